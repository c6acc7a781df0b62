"""Perplexity: an independent loop in float64 says the same, whatever the batch, the lengths and the protocol."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_oracle import a_text, logprobs64, nats64
from llmshrink_eval.errors import EvalFailed
from llmshrink_eval.model import LoadOptions, load_model
from llmshrink_eval.passes import default_batch_size, finished, run_pass
from llmshrink_eval.perplexity import MIN_DOCUMENTS, clusters, perplexity, stderr
from llmshrink_eval.protocol import Windows, build_windows

from llmshrink.demo.tokenizer import build

TOKENIZER: Any = build(128)


def windows_of(story: Path, protocol: Any, **arguments: Any) -> Windows:
    text = story.read_text()
    # Odd lengths, a document of one token, one that is a single window, and long ones.
    documents = [text[:811], text[811:813], text[900:917], "a", text[1000:1333]]
    return build_windows(a_text(documents), TOKENIZER, protocol=protocol, limit=128, **arguments)


CASES = [("gptq", {"window": 29}), ("sliding", {"window": 29, "stride": 12}), ("sliding", {"window": 33, "stride": 1})]


@pytest.mark.parametrize("batch_size", [1, 7])
@pytest.mark.parametrize(("protocol", "arguments"), CASES)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_loop_in_float64_says_the_same(
    family: str, protocol: str, arguments: Any, batch_size: int, model_of: Callable[..., Path], story: Path
) -> None:
    model = load_model(model_of(family), LoadOptions())
    windows = windows_of(story, protocol, **arguments)
    assert len(windows) > 7
    found = perplexity(windows, run_pass(model, windows, TOKENIZER, batch_size=batch_size).window_nats)
    expected = nats64(logprobs64(model, windows), windows)
    mean = math.fsum(expected) / windows.tokens
    assert found.nats_per_token == pytest.approx(mean, rel=1e-6)
    assert found.token == pytest.approx(math.exp(mean), rel=1e-5)
    assert found.word == pytest.approx(math.exp(math.fsum(expected) / windows.words), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(math.fsum(expected) / math.log(2) / windows.bytes, rel=1e-6)
    assert (found.tokens, found.words, found.bytes) == (windows.tokens, windows.words, windows.bytes)


def test_the_demo_model_reads_its_language_well(story: Path) -> None:
    import llmshrink.demo as demo

    model = load_model(Path(demo.__file__).parent / "model", LoadOptions())
    windows = build_windows(a_text([story.read_text()]), TOKENIZER, protocol="gptq", window=128, limit=256)
    found = perplexity(windows, run_pass(model, windows, TOKENIZER).window_nats)
    assert found.token < 6
    assert 0 < found.stderr < 0.1


def test_wiki7m_in_float64(wiki7m: Path, wikitext2_test: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(wiki7m)
    model = load_model(wiki7m, LoadOptions())
    text = a_text([wikitext2_test.read_text(encoding="utf-8")[:12_000]])
    windows = build_windows(text, tokenizer, protocol="gptq", window=255, max_tokens=1300, limit=512)
    found = perplexity(windows, run_pass(model, windows, tokenizer, batch_size=2).window_nats)
    expected = math.exp(math.fsum(nats64(logprobs64(model, windows), windows)) / windows.tokens)
    assert found.token == pytest.approx(expected, rel=1e-5)


def test_the_error_bar_covers_what_it_should() -> None:
    """Windows of unequal length whose nats share a mean of their own: 95 % intervals from 40 of them."""
    import statistics

    draw = random.Random(3)
    covered = 0
    for _ in range(1000):
        counts = [draw.randint(10, 60) for _ in range(40)]
        sums = [count * (2 + draw.gauss(0, 0.3)) + math.sqrt(count) * draw.gauss(0, 0.5) for count in counts]
        windows = fake_windows(counts, [-1] * 40)
        half = 1.96 * stderr(windows, torch.tensor(sums).double(), torch.tensor(counts).double())
        covered += abs(sum(sums) / sum(counts) - 2) < half
    assert 915 <= covered <= 970
    assert stderr(fake_windows([5], [-1]), torch.ones(1).double(), torch.ones(1).double()) == 0.0
    equal = fake_windows([10] * 4, [-1] * 4)
    sums = [1.0, 2.0, 3.0, 6.0]
    plain = statistics.stdev(value / 10 for value in sums) / 2
    assert stderr(equal, torch.tensor(sums).double(), torch.full((4,), 10.0).double()) == pytest.approx(plain)


def fake_windows(counts: list[int], documents: list[int]) -> Windows:
    lengths = torch.tensor(counts) + 1
    scored = (torch.arange(int(lengths.max())) < lengths[:, None]) & (torch.arange(int(lengths.max())) > 0)
    ids = torch.zeros_like(scored, dtype=torch.int64)
    return Windows("x", "sliding", 100, 50, ids, lengths, scored, torch.tensor(documents), 7, 30, "f")


def test_documents_are_the_unit_when_there_are_enough() -> None:
    many = [number // 2 for number in range(2 * MIN_DOCUMENTS)]
    unit, numbers = clusters(fake_windows([4] * len(many), many))
    assert (unit, numbers.tolist()) == ("documents", many)
    few = many[:-2]
    unit, numbers = clusters(fake_windows([4] * len(few), few))
    assert (unit, numbers.tolist()) == ("windows", list(range(len(few))))


def test_the_excess_is_paired() -> None:
    windows = fake_windows([10, 20, 30], [-1] * 3)
    original = [30.0, 40.0, 120.0]
    found = perplexity(windows, [value * 1.1 for value in original], original)
    assert found.excess_nats == pytest.approx(19 / 60)
    assert found.excess_stderr is not None and found.excess_stderr == pytest.approx(
        0.1 * perplexity(windows, original).stderr
    )
    same = perplexity(windows, original, original)
    assert (same.excess_nats, same.excess_stderr) == (0.0, 0.0)


def test_a_hopeless_model_still_has_a_number() -> None:
    found = perplexity(fake_windows([10], [-1]), [1e5])
    assert math.isfinite(found.word) and math.isfinite(found.token)
    assert json.loads(found.model_dump_json())["word"] == found.word


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_stops_the_pass_and_says_where(value: float, model_of: Callable[..., Path], story: Path) -> None:
    model = load_model(model_of("llama"), LoadOptions())
    windows = build_windows(a_text([story.read_text()[:900]]), TOKENIZER, protocol="gptq", window=32, limit=128)
    token = int(windows.input_ids[3, 17])
    first = min(row for row in range(len(windows)) if token in windows.input_ids[row])
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = value
    text = TOKENIZER.decode(windows.input_ids[first, :12].tolist())
    with pytest.raises(EvalFailed) as caught:
        run_pass(model, windows, TOKENIZER, batch_size=2)
    message = str(caught.value)
    assert f"logits in window {first} of {len(windows)}, from its token 0 on ({text!r})" in message
    assert "\n" not in message


def test_a_single_bad_position_is_named(model_of: Callable[..., Path], story: Path) -> None:
    model = load_model(model_of("llama"), LoadOptions())
    windows = build_windows(a_text([story.read_text()[:900]]), TOKENIZER, protocol="gptq", window=32, limit=128)

    def spoil(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        if len(output) == 2:
            output[1, 20:] = math.nan

    model.model.norm.register_forward_hook(spoil)
    text = TOKENIZER.decode(windows.input_ids[1, 9:21].tolist())
    with pytest.raises(EvalFailed) as caught:
        run_pass(model, windows, TOKENIZER, batch_size=2)
    assert f"in window 1 of {len(windows)}, from its token 20 on ({text!r})" in str(caught.value)


def test_an_interrupted_pass_goes_on_and_ends_the_same(
    model_of: Callable[..., Path], story: Path, tmp_path: Path
) -> None:
    model = load_model(model_of("llama"), LoadOptions())
    windows = windows_of(story, "sliding", window=29, stride=12)
    whole = run_pass(model, windows, TOKENIZER, batch_size=3)

    class Stop(Exception):
        pass

    told: list[tuple[int, int]] = []

    def stop(done: int, total: int, nats: float) -> None:
        told.append((done, total))
        assert nats > 0
        if done >= 6:
            raise Stop

    with pytest.raises(Stop):
        run_pass(model, windows, TOKENIZER, batch_size=3, folder=tmp_path, on_progress=stop)
    assert told == [(3, len(windows)), (6, len(windows))]
    assert finished(windows, tmp_path) is None
    lines = tmp_path / "windows.jsonl"
    lines.write_bytes(lines.read_bytes()[:-9])  # as a process leaves it that was killed while writing
    forwards = 0

    def count(*_: Any) -> None:
        nonlocal forwards
        forwards += 1

    hook = model.register_forward_hook(count)
    again = run_pass(model, windows, TOKENIZER, batch_size=3, folder=tmp_path)
    hook.remove()
    assert again.resumed == 5
    # One batch was whole; the one that lost a record runs again, and the proof of the head is one more.
    assert forwards == 1 + math.ceil(len(windows) / 3) - 1
    assert again.window_nats == whole.window_nats
    kept = finished(windows, tmp_path)
    assert kept is not None
    assert kept.window_nats == whole.window_nats
    assert kept.resumed == len(windows)


def test_a_batch_holds_four_thousand_tokens() -> None:
    assert [default_batch_size(length) for length in (256, 2048, 5000)] == [16, 2, 1]
