"""A recipe is read from a name, a file, flags and --set, or all that is wrong with it is said at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

import llmshrink
from llmshrink.cli import run
from llmshrink.errors import RecipeError
from llmshrink.recipe import read
from llmshrink.recipe.fields import BITSANDBYTES, BUILT_IN, PRUNERS, methods, pruners
from llmshrink.recipe.read import load_recipe, made_for, recipe_hash, shipped, shipped_names, to_yaml, unreadable
from llmshrink.recipe.schema import Recipe
from llmshrink.recipe.steps import Prune, Quantize, QuantizePatch

REPOSITORY = Path(__file__).parents[2]
RECIPES = sorted((REPOSITORY / "recipes").rglob("*.yaml"))

GOOD = """
name: mine
steps:
  - quantize: {method: gptq, bits: 4, group_size: 64}
overrides:
  - {match: "*.mlp.down_proj", quantize: {bits: 8}}
  - {match: o_proj, ignore: true}
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> str:
        (tmp_path / "recipe.yaml").write_text(text)
        return "recipe.yaml"

    return write


def faults(name: str, **changes: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, **changes)
    assert all("\n" not in fault for fault in caught.value.faults)
    return caught.value.faults


# What ships.


def test_recipes_ship() -> None:
    names = {"gptq-w2a16", "gptq-w3a16", "gptq-w4a16", "gptq-w8a16", "rtn-w4a16"}
    names |= {f"{method}-2of4" for method in ("magnitude", "wanda", "sparsegpt", "alps")}
    names |= {"wanda-50", "sparsegpt-50", "sparsegpt-2of4-gptq-w4a16", "alps-2of4-gptq-w4a16"}
    names |= {"depth-prune", "width-prune"}
    names |= {"distill-recover", "sparsegpt-2of4-distill", "w2-distill", "student-half"}
    assert names <= set(shipped_names()) == set(shipped()) == {file.stem for file in RECIPES}


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_shipped_recipe_is_valid_self_contained_and_named_by_its_file(file: Path) -> None:
    recipe = load_recipe(file.stem)
    assert recipe.name == file.stem and recipe.summary
    written = yaml.safe_load(file.read_text())
    assert written.keys() == Recipe.model_fields.keys()
    for step in written["steps"]:
        ((kind, fields),) = step.items()
        if kind != "prune":
            chosen = {"train", "lr", "mask_prompts"} - fields.keys()
            left_out = {"width": {"kv_groups"}, "distill": chosen}.get(kind, set())
            assert fields.keys() == type(getattr(recipe, kind)).model_fields.keys() - left_out
        else:
            other = {"ratio", "ratios"} if "pattern" in fields else {"pattern"}
            assert fields.keys() == Prune.model_fields.keys() - other
    if recipe.distill is not None:
        assert "distill" in file.stem or "taught" in recipe.summary
    elif recipe.quantize is not None and recipe.quantize.method in BITSANDBYTES:
        assert file.stem == recipe.quantize.method and f"{recipe.quantize.bits}-bit" in recipe.summary
    elif recipe.quantize is not None and recipe.quantize.activations != "none":
        kind = recipe.quantize.activations
        method = recipe.quantize.method if recipe.quantize.smooth == "none" else "smoothquant"
        assert file.stem == {"int8": f"{method}-w8a8", "fp8": "fp8-dynamic"}[kind]
        assert {"int8": "8-bit integers", "fp8": "FP8"}[kind] in recipe.summary
    elif recipe.quantize is not None:
        assert f"w{recipe.quantize.bits}a16" in file.stem and str(recipe.quantize.bits) in recipe.summary
        assert f"{'tuned' if recipe.tune is not None else recipe.quantize.method}-w" in file.stem
        assert str(recipe.quantize.group_size) in recipe.summary
    if recipe.prune is not None:
        assert recipe.prune.method == file.stem.partition("-")[0] and recipe.prune.method in recipe.summary
        assert file.stem.split("-")[1] == (recipe.prune.pattern or "50").replace(":", "of")


