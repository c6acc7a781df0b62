"""Recipes and `--set` that no person wrote: within limits of size, depth and values, or refused in a line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmshrink_eval.bounded import DEEPEST, Unreadable, parse_yaml

from llmshrink.cli import run
from llmshrink.errors import RecipeError
from llmshrink.recipe.read import load_recipe

BILLION = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{here}: &{here} [{','.join([f'*{before}'] * 9)}]\n" for before, here in zip("abcdefgh", "bcdefghi", strict=True)
)
PLAIN = "name: x\nsteps: [{quantize: {bits: 4}}]\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BILLION + PLAIN + "ignore: *i\n", "holds more than 20,000 values"),
        ("name: &a [*a]\n", "has a value that holds itself"),
        ("name: x\nsteps: " + "[" * 90 + "]" * 90, "isn't a mapping"),
        ("name: x\nsteps: " + "[" * 150 + "]" * 150, "nested more than 100 deep"),
        ("[" * 1200, "nested more than 100 deep"),
        ("name: 2001-13-45\n", "not YAML: month must be in 1..12"),
        ("name: 2001-01-01\n" + PLAIN[8:], "name: 2001-01-01 isn't text"),
        ("name: x\nsteps: [{quantize: {bits: " + "9" * 5000 + "}}]\n", "Exceeds the limit (4300 digits)"),
        ("name: x\nsteps: [{quantize: {bits: 0x" + "f" * 5000 + "}}]\n", "a number of more than 4300 digits"),
        ("name: x\nsteps: [{quantize: {bits: 1" + ":59" * 5000 + "}}]\n", "a number of more than 4300 digits"),
        ("name: x\nsteps: [{quantize: {bits: " + "9" * 4000 + "}}]\n", "99... isn't one of 2, 3, 4, 8"),
        ("name: !!bool maybe\n", "not YAML: 'maybe'"),
        ("name: !!timestamp soon\n", "not YAML: "),
        ("name: !!python/object/apply:os.system ['id']\n", "could not determine a constructor"),
        ("name: x\nsteps: [" + "{quantize: {bits: 4}}," * 2000 + "]\n", "at most 16 items"),
        ("# " + "x" * 100_000, "over 100,000 bytes: not a recipe"),
    ],
    ids=lambda text: text[:16],
)
def test_a_recipe_that_nobody_wrote_is_refused(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert says in caught.value.faults[0]
    assert all(fault.startswith(str(file)) and "\n" not in fault and len(fault) < 700 for fault in caught.value.faults)


def test_an_alias_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(
        "name: x\nsteps: [{quantize: {bits: 4}}]\n"
        "overrides: [{match: a, quantize: &eight {bits: 8}}, {match: b, quantize: *eight}]\n"
    )
    patches = [each.quantize for each in load_recipe(tmp_path / "own.yaml").overrides]
    assert patches[0] is not None and patches[0] == patches[1] and patches[0].bits == 8


def test_a_thousand_faults_are_shown_as_twenty(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(PLAIN + "".join(f"k{number}: 1\n" for number in range(1000)))
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "own.yaml")
    assert len(caught.value.faults) == 21 and caught.value.faults[-1].endswith("and 980 more such faults")


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("steps.0.quantize.bits=0x" + "f" * 5000, "isn't a YAML value (has a number of more than 4300 digits)"),
        ("steps.0.quantize.bits=" + "9" * 5000, "isn't a YAML value (not YAML: Exceeds the limit (4300 digits)"),
        ("steps.0.quantize.bits=" + "[" * 1200, "isn't a YAML value (is nested more than 100 deep)"),
        ("steps.0.quantize.bits=&a [*a]", "isn't a YAML value (has a value that holds itself)"),
        ("steps.0.quantize.bits=2001-13-01", "isn't a YAML value (not YAML: month must be in 1..12)"),
        ("steps." + "9" * 5000 + ".x=1", "steps has no item 999"),
        ("steps.0.quantize.damp=.nan", "damp"),
        ("name=" + BILLION, "name"),
    ],
    ids=lambda text: text[:30],
)
def test_a_set_that_nobody_wrote_is_refused(assignment: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("gptq-w4a16", sets=[assignment])
    (fault,) = caught.value.faults
    assert fault.startswith("--set ") and says in fault and "\n" not in fault and len(fault) < 700


def test_the_command_line_says_it_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["quantize", "demo", "-o", "out", "--set", "steps.0.quantize.bits=0x" + "f" * 5000]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("llmshrink: error: --set steps.0.quantize.bits=0x") and "4300 digits" in line


pieces = st.sampled_from(
    [
        *("name: x\n", "steps: ", "[", "]", "{", "}", "- ", "quantize: ", "bits: 4", ", ", ": ", "&a ", "*a", "!!int "),
        *("!!map ", "!!omap ", "!!set ", "!!binary ", "!!float ", "<<: ", "0x", "1:2", "2001-02-30", ".nan", "~", "'"),
        *('"\\ud800"', "\t", "\n  ", "---\n", "? ", "| ", "%YAML 3.0\n", "\0", "é", "\ufeff"),
    ]
)


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.lists(pieces, max_size=12).map("".join))
def test_any_text_is_yaml_or_unreadable(text: str) -> None:
    try:
        parse_yaml(text)
    except Unreadable as error:
        said = str(error)
    else:
        said = "none"
    assert said and "\n" not in said


@settings(max_examples=30, derandomize=True, deadline=None)
@given(st.integers(1, 3 * DEEPEST), st.sampled_from(["[]", "{}"]))
def test_depth_has_one_limit(levels: int, kind: str) -> None:
    text = kind[0] * levels + kind[1] * levels if kind == "[]" else "{a: " * levels + "1" + "}" * levels
    try:
        parse_yaml(text)
    except Unreadable as error:
        assert "deep" in str(error) and levels >= DEEPEST  # noqa: PT017 (the right exception is half of what is asked)
    else:
        assert levels <= DEEPEST + 1
