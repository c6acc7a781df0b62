"""What comes next is read while a device computes, and nothing else changes by it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import contents
from torch import Tensor

import llmshrink
from llmshrink.checkpoint.index import CheckpointIndex
from llmshrink.checkpoint.unchanged import Watched
from llmshrink.errors import CheckpointError
from llmshrink.model import skeleton
from llmshrink.model.ahead import Ahead
from llmshrink.model.chain import Chain

CPU = torch.device("cpu")


def value(key: str) -> Tensor:
    return torch.full((3, 2), float(ord(key)), dtype=torch.bfloat16)


def test_a_tensor_is_what_reading_it_gives_and_is_given_once() -> None:
    ahead = Ahead(CPU)
    ahead.expect(["a", "b", "c"], value)
    for key in "cab":
        taken = ahead.take(key)
        assert taken is not None
        stored, there = taken
        assert torch.equal(stored, value(key)) and torch.equal(there, value(key)) and there.device == CPU
        assert ahead.take(key) is None
    assert ahead.take("d") is None


def test_reading_goes_on_beside_and_taking_waits_for_it() -> None:
    gate, reading = threading.Event(), threading.Event()

    def read(key: str) -> Tensor:
        reading.set()
        assert gate.wait(30)
        return value(key)

    ahead = Ahead(CPU)
    ahead.expect(["a"], read)
    assert reading.wait(30), "the reading didn't begin by itself"
    threading.Timer(0.05, gate.set).start()
    taken = ahead.take("a")
    assert gate.is_set() and taken is not None and torch.equal(taken[0], value("a"))


def test_a_fault_belongs_to_the_tensor_that_has_it() -> None:
    def read(key: str) -> Tensor:
        if key == "b":
            raise CheckpointError("b can't be read")
        return value(key)

    ahead = Ahead(CPU)
    ahead.expect(["a", "b", "c"], read)
    assert ahead.take("a") is not None
    with pytest.raises(CheckpointError, match="b can't be read"):
        ahead.take("b")
    assert ahead.take("c") is not None


def test_what_was_expected_in_vain_is_let_go() -> None:
    gate, read = threading.Event(), []

    def slowly(key: str) -> Tensor:
        read.append(key)
        assert gate.wait(30)
        return value(key)

    ahead = Ahead(CPU)
    ahead.expect(["a", "b"], slowly)
    ahead.expect(["c"], value)
    gate.set()
    assert ahead.take("c") is not None
    assert ahead.take("a") is None and ahead.take("b") is None
    for thread in threading.enumerate():
        if thread.name == "llmshrink-ahead":
            thread.join(30)
    assert "b" not in read


def test_a_run_that_reads_ahead_writes_the_same_bytes(
    model_of: Callable[..., Path], story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU here, where a run does without; on a CUDA device it is the usual way."""
    source, small = model_of("llama"), {"samples": 6, "seq_len": 32, "group_size": 32, "calibration": story}
    llmshrink.quantize(source, output=tmp_path / "plain", **small)
    reads: list[Watched] = []
    expected: list[str] = []

    class Noted(Ahead):
        def take(self, key: str) -> tuple[Tensor, Tensor] | None:
            taken = super().take(key)
            expected.extend([key] * (taken is not None))
            return taken

    open_index, load = Watched.open, Chain.load_block

    def opened(*args: object, **named: object) -> Watched:
        reads.append(open_index(*args, **named))  # type: ignore[arg-type]
        return reads[-1]

    def loading(chain: Chain, number: int, **named: object) -> dict[str, Tensor]:
        if chain.skeleton.ahead is None:
            chain.skeleton.ahead = Noted(CPU)
        return load(chain, number, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Watched, "open", opened)
    monkeypatch.setattr(Chain, "load_block", loading)
    llmshrink.quantize(source, output=tmp_path / "ahead", **small)
    assert contents(tmp_path / "plain") == contents(tmp_path / "ahead")
    assert any(".layers.1." in key for key in expected) and not any(".layers.0." in key for key in expected)
    assert max(reads[0].reads.values()) <= 2


def test_a_cuda_device_gets_the_same_numbers(model_of: Callable[..., Path]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("copies beside the work need a CUDA device")
    from transformers import AutoConfig

    source = model_of("llama")
    with CheckpointIndex.open(source) as index:
        built = skeleton.Skeleton(
            AutoConfig.from_pretrained(source), index, device=torch.device("cuda"), dtype=torch.bfloat16
        )
        chain = Chain(built)
        chain.load_block(0)
        stored = chain.load_block(1)
        for key, tensor in stored.items():
            assert tensor.is_pinned() and torch.equal(tensor, index.read(key)), key
        for name, parameter in chain.blocks[1].named_parameters():
            key = built.key_of[f"{chain.name(1)}.{name}"]
            assert torch.equal(parameter.cpu(), index.read(key).to(torch.bfloat16)), key
