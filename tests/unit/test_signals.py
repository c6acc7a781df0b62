"""Ctrl-C, SIGTERM, a reader that leaves, two runs into one output: what is said, and with which exit code."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from llmshrink_eval import cache
from llmshrink_eval.cache import Cache

from llmshrink import api
from llmshrink.cli import run
from llmshrink.cli.app import command
from llmshrink.cli.stopping import ANEW, KEPT, MEASURING
from llmshrink.errors import OutputError
from llmshrink.run.lock import LOCK, locked


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stopping(monkeypatch: pytest.MonkeyPatch, verb: str, number: signal.Signals) -> None:
    """The verb's twin gets a signal while it runs."""
    monkeypatch.setattr(api, verb, lambda *_, **__: signal.raise_signal(number))


LINES = {
    "quantize": ("quantize demo -o out", "every finished block is kept"),
    "prune": ("prune demo -o out --recipe alps-2of4", "every finished block is kept"),
    "compress": ("compress demo -o out --recipe alps-2of4", "every finished block is kept"),
    "convert": ("convert w24 -o out --format llmshrink", "every finished file is kept"),
    "distill": ("distill demo w24 -o out", "what was finished is kept"),
    "eval": ("eval demo -o out", "what was measured is kept"),
    "compare": ("compare demo w4 -o out", "what was measured is kept"),
    "push": ("push out owner/name", "what was uploaded is kept"),
    "verify": ("verify out", "nothing was written"),
    "plan": ("plan demo", "nothing was written"),
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("verb", [verb for verb in LINES if verb in command().commands])
def test_every_long_verb_says_what_is_kept_and_how_to_go_on(
    verb: str, number: signal.Signals, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line, kept = LINES[verb]
    monkeypatch.setattr(cache, "_USED", [])
    if verb in MEASURING:
        Cache(here / "cache").put("text", {"a": 1}, 2.0)
    stopping(monkeypatch, verb, number)
    (here / "out.partial").mkdir()
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    assert run(line.split()) == 128 + number
    out, err = capsys.readouterr()
    said, again = err.strip().splitlines()
    word = "interrupted" if number == signal.SIGINT else "terminated"
    assert not out and said.startswith(f"llmshrink: {word}; {kept}") and again == f"  llmshrink {line}"
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("verb", MEASURING)
def test_an_evaluation_says_that_something_is_kept_where_something_is(
    verb: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = LINES[verb][0].split()
    monkeypatch.setattr(cache, "_USED", [])
    for refused in (False, True):

        def stop(*_: Any, refused: bool = refused, **__: Any) -> None:
            if refused:
                raise OSError(errno.EIO, "Input/output error", "results.json")
            signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(api, verb, stop)
        folder = Cache(here / "cache").folder("reading", {"a": 1})
        assert run(line) == (2 if refused else 130)
        assert "kept" not in capsys.readouterr().err
        (folder / "windows.jsonl").write_text("{}\n")
        assert run(line) == (1 if refused else 130)
        assert "what was measured is kept: go on from there" in capsys.readouterr().err
        (folder / "windows.jsonl").unlink()


def test_no_long_verb_is_forgotten() -> None:
    assert KEPT.keys() | set(ANEW) == LINES.keys()
    quick = {"bench", "doctor", "generate", "inspect", "recipes", "serve"}
    assert command().commands.keys() - quick <= LINES.keys()


@pytest.mark.parametrize("beside", [".student", ".student.partial"])
def test_a_student_that_was_made_is_something_to_go_on_from(
    beside: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopping(monkeypatch, "distill", signal.SIGTERM)
    (here / f"out{beside}").mkdir()
    assert run(["distill", "demo", "--student-from", "depth=2", "-o", "out"]) == 143
    assert "what was finished is kept" in capsys.readouterr().err


def test_a_download_that_was_stopped_is_kept_by_the_hubs_cache(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopping(monkeypatch, "quantize", signal.SIGINT)
    assert run(["quantize", "owner/name", "-o", "out"]) == 130
    assert "what was downloaded is kept: go on" in capsys.readouterr().err
    stopping(monkeypatch, "distill", signal.SIGINT)
    assert run(["distill", "demo", "owner/name", "-o", "out"]) == 130
    assert "what was downloaded is kept: go on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "line"),
    [
        ("quantize", "quantize demo -o out"),
        ("distill", "distill demo --student-from depth=2 -o out"),
        ("push", "push out owner/name --dry-run"),
        ("plan", "prune demo -o begun --dry-run"),
    ],
)
def test_what_wrote_nothing_says_so(
    verb: str, line: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopping(monkeypatch, verb, signal.SIGINT)
    (here / "begun.partial").mkdir()
    assert run(line.split()) == 130
    assert capsys.readouterr().err == (
        f"llmshrink: interrupted; nothing was written: start it again with the same command:\n  llmshrink {line}\n"
    )


def test_nothing_is_said_of_an_output_that_may_be_the_runs(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopping(monkeypatch, "quantize", signal.SIGINT)
    (here / "out").mkdir()
    assert run(["quantize", "demo", "-o", "out", "--overwrite"]) == 130
    assert capsys.readouterr().err == "llmshrink: interrupted\n"


def test_a_run_that_only_had_to_be_published_says_how(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopping(monkeypatch, "quantize", signal.SIGINT)
    (here / "out").mkdir()
    assert run(["quantize", "demo", "-o", "out", "--push", "owner/name", "--private", "--yes"]) == 130
    said, again = capsys.readouterr().err.splitlines()
    assert said.endswith("the output is whole, publish it with:")
    assert again == "  llmshrink push out owner/name --private --yes"


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_a_fork_of_ours_dies_of_the_signal_as_its_parent_expects() -> None:
    done = python(
        "import os, signal, time\nfrom llmshrink.cli.stopping import Signals\n"
        "with Signals():\n"
        "    ready, say = os.pipe()\n"
        "    child = os.fork()\n"
        "    if not child:\n        os.write(say, b'.')\n        time.sleep(30)\n        os._exit(0)\n"
        "    os.read(ready, 1)\n"
        "    os.kill(child, signal.SIGTERM)\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    assert (done.stdout, done.stderr) == (f"{-signal.SIGTERM}\n", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_work_is_done_changes_nothing(number: signal.Signals) -> None:
    done = python(
        "import atexit, signal, sys\nfrom llmshrink.cli import main\n"
        f"atexit.register(signal.raise_signal, {int(number)})\n"
        "sys.argv = ['llmshrink', '--version']\nmain()\n"
    )
    assert done.returncode == 0 and done.stdout.startswith("llmshrink ") and not done.stderr


def test_a_second_signal_doesnt_cut_what_is_said_of_the_first(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmshrink.cli import stopping as module

    stopping(monkeypatch, "verify", signal.SIGINT)
    real = module.goes_on
    monkeypatch.setattr(module, "goes_on", lambda *given: signal.raise_signal(signal.SIGINT) or real(*given))
    assert run(["verify", "out"]) == 130
    assert "llmshrink verify out" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["recipes", "recipes show gptq-w4a16", "doctor", "doctor --json", "--help"])
def test_a_broken_pipe_is_quiet(verb: str) -> None:
    command = f"{sys.executable} -m llmshrink {verb} 2>&1 >&3 3>&- | cat >&2"
    done = subprocess.run(
        ["bash", "-c", f"{{ {command}; }} 3> >(true); wait"], capture_output=True, text=True, timeout=60
    )
    assert not done.stderr, done.stderr


def test_a_pipe_that_isnt_the_readers_is_no_quiet_end(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that died is a failure, whatever its pipe says."""

    def dead(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(api, "verify", dead)
    with pytest.raises(BrokenPipeError):
        run(["verify", "out"])


# Two runs into one output.


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "report"
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom llmshrink.run.lock import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with (
        pytest.raises(OutputError, match=rf"another run \(process {holder.pid}\) is writing to {folder};"),
        locked(folder),
    ):
        pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with locked(folder):
        assert (folder / LOCK).read_text() == f"{os.getpid()}\n"
        (folder / "written").touch()
    assert [path.name for path in folder.iterdir()] == ["written"]


def test_nothing_is_left_of_a_lock_under_which_nothing_was_written(tmp_path: Path) -> None:
    with locked(tmp_path / "deep" / "report"):
        pass
    assert not list(tmp_path.iterdir())


def test_two_evaluations_into_one_report_refuse_each_other(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(here / "report"):
        assert run(["eval", "demo", "--text", "demo", "-o", "report"]) == 2
    assert f"another run (process {os.getpid()}) is writing" in capsys.readouterr().err
