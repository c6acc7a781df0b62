"""The curves of a training, as numbers, as a picture and in the model card."""

from __future__ import annotations

import csv
from io import StringIO
from typing import Any
from xml.etree import ElementTree

import pytest

from llmshrink.distillation.curves import PICTURE, TABLE, Curves, section
from llmshrink.run.heldout import Quality

BEFORE = Quality(tokens=100, ppl_before=5.0, ppl_after=9.0, kl_mean=0.6, kl_stderr=0.01, top1_agreement=0.5)
AFTER = Quality(tokens=100, ppl_before=5.0, ppl_after=6.0, kl_mean=0.2, kl_stderr=0.01, top1_agreement=0.8)
HISTORY: list[dict[str, float]] = [
    {"loss": 0.5, "grad_norm": 1.0, "step": 1},
    {"loss": 0.25, "step": 2},
    {"eval_kl": 0.2, "eval_perplexity": 6.0, "step": 2},
    {"train_runtime": 3.0, "train_loss": 0.4, "step": 2},
]


def test_the_table_has_every_step_and_the_student_as_it_was() -> None:
    curves = Curves.of(HISTORY)
    rows = list(csv.DictReader(StringIO(curves.table(BEFORE))))
    assert [(row["step"], row["loss"], row["kl"], row["perplexity"]) for row in rows] == [
        ("0", "", "0.6", "9.0"), ("1", "0.5", "", ""), ("2", "0.25", "0.2", "6.0"),
    ]  # fmt: skip


def test_a_history_with_a_step_missing_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        Curves.of(HISTORY[1:])


def test_the_picture_is_the_same_bytes_whatever_the_user_has_set() -> None:
    import matplotlib

    first = Curves.of(HISTORY).picture(BEFORE)
    matplotlib.rcParams["font.size"] = 31
    matplotlib.rcParams["svg.hashsalt"] = "mine"
    try:
        assert Curves.of(HISTORY).picture(BEFORE) == first
        assert matplotlib.rcParams["font.size"] == 31
    finally:
        matplotlib.rcdefaults()
    root = ElementTree.fromstring(first)
    texts = {each.text for each in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"training loss", "held-out KL", "nats/token", "held-out perplexity", "teacher", "student"} <= texts
    assert "<dc:date>" not in first
    # The loss's line has a point a step, the KL's and the perplexity's one an evaluation and the start.
    ids = [each.get("d", "").count("L") for each in root.iter("{http://www.w3.org/2000/svg}path")]
    assert ids.count(1) >= 3
    assert Curves.of([*HISTORY, {"loss": 0.1, "step": 3}]).picture(BEFORE) != first


@pytest.mark.parametrize(
    ("goal", "hidden", "says"),
    [
        ({}, 0.0, "Loss: KL(teacher || student)."),
        (
            {"alpha": 0.3, "temperature": 2.0},
            0.0,
            "0.3 x cross-entropy + 0.7 x KL(teacher || student) at temperature 2",
        ),
        ({"divergence": "jsd", "beta": 0.1}, 0.0, "the generalised Jensen-Shannon divergence with beta 0.1"),
        ({"divergence": "reverse_kl"}, 0.5, "KL(student || teacher) + 0.5 x the relative squared error"),
        ({"alpha": 1.0}, 0.0, "Loss: 1 x cross-entropy."),
    ],
)
def test_the_card_says_how_the_student_was_taught(goal: dict[str, Any], hidden: float, says: str) -> None:
    objective = {"alpha": 0.0, "temperature": 1.0, "divergence": "forward_kl", "beta": 0.5, **goal}
    made = {
        "teacher": "big", "revision": "abc", "objective": objective, "hidden_weight": hidden, "steps": 2,
        "step_windows": 8, "data": "talks.jsonl", "learned": "the loss is of 3 of 9 tokens", "windows": [4, 32],
        "before": vars(BEFORE), "curve": list(Curves.of(HISTORY).points), "trained": ["gain", "weight"],
    }  # fmt: skip
    found = section({"distill": made, "quality": vars(AFTER)})
    for part in (
        says,
        "Teacher: big (revision abc).",
        "4 windows of 32 tokens of talks.jsonl; the loss is of 3 of 9 tokens.",
        "2 steps of 8 windows; trained: gain, weight.",
        "0.60000 before, 0.20000 after (standard error 0.01000)",
        f"]({PICTURE})",
        "| 0 | 0.60000 | 9.000 |\n| 2 | 0.20000 | 6.000 |\n",
        TABLE,
    ):
        assert part in found
