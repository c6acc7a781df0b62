"""`llmshrink compare` and `eval` through the real entry point, held to slow loops of our own over the files alone."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_small import measured
from llmshrink_eval.results import ModelResult, Results

from llmshrink.checkpoint.decompressed import Decompressed
from llmshrink.demo import model_folder

pytestmark = pytest.mark.slow

LLMSHRINK = str(Path(sys.executable).with_name("llmshrink"))
WINDOW = 48
TOKENS = 1500
ITEMS = 40


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "XDG_CACHE_HOME": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def llmshrink(folder: Path, *arguments: str | int | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [LLMSHRINK, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment(folder))
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with w4 and w2, the demo model in so many bits."""
    folder = tmp_path_factory.mktemp("models")
    for bits in (4, 2):
        llmshrink(folder, "quantize", "demo", "-o", f"w{bits}", "--bits", bits, "--samples", 32)
    return folder


@pytest.fixture(scope="module")
def report(models: Path, story: Path) -> Path:
    """One report over both, with a gate that w2 doesn't pass."""
    done = llmshrink(models, *asked(story), code=1)
    assert done.stderr.splitlines()[-1].startswith("llmshrink: w2: kl<=0.005 isn't met: 0.0")
    assert "w4: kl<=" not in done.stderr and "w2: recovery" not in done.stderr
    return models / "report"


def asked(story: Path) -> tuple[str | int | Path, ...]:
    return (
        "compare", "demo", "w4", "w2", "--text", story, "--protocol", "gptq", "--window", WINDOW, "--max-tokens",
        TOKENS, "--tasks", "demo_facts,demo_habits", "--limit", ITEMS, "--require",
        "recovery>=0.5,kl<=0.005", "-o", "report",
    )  # fmt: skip


def dense64(folder: Path) -> Any:
    """The model of a folder in float64, whatever its weights are packed in."""
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = json.loads((folder / "config.json").read_text())
    config = AutoConfig.from_pretrained(folder)
    if "quantization_config" not in raw:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    reader = Decompressed(folder, raw, torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.read(name))
    return model.eval()


