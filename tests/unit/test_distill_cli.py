"""`llmshrink distill`: bad input is one line and exit code 2, and command, function and recipe have one default."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
import typer
from helpers import make_model

import llmshrink
from llmshrink.api.distillation import RECIPE, DistillSettings, RunSettings
from llmshrink.cli import run
from llmshrink.cli.distill import distill as command
from llmshrink.distillation.job import Options
from llmshrink.recipe.steps import Distill

SHORT = (
    "--steps", "4", "--batch-size", "4", "--seq-len", "32", "--lr", "0.01", "--warmup", "1", "--eval-steps", "2",
    "--dtype", "float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def teacher(model_of: Callable[..., Path]) -> Path:
    return model_of("llama")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "student", seed=3)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of fewer positions than its teacher."""
    return make_model(tmp_path_factory.mktemp("models") / "short", max_position_embeddings=24)


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    capsys.readouterr()
    code = run(["distill", *map(str, words)])
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("llmshrink: ") or "error" in line.lower()]
    assert (code, out, len(lines)) == (2, "", 1), err
    return lines[0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--alpha", "-0.1"), "--alpha -0.1: must be from 0"),
        (("--alpha", "1.5"), "--alpha 1.5: must be from 0"),
        (("--alpha", "nan"), "--alpha nan"),
        (("--temperature", "0"), "--temperature 0.0: must be above 0"),
        (("--temperature", "-1"), "--temperature -1.0: must be above 0"),
        (("--seq-len", "129"), "--seq-len 129: teacher and student allow 128 positions"),
        (("--hidden-weight", "-1"), "--hidden-weight -1.0: must be 0 (none) or a number above it"),
        (("--hidden-weight", "inf"), "--hidden-weight inf"),
        (("--hidden-weight", "1", "--teacher-cache", "cache"), "--hidden-weight 1.0: a --teacher-cache has no hidden"),
        (("--mask-prompts",), "--mask-prompts: data story.txt has no turns"),
        (("--teacher-quant", "int3"), "--teacher-quant"),
        (("--seed", "4294967296"), "--seed 4294967296: must be at most 4294967295"),
        (("--eval-steps", "0"), "--eval-steps 0: must be at least 1"),
        (("--beta", "0.3"), "--beta 0.3: is of --divergence jsd; give that, or leave it out"),
        (("--teacher-cache", __file__), "test_distill_cli.py is a file; name a folder"),
        (("--teacher-cache", f"{__file__}/cache"), "test_distill_cli.py is a file; name a folder"),
        (("--optim", "adamw_torch_xla"), "--optim adamw_torch_xla: doesn't run here ("),
    ],
)
def test_a_bad_option_is_one_line_and_leaves_nothing(
    words: Sequence[str], says: str, teacher: Path, student: Path, story: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert says in refused(capsys, teacher, student, "-o", "out", "--data", story, *SHORT, *words)
    assert not list(tmp_path.iterdir())


def test_the_page_explains_every_option_and_counts_as_the_cache_does() -> None:
    from llmshrink.distillation.cache import LIKELIEST, bytes_per_token

    page = (Path(__file__).parents[2] / "docs" / "distillation.md").read_text()
    named = [name.replace("_", "-") for name in inspect.signature(command).parameters]
    assert [name for name in named if f"`--{name}" not in page and name not in ("teacher", "student")] == []
    for likeliest in (LIKELIEST, 256, 1024):
        bytes_ = [f"{bytes_per_token(likeliest, vocabulary):,}" for vocabulary in (1 << 16, (1 << 16) + 1)]
        assert f"| {likeliest} | {bytes_[0]} | {bytes_[1]} |" in page


def test_sharded_parameters_are_refused(
    teacher: Path, student: Path, story: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    said = refused(capsys, teacher, student, "-o", tmp_path / "out", "--data", story, *SHORT)
    assert "distill can't shard parameters; launch without --use_fsdp" in said


def test_what_does_not_fit_together_is_one_line(
    teacher: Path, student: Path, short: Path, story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmshrink.demo.tokenizer import build

    vocabulary = make_model(tmp_path / "vocabulary", vocab_size=999)
    tokens = make_model(tmp_path / "tokens")
    other = build(128)
    other.add_tokens(["entirely"])
    other.save_pretrained(tokens)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "short.txt").write_text("a few words")
    for who, data, says in (
        (vocabulary, story, "have other tokenizers"),
        (tokens, story, "have other tokenizers"),
        (short, story, "--seq-len 32: teacher and student allow 24 positions; give at most that"),
        (student, tmp_path / "empty.txt", "data empty.txt is empty or white space"),
        (student, tmp_path / "empty.jsonl", "data empty.jsonl is empty"),
        (student, tmp_path / "short.txt", "are needed; give more text, or --seq-len "),
        (student, tmp_path / "missing.txt", "missing.txt: no such file; give --data FILE.txt, .jsonl or .parquet"),
    ):
        said = refused(capsys, teacher, who, "-o", tmp_path / "out", "--data", data, *SHORT)
        assert says in said and "calibration" not in said and "--samples" not in said
    assert not list(tmp_path.glob("out*"))


def test_a_loss_that_is_no_number_names_its_windows_and_keeps_the_last_checkpoint(
    teacher: Path, student: Path, story: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from llmshrink.distillation import state
    from llmshrink.distillation.trainer import Distiller

    losses, calls = Distiller.losses, []

    def spoiled(self: Distiller, *arguments: Any) -> Any:
        calls.append(1)
        found, count = losses(self, *arguments)
        bad = math.nan if len(calls) == 3 else 1.0
        return type(found)(found.total * bad, found.entropy, found.divergence), count

    monkeypatch.setattr(Distiller, "losses", spoiled)
    words = (teacher, student, "-o", tmp_path / "out", "--data", story, *SHORT, "--hidden-weight", "0.5")
    said = refused(capsys, *words)
    assert "step 3: the loss of windows [" in said
    assert "is nan (checkpoint-2 is kept, from which this command goes on); look at the text there, or start" in said
    assert not (tmp_path / "out").exists()
    last = tmp_path / "out.partial" / "training" / "checkpoint-2"
    assert len(json.loads((last / "trainer_state.json").read_text())["log_history"]) == 3
    saved = state.read(last, state.MODEL)
    assert all(bool(torch.isfinite(each).all()) for each in saved.values()) and "match.projection" in saved
    monkeypatch.undo()
    assert run(["distill", *map(str, words)]) == 0
    assert "resumed     at step 2 of 4" in capsys.readouterr().err
    # Before the first evaluation there is no checkpoint; with another rate the run starts anew, where that is asked.
    calls[:] = [1, 1]
    monkeypatch.setattr(Distiller, "losses", spoiled)
    words = (*words[:3], tmp_path / "other", *words[4:])
    assert "is nan (no checkpoint is before it); look" in refused(capsys, *words)
    monkeypatch.undo()
    slower = (*words, "--lr", "0.001")
    assert "start anew with --overwrite" in refused(capsys, *slower)
    assert run(["distill", *map(str, slower), "--overwrite"]) == 0


def test_the_command_the_function_and_the_recipe_have_one_default() -> None:
    said = {name: field.default for name, field in Distill.model_fields.items()}
    options = {field.name: field.default for field in fields(Options)}
    parameters = inspect.signature(command).parameters
    helps = {
        name: hint.__metadata__[0].help or ""
        for name, hint in get_type_hints(command, include_extras=True).items()
        if isinstance(getattr(hint, "__metadata__", [None])[0], typer.models.OptionInfo)
    }
    assert said == {name: options[name] for name in said}
    assert llmshrink.recipes()[RECIPE].distill == Distill()
    assert said.keys() == get_type_hints(DistillSettings).keys()
    for name, default in said.items():
        assert parameters[name].default is None, name  # what the recipe says
        if default not in (None, 0, 0.0):
            said_so = f"{default:g}" if isinstance(default, float) else str(default)
            assert f"({said_so})" in helps[name], name
        elif default == 0.0 and name in ("alpha", "hidden_weight"):
            assert "(0)" in helps[name], name
    own = get_type_hints(RunSettings).keys() - said.keys()
    assert own <= parameters.keys()
    for name in own:
        assert parameters[name].default == options[name], name
