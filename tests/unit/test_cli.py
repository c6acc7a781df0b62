"""The command line: parse, call the Python twin, print; exit codes, errors alone on stderr, a fast start."""

from __future__ import annotations

import errno
import inspect
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from helpers import make_model
from llmshrink_eval.refused import FULL, WAYS_OUT

from llmshrink import __version__, api
from llmshrink.cli import app, run
from llmshrink.errors import CheckpointError, RecipeError
from llmshrink.recipe.read import load_recipe, shipped
from llmshrink.run.output import partial_folder

COMMAND = str(Path(sys.executable).with_name("llmshrink"))


@dataclass
class Report:
    """A stand-in for what the Python twins return."""

    ok: bool = True

    def to_dict(self) -> dict[str, object]:
        return {"ok": self.ok, "größe": 3}

    def lines(self) -> list[str]:
        return ["size  3", "serve  this"]


@dataclass
class Twin:
    """Takes the place of a function of the API and remembers how it was called."""

    result: Report = field(default_factory=Report)
    error: BaseException | None = None
    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, *arguments: Any, **options: Any) -> Report:
        self.arguments, self.options = arguments, options
        if self.error:
            raise self.error
        return self.result


@pytest.fixture
def twin(monkeypatch: pytest.MonkeyPatch) -> Twin:
    twin = Twin()
    for verb in ("quantize", "inspect", "verify"):
        monkeypatch.setattr(api, verb, twin)
    return twin


def entry_point(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *arguments], capture_output=True, text=True, timeout=60, **options)


# The entry point itself.


def test_help_answers_in_under_four_tenths_of_a_second() -> None:
    """Of CPU: what else the machine does doesn't count. What it imports, and what not, the tests below say."""
    times = []
    for _ in range(5):
        started = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = entry_point("--help")
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(ended.ru_utime - started.ru_utime + ended.ru_stime - started.ru_stime)
        assert done.returncode == 0 and "quantize" in done.stdout and not done.stderr
    assert min(times) < 0.4, times


