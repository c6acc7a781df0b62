"""Command lines that nobody would write, drawn by a seed: a verb, and options that hardly fit."""

from __future__ import annotations

import json
import random

from benchmarks.strange import strange

VERBS = {
    "plan": (
        "plan model",
        "--samples --seq-len --group-size --bits --batch-size --seed --set --recipe --dtype --format",
    ),
    "quantize": (
        "quantize model -o out --dry-run",
        "--device --calibration --work-dir --kv-cache --bos",
    ),
    "prune": (
        "prune model -o out --recipe magnitude-2of4 --dry-run",
        "--samples --seq-len --set --max-shard-size",
    ),
    "compress": (
        "compress model -o out --recipe alps-2of4 --dry-run",
        "--samples --recipe --set --format",
    ),
    "convert": ("convert sparse -o out --format llmshrink", "--format --max-shard-size --overwrite"),
    "distill": (
        "distill model w4 -o out --data talk.jsonl --dry-run",
        "--steps --lr --batch-size --bos --seed",
    ),
    "eval": (
        "eval w4 --text talk.jsonl --window 32 --max-tokens 64 --cache cache -o out",
        "--stride --sample --require --bos",
    ),
    "generate": ("generate w4 Once", "--max-new-tokens --temperature --top-p --seed --dtype"),
    "inspect": ("inspect w4", "--json --x"),
    "verify": ("verify w4", "--engine --device --json"),
    "push": ("push w4 user/name --dry-run", "--yes --private --token"),
    "serve": ("serve w4 --dry-run", "--host --port --dtype --max-model-len --tensor-parallel-size --api-key"),
}
"""Verb -> a line that it takes, and options that are put beside it."""


NAMES = ("~nobody/x", "a" * 300, "..", "/proc/self/mem", "nowhere/nothing", "/dev/null", "x\ny")


def command_line(rng: random.Random) -> list[str]:
    """A verb with options that hardly fit, or with a name that nothing has."""
    line, options = VERBS[rng.choice(sorted(VERBS))]
    words = line.split()
    for _ in range(rng.randint(1, 3)):
        value = strange(rng)
        text = value if isinstance(value, str) else json.dumps(value)[:2000]
        text = text.replace("\0", "").encode("utf-8", "replace").decode()
        words += [rng.choice(options.split()), text] if rng.random() < 0.9 else [text]
    if rng.random() < 0.2:
        words[_a_place(words, rng)] = rng.choice(NAMES)
    if rng.random() < 0.1:
        del words[_a_place(words, rng)]
    return words


def _a_place(words: list[str], rng: random.Random) -> int:
    """Of a word that may go: without a --dry-run the work would be done."""
    return rng.choice([at for at, word in enumerate(words) if at and word != "--dry-run"])
