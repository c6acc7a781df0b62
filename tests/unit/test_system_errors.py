"""Names that no system takes, and writes that it refuses: one line each, with the name."""

from __future__ import annotations

import errno
import resource
from pathlib import Path

import pytest

import llmshrink.api
from llmshrink.cli import run
from llmshrink.errors import LlmshrinkError
from llmshrink.paths import expanded
from llmshrink.run import disk


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
