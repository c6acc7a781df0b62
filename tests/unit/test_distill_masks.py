"""Distillation on conversations: what is learned and judged, however a step is put together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import contents, make_model

import llmshrink
from llmshrink.demo import language
from llmshrink.distillation.objective import IGNORED
from llmshrink.distillation.trainer import Windows

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
SHORT: dict[str, Any] = {
    "steps": 4, "batch_size": 4, "seq_len": 48, "lr": 1e-2, "warmup": 1, "eval_steps": 2, "dtype": "float32",
    "hidden_weight": 0.3,
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher(model_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model(tmp_path_factory.mktemp("models") / "teacher")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model(tmp_path_factory.mktemp("models") / "student", seed=3)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations of one or two turns, in a folder that `datasets` reads."""
    folder = tmp_path_factory.mktemp("data") / "talks"
    folder.mkdir()
    lines = []
    for number in range(32):
        words = language.text(number, 300).split()
        turns = [words[at : at + 6] for at in range(0, 12 if number % 3 else 24, 6)]
        roles = ("user", "assistant") * 2
        messages = [{"role": role, "content": " ".join(turn)} for role, turn in zip(roles, turns, strict=False)]
        lines.append(json.dumps({"messages": messages}))
    (folder / "train.jsonl").write_text("\n".join(lines))
    return folder


def distilled(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "llmshrink.json").read_text())
    return found


def test_only_answers_are_learned_however_a_step_is_put_together(
    teacher: Path, student: Path, talks: Path, tmp_path: Path
) -> None:
    """A step of 4 windows, and one of 2 batches of 2, whose answers are of other lengths."""
    report = llmshrink.distill(teacher, student, output=tmp_path / "one", data=talks, **SHORT)
    assert report is not None and report.ok and report.quality.kl_mean < report.before.kl_mean
    halves = {**SHORT, "batch_size": 2, "accumulate": 2}
    llmshrink.distill(teacher, student, output=tmp_path / "two", data=talks, **halves)
    losses = [(tmp_path / name / "distillation.csv").read_text().split("\n")[2:-1] for name in ("one", "two")]
    found, other = ([float(line.split(",")[1]) for line in lines] for lines in losses)
    assert found == pytest.approx(other, rel=1e-4)
    card = (tmp_path / "one" / "README.md").read_text()
    assert "the assistant's, and not what it is asked" in card
    everything = {**SHORT, "mask_prompts": False}
    whole = llmshrink.distill(teacher, student, output=tmp_path / "whole", data=talks, **everything)
    assert whole is not None and whole.before.tokens > report.before.tokens  # it is judged by what it learns
    data = [distilled(tmp_path / name)["identity"]["data"] for name in ("one", "two", "whole")]
    assert data[0] == data[1] != data[2]


def test_the_same_records_give_the_same_bytes_from_a_file_or_a_folder(
    teacher: Path, student: Path, talks: Path, tmp_path: Path
) -> None:
    short = {**SHORT, "steps": 1, "eval_steps": 1}
    for name in ("first", "second"):
        llmshrink.distill(teacher, student, output=tmp_path / name, data=f"{talks}::train", **short)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    assert "distillation.svg" in contents(tmp_path / "first")


def test_a_label_that_does_not_count_is_ignored() -> None:
    from llmshrink.calibration.tokens import TokenWindows

    ids = torch.arange(10, 18).view(2, 4)
    mask = torch.tensor([[True] * 4, [True, True, True, False]])
    said = torch.tensor([[True, False, True, True], [False, True, False, False]])
    for spoken, expected in (
        (None, [[IGNORED, 11, 12, 13], [IGNORED, 15, 16, IGNORED]]),
        (said, [[IGNORED, IGNORED, 12, 13], [IGNORED, 15, IGNORED, IGNORED]]),
    ):
        rows = Windows(TokenWindows(ids, mask, "x", "y", spoken))
        assert [rows[number]["labels"].tolist() for number in range(2)] == expected
