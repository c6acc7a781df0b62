"""The chunked loss against autograd on whole logits, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmshrink.distillation.chunked import Tail, chunk_rows, chunked_loss
from llmshrink.distillation.objective import DIVERGENCES, IGNORED, Objective, TopK, row_losses

ROWS, WIDTH = 13, 6


def whole(hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher: Any, goal: Objective, **more: Any) -> Tensor:
    """The definition, as anyone would write it: all logits at once, torch's own losses and gradients."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if more.get("tail") is not None:
        logits = more["tail"](logits)
    loss = logits.new_zeros(())
    if more.get("labels") is not None:
        loss = goal.alpha * torch.nn.functional.cross_entropy(
            logits, more["labels"], ignore_index=IGNORED, reduction="sum"
        )
    p_s = (logits / goal.temperature).softmax(-1)
    if isinstance(teacher, TopK):
        kept = p_s.gather(-1, teacher.ids)
        tail = p_s.scatter(-1, teacher.ids, 0).sum(-1, keepdim=True)
        everything = teacher.ids.shape[-1] == p_s.shape[-1]  # then autograd would divide by a bucket of nothing
        p_s = kept if everything else torch.cat([kept, tail], -1)
        said = teacher.logprobs if everything else torch.cat([teacher.logprobs, teacher.tail[:, None]], -1)
        p_t = said.exp()
    else:
        p_t = (teacher / goal.temperature).softmax(-1)
    m = goal.beta * p_t + (1 - goal.beta) * p_s

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return torch.special.xlogy(p, p).sum() - torch.special.xlogy(p, q).sum()

    found = {
        "forward_kl": lambda: kl(p_t, p_s),
        "reverse_kl": lambda: kl(p_s, p_t),
        "jsd": lambda: goal.beta * kl(p_t, m) + (1 - goal.beta) * kl(p_s, m),
    }[goal.divergence]()
    return loss + (1 - goal.alpha) * goal.temperature**2 * found


def problem(vocabulary: int, seed: int, *, bias: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=g, requires_grad=True)
    weight = torch.randn(vocabulary, WIDTH, dtype=torch.float64, generator=g, requires_grad=True)
    shift = torch.randn(vocabulary, dtype=torch.float64, generator=g, requires_grad=True) if bias else None
    teacher = 2 * torch.randn(ROWS, vocabulary, dtype=torch.float64, generator=g)
    labels = torch.randint(0, vocabulary, (ROWS,), generator=g)
    labels[::4] = IGNORED
    return hidden, weight, shift, teacher, labels


