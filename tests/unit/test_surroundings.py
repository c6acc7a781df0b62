"""No home folder, no user's name, no UTF-8: every verb works, or says in one line what it lacks."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from llmshrink_eval.cache import default_folder, private_folder

from llmshrink import api
from llmshrink.cli import run
from llmshrink.errors import LlmshrinkError, OutputError
from llmshrink.paths import as_text, expanded, holds, output_folder

NOBODY = """
import os, pwd
os.getuid = os.geteuid = lambda: 12345
def unknown(uid): raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = unknown
"""
SMALL = ["--samples", "8", "--seq-len", "32", "--group-size", "32"]


def llmshrink(*words: str | Path, place: Path, **changes: str) -> subprocess.CompletedProcess[bytes]:
    apart = ("HOME", "USER", "LOGNAME", "USERNAME", "LNAME", "XDG_CACHE_HOME", "HF_HOME", "LANG", "LC_ALL")
    environment = {name: value for name, value in os.environ.items() if name not in apart}
    environment |= {"TMPDIR": str(place), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **changes}
    command = [sys.executable, "-m", "llmshrink", *map(os.fsencode, words)]
    return subprocess.run(command, env=environment, cwd=place, capture_output=True, timeout=500, check=False)


@pytest.fixture
def nobody(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NOBODY)
    return {"PYTHONPATH": str(tmp_path / "site")}


def test_without_a_home_a_model_is_measured_and_the_cache_is_this_user_s(
    nobody: dict[str, str], model_of: Callable[..., Path], story: Path, tmp_path: Path
) -> None:
    done = llmshrink(
        "eval", model_of("llama"), "--text", story, "--window", "32", "--max-tokens", "128", "--speed", "none", "-o",
        tmp_path / "report", place=tmp_path, **nobody,
    )  # fmt: skip
    said = done.stderr.decode()
    assert done.returncode == 0, said
    assert "note: user 12345 has no home folder, so caches go to " in said and "Traceback" not in said
    caches = [path for path in tmp_path.iterdir() if path.name.startswith("llmshrink-")]
    assert caches and all(stat.S_IMODE(path.stat().st_mode) == 0o700 for path in caches)
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("home", ["/proc", "/dev/null"])
def test_where_home_cant_be_written_results_are_kept_in_the_temporary_folder(
    home: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = default_folder()
    assert folder.is_relative_to(tmp_path) and folder.name == "eval"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_folder() == tmp_path / "xdg" / "llmshrink" / "eval" and not (tmp_path / "xdg").exists()


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams_lead_nowhere(closed: str, tmp_path: Path) -> None:
    program = f"{shlex.quote(sys.executable)} -P -m llmshrink"
    for words, code in (("recipes", 0), (f"inspect {tmp_path}", 2)):
        done = subprocess.run(["sh", "-c", f"{program} {words} {closed}"], capture_output=True, check=False)
        assert done.returncode == code, done.stderr
        assert b"Traceback" not in done.stderr + done.stdout


def test_without_a_home_doctor_and_a_tilde_end_in_lines(
    nobody: dict[str, str], model_of: Callable[..., Path], tmp_path: Path
) -> None:
    done = llmshrink("doctor", place=tmp_path, **nobody)
    assert b"Traceback" not in done.stdout + done.stderr and done.returncode in (0, 1)
    done = llmshrink("inspect", "~nobody-of-this-name/x", place=tmp_path, **nobody)
    assert done.returncode == 2
    assert b"no home folder of a user nobody-of-this-name is known here; give the path in full" in done.stderr


def test_without_utf_8_signs_are_printed_as_numbers(model_of: Callable[..., Path], story: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(model_of("llama"), tmp_path / "modèle-日本"))
    (model / "README.md").write_text("---\nlicense: mit\n---\n# modèle 日本\n", encoding="utf-8")
    text = tmp_path / "täxt.txt"
    text.write_text(story.read_text(encoding="utf-8") + "été 日本\n", encoding="utf-8")
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    out = tmp_path / "öut"
    done = llmshrink(
        "quantize", model, "-o", out, "--calibration", text, *SMALL, "--json", place=tmp_path, HOME=str(tmp_path),
        **ascii_only,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout)["ok"] and done.stdout.isascii()
    assert "日本" in (out / "SOURCE_README.md").read_text(encoding="utf-8")
    for words in (["inspect", out], ["verify", out], ["generate", model, "Once é", "--max-new-tokens", "4"]):
        done = llmshrink(*words, place=tmp_path, HOME=str(tmp_path), **ascii_only)
        assert done.returncode == 0, (words, done.stderr.decode())
        assert done.stdout.isascii()


def test_home_is_written_out_in_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~/model") == tmp_path / "model"
    assert expanded("a/~b") == Path("a/~b")
    with pytest.raises(LlmshrinkError, match="~no-such-user/x: no home folder of a user no-such-user"):
        expanded("~no-such-user/x")


@pytest.mark.parametrize(
    "words",
    [
        ["quantize", "~no-such-user", "-o", "out"],
        ["quantize", "demo", "-o", "~no-such-user/out"],
        ["quantize", "demo", "-o", "out", "--calibration", "~no-such-user/x.txt"],
        ["quantize", "demo", "-o", "out", "--work-dir", "~no-such-user/x"],
        ["quantize", "demo", "-o", "out", "--recipe", "~no-such-user/x.yaml"],
        ["plan", "~no-such-user/m"],
        ["eval", "demo", "--text", "~no-such-user/x.txt", "-o", "report"],
        ["eval", "demo", "--text", "demo", "--cache", "~no-such-user/x", "-o", "report"],
        ["eval", "demo", "--text", "demo", "-o", "~no-such-user/report"],
        ["distill", "demo", "demo", "-o", "out", "--teacher-cache", "~no-such-user/x"],
        ["generate", "~no-such-user/m", "Once"],
        ["inspect", "~no-such-user/m"],
        ["verify", "~no-such-user/m"],
        ["serve", "~no-such-user/m", "--dry-run"],
        ["push", "~no-such-user/m", "user/name", "--dry-run"],
        ["convert", "~no-such-user/m", "-o", "out", "--format", "llmshrink"],
    ],
)
def test_a_home_that_is_nobody_s_is_one_line(
    words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(words) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "~no-such-user" in said[0], said
    assert not (tmp_path / "~no-such-user").exists()


def test_a_private_folder_is_this_user_s_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    name = f"llmshrink-{os.getuid()}"
    assert private_folder() == private_folder() == tmp_path / name
    (tmp_path / name).chmod(0o777)  # as somebody else might have made it
    other = private_folder()
    assert other != tmp_path / name and stat.S_IMODE(other.stat().st_mode) == 0o700
    (tmp_path / name).rmdir()
    (tmp_path / name).symlink_to(other)
    assert private_folder() not in (tmp_path / name, other)


def test_the_default_cache_needs_no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    assert default_folder() == tmp_path / f"llmshrink-{os.getuid()}" / "eval"


def test_a_link_stands_for_its_folder(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "big" / "target")
    assert output_folder(tmp_path / "link") == tmp_path / "big" / "target"
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OutputError, match="leads to itself"):
        output_folder(tmp_path / "loop")


def test_what_a_folder_holds(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "other").symlink_to(tmp_path / "a")
    assert holds(tmp_path / "a", tmp_path / "other" / "b" / "c")
    assert holds(tmp_path / "other", tmp_path / "a")
    assert not holds(tmp_path / "a" / "b", tmp_path / "a")
    assert not holds(tmp_path / "absent", tmp_path / "absent" / "x")


def test_a_name_that_is_no_text_can_be_written() -> None:
    assert as_text(os.fsdecode(b"mod\xffel")).encode() == "mod\N{REPLACEMENT CHARACTER}el".encode()


@pytest.mark.parametrize("name", ["öut", "\udcc3\udcb6ut", "ö/out"])
def test_a_program_whose_file_names_arent_utf_8_is_told_before_the_work(
    name: str, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ö").mkdir()
    monkeypatch.chdir(tmp_path / Path(name).parent)
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: "ascii")
    name = Path(name).name  # of the last one it is the current folder that can't be spelt
    (Path(name)).mkdir()
    says = (
        r"öut|ö/out: this Python's names of files are ascii, .* set PYTHONUTF8=1 \(or LC_ALL=C\.UTF-8\) before Python"
    )
    for act in (
        lambda: api.quantize("demo", output=name, calibration=story),
        lambda: api.plan("demo", output=name, calibration=story),
        lambda: api.inspect(name),
        lambda: api.generate(name, "Once"),
        lambda: api.eval("demo", output=name, text=str(story)),
    ):
        with pytest.raises(LlmshrinkError, match=says) as caught:
            act()
        assert str(caught.value).isprintable()
    assert not list(Path(name).iterdir())
