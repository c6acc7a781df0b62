"""Text that the teacher writes: as much as was asked for, the same whatever was there before, and never damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llmshrink_eval.beginning import Beginning

from llmshrink.calibration.reading import Reading
from llmshrink.calibration.tokens import TokenWindows
from llmshrink.distillation.generated import BATCH, generate_windows
from llmshrink.run.progress import Silent

LENGTH = 8


class Listen(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, line: str) -> None:
        self.said.append(line)


@pytest.fixture(scope="module")
def model(model_of: Callable[..., Path]) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_of("llama"), dtype=torch.float32)


@pytest.fixture(scope="module")
def real() -> TokenWindows:
    ids = torch.randint(2, 500, (10, LENGTH), generator=torch.Generator().manual_seed(0))
    return TokenWindows(ids, torch.ones_like(ids, dtype=torch.bool), "text", "fingerprint")


def write(model: Any, real: TokenWindows, folder: Path, windows: int, **more: Any) -> tuple[TokenWindows, list[str]]:
    listen = Listen()
    settings = {"teacher": "one", "seed": 0, "progress": listen, **more}
    return generate_windows(lambda: model, real, windows * LENGTH, folder=folder, **settings), listen.said


def test_a_smaller_text_is_the_beginning_of_a_larger_one(model: Any, real: TokenWindows, tmp_path: Path) -> None:
    few, _ = write(model, real, tmp_path / "a", 3)
    more, said = write(model, real, tmp_path / "a", BATCH + 6)
    assert len(said) == 1  # the second batch alone
    at_once, _ = write(model, real, tmp_path / "b", BATCH + 6)
    again, said = write(None, real, tmp_path / "a", 3)  # everything is there: no model is needed
    assert (len(few.input_ids), len(more.input_ids), said) == (3, BATCH + 6, [])
    assert torch.equal(more.input_ids, at_once.input_ids) and more.fingerprint == at_once.fingerprint
    assert torch.equal(more.input_ids[:3], few.input_ids) and again.fingerprint == few.fingerprint


def test_another_teacher_writes_its_own(model: Any, real: TokenWindows, tmp_path: Path) -> None:
    _, first = write(model, real, tmp_path, 2)
    _, second = write(model, real, tmp_path, 2, teacher="one nf4")
    assert (len(first), len(second), len(list(tmp_path.iterdir()))) == (1, 1, 2)


@pytest.mark.parametrize("damage", ["byte", "cut", "unfinished"])
def test_a_damaged_file_is_written_again(damage: str, model: Any, real: TokenWindows, tmp_path: Path) -> None:
    whole, _ = write(model, real, tmp_path, 2)
    path = next(tmp_path.rglob("*.safetensors"))
    held = path.read_bytes()
    if damage == "unfinished":
        path.with_suffix(".sha256").unlink()
    else:
        path.write_bytes(held[:-1] + bytes([held[-1] ^ 1]) if damage == "byte" else held[:-9])
    again, said = write(model, real, tmp_path, 2)
    assert torch.equal(again.input_ids, whole.input_ids) and path.read_bytes() == held
    assert [line for line in said if "isn't what was written there" in line] == said[: damage != "unfinished"]
    assert write(model, real, tmp_path, 2)[1] == []


def test_what_the_teacher_writes_begins_with_bos_where_the_text_does(model: Any, tmp_path: Path) -> None:
    ids = torch.randint(2, 500, (10, LENGTH), generator=torch.Generator().manual_seed(0))
    marks = (501, 502)
    ids[:, :2] = torch.tensor(marks)
    reading = Reading(Beginning(marks, put=True))
    text = TokenWindows(ids, torch.ones_like(ids, dtype=torch.bool), "text", "fingerprint", reading=reading)
    found, _ = write(model, text, tmp_path, 12)
    assert found.input_ids.shape == (12, LENGTH) and (found.input_ids[:, :2] == torch.tensor(marks)).all()
    assert torch.equal(found.input_ids[:10, 2:5], ids[:, 2:5])
    assert found.reading.bos


def test_prompts_are_never_padding(model: Any, tmp_path: Path) -> None:
    ids = torch.randint(2, 500, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 2:] = False  # a conversation of two tokens, shorter than a prompt
    found, _ = write(model, TokenWindows(ids, mask, "text", "fingerprint"), tmp_path, 4)
    assert torch.equal(found.input_ids[:2, :4], ids[[0, 2], :4])
