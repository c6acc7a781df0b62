"""Divergence from an original that is no longer there: exact against float64, zero of a model with itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_oracle import a_text, disturbed, kl64, logprobs64
from hypothesis import given, settings
from hypothesis import strategies as st
from llmshrink_eval.divergence import EDGES, TOP, WORST, divergence, score_rows
from llmshrink_eval.errors import EvalFailed
from llmshrink_eval.model import LoadOptions, load_model
from llmshrink_eval.passes import run_pass
from llmshrink_eval.protocol import Windows, build_windows
from llmshrink_eval.results import Divergence
from torch import Tensor

from llmshrink.demo.tokenizer import build

TOKENIZER: Any = build(128)
CASES = [("gptq", {"window": 29}), ("sliding", {"window": 29, "stride": 12})]


def windows_of(story: Path, protocol: Any, **arguments: Any) -> Windows:
    text = story.read_text()
    documents = [text[:811], text[811:813], text[900:917], "a", text[1000:1333]]
    return build_windows(a_text(documents), TOKENIZER, protocol=protocol, limit=128, **arguments)


def compare(original: Any, compressed: Any, windows: Windows, folder: Path, batch_size: int = 4) -> Divergence:
    run_pass(original, windows, TOKENIZER, batch_size=batch_size, keep=folder)
    made = run_pass(compressed, windows, TOKENIZER, batch_size=batch_size, against=folder)
    return divergence(windows, parts(made), TOKENIZER)


def parts(made: Any) -> list[Any]:
    return [record.divergence for record in made.windows]


@pytest.mark.parametrize(("protocol", "arguments"), CASES)
@pytest.mark.parametrize("batch_size", [1, 7])
def test_a_model_does_not_diverge_from_itself(
    protocol: str, arguments: Any, batch_size: int, model_of: Callable[..., Path], story: Path, tmp_path: Path
) -> None:
    windows = windows_of(story, protocol, **arguments)
    found = compare(*(load_model(model_of("llama"), LoadOptions()) for _ in range(2)), windows, tmp_path, batch_size)
    assert found.kl_max == found.kl_mean == found.kl_stderr == 0.0
    assert found.top1_agreement == found.top5_overlap == 1.0
    assert found.worst == ()
    assert found.baseline_error == 0.0


def test_another_batch_size_changes_no_more_than_rounding(
    model_of: Callable[..., Path], story: Path, tmp_path: Path
) -> None:
    model = load_model(model_of("llama"), LoadOptions())
    windows = windows_of(story, "sliding", window=29, stride=12)
    run_pass(model, windows, TOKENIZER, batch_size=7, keep=tmp_path)
    found = divergence(windows, parts(run_pass(model, windows, TOKENIZER, batch_size=1, against=tmp_path)), TOKENIZER)
    assert found.kl_max < 1e-9
    assert found.top1_agreement == 1.0


@pytest.mark.parametrize(("protocol", "arguments"), CASES)
@pytest.mark.parametrize("scale", [0.3, 1e-3])
def test_float64_says_the_same(
    protocol: str, arguments: Any, scale: float, model_of: Callable[..., Path], story: Path, tmp_path: Path
) -> None:
    original = load_model(model_of("qwen2"), LoadOptions())
    compressed = disturbed(original, scale)
    windows = windows_of(story, protocol, **arguments)
    found = compare(original, compressed, windows, tmp_path)
    wide = [logprobs64(model, windows) for model in (original, compressed)]
    by_window = kl64(*wide, windows)
    expected = torch.cat(by_window).numpy()
    # What float32 forwards leave of a small KL: it is quadratic in differences of 1e-6.
    tolerance = {"rel": 1e-3, "abs": 1e-9}
    assert found.positions == len(expected) == int(windows.compared.sum())
    assert found.kl_mean == pytest.approx(expected.mean(), **tolerance)
    assert found.kl_median == pytest.approx(np.median(expected), **tolerance)
    assert found.kl_p99 == pytest.approx(np.quantile(expected, 0.99), **tolerance)
    assert found.kl_max == pytest.approx(expected.max(), **tolerance)
    tops = [
        torch.cat([one[windows.compared[row][: len(one)]] for row, one in enumerate(w)]).topk(5).indices for w in wide
    ]
    agree = (tops[0][:, 0] == tops[1][:, 0]).double().mean()
    shared = (tops[0][:, :, None] == tops[1][:, None, :]).double().sum((1, 2)).mean() / 5
    assert found.top1_agreement == pytest.approx(float(agree), abs=1.5 / found.positions)
    assert found.top5_overlap == pytest.approx(float(shared), abs=1.5 / found.positions)
    spread = torch.tensor([float(one.sum()) for one in by_window]).double() - expected.mean() * windows.compared.sum(1)
    n = len(windows)
    stderr = math.sqrt(n / (n - 1) * float(spread.square().sum())) / len(expected)
    assert found.kl_stderr == pytest.approx(stderr, rel=1e-2)


def test_the_worst_contexts_are_the_worst_and_say_what_both_models_expected(
    model_of: Callable[..., Path], story: Path, tmp_path: Path
) -> None:
    original = load_model(model_of("llama"), LoadOptions())
    compressed = disturbed(original, 0.3)
    windows = windows_of(story, "sliding", window=29, stride=12)
    found = compare(original, compressed, windows, tmp_path)
    wide = [logprobs64(model, windows) for model in (original, compressed)]
    expected = torch.cat(kl64(*wide, windows)).sort(descending=True).values[:WORST]
    assert [one.kl for one in found.worst] == pytest.approx(expected.tolist(), rel=1e-3)
    assert found.worst[0].kl == pytest.approx(found.kl_max, rel=1e-6)
    for one in found.worst:
        ids = windows.input_ids[one.window].tolist()
        assert TOKENIZER.decode(ids[: one.position + 1]).endswith(one.text)
        assert one.actual == TOKENIZER.decode(ids[one.position + 1 : one.position + 2])
        for table, top in ((wide[0], one.original_top), (wide[1], one.compressed_top)):
            best = table[one.window][one.position].topk(TOP)
            assert [token for token, _ in top] == [TOKENIZER.decode([token]) for token in best.indices.tolist()]
            assert [share for _, share in top] == pytest.approx(best.values.exp().tolist(), rel=1e-3)


def test_the_histogram_counts_every_position_once(model_of: Callable[..., Path], story: Path, tmp_path: Path) -> None:
    original = load_model(model_of("llama"), LoadOptions())
    windows = windows_of(story, "gptq", window=29)
    run_pass(original, windows, TOKENIZER, keep=tmp_path)
    made = run_pass(disturbed(original, 0.3), windows, TOKENIZER, against=tmp_path)
    found = divergence(windows, parts(made), TOKENIZER)
    assert found.histogram_edges == EDGES
    values = torch.cat([part.kl for part in parts(made)]).double().clamp(EDGES[0], EDGES[-1]).numpy()
    assert found.histogram_counts == tuple(np.histogram(values, bins=np.array(EDGES))[0])
    assert sum(found.histogram_counts) == found.positions


def test_an_interrupted_comparison_ends_the_same(model_of: Callable[..., Path], story: Path, tmp_path: Path) -> None:
    original = load_model(model_of("llama"), LoadOptions())
    compressed = disturbed(original, 0.1)
    windows = windows_of(story, "sliding", window=29, stride=12)
    whole = compare(original, compressed, windows, tmp_path / "base")

    def stop(done: int, _total: int, _nats: float) -> None:
        if done > 5:
            raise KeyboardInterrupt

    arguments: dict[str, Any] = {"batch_size": 4, "against": tmp_path / "base", "folder": tmp_path / "results"}
    with pytest.raises(KeyboardInterrupt):
        run_pass(compressed, windows, TOKENIZER, on_progress=stop, **arguments)
    again = run_pass(compressed, windows, TOKENIZER, **arguments)
    assert again.resumed == 8
    assert divergence(windows, parts(again), TOKENIZER) == whole


def test_without_the_originals_pass_there_is_nothing_to_compare_with(
    model_of: Callable[..., Path], story: Path, tmp_path: Path
) -> None:
    model = load_model(model_of("llama"), LoadOptions())
    windows = windows_of(story, "gptq", window=29)
    with pytest.raises(EvalFailed, match="holds no complete pass of the original over these windows"):
        run_pass(model, windows, TOKENIZER, against=tmp_path)
    run_pass(model, windows, TOKENIZER, keep=tmp_path)
    with pytest.raises(EvalFailed, match="holds no complete pass"):
        run_pass(model, windows_of(story, "gptq", window=28), TOKENIZER, against=tmp_path)


logits = st.lists(st.floats(-30, 30, width=32), min_size=7, max_size=7)


@settings(max_examples=200, deadline=None)
@given(
    logits, logits, st.integers(0, 6), st.sets(st.integers(0, 6), max_size=3), st.sets(st.integers(0, 6), max_size=3)
)
def test_any_two_distributions(
    a: list[float], b: list[float], target: int, never_a: set[int], never_b: set[int]
) -> None:
    """KL by its definition, with tokens that one or the other model can't say."""
    first, second = (
        torch.tensor([[-math.inf if i in never else value for i, value in enumerate(values)]])
        for values, never in ((a, never_a), (b, never_b))
    )
    rows = score_rows(second, torch.tensor([target]), first)
    p, q = (table[0].double().softmax(-1) for table in (first, second))
    expected = sum(
        float(x) * (math.log(x) - (math.log(y) if y > 0 else -math.inf))
        for x, y in zip(p.tolist(), q.tolist(), strict=True)
        if x > 0
    )
    assert bool(rows.finite.all())
    assert rows.kl is not None
    if math.isinf(expected):
        # Where q underflows its logarithm doesn't.
        assert float(rows.kl) == math.inf or not never_b
    else:
        assert float(rows.kl) == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert float(rows.kl) >= 0
    nats = -math.log(q[target]) if q[target] > 0 else math.inf
    assert float(rows.nats) == pytest.approx(nats, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_distribution_is_seen(bad: float) -> None:
    table = torch.randn(3, 11)
    table[1, 4] = bad
    table = torch.cat([table, torch.full((1, 11), -math.inf)])
    assert score_rows(table, torch.zeros(4, dtype=torch.int64), None).finite.tolist() == [True, False, True, False]


def test_many_rows_of_a_large_vocabulary_are_cut_without_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(2, 37, 501)
    targets = torch.randint(-1, 501, (37,))
    whole = score_rows(a, targets, b)
    monkeypatch.setattr("llmshrink_eval.divergence.CELLS", 501 * 4)
    cut = score_rows(a, targets, b)
    for name in ("nats", "kl", "original_ids", "compressed_logprobs"):
        value: Tensor = getattr(cut, name)
        assert torch.equal(value, getattr(whole, name))
    assert (cut.nats[targets < 0] == 0).all()