def test_reading_recipes_leaves_the_verb_of_that_name_alone() -> None:
    shipped()
    assert callable(llmshrink.recipes)


def test_the_methods_known_without_a_look_into_the_registry_are_in_it() -> None:
    assert set(BUILT_IN) <= set(methods())
    assert set(PRUNERS) <= set(pruners())


# What a file may say.


def test_a_file_is_read_with_every_default_resolved(write: Any) -> None:
    recipe = load_recipe(write(GOOD))
    assert recipe.quantize == Quantize(bits=4, group_size=64)
    assert recipe.ignore == ("lm_head",)
    assert recipe.overrides[0].quantize == QuantizePatch(bits=8)
    assert recipe.overrides[1].ignore
    with pytest.raises(ValidationError):
        recipe.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("name", [*(file.stem for file in RECIPES), "recipe.yaml"])
def test_a_recipe_written_as_yaml_is_read_back_equal(write: Any, name: str) -> None:
    write(GOOD)
    recipe = load_recipe(name)
    assert load_recipe(write(to_yaml(recipe))) == recipe


def test_the_hash_is_of_the_meaning_and_not_of_the_writing(write: Any) -> None:
    first = recipe_hash(load_recipe(write(GOOD)))
    spelled = GOOD.replace("{method: gptq, bits: 4, group_size: 64}", "{group_size: 64, bits: 4, symmetric: true}")
    assert recipe_hash(load_recipe(write(spelled))) == first
    assert recipe_hash(load_recipe(write(GOOD), sets=["steps.0.quantize.damp=0.02"])) != first


def test_all_faults_of_a_file_are_said_at_once_with_the_nearest_word(write: Any) -> None:
    text = """
name: x
stepz: 3
steps:
  - quantize: {method: gtpq, bits: 5, group_sise: 64, scale_search: mes, symmetric: "yes", corrected: 1e-2, damp: 3}
overrides:
  - {match: "*", quantize: {bits: 7, groupsize: 3, activations: int4}}
  - {match: "*"}
  - {quantize: {group_size: 0}}
ignore: lm_head
"""
    q = "recipe.yaml: steps[0].quantize"
    assert set(faults(write(text))) == {
        "recipe.yaml: stepz: unknown key; did you mean steps?",
        f"{q}.method: gtpq: unknown method; did you mean gptq?; methods: {', '.join(methods())}",
        f"{q}.bits: 5 isn't one of 2, 3, 4, 8",
        f"{q}.group_sise: unknown key; did you mean group_size?",
        f"{q}.scale_search: 'mes' isn't one of minmax, mse, hessian, trial; did you mean mse?",
        f"{q}.symmetric: 'yes' isn't true or false",
        f"{q}.corrected: '1e-2' isn't a number; without quotes and with a decimal point, as 0.01",
        f"{q}.damp: 3: should be less than 1",
        "recipe.yaml: ignore: 'lm_head' isn't a list",
        "recipe.yaml: overrides[0].quantize.bits: 7 isn't one of 2, 3, 4, 8",
        "recipe.yaml: overrides[0].quantize.activations: 'int4' isn't one of none, int8, fp8; did you mean int8?",
        "recipe.yaml: overrides[0].quantize.groupsize: unknown key; did you mean group_size?",
        "recipe.yaml: overrides[1]: says nothing or two things; give either `quantize: {...}` (or `prune: {...}`) or "
        "`ignore: true`",
        "recipe.yaml: overrides[2].match: missing",
        "recipe.yaml: overrides[2].quantize.group_size: 0 isn't -1 (one group a row) or a positive number of inputs",
    }


