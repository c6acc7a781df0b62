"""Log-probabilities of continuations: sequences that share their beginning, and lm-eval's own answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmshrink_eval import continuations
from llmshrink_eval.continuations import Asked, ContinuationLM, Reader, answer_all, forest_holds
from llmshrink_eval.errors import EvalError
from llmshrink_eval.forest import ROOT, batch_of, pack
from transformers import AutoConfig, AutoModelForCausalLM

from llmshrink.demo import model_folder

SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def demo() -> Any:
    return AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32).eval()


def requests(count: int, longest: int = 40, *, seed: int = 0) -> list[Asked]:
    """Items with a beginning in common, three choices each of 1 to 5 tokens, of which two begin alike."""
    generator = torch.Generator().manual_seed(seed)

    def words(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, 500, (length,), generator=generator).tolist())

    shots, asked = words(longest // 4), []
    for number in range(count):
        context = shots + words(1 + (7 * number) % (longest // 2))
        first = words(3)
        for choice in (first, first[:2] + words(3), words(1)):
            asked.append(Asked((context + choice)[:-1], choice))
    return asked


def by_itself(model: Any, one: Asked) -> tuple[float, bool]:
    with torch.no_grad():
        logits = model(torch.tensor([one.tokens])).logits[0, -len(one.targets) :].double()
    targets = torch.tensor(one.targets)
    nats = logits.log_softmax(-1).gather(1, targets[:, None]).sum()
    return float(nats), bool((logits.argmax(-1) == targets).all())


@settings(max_examples=100, deadline=None, derandomize=True)
@given(SEQUENCES, st.integers(9, 30))
def test_every_sequence_is_a_path_of_one_row(sequences: list[list[int]], capacity: int) -> None:
    rows = pack(sequences, capacity)
    found: dict[int, list[int]] = {}
    for row in rows:
        assert len(row.tokens) == len(row.parents) == len(row.depths) <= capacity
        for node, (parent, depth) in enumerate(zip(row.parents, row.depths, strict=True)):
            assert (parent == ROOT and depth == 0) or (parent < node and row.depths[parent] == depth - 1)
        for sequence, path in row.paths:
            assert [row.parents[node] for node in path] == [ROOT, *path[:-1]]
            found[sequence] = [row.tokens[node] for node in path]
    assert found == dict(enumerate(sequences))


def test_what_is_shared_is_there_once() -> None:
    (row,) = pack([[1, 2, 3], [1, 2, 4], [5], [1, 2, 3]], 10)
    assert row.tokens == (1, 2, 3, 4, 5) and row.parents == (ROOT, 0, 1, 1, ROOT) and row.depths == (0, 1, 2, 2, 0)
    assert dict(row.paths) == {0: (0, 1, 2), 3: (0, 1, 2), 1: (0, 1, 3), 2: (4,)}
    mask = batch_of([row], torch.float32).mask[0, 0] == 0
    assert mask.int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [0, 0, 0, 0, 1]]


@pytest.mark.parametrize("way", ["forest", "alone", "whole logits"])
@pytest.mark.parametrize("most", [None, 1, 4])
def test_answers_are_those_of_each_sequence_by_itself(
    way: str, most: int | None, demo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "alone":
        monkeypatch.setattr(continuations, "forest_holds", lambda *_: False)
    if way == "whole logits":
        monkeypatch.setattr(continuations, "split", lambda *_: None)
    tokens: list[int] = []
    forward = type(demo).forward

    def counted(self: Any, input_ids: Any, **more: Any) -> Any:
        tokens.append(input_ids.numel())
        return forward(self, input_ids=input_ids, **more)

    monkeypatch.setattr(type(demo), "forward", counted)
    asked = requests(20)
    with torch.inference_mode():
        found = dict(answer_all(demo, asked, most))
    assert sorted(found) == list(range(len(asked)))
    read, monkeyed = sum(len(one.tokens) for one in asked), sum(tokens)
    monkeypatch.undo()
    assert monkeyed < 0.9 * read or way == "alone"
    for index, one in enumerate(asked):
        nats, greedy = by_itself(demo, one)
        assert found[index].nats == pytest.approx(nats, abs=1e-4)
        assert found[index].greedy == greedy
    if most is not None:
        assert max(tokens) <= most * max(len(one.tokens) for one in asked) or way != "alone"


class Window(torch.nn.Module):
    """Stands before a model, and lets each token see no further back in the row than a few places."""

    def __init__(self, model: Any, places: int) -> None:
        super().__init__()
        self._model, self._places = model, places
        self.config, self.dtype = model.config, model.dtype
        self.get_output_embeddings, self.get_input_embeddings = model.get_output_embeddings, model.get_input_embeddings

    def forward(self, input_ids: Any, attention_mask: Any = None, **more: Any) -> Any:
        length = input_ids.shape[1]
        near = torch.ones(length, length).tril() - torch.ones(length, length).tril(-self._places)
        mask = torch.zeros(1, 1, length, length).masked_fill_(near == 0, torch.finfo(torch.float32).min)
        given = mask if attention_mask is None else torch.minimum(mask, attention_mask)
        return self._model(input_ids=input_ids, attention_mask=given.expand(len(input_ids), -1, -1, -1), **more)


class Deaf(Window):
    """A model that knows no mask but its own."""

    def forward(self, input_ids: Any, attention_mask: Any = None, **more: Any) -> Any:
        return self._model(input_ids=input_ids, **more)


class Refusing(Window):
    """A model that takes no numbered positions."""

    def forward(self, input_ids: Any, attention_mask: Any = None, use_cache: bool = False) -> Any:
        return self._model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


@pytest.mark.parametrize(("kind", "places"), [(Window, 6), (Window, 100), (Deaf, 0), (Refusing, 0)])
def test_a_model_for_which_a_forest_is_wrong_reads_sequences_alone(kind: type[Window], places: int, demo: Any) -> None:
    model, asked = kind(demo, places), requests(5)
    with torch.inference_mode():
        assert not forest_holds(Reader(model, asked[0].tokens), asked, 120)
        found = dict(answer_all(model, asked))
    for index, one in enumerate(asked):
        assert found[index].nats == pytest.approx(by_itself_of(model, one), abs=1e-4)


def by_itself_of(model: Any, one: Asked) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([one.tokens])).logits[0, -len(one.targets) :]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(one.targets)[:, None]).sum())


def test_a_window_longer_than_the_sequences_is_no_hindrance(demo: Any) -> None:
    asked = requests(5)
    model = Window(demo, 400)
    with torch.inference_mode():
        assert not forest_holds(Reader(model, asked[0].tokens), asked, 500), "in a row that is longer it is one"
        assert forest_holds(Reader(model, asked[0].tokens), asked, 120)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 24},
        {
            "rope_type": "longrope",
            "original_max_position_embeddings": 24,
            "short_factor": [1.0] * 16,
            "long_factor": [4.0] * 16,
            "factor": 4.0,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_a_long_sequence_turns_no_other(rope: dict[str, Any]) -> None:
    config = AutoConfig.from_pretrained(model_folder())
    head = config.hidden_size // config.num_attention_heads
    for name in ("short_factor", "long_factor"):
        if name in rope:
            rope = {**rope, name: rope[name][:1] * (head // 2)}
    config.rope_parameters = {"rope_theta": config.rope_parameters["rope_theta"], **rope}
    model = AutoModelForCausalLM.from_pretrained(model_folder(), config=config, dtype=torch.float32).eval()
    asked = [one for one in requests(9) if len(one.tokens) <= 24]
    asked.insert(3, Asked(tuple(range(1, 60)), (60, 61)))
    with torch.inference_mode():
        found = dict(answer_all(model, asked))
    for index, one in enumerate(asked):
        assert found[index].nats == pytest.approx(by_itself(model, one)[0], abs=1e-4), index


@pytest.mark.parametrize(("context", "continuation"), [([3], []), ([], [3]), ([3], list(range(1, 50)))])
def test_what_cannot_be_scored_is_refused(context: list[int], continuation: list[int], demo: Any) -> None:
    from llmshrink.demo import tokenizer

    lm = ContinuationLM(pretrained=demo, tokenizer=tokenizer.build(512), batch_size=3, max_length=48)
    ordinary = _pairs(requests(4))
    with pytest.raises(EvalError, match=f"a continuation of {len(continuation)} tokens after {len(context)} can't be"):
        lm._loglikelihood_tokens([*ordinary, (("x", "y"), context, continuation)], disable_tqdm=True)


def test_half_precision_is_proven_by_what_must_not_matter() -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.bfloat16).eval()
    asked = requests(5)
    with torch.inference_mode():
        assert forest_holds(Reader(model, asked[0].tokens), asked, 120)
        deaf = Deaf(model, 0)
        assert not forest_holds(Reader(deaf, asked[0].tokens), asked, 120)


def _pairs(asked: Sequence[Asked]) -> list[Any]:
    return [
        ((str(index), ""), list(one.tokens[: len(one.tokens) + 1 - len(one.targets)]), list(one.targets))
        for index, one in enumerate(asked)
    ]


def test_answers_are_lm_evals_also_of_what_is_too_long(demo: Any, caplog: pytest.LogCaptureFixture) -> None:
    from lm_eval.models.huggingface import HFLM

    from llmshrink.demo import tokenizer

    asked = _pairs(requests(4))
    asked += [((None), list(range(1, 60)), list(range(60, 75))), (("last", ""), [3], [4])]
    found, told = {}, {}
    for kind in (HFLM, ContinuationLM):
        caplog.clear()
        lm = kind(pretrained=demo, tokenizer=tokenizer.build(512), batch_size=3, max_length=48)
        reported: list[Any] = []

        class Hook:
            def add_partial(self, _kind: str, request: Any, answer: Any, to: list[Any] = reported) -> None:
                to.append((request, round(answer[0], 3), answer[1]))

        lm.cache_hook = Hook()
        found[kind] = lm._loglikelihood_tokens(asked, disable_tqdm=True)
        told[kind] = [record.getMessage() for record in caplog.records if "Truncating" in record.getMessage()]
        assert sorted(request[0] for request, *_ in reported) == sorted(one[0][0] for one in asked if one[0])
    assert [greedy for _, greedy in found[ContinuationLM]] == [greedy for _, greedy in found[HFLM]]
    ours, theirs = ([nats for nats, _ in found[kind]] for kind in (ContinuationLM, HFLM))
    assert ours == pytest.approx(theirs, abs=1e-4)
    (said,), (theirs_said,) = told[ContinuationLM], told[HFLM]
    # Of 74 tokens 49 fit; lm-eval says 27, and leaves out 25 too.
    assert said == theirs_said.replace("Truncating 27", "Truncating 25")