@given(
    vocabulary=st.sampled_from([1, 2, 7, 31, 130]),
    chunk=st.sampled_from([1, 3, 4, 13, 50]),
    alpha=st.sampled_from([0.0, 0.3, 1.0]),
    temperature=st.sampled_from([0.5, 1.0, 2.5]),
    divergence=st.sampled_from(DIVERGENCES),
    beta=st.sampled_from([0.1, 0.5]),
    k=st.sampled_from([None, 1, 5, 200]),
    tail=st.sampled_from([None, Tail(cap=1.5), Tail(factor=0.3)]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_value_and_gradients_are_autograds(
    vocabulary: int, chunk: int, alpha: float, temperature: float, divergence: Any, beta: float, k: int | None,
    tail: Tail | None, bias: bool, seed: int,
) -> None:  # fmt: skip
    hidden, weight, shift, teacher, labels = problem(vocabulary, seed, bias=bias)
    goal = Objective(alpha, temperature, divergence, beta)
    said: Any = teacher if k is None else TopK.of(teacher, k, temperature)

    def rows(where: slice) -> Tensor | TopK:
        return TopK(said.ids[where], said.logprobs[where], said.tail[where]) if k else said[where]

    inputs = [each for each in (hidden, weight, shift) if each is not None]
    expected = whole(hidden, weight, shift, said, goal, labels=labels, tail=tail)
    wanted = torch.autograd.grad(expected, inputs, allow_unused=True, materialize_grads=True)
    found = chunked_loss(hidden, weight, shift, rows, goal, labels=labels, tail=tail, chunk=chunk)
    torch.testing.assert_close(found.total, expected, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(alpha * found.entropy + (1 - alpha) * found.divergence, found.total.detach())
    for ours, autograds in zip(torch.autograd.grad(3 * found.total, inputs), wanted, strict=True):
        torch.testing.assert_close(ours, 3 * autograds, atol=1e-8, rtol=1e-8)


def test_nothing_is_made_for_what_needs_no_gradient() -> None:
    hidden, weight, shift, teacher, _ = problem(31, 0, bias=True)
    total = chunked_loss(
        hidden, weight.detach(), None if shift is None else shift.detach(), teacher.__getitem__, Objective()
    ).total
    assert total.grad_fn.gradients[1:] == (None, None)  # type: ignore[union-attr]
    with torch.no_grad():
        assert chunked_loss(hidden, weight, shift, teacher.__getitem__, Objective()).total > 0


def test_half_precision_is_summed_in_single() -> None:
    hidden, weight, _, teacher, labels = problem(130, 1, bias=False)
    goal = Objective(alpha=0.3)
    exact = chunked_loss(hidden, weight, None, teacher.__getitem__, goal, labels=labels)
    narrow = hidden.detach().bfloat16().requires_grad_()
    single = weight.detach().float().requires_grad_()
    found = chunked_loss(narrow, single, None, teacher.float().__getitem__, goal, labels=labels, chunk=4)
    assert found.total.dtype == torch.float32
    assert abs(float(found.total.detach() / exact.total.detach()) - 1) < 2e-2
    found.total.backward()
    assert (narrow.grad is not None and narrow.grad.dtype == torch.bfloat16) and single.grad is not None
    assert single.grad.dtype == torch.float32


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_what_is_no_number_is_seen(divergence: Any, whose: str) -> None:
    hidden, weight, _, teacher, _ = problem(31, 0, bias=False)
    spoiled = hidden.detach().clone()
    if whose == "student":
        spoiled[3, 0] = math.nan
    else:
        teacher[3, 0] = math.nan
    assert chunked_loss(spoiled, weight, None, teacher.__getitem__, Objective(divergence=divergence)).total.isnan()


def test_a_second_backward_is_refused() -> None:
    hidden, weight, _, teacher, _ = problem(7, 0, bias=False)
    total = chunked_loss(hidden, weight, None, teacher.__getitem__, Objective()).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward"):
        total.backward()


def test_no_rows_no_loss() -> None:
    weight = torch.ones(5, 4, requires_grad=True)
    total = chunked_loss(
        torch.ones(0, 4, requires_grad=True), weight, None, lambda rows: torch.ones(0, 5), Objective()
    ).total
    total.backward()
    assert float(total) == 0
    assert not weight.grad.any()  # type: ignore[union-attr]


def test_the_cross_entropy_form_has_the_same_gradient() -> None:
    """alpha = 0, T = 1: KL(p_t || p_s) and CE(p_t, p_s) differ by the teacher's entropy, whatever the student."""
    hidden, weight, _, teacher, _ = problem(31, 2, bias=False)
    logits = hidden @ weight.t()
    p_t = teacher.softmax(-1)
    cross = -(p_t * logits.log_softmax(-1)).sum()
    entropy = -(p_t * teacher.log_softmax(-1)).sum()
    found = chunked_loss(hidden, weight, None, teacher.__getitem__, Objective())
    torch.testing.assert_close(found.total, cross - entropy)
    torch.testing.assert_close(torch.autograd.grad(found.total, hidden), torch.autograd.grad(cross, hidden))


def test_the_tail_bucket_removes_the_bias_of_the_likeliest_tokens() -> None:
    """A teacher known by its 2 likeliest of 5 tokens (.4, .3, rest .3): who is taught by them alone gives the rest
    nothing; with the bucket the student ends at the teacher's own probabilities for them, and .3 for the rest."""
    teacher = torch.tensor([[0.4, 0.3, 0.1, 0.1, 0.1]], dtype=torch.float64).log()
    full = TopK.of(teacher, 2)
    alone = TopK(full.ids, full.logprobs - full.logprobs.logsumexp(-1, keepdim=True), torch.full((1,), -torch.inf))
    ends = []
    for said in (full, alone):
        logits = torch.zeros(1, 5, dtype=torch.float64)
        for _ in range(4000):
            logits -= 0.5 * row_losses(Objective(), logits, said, None)[2]
        ends.append(logits.softmax(-1)[0])
    torch.testing.assert_close(ends[0], teacher.exp()[0], atol=1e-6, rtol=0)
    assert float(ends[1][2:].sum()) < 1e-2
    assert abs(float(ends[1][0]) - 4 / 7) < 1e-2


def test_what_the_bucket_leaves_out_is_the_divergence_within_it_and_less_the_more_is_kept() -> None:
    """A teacher that is unsure (a Zipf law over 300 tokens), and a student elsewhere: the cached loss is too small by
    the bucket's probability times the KL inside it, and its gradient differs by the less."""
    g = torch.Generator().manual_seed(0)
    teacher = (1.0 / torch.arange(1, 301, dtype=torch.float64)).log()[None]
    student = torch.randn(1, 300, dtype=torch.float64, generator=g)
    _, exact, slope = row_losses(Objective(), student, teacher, None)
    p_t, p_s = teacher.softmax(-1)[0], student.softmax(-1)[0]
    short, off = [], []
    for k in (1, 16, 64, 128, 299, 300):
        _, cached, bucketed = row_losses(Objective(), student, TopK.of(teacher, k), None)
        t, s = p_t[k:].sum(), p_s[k:].sum()
        within = (p_t[k:] * (p_t[k:] / t / (p_s[k:] / s)).log()).sum()
        torch.testing.assert_close(exact - cached, within[None], atol=1e-12, rtol=0)
        short.append(float(exact - cached))
        off.append(float((slope - bucketed).abs().sum()))
    assert short == sorted(short, reverse=True) and off == sorted(off, reverse=True)
    assert short[2] > 0.1 and short[2] < 0.6 * short[0]  # with 64 of 300 tokens kept it is far from nothing
    assert max(short[-2:]) < 1e-12 and max(off[-2:]) < 1e-12  # a bucket of one token, or of none, leaves nothing out


def test_chunks_hold_a_fixed_number_of_logits() -> None:
    device = torch.device("cuda")
    assert chunk_rows(128_256, device) == 32 and chunk_rows(4096, device) == 1024
    assert chunk_rows(1 << 23, device) == 1


def test_on_a_cpu_a_chunk_stays_in_the_caches() -> None:
    cpu = torch.device("cpu")
    assert [chunk_rows(size, cpu) for size in (4096, 32_768, 128_256, 1 << 23)] == [128, 128, 32, 1]


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"alpha": 1.5}, "alpha 1.5"),
        ({"alpha": math.nan}, "alpha nan"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"temperature": math.inf}, "temperature inf"),
        ({"divergence": "kl"}, "divergence kl"),
        ({"beta": 1.0}, "beta 1.0"),
    ],
)
def test_an_impossible_objective_is_refused(fault: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Objective(**fault)
