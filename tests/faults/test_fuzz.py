"""A minute of `make fuzz`: inputs that nobody would write are read, or refused in a line."""

from __future__ import annotations

import json
import random
from collections import Counter
from types import SimpleNamespace

import pytest

from benchmarks.fuzz import KINDS, changed, complaint, main, run
from benchmarks.injected import Ended
from benchmarks.lines import VERBS, command_line


@pytest.mark.slow
def test_no_input_ends_in_a_traceback() -> None:
    fuzz = run(lambda count, seconds: count < 250, 0, None)
    assert fuzz.count == 250 and fuzz.found == []
    assert len(fuzz.counts) == 8 and min(fuzz.counts.values()) >= 15


def test_no_kind_is_left_short() -> None:
    shares: Counter[str] = Counter()
    for kind in KINDS:
        shares[kind.name] += kind.share
    assert set(shares) == {"config", "header", "record", "recipe", "calibration", "journal", "side file"}
    assert min(shares.values()) >= 10 and 100 - shares.total() >= 10  # the rest are command lines
    drawn = {command_line(random.Random(seed))[0] for seed in range(300)}
    wanted = {"plan", "quantize", "prune", "compress", "convert", "distill"}
    wanted |= {"eval", "generate", "inspect", "verify", "push", "serve"}
    assert drawn == set(VERBS) == wanted


def test_inputs_of_every_kind_are_changed_by_the_seed_alone() -> None:
    plain = {
        ".json": b'{"a": 1, "b": [2, {"c": "d"}], "e": 5, "f": {"g": null}}',
        ".jsonl": b'0a0b0c0d {"a": [1, 2]}\n',
    }
    for kind in KINDS:
        data = plain.get(f".{kind.file.rpartition('.')[2]}", b"a: 1\nb: [2]\nc:\n  - d: e\n")
        if kind.name == "calibration":
            data = data.partition(b" ")[2]
        drawn = [[changed(kind, data, rng) for _ in range(20)] for rng in (random.Random(5), random.Random(5))]
        assert drawn[0] == drawn[1]
        assert sum(each != data for each in drawn[0]) > 10, kind.name
    assert command_line(random.Random(5)) == command_line(random.Random(5))


@pytest.mark.parametrize("few", [True, False])
def test_fewer_inputs_than_were_asked_for_are_a_failure(
    few: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = SimpleNamespace(counts=Counter({"config": 3 if few else 9}), count=3 if few else 9, found=[])
    monkeypatch.setattr("benchmarks.fuzz.run", lambda *_: drawn)
    monkeypatch.setattr("sys.argv", ["fuzz", "--inputs", "9"])
    assert main() == int(few)
    assert ("9 were asked for" in capsys.readouterr().out) == few
    monkeypatch.setattr("sys.argv", ["fuzz", "--inputs", "9", "--minutes", "1"])
    assert main() == 0


@pytest.mark.parametrize(
    ("code", "said", "wrong"),
    [
        (0, "block 1/2", False),
        (2, "llmshrink: error: a\nllmshrink: error: b\n", False),
        (2, "usage", True),
        (1, "Traceback (most recent call last)", True),
        (-9, "", True),
        (None, "", True),
        (2, "llmshrink: error: " + json.dumps("x" * 30_000), True),
    ],
)
def test_what_is_wrong_with_an_end_is_seen(code: int | None, said: str, wrong: bool) -> None:
    assert bool(complaint(Ended(code, said))) == wrong
