"""What a training leaves to go on from: no pickle is written or read, and what comes back is what was kept."""

from __future__ import annotations

import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_model
from hypothesis import given, settings
from hypothesis import strategies as st

import llmshrink
from llmshrink.distillation import state
from llmshrink.distillation.asked import check_optimizer
from llmshrink.distillation.train import last_whole
from llmshrink.errors import CheckpointError, LlmshrinkError, OutputError
from llmshrink.run.progress import Silent

SHORT: dict[str, Any] = {
    "steps": 4, "batch_size": 4, "seq_len": 32, "lr": 1e-2, "warmup": 1, "eval_steps": 2, "dtype": "float32",
}  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters(exclude_categories=["Cs"])),
    st.builds(
        lambda dtype, shape: (torch.arange(int(np.prod(shape))).reshape(shape) % 7).to(dtype),
        st.sampled_from(DTYPES),
        st.lists(st.integers(0, 3), max_size=3),
    ),
)
TREES = st.recursive(
    LEAVES,
    lambda each: st.one_of(
        st.lists(each, max_size=4),
        st.lists(each, max_size=4).map(tuple),
        st.dictionaries(st.one_of(st.integers(), st.text(st.characters(exclude_categories=["Cs"]))), each, max_size=4),
    ),
    max_leaves=12,
)


