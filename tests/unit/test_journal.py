"""The workspace of a run: locked, journalled, published whole."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmshrink.errors import OutputError
from llmshrink.run import disk
from llmshrink.run.journal import Part, Workspace
from llmshrink.run.lock import LOCK, locked
from llmshrink.run.output import RECORD, WRITTEN_LATER, check_output
from llmshrink.run.seal import SEAL
from llmshrink.run.strangers import strangers

IDENTITY = {"recipe": "a", "seed": 0}


def add(workspace: Workspace, name: str) -> Part:
    file = f"{name}.safetensors"
    sha256, size = disk.write_tensors(workspace.checkpoint / file, {name: torch.arange(4)})
    part = Part(name, {file: {"sha256": sha256, "bytes": size}}, [])
    workspace.finish_part(part)
    return part


def test_finished_parts_are_found_again(tmp_path: Path) -> None:
    with Workspace(tmp_path / "out", overwrite=False) as workspace:
        assert workspace.begin(IDENTITY) == []
        parts = [add(workspace, "a"), add(workspace, "b")]
    with Workspace(tmp_path / "out", overwrite=False) as workspace:
        assert workspace.begin(IDENTITY) == parts


def test_a_run_of_another_kind_of_machine_is_told_what_differs_and_where_to_finish_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu_with: Callable[[str], None]
) -> None:
    cpu_with("avx2 avx512_bf16")
    fast = {**IDENTITY, "dtype": "torch.bfloat16", "device": "cpu", "instructions": "AVX512 with avx512_bf16"}
    slow = {**fast, "dtype": "torch.float32", "instructions": "AVX2"}
    with Workspace(tmp_path / "out", overwrite=False) as workspace:
        workspace.begin(fast)
        add(workspace, "a")
    said = (
        f"{tmp_path}/out.partial holds an unfinished run of another kind of machine, whose sums end in other bits "
        "(cpu, AVX512 with avx512_bf16, bfloat16; here cpu, AVX2, float32): finish it %s, "
        "or start anew with --overwrite"
    )
    for caps, where in (({}, "there"), ({"ATEN_CPU_CAPABILITY": "avx2"}, "where ATEN_CPU_CAPABILITY=avx2 isn't set")):
        for name, value in caps.items():
            monkeypatch.setenv(name, value)
        with Workspace(tmp_path / "out", overwrite=False) as workspace, pytest.raises(OutputError) as raised:
            workspace.begin(slow)
        assert str(raised.value) == said % where
    with Workspace(tmp_path / "out", overwrite=False) as workspace:
        assert [part.name for part in workspace.begin(fast) or []] == ["a"]


def test_another_number_of_threads_has_its_way_out(tmp_path: Path) -> None:
    with Workspace(tmp_path / "out", overwrite=False) as workspace:
        workspace.begin({**IDENTITY, "threads": 4})
    with (
        Workspace(tmp_path / "out", overwrite=False) as workspace,
        pytest.raises(OutputError, match=r"number of threads \(4, now 2\): finish it with OMP_NUM_THREADS=4, or start"),
    ):
        workspace.begin({**IDENTITY, "threads": 2})


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_shard_and_all_after_it_are_done_again(tmp_path: Path, damage: str) -> None:
    with Workspace(tmp_path / "out", overwrite=False) as workspace:
        workspace.begin(IDENTITY)
        first = add(workspace, "a")
        add(workspace, "b")
        add(workspace, "c")
        path = workspace.checkpoint / "b.safetensors"
    data = path.read_bytes()
    path.unlink()
    if damage != "remove":
        path.write_bytes(data[:-1] + (b"" if damage == "truncate" else bytes([data[-1] ^ 1])))
    with Workspace(tmp_path / "out", overwrite=False) as workspace:
        assert workspace.begin(IDENTITY) == [first]
        assert sorted(p.name for p in workspace.checkpoint.iterdir()) == ["a.safetensors"]


def test_half_a_line_at_the_end_is_no_part(tmp_path: Path) -> None:
    with Workspace(tmp_path / "out", overwrite=False) as workspace:
        workspace.begin(IDENTITY)
        first = add(workspace, "a")
        journal = workspace.journal
    with journal.open("ab") as file:
        file.write(b'{"name": "b", "sha')
    with Workspace(tmp_path / "out", overwrite=False) as workspace:
        assert workspace.begin(IDENTITY) == [first]
    assert journal.read_bytes().endswith(b"\n")


def test_another_run_s_state_is_refused_with_what_differs(tmp_path: Path) -> None:
    with Workspace(tmp_path / "out", overwrite=False) as workspace:
        workspace.begin(IDENTITY)
        add(workspace, "a")
    with Workspace(tmp_path / "out", overwrite=False) as workspace:
        with pytest.raises(OutputError, match=r"another seed \(0, now 1\).*--overwrite"):
            workspace.begin({**IDENTITY, "seed": 1})
        assert (workspace.checkpoint / "a.safetensors").exists()
    with Workspace(tmp_path / "out", overwrite=True) as workspace:
        assert workspace.begin({**IDENTITY, "seed": 1}) == []
        assert not (workspace.checkpoint / "a.safetensors").exists()


def test_two_runs_into_one_output_refuse_each_other(tmp_path: Path) -> None:
    with (
        Workspace(tmp_path / "out", overwrite=False),
        pytest.raises(OutputError, match=rf"another run \(process {os.getpid()}\) is writing"),
        Workspace(tmp_path / "out", overwrite=True),
    ):
        raise AssertionError("the second run got in")


def test_publish_gives_the_output_its_name_and_leaves_nothing_else(tmp_path: Path) -> None:
    with Workspace(tmp_path / "out", overwrite=False) as workspace:
        workspace.begin(IDENTITY)
        add(workspace, "a")
        disk.write_json(workspace.checkpoint / RECORD, {})
        workspace.publish()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.safetensors", RECORD]


def test_a_crash_after_the_rename_is_tidied_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Workspace(tmp_path / "out", overwrite=False) as workspace:
        workspace.begin(IDENTITY)
        add(workspace, "a")
        disk.write_json(workspace.checkpoint / RECORD, {})
        with monkeypatch.context() as patch:
            patch.setattr(workspace, "_tidy", lambda: None)
            workspace.publish()
    with Workspace(tmp_path / "out", overwrite=False) as workspace:
        assert workspace.begin(IDENTITY) is None
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_output_of_ours_is_replaced_only_when_asked(tmp_path: Path) -> None:
    old = tmp_path / "out"
    old.mkdir()
    (old / RECORD).write_text(json.dumps({"old": True}))
    with pytest.raises(OutputError, match="--overwrite"), Workspace(old, overwrite=False) as workspace:
        workspace.begin(IDENTITY)
    with Workspace(old, overwrite=True) as workspace:
        workspace.begin(IDENTITY)
        add(workspace, "a")
        assert json.loads((old / RECORD).read_text()) == {"old": True}
        disk.write_json(workspace.checkpoint / RECORD, {})
        workspace.publish()
    assert json.loads((old / RECORD).read_text()) == {}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def ours(folder: Path) -> Path:
    """An output with all that a run leaves."""
    files = ["config.json", "tokenizer.json", "verify/held_out.safetensors", "additional_chat_templates/a.jinja"]
    for name in (*files, *WRITTEN_LATER, "model.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    (folder / RECORD).write_text(json.dumps({"files": files, "shards": {"model.safetensors": "0"}}))
    return folder


def test_what_a_run_leaves_is_no_stranger(tmp_path: Path) -> None:
    out = ours(tmp_path / "out")
    (out / "lost+found").mkdir()
    for name in ("__pycache__/a.pyc", ".DS_Store", "verify/.DS_Store", ".llmshrink.student.partial/lock"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).touch()
    assert strangers(out) == []
    with Workspace(out, overwrite=True) as workspace:
        workspace.begin(IDENTITY)
        disk.write_json(workspace.checkpoint / RECORD, {"new": True})
        workspace.publish()
    assert json.loads((out / RECORD).read_text()) == {"new": True}


@pytest.mark.parametrize(
    ("put", "told"),
    [
        ("notes.txt", "notes.txt"),
        ("mine/deep/notes.txt", "mine/"),
        ("verify/notes.txt", "verify/notes.txt"),
        (".git/HEAD", ".git/"),
        ("model-lora.safetensors", "model-lora.safetensors"),
        ("merges.txt", "merges.txt"),
        ("__pycache__/notes.txt", "__pycache__/notes.txt"),
        ("__pycache__/mine/a.pyc", "__pycache__/mine/"),
        ("verify/__pycache__/a.py", "verify/__pycache__/a.py"),
        ("lost+found/notes.txt", "lost+found/"),
        (".DS_Store/notes.txt", ".DS_Store/"),
        (".llmshrink.mine/x", ".llmshrink.mine/"),
        ("verify/.llmshrink.partial/x", "verify/.llmshrink.partial/"),
    ],
)
@pytest.mark.parametrize("linked", [False, True])
def test_files_beside_ours_stop_overwriting_by_name(put: str, told: str, linked: bool, tmp_path: Path) -> None:
    out, far = ours(tmp_path / "out"), tmp_path / "far"
    far.mkdir()
    before = sorted(out.rglob("*"))
    first = out / put.split("/")[0]
    if linked and not first.exists():
        first.symlink_to(far)
        told = put.split("/")[0]
    else:
        (out / put).parent.mkdir(parents=True, exist_ok=True)
        (out / put).write_text("work")
    added = sorted({*out.rglob("*")} - {*before})
    with pytest.raises(OutputError, match=rf"holds {re.escape(told)}, which no run .* would delete"):
        Workspace(out, overwrite=True).__enter__()
    assert sorted(out.rglob("*")) == sorted([*before, *added])
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["far", "out"]


@pytest.mark.parametrize("name", ["__pycache__/notes.txt", "lost+found/notes.txt", ".DS_Store/x", ".llmshrink.mine/x"])
def test_a_folder_with_somebody_s_file_is_not_empty(name: str, tmp_path: Path) -> None:
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text("work")
    with pytest.raises(OutputError, match="exists and wasn't written by llmshrink"):
        check_output(tmp_path / "out", overwrite=True)


def sealed(out: Path, files: list[str]) -> None:
    """Give an output a seal of these files."""
    place = {"device": "cpu", "threads": 1, "versions": {}}
    sums = {name: disk.sha256_of(out / name) for name in files}
    seal = {"by": "x", "against": "y", "tolerance": 0.1, "positions": 1, "with": place, "files": sums}
    (out / SEAL).write_text(json.dumps(seal))


def test_only_what_is_as_it_was_made_is_overwritten(tmp_path: Path) -> None:
    out = ours(tmp_path / "out")
    files = ["config.json", "tokenizer.json", "verify/held_out.safetensors", RECORD]
    (out / "tool_chat_template_x.jinja").write_text("of a run of before")
    record = json.loads((out / RECORD).read_text())
    (out / RECORD).write_text(json.dumps({**record, "files": [*record["files"], "tool_chat_template_x.jinja"]}))
    sealed(out, [*files, "tool_chat_template_x.jinja"])
    assert strangers(out) == []
    (out / "tokenizer.json").write_text('{"mine": 1}')
    (out / "tool_chat_template_x.jinja").write_text("mine")
    changed = ["tokenizer.json (changed since it was made)", "tool_chat_template_x.jinja (changed since it was made)"]
    assert strangers(out) == changed
    with pytest.raises(OutputError, match=r"holds tokenizer.json \(changed since it was made\), tool_"):
        check_output(out, overwrite=True)


@pytest.mark.parametrize("seal", [True, False])
def test_a_record_that_was_edited_makes_nothing_ours(seal: bool, tmp_path: Path) -> None:
    out = ours(tmp_path / "out")
    if seal:
        sealed(out, ["config.json", RECORD])
    for name in ("thesis.tex", "mine/notes.txt"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("work")
    record = json.loads((out / RECORD).read_text())
    more = {"files": [*record["files"], "mine/notes.txt"], "shards": {**record["shards"], "thesis.tex": "0"}}
    (out / RECORD).write_text(json.dumps({**record, **more}))
    edited = [f"{RECORD} (changed since it was made)"] if seal else []
    assert strangers(out) == [*edited, "mine/", "thesis.tex"]


def test_files_put_there_during_a_run_stop_its_end_and_nothing_is_lost(tmp_path: Path) -> None:
    out = ours(tmp_path / "out")
    with Workspace(out, overwrite=True) as workspace:
        workspace.begin(IDENTITY)
        part = add(workspace, "a")
        disk.write_json(workspace.checkpoint / RECORD, {"new": True})
        (out / "notes.txt").write_text("work")
        with pytest.raises(OutputError, match=r"holds notes\.txt"):
            workspace.publish()
    (out / "notes.txt").rename(tmp_path / "notes.txt")
    with Workspace(out, overwrite=True) as workspace:
        assert workspace.begin(IDENTITY) == [part]
        disk.write_json(workspace.checkpoint / RECORD, {"new": True})
        workspace.publish()
    assert json.loads((out / RECORD).read_text()) == {"new": True}


@pytest.mark.parametrize("name", ["", "lock", "checkpoint", "journal.jsonl", "activations", "old", "training"])
@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_in_the_place_of_a_workspace_or_a_part_of_it_is_refused(
    name: str, dangling: bool, tmp_path: Path
) -> None:
    far, partial = tmp_path / "far", tmp_path / "out.partial"
    if not dangling:
        far.mkdir()
        (far / "precious").write_text("work")
    (partial / name).parent.mkdir(exist_ok=True)
    (partial / name).symlink_to(far)
    with pytest.raises(OutputError, match=rf"{name or 'out.partial'} is a link to .*far, where a run would write"):
        Workspace(tmp_path / "out", overwrite=True).__enter__()
    assert far.exists() is not dangling
    assert dangling or [(file.name, file.read_text()) for file in far.iterdir()] == [("precious", "work")]


def test_a_lock_that_is_a_link_writes_nowhere_else(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / LOCK).symlink_to(file)
    with pytest.raises(OutputError, match="lock is a link"), locked(tmp_path / "folder"):
        raise AssertionError("it was taken")
    assert file.read_text() == "precious"


@pytest.mark.skipif(os.getuid() != 0, reason="gives a folder to another user, which takes root")
@pytest.mark.parametrize("name", ["", "lock", "checkpoint"])
def test_another_users_workspace_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "out.partial" / name
    path.mkdir(parents=True)
    os.chown(path, 12345, 12345)
    with pytest.raises(OutputError, match="belongs to user 12345, and this one is 0"):
        Workspace(tmp_path / "out", overwrite=True).__enter__()
    assert path.is_dir()


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o755])
def test_a_private_output_stays_private(mode: int, tmp_path: Path) -> None:
    out = ours(tmp_path / "out")
    out.chmod(mode)
    with Workspace(out, overwrite=True) as workspace:
        workspace.begin(IDENTITY)
        assert stat.S_IMODE(workspace.folder.stat().st_mode) == mode
        disk.write_json(workspace.checkpoint / RECORD, {"new": True})
        workspace.publish()
    assert stat.S_IMODE(out.stat().st_mode) == mode


@pytest.fixture
def mounted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An output that nothing can be renamed over or away, as where a volume is mounted; `lost+found` is in it."""
    out = tmp_path / "out"
    (out / "lost+found").mkdir(parents=True)
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == out)
    real = disk.replace

    def replace(source: Path, target: Path) -> None:
        if out in (source, target):
            raise OSError(errno.EBUSY, "Device or resource busy")
        real(source, target)

    monkeypatch.setattr(disk, "replace", replace)
    return out


