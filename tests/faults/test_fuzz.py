"""A minute of `make fuzz`: inputs that nobody would write are read, or refused in a line."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from benchmarks.faults import Ended
from benchmarks.fuzz import KINDS, changed, command_line, complaint, run, set_up


@pytest.mark.slow
def test_no_input_ends_in_a_traceback() -> None:
    fuzz = run(lambda count, seconds: count < 150, 0, None)
    assert fuzz.count == 150 and fuzz.found == []


def test_inputs_of_every_kind_are_changed_by_the_seed_alone(tmp_path: Path) -> None:
    set_up(tmp_path)
    here = [kind for kind in KINDS if list(tmp_path.glob(kind.file))]
    assert {kind.name for kind in here} >= {"config", "header", "index", "recipe", "calibration"}
    for kind in here:
        data = min(tmp_path.glob(kind.file)).read_bytes()
        drawn = [[changed(kind, data, rng) for _ in range(20)] for rng in (random.Random(5), random.Random(5))]
        assert drawn[0] == drawn[1]
        assert sum(each != data for each in drawn[0]) > 10, kind.name
    assert command_line(random.Random(5)) == command_line(random.Random(5))


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
    assert bool(complaint(Ended(code, said, 0))) == wrong
