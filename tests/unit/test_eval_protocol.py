"""The windows: the GPTQ paper's to the token, sliding ones that score everything once, counts that belong to them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmshrink_eval.errors import EvalError
from llmshrink_eval.leftout import LeftOut
from llmshrink_eval.protocol import PAD_ID, build_windows
from llmshrink_eval.text import Text

from llmshrink.demo.tokenizer import build

TOKENIZER: Any = build(128)
LIMIT = 128


def text_of(*documents: str) -> Text:
    return Text("a text", documents)


def with_bos(folder: Path) -> Any:
    """The same tokenizer, putting <|end|> before every text, as Llama's does its <s>."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = build(128)
    token, number = tokenizer.eos_token, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{token} $A", pair=None, special_tokens=[(token, number)]
    )
    return tokenizer


def test_gptq_is_the_papers_own(story: Path) -> None:
    documents = story.read_text().split("\n\n")
    windows = build_windows(text_of(*documents), TOKENIZER, protocol="gptq", window=48, limit=LIMIT)
    # datautils.get_wikitext2 and opt.opt_eval of github.com/IST-DASLab/gptq
    testenc = TOKENIZER("\n\n".join(documents), return_tensors="pt", verbose=False).input_ids
    nsamples = testenc.numel() // 48
    assert len(windows) == nsamples
    for i in range(nsamples):
        assert torch.equal(windows.input_ids[i], testenc[0, i * 48 : (i + 1) * 48])
        assert windows.scored[i].tolist() == [False] + [True] * 47
    assert windows.tokens == nsamples * 47
    assert windows.compared.all()
    assert windows.document.unique().tolist() == [-1]
    assert windows.stride == windows.window == 48


def test_the_tokenizers_own_special_tokens_come_once_a_window(tmp_path: Path) -> None:
    tokenizer = with_bos(tmp_path)
    text = text_of("one two", "three four five")
    joined = build_windows(text, tokenizer, protocol="gptq", window=4, limit=LIMIT)
    assert (joined.input_ids == tokenizer.eos_token_id).sum() == len(joined) and joined.bos
    sliding = build_windows(text, tokenizer, protocol="sliding", window=100, limit=LIMIT)
    assert sliding.input_ids[:, 0].tolist() == [tokenizer.eos_token_id] * 2
    # The first real token of a document has something to be predicted from, and owns its own bytes.
    assert sliding.bytes == len("one two") + len("three four five")
    assert sliding.words == 5


def test_default_windows(story: Path) -> None:
    text = text_of(story.read_text())
    assert build_windows(text, TOKENIZER, protocol="gptq", limit=64).window == 64
    sliding = build_windows(text, TOKENIZER, protocol="sliding", limit=64)
    assert (sliding.window, sliding.stride) == (64, 32)
    assert build_windows(text_of("word " * 3000), TOKENIZER, protocol="gptq", limit=10_000).window == 2048


documents = st.lists(st.text(alphabet="ab é\n😀T", max_size=60), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(documents, st.integers(2, 20), st.data())
def test_sliding_scores_every_token_but_the_first_once_with_all_the_context_there_is(
    texts: list[str], window: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, window - 1))
    tokens = [TOKENIZER(text)["input_ids"] for text in texts]
    arguments: dict[str, Any] = {"protocol": "sliding", "window": window, "stride": stride, "limit": LIMIT}
    if all(len(ids) < 2 for ids in tokens):
        with pytest.raises(EvalError, match="nothing to predict"):
            build_windows(text_of(*texts), TOKENIZER, **arguments)
        return
    windows = build_windows(text_of(*texts), TOKENIZER, **arguments)
    for number, ids in enumerate(tokens):
        rows = (windows.document == number).nonzero().squeeze(-1).tolist()
        reached = 1
        for row in rows:
            length = int(windows.lengths[row])
            new = int(windows.scored[row].sum())
            end = reached + new
            begin = end - length
            assert begin == max(0, end - window)
            assert windows.input_ids[row, :length].tolist() == ids[begin:end]
            assert windows.scored[row].nonzero().squeeze(-1).tolist() == list(range(length - new, length))
            assert new <= (window - 1 if row == rows[0] else stride)
            assert windows.compared[row].nonzero().squeeze(-1).tolist() == list(range(length - new - 1, length - 1))
            reached = end
        assert reached == len(ids) or (not rows and len(ids) < 2)
    padding = torch.arange(windows.input_ids.shape[1]) >= windows.lengths[:, None]
    assert not windows.scored[padding].any()
    assert (windows.input_ids[padding] == PAD_ID).all()


@settings(max_examples=150, deadline=None)
@given(documents, st.integers(2, 20))
def test_bytes_and_words_are_those_of_the_scored_tokens(texts: list[str], window: int) -> None:
    """Only a document's first token isn't scored: with a token before it that is no text, everything is counted."""
    tokenizer = with_bos(Path())
    kept = [text for text in texts if text]
    if not kept:
        return
    windows = build_windows(text_of(*kept), tokenizer, protocol="sliding", window=window, limit=LIMIT)
    assert windows.bytes == sum(len(text.encode()) for text in kept)
    assert windows.words == sum(len(text.split()) for text in kept)