def test_a_group_of_more_inputs_than_any_matrix_has_is_refused() -> None:
    step: Any = load_recipe("rtn-w4a16", flags={"group_size": 2**20}).steps[0]
    assert step.quantize.group_size == 2**20
    for size in (2**20 + 1, 10**30):
        says = f"{size} is more than 1,048,576 inputs; -1 is one group a row"
        (said,) = faults("rtn-w4a16", flags={"group_size": size})
        assert said == f"--group-size: steps[0].quantize.group_size: {says}"
        (said,) = faults("rtn-w4a16", sets=[f"steps.0.quantize.group_size={size}"])
        assert said.endswith(says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not a recipe: a mapping"),
        ("[1, 2]", "not a recipe: a mapping"),
        ("[1, 2", "line 1, column 6: expected"),
        ("name: x\nname: y", "line 2, column 1: name is given twice"),
        ("name: x\nsteps:\n  - quantize: {bits: 4, bits: 3}", "bits is given twice"),
        ("name: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("name: x", "steps: missing; for example"),
        ("name: x\nsteps: []", "steps: there are none; a recipe quantizes, prunes, or prunes and then quantizes"),
        (
            "name: x\nsteps: [{}]",
            "steps[0]: is nothing or two things; give one of quantize: {...}, prune: {...}, tune: {...}, depth: {...}",
        ),
        ("name: x\nsteps: [4]", "steps[0]: 4 isn't a mapping"),
        ("name: x\nsteps: [{quantize: {bits: '4'}}]", "bits: '4' isn't a whole number; write 4"),
        ("name: x\nsteps: [{quantize: {bits: true}}]", "bits: true isn't a whole number"),
        ("name: x\nsteps: [{quantize: {bits: 3.5}}]", "bits: 3.5 isn't a whole number"),
        ("name: x\nsteps: [{quantize: {block_size: 0}}]", "block_size: 0: should be greater than 0"),
        ("name: ''\nsteps: [{quantize: {}}]", "name: '' isn't some text"),
        ("name: x\nsteps: [{prune: {}}]", "steps[0].prune: says neither or both of pattern and ratio"),
        ('name: x\nsteps: [{prune: {pattern: "2:4", ratio: 0.5}}]', "says neither or both of pattern and ratio"),
        ("name: x\nsteps: [{prune: {pattern: 2:4}}]", "steps[0].prune.pattern: 124 isn't text: write the pattern with"),
        ('name: x\nsteps: [{prune: {pattern: "4:2"}}]', "4:2 isn't n:m with 0 < n < m"),
        ('name: x\nsteps: [{prune: {pattern: "2:4", method: alp}}]', "did you mean alps?; ways: alps, magnitude"),
        ("name: x\nsteps: [{prune: {ratio: 1.0}}]", "steps[0].prune.ratio: 1.0: "),
        ('name: x\nsteps: [{prune: {pattern: "2:4", rapair: true}}]', "unknown key; did you mean repair?"),
        ('name: x\nsteps: [{quantize: {}}, {prune: {pattern: "2:4"}}]', "steps: are quantize, prune; a recipe"),
        (
            'name: x\nsteps: [{prune: {pattern: "2:4"}}]\noverrides: [{match: a, quantize: {bits: 4}}]',
            "overrides[0] changes a quantize step, and the recipe has none",
        ),
        ("name: x\nsteps: [{quantize: {method: rtn, scale_search: trial}}]", "method rtn reads no statistics"),
        ("name: x\nsteps: [{quantize: {}}, {quantize: {}}]", "steps: are quantize, quantize; a recipe"),
        ("? [a]\n: 3", "found unhashable key"),
    ],
)
def test_a_wrong_file_is_refused(write: Any, text: str, says: str) -> None:
    found = faults(write(text))
    assert len(found) == 1 and says in found[0] and found[0].startswith("recipe.yaml: ")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gptq-w4", "unknown recipe; did you mean gptq-w4a16?; shipped: alps-2of4"),
        ("zzz", "zzz: unknown recipe; shipped:"),
        ("nothing.yaml", "nothing.yaml: no such file; shipped recipes:"),
        ("no/such", "no/such: no such file"),
        (".", "no such file"),
    ],
)
def test_an_unknown_recipe_names_those_there_are(write: Any, name: str, says: str) -> None:
    (found,) = faults(name)
    assert says in found and "gptq-w4a16" in found


