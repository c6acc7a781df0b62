"""Hidden states in the loss: against plain autograd in float64, and through whole runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_model
from torch import Tensor

import llmshrink
from llmshrink.distillation.match import HiddenMatch, matched_blocks
from llmshrink.distillation.objective import IGNORED, Objective
from llmshrink.distillation.teacher import LiveTeacher, SplitModel
from llmshrink.distillation.trainer import Distiller

STUDENTS: list[dict[str, Any]] = [{}, {"hidden_size": 32, "head_dim": 8}, {"num_hidden_layers": 1}]
GOAL, WEIGHT = Objective(alpha=0.3), 0.7


def opened(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def batch() -> dict[str, Tensor]:
    """Two windows, one of them padded, both with prompts that don't count."""
    ids = torch.randint(2, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.clone()
    labels[0, :4] = labels[1, :2] = IGNORED
    return {
        "input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, IGNORED),
        "window": torch.arange(2),
    }  # fmt: skip


def plainly(student: Any, teacher: Any, pairs: list[int], projection: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """The definition: whole logits, torch's own losses, states as hooks find them, a position at a time."""
    states: list[list[Tensor]] = [[], []]
    for model, found in zip((student, teacher), states, strict=True):
        for block in model.model.layers:
            block.register_forward_hook(lambda _, __, out, found=found: found.append(out))
    ours, theirs = (model(inputs["input_ids"], attention_mask=inputs["attention_mask"]) for model in (student, teacher))
    total = torch.zeros((), dtype=torch.float64)
    places = [(row, at) for row in range(2) for at in range(8) if inputs["labels"][row, at + 1] != IGNORED]
    for place in places:
        label = inputs["labels"][place[0], place[1] + 1]
        p, q = theirs.logits[place].detach().softmax(-1), ours.logits[place].softmax(-1)
        total = total - 0.3 * q[label].log() + 0.7 * (p * (p / q).log()).sum()
        for number, pair in enumerate(pairs):
            target = states[1][pair][place].detach()
            error = projection @ states[0][number][place] - target
            total = total + WEIGHT / len(pairs) * error.square().sum() / target.square().sum()
    return total / len(places)


@pytest.mark.parametrize("changes", STUDENTS)
def test_loss_and_gradients_are_autograds(
    changes: dict[str, Any], model_of: Callable[..., Path], tmp_path: Path
) -> None:
    student, teacher = opened(make_model(tmp_path / "student", seed=3, **changes)), opened(model_of("llama"))
    teacher.requires_grad_(False)
    for parameter in (student.get_input_embeddings().weight, student.lm_head.weight):
        parameter.requires_grad_(False)
    pairs = matched_blocks(len(student.model.layers), 2, None)
    match = HiddenMatch(student, teacher, pairs, WEIGHT, seed=0).double()
    with torch.no_grad():
        match.projection += 0.1 * torch.randn(match.projection.shape, generator=torch.Generator().manual_seed(1))
    says = LiveTeacher(SplitModel(teacher, "teacher"), torch.float64)
    module = Distiller(SplitModel(student, "student"), says, GOAL, torch.float64, match)
    trained = {name: each for name, each in module.named_parameters() if each.requires_grad}
    assert "match.projection" in trained and trained.keys() == module.state_dict().keys()
    inputs = batch()
    loss = module(**inputs)["loss"]
    found = torch.autograd.grad(loss, list(trained.values()))
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = torch.autograd.grad(module.train()(**inputs)["loss"], list(trained.values()))
    student.gradient_checkpointing_disable()
    expected = plainly(student, teacher, pairs, match.projection, inputs)
    wanted = torch.autograd.grad(expected, list(trained.values()))
    torch.testing.assert_close(loss, expected, atol=1e-8, rtol=1e-8)
    for ours, recomputed, autograds in zip(found, again, wanted, strict=True):
        torch.testing.assert_close(ours, autograds, atol=1e-8, rtol=1e-8)
        torch.testing.assert_close(recomputed, autograds, atol=1e-8, rtol=1e-8)


def test_equal_widths_begin_at_the_identity_others_keep_lengths(tmp_path: Path, model_of: Callable[..., Path]) -> None:
    teacher = opened(model_of("llama"))
    assert torch.equal(HiddenMatch(teacher, teacher, [0, 1], 1.0, seed=0).projection, torch.eye(64))
    narrow = opened(make_model(tmp_path / "narrow", hidden_size=32, head_dim=8))
    first, other = (HiddenMatch(narrow, teacher, [0, 1], 1.0, seed=seed).projection for seed in (0, 1))
    assert first.shape == (64, 32) and not torch.equal(first, other)
    torch.testing.assert_close(first.T @ first, torch.eye(32), atol=1e-5, rtol=0)


def test_blocks_are_matched_with_what_they_were_else_evenly() -> None:
    record = {"kind": "depth", "blocks": [6, 4], "dropped": [2, 3]}
    assert matched_blocks(4, 6, record) == [0, 1, 4, 5]
    assert matched_blocks(3, 6, record) == matched_blocks(3, 6, None) == [1, 3, 5]
    assert matched_blocks(4, 6, {"kind": "width"}) == [1, 2, 4, 5]
    assert matched_blocks(6, 6, None) == list(range(6))
    assert matched_blocks(3, 2, None) == [0, 1, 1]


def test_a_shallower_student_is_held_to_the_blocks_it_kept(
    model_of: Callable[..., Path], story: Path, tmp_path: Path
) -> None:
    teacher = model_of("llama", num_hidden_layers=3)
    settings: dict[str, Any] = {
        "steps": 4, "batch_size": 4, "seq_len": 32, "lr": 1e-2, "warmup": 1, "eval_steps": 2, "dtype": "float32",
    }  # fmt: skip
    report = llmshrink.distill(
        teacher, student_from="depth=2", output=tmp_path / "out", data=story, hidden_weight=0.5, **settings
    )
    assert report is not None and report.ok
    record = json.loads((tmp_path / "out" / "llmshrink.json").read_text())
    dropped = record["structure"]["dropped"]
    assert record["distill"]["matched_blocks"] == [number for number in range(3) if number not in dropped]
    assert record["distill"]["hidden_weight"] == 0.5
    assert "0.5 x the relative squared error of the hidden states" in (tmp_path / "out" / "README.md").read_text()
    weights = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert not any("projection" in name for name in weights)
