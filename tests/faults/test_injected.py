"""The torture of `benchmarks.faults`, for a few of its faults; that it leaves none out, and sees what it looks for."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from benchmarks.faults import DAMAGES, ERRORS, LEAST, Bench, Damaged, Failing, Limited, damage, faults, set_up
from benchmarks.injected import Ended, Injected, Limits, Site, Strike, carried_out, strike_at

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("faults").resolve()
    set_up(folder, ["quantize"])
    return Bench.made(folder, "quantize")


def test_faults_end_in_the_same_bytes_or_one_line(bench: Bench) -> None:
    for fault in faults([bench], 5, seed=0):
        try:
            assert bench.tried(fault) == "", fault
        except OSError:
            assert isinstance(fault, Limited) and fault.disk is not None  # which isn't to be had everywhere


def test_none_is_left_out(bench: Bench) -> None:
    every = faults([bench], None, 0)
    assert len(every) >= LEAST and every == faults([bench], None, 0) != faults([bench], None, 1)
    failing = [fault.strike for fault in every if isinstance(fault, Failing)]
    assert {strike.site for strike in failing} == set(bench.sites)
    assert {strike.error for strike in failing} == set(ERRORS)
    calls = {"open", "read", "write", "fsync", "replace", "mkdir", "unlink", "stat"}
    assert {strike.site.call for strike in failing} >= calls
    damaged = {(fault.file, fault.how) for fault in every if isinstance(fault, Damaged) and fault.killed == 1}
    files = bench.snapshots[1]
    assert {file for file, _ in damaged} == set(files) and any("block" in file for file in files)
    assert damaged >= {(file, how) for file, data in files.items() if data for how in set(DAMAGES) - {"older"}}
    assert sum(isinstance(fault, Limited) for fault in every) == 25


def test_a_fault_that_is_swallowed_with_other_bytes_is_seen(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "reference", {**bench.reference, "config.json": b"other"})
    nowhere = Failing("quantize", Strike(Site("open", "nowhere.py:1", "nothing"), 0, "EIO"))
    assert "config.json" in bench.tried(nowhere)


def test_a_call_fails_at_the_place_and_the_time_that_are_asked_for(tmp_path: Path) -> None:
    looking = Injected(tmp_path, None, look=True)

    def at_all(injected: Injected) -> None:
        for name in ("1", "22", "elsewhere", "3"):
            injected.at("stat", tmp_path / name)

    at_all(looking)
    assert [site.file for site in looking.seen] == ["N", "N", "elsewhere", "N"]
    with pytest.raises(OSError, match="Stale") as raised:
        at_all(Injected(tmp_path, strike_at(looking.seen, 1, "ESTALE")))
    assert (raised.value.errno, raised.value.filename) == (errno.ESTALE, os.fspath(tmp_path / "22"))


def test_too_few_open_files_are_a_line(bench: Bench) -> None:
    """No module can be imported either: what says so is here already."""
    for opened in (0, 2):
        ended = bench.run(limits=Limits(opened=opened))
        assert ended.code in (1, 2) and ended.complaint() == "" and "Too many open files (EMFILE)" in ended.said
        bench.tidy()


def test_a_folder_that_cannot_be_listed_stops_the_run(bench: Bench) -> None:
    found = [site for site in dict.fromkeys(bench.sites) if site.call == "listdir" and "listing.py" in site.where]
    assert found
    for site in found[:2]:
        assert bench.tried(Failing("quantize", Strike(site, 0, "EACCES"))) == "", site


def test_a_run_that_is_killed_at_a_call_leaves_what_it_had(bench: Bench) -> None:
    last = len(bench.sites) - 1
    bench.tidy()
    assert bench.run(strike_at(bench.sites, last, "")).code == -9
    assert bench.left()
    bench.tidy()
    assert carried_out(["--version"], bench.folder).said.startswith("llmshrink ")


@pytest.mark.parametrize(
    ("code", "said", "complaint"),
    [
        (0, "", ""),
        (2, "block 1/2\nllmshrink: error: a: Input/output error (EIO); look\n", ""),
        (2, "llmshrink: error: one\nllmshrink: error: two\n", "2 lines of error"),
        (1, "Traceback (most recent call last):\nOSError: x\n", "exit code 1"),
        (70, "", "exit code 70"),
        (None, "", "didn't end"),
        (2, "llmshrink: error: " + "x" * 900, "918 characters"),
    ],
)
def test_what_is_wrong_with_an_end_is_said(code: int | None, said: str, complaint: str) -> None:
    found = Ended(code, said).complaint()
    assert complaint in found and bool(found) == bool(complaint)


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_changes_one_file(how: str, tmp_path: Path) -> None:
    (folder := tmp_path / "folder").mkdir()
    for name in "abc":
        (folder / name).write_text(name * 50)
    damage(folder / "b", how, 7, b"as it was", tmp_path / "elsewhere")
    whole = [name for name in "abc" if (folder / name).is_file() and (folder / name).read_bytes() == name.encode() * 50]
    assert whole == (["a", "b", "c"] if how == "link" else ["a", "c"])
    assert (folder / "b").is_symlink() == (how == "link")
    assert how != "older" or (folder / "b").read_bytes() == b"as it was"