def test_a_file_that_is_no_text_or_far_too_long_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "b.yaml").write_text("#" * 1_000_001)
    assert "not UTF-8 text" in faults(str(tmp_path / "a.yaml"))[0]
    assert "not a recipe" in faults(str(tmp_path / "b.yaml"))[0]


# Flags and --set.


def test_flags_change_the_step() -> None:
    flags = {"bits": 3, "group_size": 32, "symmetric": False, "method": None}
    changed = load_recipe("gptq-w4a16", flags=flags).quantize
    assert changed == load_recipe("gptq-w4a16").quantize.model_copy(
        update={"bits": 3, "group_size": 32, "symmetric": False}
    )


def test_a_changed_recipe_says_so_in_its_name() -> None:
    changed = load_recipe("gptq-w4a16", flags={"bits": 3, "symmetric": None}, sets=["steps.0.quantize.damp=0.02"])
    assert changed.name == "gptq-w4a16 with bits=3, steps.0.quantize.damp=0.02"
    assert changed.summary.endswith("; with bits=3, steps.0.quantize.damp=0.02")
    assert load_recipe("gptq-w4a16", flags={"bits": 4}) == load_recipe("gptq-w4a16")
    assert load_recipe("gptq-w4a16", sets=["name=mine"]).name == "mine"


def test_the_same_change_by_flag_or_by_set_has_the_same_hash() -> None:
    by_flag = load_recipe("gptq-w4a16", flags={"bits": 3})
    assert recipe_hash(by_flag) == recipe_hash(load_recipe("gptq-w4a16", sets=["steps.0.quantize.bits=3"]))


def test_another_method_by_flag_brings_its_own_defaults() -> None:
    changed = load_recipe("gptq-w4a16", flags={"method": "rtn"}).quantize
    assert (changed.method, changed.scale_search, changed.act_order, changed.corrected) == ("rtn", "mse", False, 0.0)
    assert load_recipe("gptq-w2a16", flags={"method": "gptq"}) == load_recipe("gptq-w2a16")


def test_a_flag_that_could_mean_two_steps_is_refused_naming_both(write: Any) -> None:
    found = faults(write("name: x\nsteps: [{quantize: {}}, {quantize: {}}]"), flags={"bits": 3})
    assert "--bits: could mean steps[0].quantize or steps[1].quantize" in found[0]
    assert "--set steps.0.quantize.bits=3" in found[0]


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        (["steps.0.quantize.bits=3"], {"bits": 3}),
        (
            ["steps[0].quantize.corrected=0.5", "steps.0.quantize.act_order=false"],
            {"corrected": 0.5, "act_order": False},
        ),
        (["steps.0.quantize.scale_search=mse", "steps.0.quantize.scale_search=minmax"], {"scale_search": "minmax"}),
    ],
)
def test_set_reaches_any_field_and_the_last_wins(sets: Sequence[str], expected: dict[str, object]) -> None:
    changed = load_recipe("gptq-w4a16", sets=sets).quantize
    assert changed == load_recipe("gptq-w4a16").quantize.model_copy(update=expected)


def test_set_reaches_lists_and_fields_that_are_not_written(write: Any) -> None:
    recipe = load_recipe(
        write(GOOD), sets=["ignore=[lm_head, '*.0.*']", "summary=mine", "overrides.0.quantize.group_size=32"]
    )
    assert recipe.ignore == ("lm_head", "*.0.*") and recipe.summary == "mine"
    assert recipe.overrides[0].quantize == QuantizePatch(bits=8, group_size=32)