@pytest.fixture(scope="module")
def slow(models: Path, story: Path, report: Path) -> dict[str, Any]:
    """name -> (log-probabilities of each window, right answers by task), by plain loops."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder())
    ids = tokenizer(story.read_bytes().decode())["input_ids"][:TOKENS]
    windows = [torch.tensor(ids[start : start + WINDOW]) for start in range(0, TOKENS - WINDOW + 1, WINDOW)]
    found: dict[str, Any] = {"windows": windows}
    for name, folder in (("demo", Path(model_folder())), ("w4", models / "w4"), ("w2", models / "w2")):
        model = dense64(folder)
        with torch.no_grad():
            tables = [model(input_ids=window[None]).logits[0].log_softmax(-1) for window in windows]
            right = {task: answered(model, tokenizer, models, task) for task in ("demo_facts", "demo_habits")}
        found[name] = (tables, right)
    return found


def answered(model: Any, tokenizer: Any, models: Path, task: str) -> list[bool]:
    """For each item whether the likeliest option is the right one."""
    rows = (models / "llmshrink" / "eval" / "demo-tasks" / f"{task}.jsonl").read_text().splitlines()[:ITEMS]
    right = []
    for row in map(json.loads, rows):
        start = len(tokenizer(row["context"])["input_ids"])
        scores = []
        for option in row["options"]:
            whole = torch.tensor(tokenizer(row["context"] + option)["input_ids"])
            table = model(input_ids=whole[None]).logits[0].log_softmax(-1)
            scores.append(sum(float(table[place - 1, whole[place]]) for place in range(start, len(whole))))
        right.append(max(range(len(scores)), key=scores.__getitem__) == row["answer"])
    return right


def of(report: Path, name: str) -> ModelResult:
    return next(model for model in Results.read(report / "results.json").models if model.name == name)


@pytest.mark.parametrize("name", ["demo", "w4", "w2"])
def test_perplexity_is_that_of_a_float64_loop(name: str, report: Path, slow: dict[str, Any]) -> None:
    nats = [
        -float(table[place - 1, window[place]])
        for table, window in zip(slow[name][0], slow["windows"], strict=True)
        for place in range(1, WINDOW)
    ]
    found = of(report, name).perplexity
    assert found is not None and found.tokens == len(nats) and found.windows == TOKENS // WINDOW == found.units
    assert found.nats_per_token == pytest.approx(math.fsum(nats) / len(nats), rel=1e-5)
    assert found.token == pytest.approx(math.exp(math.fsum(nats) / len(nats)), rel=1e-5)


@pytest.mark.parametrize("name", ["w4", "w2"])
def test_divergence_is_that_of_a_float64_loop(name: str, report: Path, slow: dict[str, Any]) -> None:
    kl, same, shared = [], 0, 0
    for p, q in zip(slow["demo"][0], slow[name][0], strict=True):
        for a, b in zip(p, q, strict=True):
            kl.append(float((a.exp() * (a - b)).sum()))
            same += int(a.argmax() == b.argmax())
            shared += len(set(a.topk(5).indices.tolist()) & set(b.topk(5).indices.tolist()))
    found = of(report, name).divergence
    assert found is not None and found.positions == len(kl)
    assert found.kl_mean == pytest.approx(math.fsum(kl) / len(kl), rel=1e-3)
    assert found.kl_max == pytest.approx(max(kl), rel=1e-3)
    ordered = sorted(kl)
    assert found.kl_median == pytest.approx((ordered[(len(kl) - 1) // 2] + ordered[len(kl) // 2]) / 2, rel=1e-2)
    assert abs(found.top1_agreement - same / len(kl)) <= 2 / len(kl)
    assert abs(found.top5_overlap - shared / 5 / len(kl)) <= 4 / len(kl)


@pytest.mark.parametrize("task", ["demo_facts", "demo_habits"])
@pytest.mark.parametrize("name", ["demo", "w4", "w2"])
def test_every_answer_is_that_of_a_loop_over_the_options(
    name: str, task: str, report: Path, slow: dict[str, Any]
) -> None:
    found = of(report, name).tasks[task]
    expected, before = slow[name][1][task], slow["demo"][1][task]
    rows = [json.loads(line) for line in (report / (found.samples or "")).read_text().splitlines()]
    assert [bool(row["value"]) for row in sorted(rows, key=lambda row: row["doc_id"])] == expected
    assert found.score == pytest.approx(sum(expected) / ITEMS, abs=1e-12) and found.items == ITEMS
    if name != "demo":
        paired = found.versus_original
        assert paired is not None
        lost = [index for index in range(ITEMS) if before[index] and not expected[index]]
        won = [index for index in range(ITEMS) if expected[index] and not before[index]]
        assert (paired.lost, paired.won, sorted(paired.flipped)) == (len(lost), len(won), sorted([*lost, *won]))
        assert paired.difference == pytest.approx((sum(expected) - sum(before)) / ITEMS, abs=1e-12)


SEEN = "import sys; from llmshrink.cli import run; run(sys.argv[1:]); print(*sorted(sys.modules), sep='\\n')"


def test_a_second_run_imports_nothing_that_could_measure(models: Path, report: Path, story: Path) -> None:
    """Nor does it need a third: in this file, this is the second."""
    command = [sys.executable, "-P", "-c", SEEN, *map(str, asked(story))]
    done = subprocess.run(command, cwd=models, capture_output=True, text=True, env=environment(models))
    assert done.returncode == 0, done.stderr
    imported = {line for line in done.stdout.splitlines() if line.isidentifier()}
    assert "llmshrink_eval" in imported
    assert not imported & {"torch", "transformers", "tokenizers", "lm_eval", "datasets", "matplotlib", "numpy", "scipy"}


def test_a_second_run_measures_nothing_and_says_so(models: Path, report: Path, story: Path) -> None:
    before = Results.read(report / "results.json")
    done = llmshrink(models, *asked(story), code=1)
    said = [f"{name}: cost, text, tasks, generations from the cache" for name in ("demo", "w4", "w2")]
    assert done.stderr.splitlines()[:3] == said and len(done.stderr.splitlines()) == 4
    after = Results.read(report / "results.json")
    assert measured(after) == measured(before)
    assert [model.cost for model in after.models] == [model.cost for model in before.models]


def test_json_is_the_file_and_goes_alone_on_stdout(models: Path, report: Path, story: Path) -> None:
    done = llmshrink(models, *asked(story), "--json", code=1)
    assert done.stdout == (report / "results.json").read_text()


# Interrupted.

LONG = ("eval", "demo", "--baseline", "demo", "--text", "demo", "--batch-size", 1, "--tasks", "demo", "--limit", 150,
        "--speed", "none", "-o", "report")  # fmt: skip


def heeding() -> None:
    """What a shell starts with & is deaf to an interrupt, and so is whatever it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def stopped(folder: Path, sign: signal.Signals, there: Callable[[], bool]) -> tuple[int, str]:
    """Start the long evaluation, and send it a signal when something is there."""
    command = [LLMSHRINK, *map(str, LONG)]
    process = subprocess.Popen(
        command, cwd=folder, stderr=subprocess.PIPE, text=True, env=environment(folder), preexec_fn=heeding
    )
    deadline = time.monotonic() + 300
    while not there():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(sign)
    error = process.communicate(timeout=120)[1]
    return process.returncode, error


def test_a_run_that_was_killed_and_interrupted_goes_on_and_finds_the_same(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    llmshrink(whole, *LONG)

    def lines(pattern: str) -> int:
        return sum(file.read_bytes().count(b"\n") for file in (broken / "llmshrink").rglob(pattern))

    code, _ = stopped(broken, signal.SIGKILL, lambda: lines("windows.jsonl") >= 5)
    assert code == -signal.SIGKILL and 5 <= lines("windows.jsonl") < 102
    before = lines("windows.jsonl")
    code, error = stopped(broken, signal.SIGINT, lambda: lines("answers.jsonl") >= 1)
    assert code == 130 and "Traceback" not in error
    assert "what was measured is kept: go on from there with the same command:\n  llmshrink eval demo" in error
    assert lines("windows.jsonl") >= 102 > before
    assert not (broken / "report").exists()
    done = llmshrink(broken, *LONG)
    assert "demo: cost, text from the cache\n" in done.stderr
    assert re.search(r"^demo: tasks: goes on after \d+ answers, where a run stopped$", done.stderr, re.MULTILINE)
    found, expected = (Results.read(folder / "report" / "results.json") for folder in (broken, whole))
    assert measured(found) == measured(expected)
    for file in sorted((whole / "report" / "samples").rglob("*.jsonl")):
        assert (broken / file.relative_to(whole)).read_bytes() == file.read_bytes()
    assert not list((broken / "llmshrink").rglob("answers.jsonl"))