def test_nothing_heavy_is_imported_for_help() -> None:
    code = (
        "import sys\nfrom llmshrink.cli import run\nrun(['--help'])\nrun(['quantize', '--help'])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'yaml', 'rich', 'huggingface_hub', 'safetensors'}\n"
        "sys.exit(str(heavy & sys.modules.keys()) if heavy & sys.modules.keys() else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_bad_input_is_one_line_alone_on_stderr_and_exit_2() -> None:
    done = entry_point("recipes", "show", "gptq-w4")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("llmshrink: error: gptq-w4: unknown recipe; did you mean gptq-w4a16?")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_early_gets_no_traceback(unbuffered: str) -> None:
    pipeline = f"set -o pipefail; {COMMAND} recipes show gptq-w4a16 | true"
    done = subprocess.run(
        ["bash", "-c", pipeline],
        capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    assert done.returncode in (0, 1) and not done.stderr


# One process from here on.


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"llmshrink {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_without_a_verb_there_is_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 0
    out, err = capsys.readouterr()
    assert all(verb in out for verb in ("quantize", "inspect", "verify", "recipes")) and not err


def test_help_offers_every_dtype_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    from llmshrink.run.asked import DTYPES

    assert run(["quantize", "--help"]) == 0
    said = capsys.readouterr().out.partition("--dtype")[2].partition("--batch-size")[0]
    assert all(name in said for name in (*DTYPES, "auto")), said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["quantise"], "no such command 'quantise'"),
        (["quantize", "demo"], "missing option '--output' / '-o'; see llmshrink quantize --help"),
        (["quantize", "-o", "out"], "missing argument 'MODEL'"),
        (["quantize", "demo", "-o", "out", "--bitz", "3"], "no such option: --bitz (Possible options: --bits)"),
        (["quantize", "demo", "-o", "out", "--bits", "four"], "'--bits': 'four' should be a valid integer;"),
        (["quantize", "demo", "-o", "out", "--samples", "0"], "'--samples': '0' should be greater than or equal to 1;"),
        (["quantize", "demo", "-o", "out", "--samples", "x"], "'--samples': 'x' should be a valid integer;"),
        (["quantize", "demo", "-o", "out", "--serve-tp", "0"], "'--serve-tp': '0' should be greater than"),
        (["quantize", "demo", "-o", "out", "--batch-size", "0"], "'--batch-size': '0' should be greater than"),
        (["quantize", "demo", "-o", "out", "--seed", "-1"], "'--seed': '-1' should be greater than or equal to 0;"),
        (["eval", "out", "-o", "report", "--limit", "0"], "'--limit': '0' should be greater than or equal to 1;"),
        (["compare", "a", "b", "-o", "report", "--window", "1"], "'--window': '1' should be greater than"),
        (["generate", "out", "Once", "--max-new-tokens", "x"], "'--max-new-tokens': 'x' should be a valid integer;"),
        (["quantize", "demo", "-o"], "option '-o' requires an argument"),
        (["quantize", "demo", "-o", "out", "again"], "unexpected extra argument"),
        (["verify", "out", "--engine", "sglang"], "invalid value for '--engine': 'sglang' is not one of"),
        (["recipes", "shoe"], "no such command 'shoe'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(
    twin: Twin, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("llmshrink: error: ") and err.count("\n") == 1 and says.lower() in err.lower()
    assert "--help" in err


def test_quantize_hands_every_flag_to_its_twin(twin: Twin, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (
        "quantize owner/name@v1 -o out --recipe mine.yaml --calibration notes.txt --samples 8 --seq-len 64 --bits 3 "
        "--group-size -1 --asymmetric --method rtn --set a.b=1 --set c=2 --device cpu --dtype float32 --batch-size 2 "
        "--bos never --seed 7 --work-dir work --overwrite --max-shard-size 1GB --trust-remote-code --serve-tp 2 "
        "--strict --no-verify --push user/name --private --yes --kv-cache fp8"
    )
    assert run(arguments.split()) == 0
    assert capsys.readouterr().out == "size  3\nserve  this\n"
    assert twin.arguments == ("owner/name@v1",)
    assert twin.options.pop("progress") is not None
    assert twin.options == {
        "output": "out", "recipe": "mine.yaml", "calibration": "notes.txt", "samples": 8, "seq_len": 64, "bits": 3,
        "group_size": -1, "asymmetric": True, "method": "rtn", "set": ("a.b=1", "c=2"), "device": "cpu",
        "dtype": "float32", "batch_size": 2, "seed": 7, "work_dir": "work", "overwrite": True, "max_shard_size": "1GB",
        "trust_remote_code": True, "serve_tp": 2, "strict": True, "verify": False,
        "push": "user/name", "private": True, "yes": True, "kv_cache": "fp8", "bos": "never",
    }  # fmt: skip


def test_quantizes_defaults_are_its_twins(twin: Twin) -> None:
    parameters = inspect.signature(PYTHON_TWIN).parameters
    assert run(["quantize", "demo", "--output", "out"]) == 0
    for name, parameter in parameters.items():
        if name not in ("model", "output", "progress"):
            assert twin.options[name] == parameter.default, name
    assert twin.options.keys() == parameters.keys() - {"model"}


PYTHON_TWIN = api.quantize


@pytest.mark.parametrize(("flag", "value"), [("--symmetric", False), ("--asymmetric", True)])
def test_symmetric_and_asymmetric_are_one_choice(twin: Twin, flag: str, value: bool) -> None:
    run(["quantize", "demo", "-o", "out", flag])
    assert twin.options["asymmetric"] is value


@pytest.mark.parametrize(
    ("arguments", "positional", "options"),
    [
        (["inspect", "out"], ("out",), {}),
        (["verify", "out"], ("out",), {"engine": "transformers"}),
        (["verify", "out", "--engine", "vllm"], ("out",), {"engine": "vllm"}),
    ],
)
def test_inspect_and_verify_call_their_twins(
    twin: Twin, arguments: list[str], positional: tuple[str, ...], options: dict[str, str]
) -> None:
    assert run(arguments) == 0
    assert (twin.arguments, twin.options) == (positional, options)


@pytest.mark.parametrize("arguments", [["quantize", "demo", "-o", "out"], ["inspect", "out"], ["verify", "out"]])
def test_json_is_one_document_and_nothing_else_on_stdout(
    twin: Twin, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"ok": True, "größe": 3}


@pytest.mark.parametrize(("verb", "code"), [("quantize demo -o out", 1), ("verify out", 1), ("inspect out", 0)])
def test_a_run_that_falls_short_is_shown_and_exits_with_1(
    twin: Twin, verb: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    twin.result = Report(ok=False)
    assert run(verb.split()) == code
    assert "size  3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "lines"),
    [
        (CheckpointError("a: broken\n  in two"), ["a: broken in two"]),
        (RecipeError(["a: one", "b: two"]), ["a: one", "b: two"]),
        (OSError(errno.ENOSPC, "No space left on device", "/out/x"), ["/out/x: no space left ("]),
        (
            OSError(errno.EDQUOT, "Disk quota exceeded"),
            ["the disk, or what the output goes to: no space left; free some and run"],
        ),
        (OSError(errno.EIO, "", "/m/x"), ["/m/x: Input/output error (EIO); the disk, or the way to it, fails: see"]),
        (OSError(errno.EMFILE, ""), ["a file: Too many open files (EMFILE); this process has as many open files as"]),
    ],
)
def test_what_a_user_did_is_said_alone_on_stderr_a_line_a_fault(
    twin: Twin, error: Exception, lines: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    twin.error = error
    assert run(["quantize", "demo", "-o", "out"]) == 2
    out, err = capsys.readouterr()
    assert not out and "Traceback" not in err
    found = err.splitlines()
    assert len(found) == len(lines)
    for line, expected in zip(found, lines, strict=True):
        assert line.startswith(f"llmshrink: error: {expected}")


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("number", sorted(set(WAYS_OUT) - set(FULL)))
def test_what_the_system_refuses_says_whether_work_is_kept(
    number: int, kept: bool, twin: Twin, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    if kept:
        (tmp_path / "out.partial").mkdir()
    twin.error = OSError(number, "whatever", str(out))
    assert run(["quantize", "demo", "-o", str(out)]) == (1 if kept else 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"llmshrink: error: {out}: {os.strerror(number)} ({errno.errorcode[number]}); ")
    assert line.endswith(
        "every finished block is kept: go on from there with the same command" if kept else "run the same command again"
    )


def test_an_output_that_is_whole_is_only_to_be_published(
    twin: Twin, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "an out"
    out.mkdir()
    twin.error = OSError(errno.EIO, "", str(out))
    assert run(["quantize", "demo", "-o", str(out), "--push", "u/n"]) == 1
    said = capsys.readouterr().err.strip()
    assert said.endswith(f"; then the output is whole, publish it with llmshrink push '{out}' u/n")


def test_a_connection_that_breaks_is_no_fault_of_a_file(twin: Twin) -> None:
    twin.error = ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
    with pytest.raises(ConnectionResetError):
        run(["quantize", "demo", "-o", "out"])


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        ("gpt2", {}, "architecture 'gpt2' isn't covered yet: transformer.h.0.attn.c_attn.weight: a Conv1D of shape"),
        (
            "mixtral",
            {"num_local_experts": 2},
            "architecture 'mixtral' isn't covered yet: model.layers.0.mlp.experts.gate_up_proj: fused experts, 2 in",
        ),
    ],
)
def test_a_model_that_is_not_covered_is_refused_with_the_part_that_is_why(
    family: str, changes: dict[str, Any], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model(tmp_path / "model", family, **changes)
    capsys.readouterr()  # the progress of making it
    assert run(["quantize", str(model), "-o", str(tmp_path / "out"), "--calibration", "demo"]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1
    assert err.startswith(f"llmshrink: error: {why}") and "nothing was touched" in err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_our_own_bug_is_not_dressed_up_as_the_users(twin: Twin) -> None:
    twin.error = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        run(["quantize", "demo", "-o", "out"])


def test_ctrl_c_says_how_to_go_on_and_exits_with_130(
    twin: Twin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    partial_folder(Path("out").absolute()).mkdir()
    twin.error = KeyboardInterrupt()
    assert run(["quantize", "my model", "-o", "out", "--bits", "3"]) == 130
    out, err = capsys.readouterr()
    assert not out and "interrupted; every finished block is kept" in err
    assert "llmshrink quantize 'my model' -o out --bits 3" in err
    assert run(["verify", "out"]) == 130
    said = (
        "llmshrink: interrupted; nothing was written: start it again with the same command:\n  llmshrink verify out\n"
    )
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("output", [["-o", "out"], ["--output=out/"], []])
def test_ctrl_c_before_anything_was_begun_says_that_nothing_was_written(
    output: list[str], twin: Twin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llmshrink.cli.app.command", interrupted_once(app.command))
    assert run(["quantize", "demo", *output]) == 130
    begun = (
        f"; nothing was written: start it again with the same command:\n  llmshrink quantize demo {' '.join(output)}"
    )
    assert capsys.readouterr().err == f"llmshrink: interrupted{begun if output else ''}\n"


def test_a_ctrl_c_that_a_library_swallows_is_no_fault_of_the_users(
    twin: Twin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def swallow(*_: object, **__: object) -> Report:
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise CheckpointError("half-imported")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api, "quantize", swallow)
    before = signal.getsignal(signal.SIGINT)
    assert run(["quantize", "demo", "-o", "out"]) == 130
    assert capsys.readouterr().err.startswith("llmshrink: interrupted; nothing was written")
    assert signal.getsignal(signal.SIGINT) is before


def interrupted_once(parser: Callable[[], Any]) -> Callable[[], Any]:
    """Ctrl-C while the parser is first asked for."""
    asked = iter([True])

    def command() -> Any:
        if next(asked, False):
            raise KeyboardInterrupt
        return parser()

    return command


def test_libraries_are_hushed_unless_the_user_wants_to_hear_them(twin: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    monkeypatch.delenv("HF_HUB_VERBOSITY", raising=False)
    run(["inspect", "out"])
    assert (os.environ["TRANSFORMERS_VERBOSITY"], os.environ["HF_HUB_VERBOSITY"]) == ("info", "error")


# Recipes.


def test_recipes_are_listed_with_their_summaries(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(shipped())
    for line, (name, recipe) in zip(lines, shipped().items(), strict=True):
        assert line.startswith(name) and line.endswith(recipe.summary)


def test_recipes_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recipes", "--json"]) == 0
    assert [entry["name"] for entry in json.loads(capsys.readouterr().out)] == list(shipped())


def test_a_shown_recipe_is_one_that_recipe_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recipes", "show", "gptq-w2a16"]) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    assert load_recipe(tmp_path / "mine.yaml") == load_recipe("gptq-w2a16")
    assert run(["recipes", "show", str(tmp_path / "mine.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"][0]["quantize"]["bits"] == 2
