"""A whole evaluation as plain data, made up but plausible: one original, three compressed models, six tasks.

Numbers come from one seeded generator, so that it is the same evaluation every time; nothing is run.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llmshrink_eval.results import (
    Cost,
    Divergence,
    Generation,
    ModelResult,
    Paired,
    Perplexity,
    Requirement,
    Results,
    SiteError,
    Speed,
    Task,
    TextUsed,
    WorstContext,
)

# name, chance, items, score of the original
TASKS = (
    ("arc_easy", 0.25, 2376, 0.652),
    ("arc_challenge", 0.25, 1172, 0.341),
    ("hellaswag", 0.25, 2000, 0.478),
    ("piqa", 0.5, 1838, 0.713),
    ("winogrande", 0.5, 1267, 0.561),
    ("demo_facts", 0.25, 120, 0.917),
)
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# name, damage (KL in nats), bits, bits per weight
COMPRESSED = (
    ("runs/wiki7m-rtn-w4", 0.0524, 4, 4.25),
    ("runs/wiki7m-gptq-w4", 0.0291, 4, 4.25),
    ("runs/wiki7m-gptq-w3", 0.1630, 3, 3.25),
)
ORIGINAL = "models/wiki7m"
PARAMETERS = 7_340_032


def example(*, tasks: int = len(TASKS), sites: int = 6, models: int = len(COMPRESSED)) -> Results:
    """The evaluation with so many tasks, blocks of seven sites, and compressed models."""
    random = np.random.default_rng(0)
    specs = [(f"{name}{'' if turn == 0 else f'-{turn}'}", *rest) for turn in range(9) for name, *rest in COMPRESSED]
    compressed = [_compressed(random, *spec, tasks=tasks, blocks=sites) for spec in specs[:models]]
    return Results(
        created="2026-11-25T01:40:00+00:00",
        command=f"llmshrink compare {ORIGINAL} {' '.join(model.path for model in compressed)} "
        "--text wikitext2-test.txt --protocol gptq --window 256 --max-tokens 102400 --tasks demo "
        "--require 'recovery>=0.98,kl<=0.06' -o report/",
        seed=0,
        device="cpu",
        versions={"python": "3.11.7", "torch": "2.13.0", "transformers": "5.19.0", "lm_eval": "0.4.13"},
        settings={"protocol": "gptq", "window": 256, "max_tokens": 102400, "tasks": ["demo"], "limit": None},
        text=TextUsed(
            name="wikitext2-test.txt", protocol="gptq", window=256, stride=256, tokens=102_000, fingerprint="3f9a" * 16
        ),
        models=(_original(random, tasks), *compressed),
        requirements=tuple(
            Requirement(condition=condition, model=model.name, value=value, passed=passed)
            for model in compressed
            for condition, value, passed in _required(model)
        ),
    )


def samples_of(results: Results) -> dict[str, list[dict[str, Any]]]:
    """Rows of every item that any model flips, under the path that each task names; right and wrong as it says."""
    files: dict[str, list[dict[str, Any]]] = {}
    for name in {name: None for model in results.models for name in model.tasks}:
        models = [(model, model.tasks[name]) for model in results.models if name in model.tasks]
        flipped = {model.name: _flipped(task) for model, task in models}
        won_by_any = {item for lost, won in flipped.values() for item in won}
        for model, task in models:
            lost, won = flipped[model.name]
            wrong = (won_by_any - set(won)) | set(lost)
            items = sorted({item for pair in flipped.values() for part in pair for item in part})
            files[task.samples or ""] = [_row(item, item in wrong) for item in items]
    return files


def _row(item: int, wrong: bool) -> dict[str, Any]:
    answer = "the blue door" if wrong else "the red door"
    return {"doc_id": item, "value": float(not wrong), "target": "the red door", "answer": answer}


def _flipped(task: Task) -> tuple[tuple[int, ...], tuple[int, ...]]:
    paired = task.versus_original
    return (paired.flipped[: paired.lost], paired.flipped[paired.lost :]) if paired else ((), ())


def _required(model: ModelResult) -> list[tuple[str, float | None, bool]]:
    kl = model.divergence.kl_mean if model.divergence else math.nan
    required: list[tuple[str, float | None, bool]] = [("kl<=0.06", kl, kl <= 0.06)]
    if model.recovery is not None:
        required.insert(0, ("recovery>=0.98", model.recovery, model.recovery >= 0.98))
    return required


def _perplexity(nats: float, excess: float | None) -> Perplexity:
    tokens, words, size = 102_000, 61_840, 331_210
    return Perplexity(
        token=math.exp(nats),
        word=math.exp(nats * tokens / words),
        bits_per_byte=nats * tokens / size / math.log(2),
        nats_per_token=nats,
        stderr=0.021,
        stderr_over="windows",
        units=400,
        tokens=tokens,
        words=words,
        bytes=size,
        windows=400,
        excess_nats=excess,
        excess_stderr=None if excess is None else 0.0014 + excess / 40,
    )


def _original(random: np.random.Generator, tasks: int) -> ModelResult:
    return ModelResult(
        path=f"/data/{ORIGINAL}",
        name=ORIGINAL,
        fingerprint="a1b2" * 16,
        role="original",
        engine="transformers",
        dtype="float32",
        perplexity=_perplexity(3.412, None),
        tasks={
            name: Task(
                metric="acc,none",
                higher_is_better=True,
                score=score,
                stderr=math.sqrt(score * (1 - score) / items),
                items=items,
                chance=chance,
                samples=f"samples/wiki7m/{name}.jsonl",
            )
            for name, chance, items, score in TASKS[:tasks]
        },
        cost=_cost(16.0, 1.0),
        generations=tuple(Generation(prompt=prompt, text=text) for prompt, (text, *_) in GENERATIONS.items()),
        seconds=44.1,
    )


def _cost(bits: float, speedup: float) -> Cost:
    return Cost(
        bytes_on_disk=int(PARAMETERS * bits / 8) + 9_000,
        parameters=PARAMETERS,
        bits_per_weight=bits + (0.6 if bits < 16 else 0.0),
        bits_per_weight_linears=bits,
        load_seconds=0.42 / speedup,
        peak_rss_bytes=612_000_000,
        speed=tuple(
            Speed(
                batch_size=batch,
                prompt_tokens=128,
                new_tokens=64,
                prefill_tokens_per_second=5210.0 * batch**0.5,
                decode_tokens_per_second=148.0 * batch**0.8 * speedup,
            )
            for batch in (1, 8)
        ),
    )


def _task(random: np.random.Generator, label: str, spec: tuple[str, float, int, float], damage: float) -> Task:
    name, chance, items, before = spec
    lost = int(random.binomial(items, min(0.3, damage * 0.7)))
    won = int(random.binomial(items, min(0.3, damage * 0.45)))
    difference = (won - lost) / items
    reach = 1.96 * math.sqrt(max(lost + won, 1)) / items
    recovery = 1 + difference / before
    return Task(
        metric="acc,none",
        higher_is_better=True,
        score=before + difference,
        stderr=math.sqrt(before * (1 - before) / items),
        items=items,
        chance=chance,
        versus_original=Paired(
            difference=difference,
            low=difference - reach,
            high=difference + reach,
            mcnemar_p=_mcnemar(lost, won),
            lost=lost,
            won=won,
            flipped=tuple(int(item) for item in random.choice(items, lost + won, replace=False)),
            recovery=recovery,
            recovery_low=recovery - reach / before,
            recovery_high=recovery + reach / before,
        ),
        samples=f"samples/{label}/{name}.jsonl",
    )


def _mcnemar(lost: int, won: int) -> float:
    total = lost + won
    return min(1.0, 2 * sum(math.comb(total, k) for k in range(min(lost, won) + 1)) / 2**total)


def _compressed(
    random: np.random.Generator, name: str, kl: float, bits: int, stored: float, *, tasks: int, blocks: int
) -> ModelResult:
    label = name.rsplit("/", 1)[-1]
    edges = np.logspace(-6, 1.2, 41)
    draws = np.clip(random.lognormal(math.log(kl) - 1.2, 1.55, 102_000), 1.1e-6, 15)
    histogram, _ = np.histogram(draws, edges)
    done = {spec[0]: _task(random, label, spec, kl) for spec in TASKS[:tasks]}
    recoveries = [task.versus_original.recovery or 0.0 for task in done.values() if task.versus_original]
    return ModelResult(
        path=f"/data/{name}",
        name=name,
        fingerprint=random.bytes(32).hex(),
        role="compressed",
        engine="transformers",
        dtype="float32",
        perplexity=_perplexity(3.412 + kl * 0.97, kl * 0.97),
        divergence=Divergence(
            kl_mean=kl,
            kl_stderr=kl / 55,
            kl_median=kl / 2.6,
            kl_p99=kl * 9.1,
            kl_max=kl * 84,
            top1_agreement=1 - 0.62 * kl**0.5,
            top5_overlap=1 - 0.5 * kl**0.5,
            positions=102_400,
            kl_units=400,
            baseline_error=2e-7,
            histogram_edges=tuple(float(edge) for edge in edges),
            histogram_counts=tuple(int(count) for count in histogram),
            worst=_worst(kl),
        ),
        tasks=done,
        cost=_cost(stored, 1.0 + 0.3 * (bits == 4)),
        recovery=sum(recoveries) / len(recoveries) if recoveries else None,
        site_errors=tuple(
            SiteError(
                name=f"model.layers.{block}.{'self_attn' if place < 4 else 'mlp'}.{kind}",
                bits=None if kind == "o_proj" and block == 2 and bits == 3 else bits,
                error=None
                if kind == "o_proj" and block == 2 and bits == 3
                else float(kl * 0.3 * (1 + block / 4) * (0.5 + place / 5) * random.lognormal(0, 0.25)),
            )
            for block in range(blocks)
            for place, kind in enumerate(KINDS)
        ),
        generations=tuple(
            Generation(prompt=prompt, text=texts[1 + [spec[0] for spec in COMPRESSED].index(name)])
            for prompt, texts in GENERATIONS.items()
            if name in [spec[0] for spec in COMPRESSED]
        ),
        seconds=51.7,
        cached=("perplexity", "divergence") if bits == 3 else (),
    )


def _worst(kl: float) -> tuple[WorstContext, ...]:
    return tuple(
        WorstContext(
            window=17 + 31 * rank,
            position=200 - 23 * rank,
            kl=kl * 84 / (rank + 1),
            text=text,
            actual=actual,
            original_top=((actual, 0.83), (" a", 0.07), (",", 0.04), ("\n", 0.02), (" his", 0.01)),
            compressed_top=((other, 0.61), (actual, 0.11), (" a", 0.08), (".", 0.05), ("", 0.02)),
        )
        for rank, (text, actual, other) in enumerate(CONTEXTS)
    )


CONTEXTS = (
    (
        " The ship was laid down at Kiel in 1911 and commissioned in the summer of 1914 .\n She took part in the "
        "Battle of Jutland , where her third turret was hit by a shell from HMS",
        " Warspite",
        " Lion",
    ),
    (
        " = Robert Boulter =\n\n Robert Boulter is an English film , television and theatre actor . He had a",
        " guest",
        " number",
    ),
    (" which is found in the north of the island and as far as the mouth of the river Der", "went", " and"),
)

GENERATIONS = {
    "The river rises in the hills and": (
        " flows south to the sea, where it is joined by two smaller streams. The valley was settled in the ninth "
        "century and has been farmed ever since.",
        " flows south to the sea, where it is met by a number of smaller streams. The valley was first settled in the "
        "ninth century.",
        " flows south to the sea, where it is joined by two smaller streams. The valley was settled in the tenth "
        "century and has been farmed ever since.",
        " flows to the south of the south of the river. The river is the river of the river and the river is the",
    ),
    "In 1914 the battalion": (
        " was sent to France, and served on the Western Front until the armistice.",
        " was sent to France, and served on the Western Front until the end of the war.",
        " was sent to France, and served on the Western Front until the armistice.",
        " was sent to the front of the war in the same year.",
    ),
}
