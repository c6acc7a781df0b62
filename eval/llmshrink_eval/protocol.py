"""From a text to the windows that every model of a comparison reads, and what exactly is counted.

**gptq**: as in the code of the GPTQ paper (Frantar et al. 2022, arXiv 2210.17323): the documents joined by blank lines
are tokenized at once, with the special tokens that the tokenizer itself adds, and cut into windows that don't overlap.
Each window is read on its own, so its first token is context and is not scored. The rest that fills no window is
dropped.

**sliding**: each document on its own, in windows that end `stride` tokens after one another (the last one where the
document ends) and reach back as far as the window allows. A window scores the tokens that no earlier one did, so that
every token but the document's first is scored exactly once, with at least window - stride tokens of context, or
everything that stands before it.

**BOS** (`beginning` says when): every window begins with it, whatever part of the text follows, and is no longer for
that. It's never scored, and then every token of the text is, the first one too: it's predicted from BOS.

**Words and bytes** belong to the scored tokens alone, so that word perplexity and bits per byte are about the same text
as the token perplexity. The tokenizer's offsets cut the text into consecutive pieces, one a token: a token owns what
lies between the furthest character that earlier tokens reached and the furthest that it reaches itself, so characters
that a normalizer skipped belong to the token after them, those at the very end to the last token, and a character that
was split over several tokens belongs to the first. Every byte is owned once; a word (a run of non-white characters)
counts with the token that owns its last character. A tokenizer that gives no offsets is refused: its counts would be
guesses.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from llmshrink_eval.beginning import Beginning, Bos, beginning_of
from llmshrink_eval.errors import EvalError
from llmshrink_eval.prefix import characters_for, tokenize_beginning
from llmshrink_eval.text import Text

Protocol: TypeAlias = Literal["gptq", "sliding"]

GPTQ_WINDOW = 2048
SEPARATOR = "\n\n"
WORD = re.compile(r"\S+")
PAD_ID = 0
"""Any id that every model has: what stands on padding is masked and never scored."""


@dataclass(frozen=True)
class Windows:
    """What is read, in windows, and which of it is scored.

    input_ids: int64 [windows, length], padded on the right. lengths: int64 [windows]. scored: bool [windows, length]:
    the token AT this position is predicted, from those before it in the window, and counted. document: int64
    [windows]: which document a window belongs to, -1 where windows run over documents. words, bytes: of the text that
    the scored tokens stand for. stride: tokens between the ends of consecutive windows. fingerprint: sha256 of ids,
    lengths and scored. bos: whether each window begins with BOS. lacks_bos: whether it should and there is none.
    """

    name: str
    protocol: Protocol
    window: int
    stride: int
    input_ids: Tensor
    lengths: Tensor
    scored: Tensor
    document: Tensor
    words: int
    bytes: int
    fingerprint: str
    bos: bool = False
    lacks_bos: bool = False

    @property
    def tokens(self) -> int:
        """How many tokens are scored."""
        return int(self.scored.sum())

    @cached_property
    def compared(self) -> Tensor:
        """bool [windows, length]: where next-token distributions are looked at, each place of the text once.

        `gptq`: every position that is not padding. `sliding`: those from which a scored token is predicted, since the
        others were looked at in an earlier window.
        """
        if self.protocol == "gptq":
            return torch.arange(self.input_ids.shape[1]) < self.lengths[:, None]
        return torch.nn.functional.pad(self.scored[:, 1:], (0, 1))

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True)
class _Tokens:
    """A tokenized text, or as much of its beginning as is read. ids: int64 [tokens], without BOS where that is put
    before windows. words, bytes: int64 [tokens], how much of the text each token owns."""

    ids: Tensor
    words: Tensor
    bytes: Tensor


@dataclass(frozen=True)
class _Span:
    """A window over a document's tokens: reads [begin, end), scores [first, end)."""

    begin: int
    first: int
    end: int