def filled(workspace: Workspace, words: str) -> None:
    """A finished checkpoint."""
    if not (workspace.checkpoint / "a.safetensors").exists():
        add(workspace, "a")
    for name in ("config.json", "verify/held_out.safetensors", RECORD):
        (workspace.checkpoint / name).parent.mkdir(exist_ok=True)
        record = {"files": ["config.json", "verify/held_out.safetensors"], "shards": {"a.safetensors": "0"}}
        disk.write_json(workspace.checkpoint / name, {**record, "words": words})


def whole(out: Path) -> dict[str, str]:
    files = (path for path in out.rglob("*") if path.is_file() and path.suffix != ".safetensors")
    return {path.relative_to(out).as_posix(): json.loads(path.read_text())["words"] for path in files}


NAMES = ("config.json", RECORD)


def test_an_output_that_cant_be_renamed_is_filled_from_inside(mounted: Path) -> None:
    for words, overwrite in (("first", False), ("second", True)):
        with Workspace(mounted, overwrite=overwrite) as workspace:
            assert workspace.folder == mounted / ".llmshrink.partial"
            assert workspace.begin({**IDENTITY, "recipe": words}) == []
            filled(workspace, words)
            workspace.publish()
        assert whole(mounted) == dict.fromkeys(NAMES, words)
        assert sorted(path.name for path in mounted.iterdir()) == [
            "a.safetensors", "config.json", RECORD, "lost+found", "verify",
        ]  # fmt: skip
    with pytest.raises(OutputError, match="exists; replace it with --overwrite"):
        Workspace(mounted, overwrite=False).__enter__()
    assert [path.name for path in mounted.parent.iterdir()] == ["out"]


