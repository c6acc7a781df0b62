"""Names that no system takes, and writes that it refuses: one line each, with the name."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from llmshrink_eval.engines import child, cost_worker
from llmshrink_eval.errors import EvalError
from llmshrink_eval.refused import OF_PLACE, OF_SYSTEM, NotStarted, refused, save_tensors, told
from llmshrink_eval.sidefiles import check_generation

import llmshrink.api
from llmshrink.cli import run
from llmshrink.cli.system import is_refusal, refusal
from llmshrink.errors import LlmshrinkError, OutputError
from llmshrink.paths import expanded
from llmshrink.run import disk
from llmshrink.run.lock import Lock


@pytest.mark.parametrize("name", ["x" * 300, "/".join(["x" * 200] * 40), "é" * 200])
@pytest.mark.parametrize(
    "line",
    [
        *(["inspect", "NAME"], ["verify", "NAME"], ["plan", "NAME"], ["plan", "demo", "--recipe", "NAME"]),
        *(["plan", "demo", "--calibration", "NAME"], ["quantize", "demo", "-o", "NAME", "--calibration", "demo"]),
        ["eval", "demo", "--text", "NAME", "-o", "report"],
    ],
    ids=lambda line: line[0] if isinstance(line, list) else None,
)
def test_a_name_that_no_system_takes_is_a_line(
    line: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run([name if word == "NAME" else word for word in line]) == 2
    err = capsys.readouterr().err
    assert err.startswith("llmshrink: error: ") and err.count("\n") == 1 and name[:20] in err and len(err) < 1000
    assert list(tmp_path.iterdir()) == []


def test_a_nul_byte_in_a_name_is_refused() -> None:
    with pytest.raises(LlmshrinkError, match="no file's name has a NUL byte"):
        expanded("a\0b")
    with pytest.raises(LlmshrinkError, match="no file's name has a NUL byte"):
        llmshrink.inspect("a\0b")


def test_a_write_that_fails_names_its_file(tmp_path: Path) -> None:
    """The system itself answers: a file may grow to 1000 bytes here."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            disk.write_file(tmp_path / "shard", [b"x" * 5000], 5000)
        with pytest.raises(OSError, match="File too large") as of_line:
            disk.append_line(tmp_path / "journal", "x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "shard.tmp"))
    assert of_line.value.filename == str(tmp_path / "journal")
    assert not (tmp_path / "shard").exists()


@contextmanager
def limited(what: int, value: int) -> Iterator[None]:
    """While open, the system itself gives no more than that."""
    soft, hard = resource.getrlimit(what)
    resource.setrlimit(what, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(what, (soft, hard))


@contextmanager
def no_more_files() -> Iterator[None]:
    """While open, no further file may be."""
    free = os.dup(0)
    os.close(free)
    with limited(resource.RLIMIT_NOFILE, free):
        yield


RAISE_IT = "Too many open files; this process has as many open files as `ulimit -n` allows: raise it"


def test_too_many_open_files_have_the_same_way_out_everywhere(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{}")
    with no_more_files():
        with pytest.raises(EvalError) as of_file:
            check_generation(tmp_path)
        with pytest.raises(OutputError) as of_lock:
            Lock(tmp_path).take(tmp_path)
    assert str(of_file.value) == f"{tmp_path / 'generation_config.json'}: can't be read: {RAISE_IT}"
    assert str(of_lock.value) == f"can't write to {tmp_path}: {RAISE_IT}"


def test_a_process_that_cant_be_started_is_named() -> None:
    words = child.python("llmshrink_eval.template_worker")
    with no_more_files(), pytest.raises(NotStarted) as caught:
        child.start(words, {}, stdout=subprocess.PIPE)
    assert caught.value.errno == errno.EMFILE and is_refusal(caught.value)
    assert refusal(caught.value, ["inspect", "out"]) == (
        "can't start a process of its own for llmshrink_eval.template_worker: Too many open files (EMFILE); this "
        "process has as many open files as `ulimit -n` allows: raise it; then run the same command again",
        2,
    )


@pytest.mark.parametrize(
    ("number", "way"),
    [(errno.EAGAIN, "as many processes run as `ulimit -u`"), (errno.ENOMEM, "this machine has no memory left: end")],
)
def test_a_machine_that_starts_no_process_is_a_line(number: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(subprocess, "Popen", fails)
    with pytest.raises(NotStarted) as caught:
        child.start(child.python("a.module"), {}, stdout=subprocess.PIPE)
    line, code = refusal(caught.value, ["inspect", "x"])
    said = f"can't start a process of its own for a.module: {os.strerror(number)} ({errno.errorcode[number]}); {way}"
    assert is_refusal(caught.value) and code == 2 and line.startswith(said)


def test_safetensors_that_the_system_refuses_name_their_file(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    with limited(resource.RLIMIT_FSIZE, 1000), pytest.raises(OSError, match="File too large") as caught:
        save_tensors({"a": torch.zeros(5000)}, file)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(file))
    assert told(caught.value).startswith(f"{file}: File too large; this file system, or `ulimit -f`, takes no file so")
    save_tensors({"a": torch.zeros(2)}, file, {"format": "pt"})
    assert file.stat().st_size > 0


def test_what_the_system_refuses_a_measuring_process_names_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: object) -> None:
        raise OSError(errno.EFBIG, "File too large", "/tmp/dense/a.safetensors")

    monkeypatch.setattr(cost_worker, "measure", fails)
    answer = cost_worker._answer({})
    assert answer["kind"] == "died"
    assert answer["error"].startswith("/tmp/dense/a.safetensors: File too large; this file system, or `ulimit -f`")


def test_who_knows_the_place_says_its_way_out_and_the_systems_are_its_own() -> None:
    for number in OF_PLACE:
        assert refused(OSError(number, "No"), "choose another") == "No; choose another"
        assert refused(OSError(number, "No")) == f"No; {OF_PLACE[number]}"
    for number in OF_SYSTEM:
        assert refused(OSError(number, "No"), "choose another") == f"No; {OF_SYSTEM[number]}"
    assert refused(OSError(errno.EXDEV, "No")) == "No" and refused(OSError("odd"), "look") == "odd; look"


@pytest.mark.parametrize("line", [["inspect", "nope"], ["--nope"], ["plan", "demo", "--recipe", "nope"]])
def test_an_error_that_stderr_doesnt_take_is_the_same_exit_code(
    line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with open("/dev/full", "w", buffering=1, encoding="utf-8") as full:
        monkeypatch.setattr("sys.stderr", full)
        assert run(line) == 2
