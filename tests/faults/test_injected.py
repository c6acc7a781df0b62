"""The torture of `benchmarks.faults`, for a few seeded faults; and that it would see what it looks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.faults import ERRORS, Bench, Ended, Fault, faults

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench.made(tmp_path_factory.mktemp("faults").resolve())


def test_each_fault_ends_in_the_same_bytes_or_one_line(bench: Bench) -> None:
    for fault in faults(bench.calls, 3, seed=0):
        assert bench.tried(fault) == "", fault


def test_every_kind_of_fault_is_drawn() -> None:
    drawn = list(faults(100, 300, 0))
    assert {fault.error for fault in drawn} == {"", *ERRORS}
    assert len({fault.at for fault in drawn}) > 80
    assert drawn == list(faults(100, 300, 0)) != list(faults(100, 300, 1))


def test_a_fault_that_is_swallowed_with_other_bytes_is_seen(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "reference", {**bench.reference, "config.json": b"other"})
    assert "config.json" in bench.tried(Fault(10**9, "EIO"))  # which no run comes to


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
    found = Ended(code, said, 1).complaint()
    assert complaint in found and bool(found) == bool(complaint)


def test_damage_changes_one_file(tmp_path: Path) -> None:
    from benchmarks.faults import DAMAGES, damaged

    for index, damage in enumerate(DAMAGES):
        folder = tmp_path / damage
        folder.mkdir()
        for name in "abc":
            (folder / name).write_text(name * 50)
        assert damaged(folder, Fault(0, "", damage, index)) == "abc"[index % 3]
        whole = [name for name in "abc" if (folder / name).is_file() and (folder / name).read_text() == name * 50]
        assert len(whole) == 2, damage