def build_windows(
    text: Text,
    tokenizer: Any,
    *,
    protocol: Protocol,
    limit: int,
    window: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    bos: Bos = "auto",
    model_type: str | None = None,
) -> Windows:
    """Tokenize a text and cut it.

    limit: the longest input of the model, in tokens. window: 2048 or the limit, whichever is less, where None. stride:
    for `sliding`, half a window where None. max_tokens: read no more of the text than this, BOS counted with it (for
    `gptq`: as many whole windows as fit); everything where None. bos: whether each window begins with BOS; model_type:
    of the model's config, for "auto".
    Raises EvalError if window, stride or max_tokens are out of range, if the text is too short for them, if the
    tokenizer gives no offsets, and for a BOS that there isn't.
    """
    window = min(GPTQ_WINDOW, limit) if window is None else window
    stride = _checked_stride(protocol, window, stride, limit)
    if max_tokens is not None and max_tokens < 2:
        raise EvalError(f"--max-tokens {max_tokens}: at least 2, since a token is predicted from those before it")
    if not getattr(tokenizer, "is_fast", False):
        raise EvalError(
            f"the tokenizer ({type(tokenizer).__name__}) gives no character offsets, so words and bytes can't be"
            " counted exactly; save its fast form (tokenizer.json) beside the model"
        )
    try:
        beginning = beginning_of(tokenizer, model_type, bos)
    except ValueError as error:
        raise EvalError(str(error)) from error
    # What of a window is text, and what each text costs beyond its own tokens.
    opening = len(beginning.opening)
    room = window - opening
    if room < 1:
        raise EvalError(f"--window {window}: it begins with BOS, of {opening} marks; at least {opening + 1}")
    if protocol == "sliding" and stride > room:
        raise EvalError(f"--stride {stride}: at most {room}, since each window begins with BOS, of {opening} marks")
    if protocol == "gptq":
        parts = [_tokenize(SEPARATOR.join(text.documents), tokenizer, beginning, max_tokens)]
        there = len(parts[0].ids) + opening * -(-len(parts[0].ids) // room)
    else:
        parts = _tokenize_documents(text.documents, tokenizer, beginning, max_tokens)
        there = sum(len(part.ids) + opening for part in parts)
    if max_tokens is not None and max_tokens > there:
        raise EvalError(
            f"--max-tokens {max_tokens:,}: {text.name} has {there:,} tokens{_left_out(text)}; ask for fewer, or leave"
            " --max-tokens out"
        )
    if protocol == "gptq":
        if max_tokens is not None and max_tokens < window:
            raise EvalError(
                f"--max-tokens {max_tokens:,}: less than one window of {window:,} tokens; ask for {window:,} or more,"
                " or take a smaller --window"
            )
        spans = [_gptq_spans(min(there, max_tokens or there), window, opening, text)]
    else:
        spans = list(_sliding_spans([len(part.ids) for part in parts], max_tokens, room, stride, opening))
    return _assemble(text, protocol, window, stride, parts, spans, beginning)


def _checked_stride(protocol: Protocol, window: int, stride: int | None, limit: int) -> int:
    if not 2 <= window <= limit:
        raise EvalError(f"--window {window}: between 2 and the model's limit of {limit} tokens")
    if protocol == "gptq":
        if stride not in (None, window):
            raise EvalError(f"--stride {stride}: gptq's windows don't overlap; use --protocol sliding")
        return window
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= stride < window:
        raise EvalError(f"--stride {stride}: between 1 and {window - 1}, less than the window of {window} tokens")
    return stride


def _tokenize_documents(
    documents: tuple[str, ...], tokenizer: Any, beginning: Beginning, max_tokens: int | None
) -> list[_Tokens]:
    """Each on its own: all of them, or no more than it takes to reach max_tokens."""
    parts: list[_Tokens] = []
    seen = 0
    for document in documents:
        if max_tokens is not None and seen >= max_tokens:
            break
        parts.append(_tokenize(document, tokenizer, beginning, None if max_tokens is None else max_tokens - seen))
        seen += len(parts[-1].ids) + len(beginning.opening)
    return parts


def _tokenize(text: str, tokenizer: Any, beginning: Beginning, wanted: int | None) -> _Tokens:
    """The tokens as `tokenizer(text)` gives them, or the first of them, and what each owns of the text."""

    def columns(prefix: str) -> tuple[list[Any], ...]:
        # verbose=False: a text longer than the model's limit is what windows are for, and no reason to warn.
        encoded = tokenizer(prefix, return_offsets_mapping=True, verbose=False)
        return list(encoded["input_ids"]), [end for _, end in encoded["offset_mapping"]]

    if wanted is None:
        prefix, whole = text, True
        ids, ends = columns(text)
    else:
        found = tokenize_beginning(
            lambda length: (text[:length], length >= len(text)),
            columns,
            wanted + max(1, len(beginning.marks)),  # those that the tokenizer puts before a text may go
            characters_for(wanted),
        )
        (ids, ends), prefix, whole = found.columns, found.prefix, found.complete
    own = beginning.content(ids)
    made = torch.tensor(ids[own:], dtype=torch.int64)
    if not len(made):
        return _Tokens(made, made.clone(), made.clone())
    reached = torch.tensor(ends[own:], dtype=torch.int64).cummax(0).values
    if whole:
        reached[-1] = len(prefix)
    return _Tokens(made, _owned(_word_ends(prefix), reached), _owned(_byte_ends(prefix), reached))


def _owned(cumulative: Tensor, reached: Tensor) -> Tensor:
    """cumulative: int64 [characters + 1], what lies before each character. Returns how much of it each token owns."""
    return cumulative[reached].diff(prepend=torch.zeros(1, dtype=torch.int64))


def _byte_ends(text: str) -> Tensor:
    sizes = torch.tensor([0, *(len(character.encode("utf-8", "surrogatepass")) for character in text)])
    return sizes.cumsum(0)


def _word_ends(text: str) -> Tensor:
    ends = torch.zeros(len(text) + 1, dtype=torch.int64)
    ends[torch.tensor([match.end() for match in WORD.finditer(text)], dtype=torch.int64)] = 1
    return ends.cumsum(0)


def _gptq_spans(tokens: int, window: int, opening: int, text: Text) -> list[_Span]:
    """tokens: with BOS before each window, where that is put; the spans are of the text alone."""
    if tokens < window:
        raise EvalError(
            f"--window {window}: {text.name} gives {tokens:,} tokens, less than one window{_left_out(text)}; take a"
            " smaller --window or a longer text"
        )
    room = window - opening
    return [
        _Span(number * room, number * room + _context(opening), (number + 1) * room)
        for number in range(tokens // window)
    ]


def _context(opening: int) -> int:
    """How many of a text's first tokens aren't scored: the one that nothing predicts, where no BOS does."""
    return 0 if opening else 1


def _sliding_spans(
    lengths: list[int], max_tokens: int | None, room: int, stride: int, opening: int
) -> Iterator[list[_Span]]:
    """For each document its windows; a document of one token has none, as there is nothing to predict.

    lengths: of the text alone. room: for text in a window. opening: BOS's marks, which precede it.
    """
    left = sum(length + opening for length in lengths) if max_tokens is None else max_tokens
    for length in lengths:
        tokens = min(length + opening, left)
        left -= tokens
        tokens -= opening
        if tokens <= _context(opening):
            yield []
            continue
        ends = [*range(min(room, tokens), tokens, stride), tokens]
        firsts = itertools.chain([_context(opening)], ends)
        yield [_Span(max(0, end - room), first, end) for first, end in zip(firsts, ends, strict=False)]


def _left_out(text: Text) -> str:
    return f" ({text.left_out.words()})" if text.left_out.count else ""


def _assemble(
    text: Text,
    protocol: Protocol,
    window: int,
    stride: int,
    parts: list[_Tokens],
    spans: list[list[_Span]],
    beginning: Beginning,
) -> Windows:
    flat = [(number, span) for number, group in enumerate(spans) for span in group]
    if not flat:
        raise EvalError(
            f"{text.name}: no document has two tokens, so there is nothing to predict{_left_out(text)}; give a longer"
            " text"
        )
    opening = beginning.opening
    lengths = torch.tensor([len(opening) + span.end - span.begin for _, span in flat])
    input_ids = torch.full((len(flat), int(lengths.max())), PAD_ID, dtype=torch.int64)
    scored = torch.zeros_like(input_ids, dtype=torch.bool)
    words = size = 0
    for row, (number, span) in enumerate(flat):
        part, length = parts[number], int(lengths[row])
        input_ids[row, : len(opening)] = torch.tensor(opening, dtype=torch.int64)
        input_ids[row, len(opening) : length] = part.ids[span.begin : span.end]
        scored[row, length - (span.end - span.first) : length] = True
        words += int(part.words[span.first : span.end].sum())
        size += int(part.bytes[span.first : span.end].sum())
    document = torch.tensor([-1 if protocol == "gptq" else number for number, _ in flat])
    digest = hashlib.sha256(repr(tuple(input_ids.shape)).encode())
    for tensor in (input_ids, lengths, scored):
        digest.update(tensor.numpy().tobytes())
    return Windows(
        name=text.name,
        protocol=protocol,
        window=window,
        stride=stride,
        input_ids=input_ids,
        lengths=lengths,
        scored=scored,
        document=document,
        words=words,
        bytes=size,
        fingerprint=digest.hexdigest(),
        bos=beginning.put,
        lacks_bos=beginning.lacking,
    )