def same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, float):
        return one.hex() == other.hex()
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(TREES)
def test_a_state_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
    folder = tmp_path_factory.mktemp("state")
    state.write(folder, "any", tree)
    assert same(state.read(folder, "any"), tree)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize(
    "leaf", [{1, 2}, b"bytes", torch.nn.Linear(1, 1), torch.ones(1).to_sparse(), 1j, random.Random()]
)
def test_what_is_no_plain_value_is_not_kept(leaf: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        state.write(tmp_path, "any", {"leaf": [leaf]})
    assert not state.is_there(tmp_path, "any")


def test_an_optimizer_whose_memory_cannot_be_kept_is_refused_before_the_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Odd(torch.optim.SGD):
        def state_dict(self) -> dict[str, Any]:
            return {"odd": {1, 2}}

    monkeypatch.setattr(torch.optim, "SGD", Odd)
    with pytest.raises(LlmshrinkError, match=r"^--optim sgd: what it remembers can't be kept .*; take adamw_torch$"):
        check_optimizer("sgd", torch.device("cpu"))


def test_random_numbers_go_on_where_they_stood(tmp_path: Path) -> None:
    state.write(tmp_path, "random", state.random_state())
    drawn = [random.random(), float(np.random.rand()), float(np.random.randn()), float(torch.rand(()))]
    state.set_random_state(state.read(tmp_path, "random"))
    assert [random.random(), float(np.random.rand()), float(np.random.randn()), float(torch.rand(()))] == drawn


@pytest.mark.parametrize("file", ["any.json", "any.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "pickle", "other number"])
def test_a_damaged_state_is_refused_with_a_way_out(file: str, damage: str, tmp_path: Path) -> None:
    state.write(tmp_path, "any", {"weights": torch.ones(8), "step": 3})
    path = tmp_path / file
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        harm = {
            "other number": data[:-2] + bytes([data[-2] ^ 1]) + data[-1:]
            if file == "any.safetensors"
            else data.replace(b"3", b"4"),
            "cut": data[:-9],
            "flip": data[:40] + bytes([data[40] ^ 1]) + data[41:],
            "pickle": pickle.dumps({1: 2}),
        }
        path.write_bytes(harm[damage])
    with pytest.raises(CheckpointError, match=r"any.json: isn't what the training wrote there: remove .*, and the run"):
        state.read(tmp_path, "any")


class _Harm:
    def __reduce__(self) -> Any:
        return os.mkdir, ("harmed",)


@pytest.fixture(scope="module")
def stopped(story: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Callable[..., Any]]:
    """A place -> the same command again: what was stopped after its first checkpoint goes on into place/out."""
    folder = make_model(tmp_path_factory.mktemp("models") / "teacher", seed=3)
    student = make_model(tmp_path_factory.mktemp("models") / "student", seed=4)

    class Stop(Silent):
        def note(self, line: str) -> None:
            if line.startswith("step 4/4"):
                raise KeyboardInterrupt

    def stop(place: Path) -> Callable[..., Any]:
        def run(**more: Any) -> Any:
            return llmshrink.distill(folder, student, output=place / "out", data=story, **SHORT, **more)

        with pytest.raises(KeyboardInterrupt):
            run(progress=Stop())
        return run

    return stop


def test_a_checkpoint_holds_no_pickle_and_none_is_read(
    stopped: Callable[[Path], Callable[..., Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stopped(tmp_path)
    training = tmp_path / "out.partial" / "training"
    checkpoint = last_whole(training, 1)
    assert checkpoint is not None and {path.suffix for path in checkpoint.iterdir()} == {".json", ".safetensors"}
    # What transformers would read, put there by whoever could.
    names = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "training_args.bin", "pytorch_model.bin")
    for name in names:
        (checkpoint / name).write_bytes(pickle.dumps(_Harm()))
    # The best checkpoint is looked for by its name: where it was written the workspace may have been elsewhere.
    said = json.loads((checkpoint / "trainer_state.json").read_text())
    said["best_model_checkpoint"] = f"/nowhere/{Path(said['best_model_checkpoint']).name}"
    (checkpoint / "trainer_state.json").write_text(json.dumps(said))
    state.seal(checkpoint)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    assert run().ok
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    left = {path.name for path in (tmp_path / "out").rglob("*")}
    assert not left & {*names, "optimizer.safetensors", "trainer_state.json"}


def test_a_checkpoint_that_is_a_link_or_another_s_is_not_gone_on_from(
    stopped: Callable[[Path], Callable[..., Any]], tmp_path: Path
) -> None:
    run = stopped(tmp_path)
    checkpoint = last_whole(tmp_path / "out.partial" / "training", 1)
    assert checkpoint is not None
    for path in (checkpoint, checkpoint / "optimizer.safetensors"):
        elsewhere = tmp_path / f"mine-{path.name}"
        path.rename(elsewhere)
        path.symlink_to(elsewhere)
        with pytest.raises(OutputError, match=f"^{path} is a link to .*remove the link"):
            run()
        path.unlink()
        elsewhere.rename(path)
    if os.getuid() == 0:
        os.chown(checkpoint / "random-0.json", 12345, -1)
        with pytest.raises(OutputError, match=r"random-0.json belongs to user 12345"):
            run()
        os.chown(checkpoint / "random-0.json", 0, -1)
    assert run().ok


def test_an_account_of_the_training_that_was_changed_is_not_gone_on_from(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-2"
    state.write(folder, "model", {})
    account = folder / "trainer_state.json"
    account.write_text('{"global_step": 2, "log_history": [{"eval_kl": 1}]}')
    assert not state.sealed(folder)
    state.seal(folder)
    assert state.sealed(folder)
    account.write_text(account.read_text().replace("eval_kl", "eval_km"))
    assert not state.sealed(folder)


def test_a_checkpoint_that_is_not_whole_is_not_the_last(tmp_path: Path) -> None:
    for step in (2, 4):
        for name in ("model", "optimizer", "schedule", "random-0", "random-1"):
            state.write(tmp_path / f"checkpoint-{step}", name, {})
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        state.seal(tmp_path / f"checkpoint-{step}")
    assert last_whole(tmp_path, 2) == tmp_path / "checkpoint-4"
    (tmp_path / "checkpoint-4" / "random-1.json").unlink()
    assert last_whole(tmp_path, 2) == tmp_path / "checkpoint-2"
    assert last_whole(tmp_path, 3) is None
    for text in ("", "[]", "{}", '{"global_step": "x"}', '{"global_step": 8}', "[" * 100_000):
        (tmp_path / "checkpoint-2" / "trainer_state.json").write_text(text)
        assert last_whole(tmp_path, 2) is None