def test_what_is_not_scored_is_not_counted() -> None:
    document = "ab cd ef gh"
    assert len(TOKENIZER(document)["input_ids"]) == len(document)  # so that counts can be done by hand
    windows = build_windows(text_of(document), TOKENIZER, protocol="gptq", window=4, limit=LIMIT)
    # "ab c|d ef|(gh)": the first of each window is context, and what fills no window is dropped. The word cd ends with
    # the unscored d.
    assert (windows.bytes, windows.words) == (6, 2)
    sliding = build_windows(text_of("é b"), TOKENIZER, protocol="sliding", window=4, limit=LIMIT)
    # é is two tokens of which the first owns it, and is not scored.
    assert (sliding.tokens, sliding.bytes, sliding.words) == (3, 2, 1)


def test_max_tokens_takes_the_beginning(story: Path) -> None:
    document = story.read_text()
    ids = TOKENIZER(document, verbose=False)["input_ids"]
    windows = build_windows(text_of(document), TOKENIZER, protocol="gptq", window=32, max_tokens=100, limit=LIMIT)
    assert windows.input_ids.flatten().tolist() == ids[:96]
    parts = (document[:40], document[40:200], document[200:])
    sliding = build_windows(text_of(*parts), TOKENIZER, protocol="sliding", window=32, max_tokens=100, limit=LIMIT)
    first = len(TOKENIZER(parts[0])["input_ids"])
    assert sliding.tokens == 97
    assert int((sliding.scored.sum(1) * (sliding.document == 0)).sum()) == first - 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"window": 129}, "--window 129: between 2 and the model's limit of 128 tokens"),
        ({"window": 1}, "--window 1: between 2"),
        ({"window": 8, "stride": 4}, "--stride 4: gptq's windows don't overlap; use --protocol sliding"),
        ({"protocol": "sliding", "window": 8, "stride": 8}, "--stride 8: between 1 and 7"),
        ({"protocol": "sliding", "window": 8, "stride": 0}, "--stride 0: between 1 and 7"),
        ({"window": 8, "max_tokens": 1}, "--max-tokens 1: at least 2"),
        ({"window": 8, "max_tokens": 5000}, "--max-tokens 5,000: a text has 30 tokens"),
        ({"protocol": "sliding", "window": 8, "max_tokens": 31}, "--max-tokens 31: a text has 28 tokens"),
        ({"window": 40}, "--window 40: a text gives 30 tokens, less than one window"),
        ({"window": 20, "max_tokens": 10}, "--max-tokens 10: less than one window of 20 tokens"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(arguments: dict[str, Any], says: str) -> None:
    text = text_of("ab cd ef gh ij", "kl mn op qr st")
    counts = [len(TOKENIZER(document)["input_ids"]) for document in text.documents]
    assert counts == [14, 14] and len(TOKENIZER("\n\n".join(text.documents))["input_ids"]) == 30
    with pytest.raises(EvalError, match=says) as caught:
        build_windows(text, TOKENIZER, **{"protocol": "gptq", "limit": LIMIT, **arguments})
    assert "\n" not in str(caught.value)


def test_too_little_text_says_what_was_left_out() -> None:
    text = Text("a text", ("ab cd",), LeftOut(1, 2, ("line 2 has text that is null",)))
    left = r"\(1 of 2 records was left out: line 2 has text that is null\)"
    for asked in ({"window": 9}, {"window": 4, "max_tokens": 40}):
        arguments: dict[str, Any] = {"protocol": "gptq", "limit": LIMIT, **asked}
        with pytest.raises(EvalError, match=f"a text .* tokens.* {left}"):
            build_windows(text, TOKENIZER, **arguments)


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(EvalError, match=r"the tokenizer \(Slow\) gives no character offsets"):
        build_windows(text_of("a b"), Slow(), protocol="gptq", window=2, limit=LIMIT)


def test_a_long_text_raises_no_warning(story: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        build_windows(text_of(story.read_text() * 2), build(128), protocol="gptq", window=64, limit=LIMIT)
    assert not caplog.records


def test_the_fingerprint_follows_what_is_read_and_scored() -> None:
    def fingerprint(document: str, **arguments: Any) -> str:
        made = {"protocol": "sliding", "window": 8, "stride": 4, "limit": LIMIT, **arguments}
        return build_windows(text_of(document), TOKENIZER, **made).fingerprint

    one = fingerprint("ab cd ef gh ij kl")
    assert one == fingerprint("ab cd ef gh ij kl")
    assert len({one, fingerprint("ab cd ef gh ij km"), fingerprint("ab cd ef gh ij kl", stride=3)}) == 3


def test_wikitext_is_counted_whole(wiki7m: Path, wikitext2_test: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(wiki7m)
    document = wikitext2_test.read_text(encoding="utf-8")[:50_000]
    ids = tokenizer(document, verbose=False)["input_ids"]
    windows = build_windows(text_of(document), tokenizer, protocol="sliding", window=64, limit=512)
    assert windows.tokens == len(ids) - 1
    first = len(tokenizer.decode(ids[:1]).encode())
    assert windows.bytes == len(document.encode()) - first
    assert len(document.split()) - windows.words in (0, 1)