def test_a_flag_and_a_set_are_named_where_their_value_is_wrong() -> None:
    found = faults("gptq-w4a16", flags={"bits": 5}, sets=["steps.0.quantize.group_sise=3", "steps.0.quantize.damp=2"])
    assert set(found) == {
        "--bits: steps[0].quantize.bits: 5 isn't one of 2, 3, 4, 8",
        "--set steps.0.quantize.group_sise=3: steps[0].quantize.group_sise: unknown key; did you mean group_size?",
        "--set steps.0.quantize.damp=2: steps[0].quantize.damp: 2: should be less than 1",
    }


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("bits", "not a path=value"),
        ("=3", "not a path=value"),
        ("steps.1.quantize.bits=3", "steps has no item 1 (it has 0 alone); add it in a recipe file"),
        ("steps.x.quantize=3", "steps has no item x"),
        ("overrides.0.match=x", "overrides has no item 0 (it has none, it is empty)"),
        ("name.x=3", "name is a value, so there is no name.x"),
        ("ignore.0.x.y=3", "ignore[0] is a value"),
        ("steps.0.quantize.damp=[", "isn't a YAML value"),
    ],
)
def test_a_set_that_leads_nowhere_is_refused(assignment: str, says: str) -> None:
    (found,) = faults("gptq-w8a16", sets=[assignment])
    assert found.startswith(f"--set {assignment}: ") and says in found


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("damp=nan", "'nan' isn't a number; write a finite one"),
        ("damp=-inf", "'-inf' isn't a number; write a finite one"),
        ("damp=1e-2", "'1e-2' isn't a number; without quotes and with a decimal point, as 0.01"),
        ("bits=nan", "'nan' isn't a whole number"),
        ("bits='4.5'", "'4.5' isn't a whole number"),
        ("bits='4'", "'4' isn't a whole number; write 4"),
    ],
)
def test_a_text_in_place_of_a_number_has_a_hint_that_helps(assignment: str, says: str) -> None:
    (found,) = faults("gptq-w4a16", sets=[f"steps.0.quantize.{assignment}"])
    assert found.rpartition("]")[2].partition(": ")[2] == says


def test_a_method_that_is_registered_is_one_that_a_recipe_may_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmshrink.methods import registry, solver

    monkeypatch.setattr(registry, "_METHODS", {**registry._METHODS, "toy": solver("rtn")})
    assert load_recipe("gptq-w4a16", flags={"method": "toy"}).quantize.method == "toy"


def test_a_shipped_recipe_that_cannot_be_read_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in RECIPES:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "newer.yaml").write_text("name: newer\nsteps:\n  - quantize: {method: of-an-extra}\n")
    monkeypatch.setattr(read, "_folder", lambda: tmp_path)
    assert set(shipped()) == {file.stem for file in RECIPES}
    assert list(unreadable()) == ["newer"] and "of-an-extra: unknown method" in unreadable()["newer"]
    assert made_for("gptq-w4a16", load_recipe("gptq-w4a16", flags={"bits": 3})) == "gptq-w3a16"
    assert run(["recipes"]) == 0
    assert "newer" in (said := capsys.readouterr().out) and "can't be read here" in said


def test_bits_that_another_recipe_was_made_for_name_it() -> None:
    assert made_for("gptq-w4a16", load_recipe("gptq-w4a16", flags={"bits": 3})) == "gptq-w3a16"
    assert made_for("gptq-w4a16", load_recipe("gptq-w4a16", flags={"group_size": 64})) is None
    assert made_for("gptq-w4a16", load_recipe("gptq-w4a16")) is None
    assert made_for("rtn-w4a16", load_recipe("rtn-w4a16", flags={"bits": 3})) is None
    assert made_for("gptq-w4a16", load_recipe("gptq-w4a16", flags={"method": "rtn"})) is None
    assert made_for("mine.yaml", load_recipe("gptq-w3a16")) is None


def test_repair_is_asked_of_every_recipe_that_has_one_and_refused_by_the_others() -> None:
    for name, recipe in shipped().items():
        base = recipe.prune or recipe.width
        if base is None:
            with pytest.raises(RecipeError, match=f"changes a prune or width step, and {name} has none"):
                load_recipe(name, flags={"repair": False})
            continue
        assert base.repair
        asked = load_recipe(name, flags={"repair": False})
        changed = asked.prune or asked.width
        assert changed == base.model_copy(update={"repair": False})