STEPS = 14
"""Renames and removals while the second output takes the first one's place."""


@pytest.mark.parametrize("step", range(STEPS + 1))
def test_a_crash_at_any_step_of_filling_it_goes_on_to_the_same(
    step: int, mounted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Workspace(mounted, overwrite=False) as workspace:
        workspace.begin({"recipe": "first"})
        filled(workspace, "first")
        disk.write_json(workspace.checkpoint / "tokenizer.json", {"words": "first"})
        record = json.loads((workspace.checkpoint / RECORD).read_text())
        disk.write_json(workspace.checkpoint / RECORD, {**record, "files": [*record["files"], "tokenizer.json"]})
        workspace.publish()
    left = step

    class Crash(BaseException):
        pass

    def failing(act: Callable[..., object]) -> Callable[..., object]:
        def acted(*words: object, **more: object) -> object:
            nonlocal left
            left -= 1
            if left == -1:
                raise Crash
            return act(*words, **more)

        return acted

    crashed = False
    with Workspace(mounted, overwrite=True) as workspace:
        workspace.begin({"recipe": "second"})
        filled(workspace, "second")
        with monkeypatch.context() as patched:
            patched.setattr(disk, "replace", failing(disk.replace))
            patched.setattr(Path, "unlink", failing(Path.unlink))
            patched.setattr("shutil.rmtree", failing(shutil.rmtree))
            try:
                workspace.publish()
            except Crash:
                crashed = True
    assert crashed == (step < STEPS)
    if crashed:
        with Workspace(mounted, overwrite=True) as workspace:
            parts = workspace.begin({"recipe": "second"})
            if parts is not None:
                assert [part.name for part in parts] == ["a"]
                filled(workspace, "second")
                workspace.publish()
    assert whole(mounted) == dict.fromkeys(NAMES, "second"), "nothing of the first, all of the second"
    assert not [path for path in mounted.iterdir() if path.name.startswith(".")]


def test_an_output_that_cant_be_renamed_is_known_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ours(tmp_path / "out")

    def busy(source: Path, target: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(disk, "replace", busy)
    with (
        pytest.raises(
            OutputError,
            match=r"out can't be renamed, so that .*: Device or resource busy; choose another folder with -o",
        ),
        Workspace(out, overwrite=True) as workspace,
    ):
        workspace.begin(IDENTITY)
    assert strangers(out) == [] and [path.name for path in tmp_path.iterdir()] == ["out"]


def two_parts(out: Path) -> tuple[Path, list[Part]]:
    """A run that was stopped after two parts: its journal, and they."""
    with Workspace(out, overwrite=False) as workspace:
        workspace.begin(IDENTITY)
        return workspace.journal, [add(workspace, name) for name in ("a", "b")]


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_part_whose_line_was_changed_anywhere_is_made_again(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        journal, parts = two_parts(Path(folder) / "out")
        lines = journal.read_bytes().splitlines(keepends=True)
        number = data.draw(st.integers(1, len(lines) - 1))
        place = data.draw(st.integers(0, len(lines[number]) - 1))
        changed = bytearray(lines[number])
        changed[place] ^= data.draw(st.integers(1, 255))
        lines[number] = bytes(changed)
        journal.write_bytes(b"".join(lines))
        with Workspace(Path(folder) / "out", overwrite=False) as workspace:
            assert workspace.begin(IDENTITY) == parts[: number - 1]


@pytest.mark.parametrize(("first", "why"), [(b"{}\n", "is of an earlier llmshrink"), (b"00000000 {}\n", "is damaged")])
def test_a_journal_without_a_first_line_is_refused_by_name_and_nothing_deleted(
    first: bytes, why: str, tmp_path: Path
) -> None:
    journal, _ = two_parts(tmp_path / "out")
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(first + b"".join(lines[1:]))
    before = sorted(journal.parent.rglob("*"))
    with (
        pytest.raises(OutputError, match=rf"journal\.jsonl {why}, so .* --overwrite"),
        Workspace(tmp_path / "out", overwrite=False) as workspace,
    ):
        workspace.begin(IDENTITY)
    assert sorted(journal.parent.rglob("*")) == before
    with Workspace(tmp_path / "out", overwrite=True) as workspace:
        assert workspace.begin(IDENTITY) == []


def test_many_strangers_are_counted(tmp_path: Path) -> None:
    out = ours(tmp_path / "out")
    for number in range(7):
        (out / f"{number}.txt").touch()
    with pytest.raises(OutputError, match=r"holds 0\.txt, 1\.txt, 2\.txt, 3\.txt and 3 more, which"):
        check_output(out, overwrite=True)


def test_a_record_of_before_it_named_files_knows_them_by_name(tmp_path: Path) -> None:
    out = ours(tmp_path / "out")
    (out / RECORD).write_text("{}")
    assert strangers(out) == []
    (out / "notes.txt").touch()
    (out / "additional_chat_templates" / "notes.txt").touch()
    assert strangers(out) == ["additional_chat_templates/notes.txt", "notes.txt"]


def test_a_folder_that_is_not_ours_is_never_replaced(tmp_path: Path) -> None:
    other = tmp_path / "out"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="wasn't written by llmshrink"), Workspace(other, overwrite=True):
        raise AssertionError("it was let in")
    assert (other / "thesis.txt").read_text() == "years of work"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_shards_are_read_by_the_reference_library(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = {
        "b": torch.arange(6, dtype=torch.int32).view(2, 3),
        "a": torch.randn(3, 5).bfloat16(),
        "odd": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "wide": torch.tensor([1, 2], dtype=torch.int64),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
    }
    disk.write_tensors(tmp_path / "x.safetensors", tensors)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_workspace_s_name_taken_by_another_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "precious").write_text("mine")
    with pytest.raises(OutputError, match=r"out\.partial is in the way"), Workspace(tmp_path / "out", overwrite=True):
        raise AssertionError("it was let in")
    assert (tmp_path / "out.partial" / "precious").read_text() == "mine"


def test_a_backup_beside_the_output_is_left_alone(tmp_path: Path) -> None:
    for name in ("out", "out.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / RECORD).write_text("{}")
    with Workspace(tmp_path / "out", overwrite=True) as workspace:
        workspace.begin(IDENTITY)
        disk.write_json(workspace.checkpoint / RECORD, {"new": True})
        workspace.publish()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.old"]


def test_a_crash_while_replacing_gives_the_old_output_back(tmp_path: Path) -> None:
    old = tmp_path / "out"
    old.mkdir()
    (old / RECORD).write_text(json.dumps({"old": True}))
    with Workspace(old, overwrite=True) as workspace:
        workspace.begin(IDENTITY)
        part = add(workspace, "a")
        old.rename(workspace.folder / "old")  # the crash comes here
    with Workspace(old, overwrite=True) as workspace:
        assert workspace.begin(IDENTITY) == [part]
        assert json.loads((old / RECORD).read_text()) == {"old": True}


def test_a_run_that_never_began_leaves_no_folder(tmp_path: Path) -> None:
    with Workspace(tmp_path / "a" / "b" / "out", overwrite=False):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", [disk.write_text, disk.append_line])
def test_a_full_disk_names_the_path_and_the_bytes_needed(
    write: Callable[[Path, str], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, data: memoryview | bytes) -> None:
        os.write(fd, bytes(data)[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk, "write", full)
    path = tmp_path / "x"
    needed = "1,234" if write is disk.write_text else "1,235"
    with pytest.raises(OutputError, match=rf"no space left writing {path}: {needed} bytes needed, [\d,]+ free; free"):
        write(path, "a" * 1234)
    assert not (tmp_path / "x.tmp").exists(), "what was written of it takes room"
