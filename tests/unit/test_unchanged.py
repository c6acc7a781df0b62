"""A source that changes while a run reads it, or before the run goes on, is seen; one that only looks it isn't."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import contents, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import llmshrink
from llmshrink.checkpoint.index import CheckpointIndex
from llmshrink.checkpoint.unchanged import Changed, Watched
from llmshrink.errors import LlmshrinkError
from llmshrink.run import convert as converting
from llmshrink.run import quantize as runs
from llmshrink.run.journal import Part, Workspace
from llmshrink.run.progress import Silent

SMALL: dict[str, Any] = {"samples": 4, "seq_len": 32, "group_size": 32}
FILE = "model.safetensors"
KEYS = ("a", "b", "c")


def save(folder: Path) -> Path:
    folder.mkdir()
    tensors = {key: torch.full((64, 96), float(n), dtype=torch.float32) for n, key in enumerate(KEYS)}
    save_file({**tensors, "none": torch.empty(0, 3)}, folder / FILE)
    return folder


def flip(folder: Path, key: str, *, at: float = 0.5) -> Path:
    """Change a bit of a tensor in place, in its middle unless said otherwise; times, where they can be, stay."""
    entry = CheckpointIndex.open(folder).entry(key)
    before = entry.file.stat()
    with entry.file.open("r+b") as file:
        file.seek(entry.offset + int(at * (entry.nbytes - 1)))
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    os.utime(entry.file, ns=(before.st_atime_ns, before.st_mtime_ns))
    return entry.file


def replaced(file: Path) -> None:
    """The same bytes in another file under the same name."""
    shutil.copy(file, file.with_suffix(".new"))
    os.replace(file.with_suffix(".new"), file)


LOOKS: dict[str, Callable[[Path], None]] = {
    "nothing": lambda file: None,
    "touched": lambda file: os.utime(file),
    "copied": replaced,
    "another mode": lambda file: file.chmod(0o600),
    "rewritten": lambda file: (file.write_bytes(file.read_bytes()), None)[1],
}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    read=st.sets(st.sampled_from(KEYS)),
    harmed=st.none() | st.sampled_from(KEYS),
    at=st.floats(0, 1),
    look=st.sampled_from(sorted(LOOKS)),
    later=st.sampled_from(["the same process", "the end", "another process"]),
)
def test_only_other_bytes_of_what_was_read_are_a_change(
    tmp_path_factory: pytest.TempPathFactory, read: set[str], harmed: str | None, at: float, look: str, later: str
) -> None:
    folder = save(tmp_path_factory.mktemp("source") / "model")
    with Watched.open(folder) as index:
        for key in sorted(read):
            index.read(key)
        index.close()
        LOOKS[look](folder / FILE)
        if harmed is not None:
            flip(folder, harmed, at=at)

        def again() -> None:
            if later == "the same process":
                for key in sorted(read):
                    index.read(key)
            elif later == "the end":
                index.check_unchanged()
            else:
                with Watched.open(folder) as other:
                    other.go_on_from(index.seen())

        if harmed in read:
            with pytest.raises(Changed) as raised:
                again()
            assert str(raised.value) == (
                f"{folder / FILE}: changed since this run first read it: {harmed} has other bytes; put back what was "
                "there and run the same command again, which goes on, or start anew with --overwrite"
            )
        else:
            again()


@pytest.mark.parametrize("harm", ["cut", "gone", "another model", "a folder"])
def test_a_file_that_is_no_longer_the_same_checkpoint_is_named(harm: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    file = folder / FILE
    with Watched.open(folder) as index:
        index.read("a")
        index.close()
        data = file.read_bytes()
        file.unlink()
        if harm == "cut":
            file.write_bytes(data[:-8])
        elif harm == "another model":
            save_file({"a": torch.zeros(3)}, file)
        elif harm == "a folder":
            file.mkdir()
        with pytest.raises(LlmshrinkError, match=f"^{re.escape(str(file))}: "):
            index.check_unchanged()
        with pytest.raises(LlmshrinkError, match=f"^{re.escape(str(file))}: "):
            index.read("b")


def test_what_is_the_same_is_not_read_for_that(tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    with Watched.open(folder) as first:
        first.sum_rest()
        first.check_unchanged()
        assert set(first.reads.values()) == {1}
        with Watched.open(folder) as second:
            second.go_on_from(first.seen())
            second.check_unchanged()
            assert not second.reads and second.sums == first.sums
        shutil.copytree(folder, tmp_path / "copy")
        with Watched.open(tmp_path / "copy") as elsewhere:
            elsewhere.go_on_from(first.seen())
            assert set(elsewhere.reads.values()) == {1} and elsewhere.sums == first.sums


def test_a_workspace_holds_its_sources_to_what_was_read_of_them(tmp_path: Path) -> None:
    folder, out = save(tmp_path / "model"), tmp_path / "out"
    with Watched.open(folder) as index, Workspace(out, overwrite=False) as workspace:
        index.read("a")
        assert workspace.begin({"seed": 0}, {"model": index}) == []
        index.read("b")
        workspace.finish_part(Part("one", {}, []))
        workspace.finish_part(Part("two", {}, []))
        index.read("c")
        assert len(workspace.journal.read_text().splitlines()) == 4
    file = flip(folder, "c")  # which no part was made of yet
    with Watched.open(folder) as index, Workspace(out, overwrite=False) as workspace:
        assert workspace.begin({"seed": 0}, {"model": index}) == [Part("one", {}, []), Part("two", {}, [])]
        assert index.sums.keys() == {"a", "b"}
    flip(folder, "b")
    for overwrite in (False, True):
        with Watched.open(folder) as index, Workspace(out, overwrite=overwrite) as workspace:
            if overwrite:
                assert workspace.begin({"seed": 0}, {"model": index}) == []
                continue
            with pytest.raises(Changed, match=f"^{file}: .*b has other bytes"):
                workspace.begin({"seed": 0}, {"model": index})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


def stopped(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, run: Callable[[], Any]) -> None:
    """Run until a function is called."""

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(where, name, stop)
        with pytest.raises(KeyboardInterrupt):
            run()


def test_a_run_goes_on_from_the_same_bytes_alone(
    source: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(out: str = "out") -> Any:
        return llmshrink.quantize(source, output=tmp_path / out, calibration=story, **SMALL)

    run("whole")
    stopped(monkeypatch, runs, "finish", run)
    # In the middle, where a fingerprint by samples doesn't look, and at the start, where it does.
    for at in (0.5, 0.0):
        file = flip(source, "model.layers.1.mlp.up_proj.weight", at=at)
        with pytest.raises(
            Changed, match=f"^{file}: changed since .*model.layers.1.mlp.up_proj.weight has other bytes"
        ):
            run()
        flip(source, "model.layers.1.mlp.up_proj.weight", at=at)
    for look in LOOKS.values():
        look(source / FILE)
    source.rename(tmp_path / "elsewhere")
    shutil.copytree(tmp_path / "elsewhere", source)
    assert run().blocks_kept == 2
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("key", ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_a_change_during_a_run_stops_it_and_nothing_is_published(
    key: str, source: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Change(Silent):
        def block(self, number: int, state: float | str) -> None:
            if number == 0:
                flip(source, key)

    def run(**more: Any) -> Any:
        return llmshrink.quantize(source, output=tmp_path / "out", calibration=story, **SMALL, **more)

    # What is outside the blocks, and the block itself, are read by then and not again.
    with pytest.raises(Changed, match=re.escape(key)):
        run(progress=Change())
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()
    flip(source, key)
    assert run().blocks_kept == 2


def test_a_change_during_the_analysis_is_seen_before_anything_is_written(
    source: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = runs.check_fits

    def change(*arguments: Any, **named: Any) -> Any:
        flip(source, "model.layers.0.mlp.up_proj.weight")
        return check(*arguments, **named)

    monkeypatch.setattr(runs, "check_fits", change)
    with pytest.raises(Changed, match="up_proj"):
        llmshrink.quantize(source, output=tmp_path / "out", calibration=story, **SMALL)
    assert not (tmp_path / "out.partial").exists()


def test_a_conversion_goes_on_from_the_same_bytes_alone(
    source: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "made"
    llmshrink.prune(source, output=made, recipe="magnitude-2of4", calibration=story, samples=4, seq_len=32)

    def run() -> Any:
        return llmshrink.convert(made, output=tmp_path / "out", format="llmshrink")

    stopped(monkeypatch, converting, "_config", run)
    file = flip(made, "model.embed_tokens.weight")  # copied by a part that is finished
    with pytest.raises(Changed, match=f"^{file}: .*embed_tokens"):
        run()
    flip(made, "model.embed_tokens.weight")
    assert run().ok


@pytest.mark.parametrize("changes", ["teacher", "student"])
def test_a_distillation_goes_on_with_the_same_bytes_alone(
    changes: str, source: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmshrink.distillation import run as distilling

    models = {"teacher": make_model(tmp_path / "teacher", seed=3), "student": source}
    settings = {"steps": 2, "batch_size": 2, "seq_len": 32, "eval_steps": 2, "warmup": 1}

    def run() -> Any:
        return llmshrink.distill(models["teacher"], source, output=tmp_path / "out", data=story, **settings)

    stopped(monkeypatch, distilling, "write", run)
    key = "model.layers.0.mlp.up_proj.weight"
    file = flip(models[changes], key)
    with pytest.raises(Changed, match=f"^{file}: .*{key}"):
        run()
    flip(models[changes], key)
    assert run().ok


@pytest.mark.parametrize("kept", ["outputs", "generated"])
def test_a_cache_of_a_teacher_that_changed_is_refused(kept: str, source: Path, story: Path, tmp_path: Path) -> None:
    teacher = make_model(tmp_path / "teacher", seed=3)
    settings = {"steps": 2, "batch_size": 2, "seq_len": 32, "eval_steps": 2, "warmup": 1}

    def run(out: str) -> Any:
        cache = {"teacher_cache": tmp_path / "cache", "generated_tokens": 64 if kept == "generated" else 0}
        return llmshrink.distill(teacher, source, output=tmp_path / out, data=story, **settings, **cache)

    run("first")
    if kept == "generated":
        shutil.rmtree(tmp_path / "cache" / "outputs")
    flip(teacher, "model.layers.0.mlp.up_proj.weight")
    with pytest.raises(LlmshrinkError, match=r"holds the outputs of a teacher that changed since: .*--teacher-cache"):
        run("second")
    flip(teacher, "model.layers.0.mlp.up_proj.weight")
    assert run("second").ok


def test_a_student_made_of_other_weights_is_made_again(
    source: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmshrink.distillation import compress as compressing

    (tmp_path / "recipe.yaml").write_text("name: mine\nsteps:\n- quantize: {group_size: 32}\n- distill: {steps: 1}\n")
    said: list[str] = []

    class Listen(Silent):
        def note(self, line: str) -> None:
            said.append(line)

    def run() -> None:
        llmshrink.compress(
            source, output=tmp_path / "out", recipe=tmp_path / "recipe.yaml", calibration=story, samples=4, seq_len=32,
            progress=Listen(),
        )  # fmt: skip

    for change, there in ((False, False), (False, True), (True, False)):
        if change:
            flip(source, "model.layers.0.mlp.up_proj.weight")
        said.clear()
        stopped(monkeypatch, compressing, "distill", run)
        assert any("is there, from an earlier run" in line for line in said) == there
