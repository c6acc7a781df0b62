"""Documents to rows of tokens: consecutive tokens of one text, texts packed end to end, conversations padded.

A document is never tokenized further than needed, though the tokens equal those of the whole (`llmshrink_eval.prefix`).
Where a model needs BOS (`llmshrink_eval.beginning`), every window begins with it, and is no longer for that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from llmshrink_eval.beginning import Beginning
from llmshrink_eval.leftout import Tally
from llmshrink_eval.prefix import tokenize_beginning
from llmshrink_eval.templates import Refused
from torch import Tensor

from llmshrink.calibration.records import Completion, Record, leave_out
from llmshrink.calibration.turns import NO_MASK, Writer, encode, encode_beginning, encode_conversation
from llmshrink.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PADDING = 0
"""Any id that every model has an embedding of: what stands on padding is masked, and the padding token of a tokenizer
may lie beyond the vocabulary."""


MARKS = 8
"""More tokens than are needed, for BOS that gives way to the one that every window begins with."""


def begun(
    ids: Sequence[int], said: Sequence[bool], seq_len: int, opening: tuple[int, ...], wanted: int
) -> tuple[list[int], list[bool]]:
    """The first `wanted` tokens of a text so laid out that each window of `seq_len` begins with BOS.

    One that begins with it anyway isn't given another, nor the rest of one that the window before cuts. opening: BOS's
    marks; empty to leave everything as it is.
    """
    if not opening:
        return list(ids[:wanted]), list(said[:wanted])
    size = len(opening)
    assert seq_len > size, (seq_len, size)
    found: list[int] = []
    marks: list[bool] = []
    place = 0
    while place < len(ids) and len(found) < wanted:
        own = tuple(ids[place : place + size]) == opening
        if not own:
            found += opening
            marks += [False] * size
            cut = (n for n in range(1, size) if n <= place and tuple(ids[place - n : place - n + size]) == opening)
            place += size - next(cut, size)
        taken = slice(place, place + (seq_len if own else seq_len - size))
        found += ids[taken]
        marks += said[taken]
        place = taken.stop
    return found[:wanted], marks[:wanted]


def continuous(pieces: Iterator[str], tokenizer: PreTrainedTokenizerBase, wanted: int) -> list[int]:
    """The first `wanted` tokens of one document (all of them where it has fewer, none where it is white space)."""
    found = tokenize_beginning(
        _Prefix(pieces).first, lambda prefix: (encode(tokenizer, prefix, special=False),), wanted
    )
    if found.whole and not found.prefix.strip():
        return []
    ids: list[int] = found.columns[0]
    return ids


class _Prefix:
    """The beginning of a text that arrives in pieces, as long as asked for."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self._pieces = pieces
        self._held: list[str] = []
        self._characters = 0
        self._ended = False

    def first(self, length: int) -> tuple[str, bool]:
        """(the first characters, whether there are no more)."""
        while self._characters <= length and not self._ended:
            piece = next(self._pieces, None)
            if piece is None:
                self._ended = True
            else:
                self._held.append(piece)
                self._characters += len(piece)
        self._held = ["".join(self._held)]
        return self._held[0][:length], self._ended and length >= self._characters


def packed(
    records: Iterator[Record],
    tokenizer: PreTrainedTokenizerBase,
    wanted: int,
    name: str,
    beginning: Beginning,
    *,
    masked: bool,
) -> tuple[list[int], list[bool]]:
    """Documents closed by EOS, end to end, until there are `wanted` tokens or no more documents.

    Returns ids, and whether each is a completion's (all are where nothing is masked).
    """
    ids: list[int] = []
    said: list[bool] = []
    end = tokenizer.eos_token_id
    for record in records:
        document = record.document
        prompt, rest = (document.prompt, document.completion) if isinstance(document, Completion) else ("", document)
        text = f"{prompt}{rest}"
        if not text or text.isspace():
            continue
        spans = [(len(prompt), len(text))] if masked else None
        room = wanted - len(ids) + MARKS
        found, counted, complete = encode_beginning(tokenizer, text, spans, name, room, special=True)
        new, counted = _opened(found, counted, beginning)
        if not new:
            continue
        if complete and end is not None and new[-1] != end:
            new.append(int(end))
            counted.append(True)
        counted[-1] |= new[-1] == end
        ids += new
        said += counted
        if len(ids) >= wanted:
            break
    return ids[:wanted], said[:wanted]


@dataclass(frozen=True)
class Padded:
    """Conversations, one a window. ids: int64, mask and said: bool, [at most as many as wanted, seq_len].

    dated: whether the chat template asked for the date. untold: records whose tools it doesn't write.
    """

    ids: Tensor
    mask: Tensor
    said: Tensor
    dated: bool
    untold: int


def padded(
    records: Iterator[Record],
    tokenizer: PreTrainedTokenizerBase,
    windows: int,
    seq_len: int,
    name: str,
    beginning: Beginning,
    tally: Tally,
    *,
    masked: bool,
) -> Padded:
    """One conversation a window; one of fewer than two tokens has no next token to be judged by and is left out, and so
    is one in which nobody whom a student is to imitate says anything, or that the chat template refuses.
    """
    if tokenizer.chat_template is None:
        raise CalibrationError(f"calibration data {name} has messages, the tokenizer has no chat template; give text")
    ids = torch.full((windows, seq_len), PADDING, dtype=torch.int64)
    mask = torch.zeros((windows, seq_len), dtype=torch.bool)
    said = torch.zeros((windows, seq_len), dtype=torch.bool)
    filled = silent = untold = 0
    dated = False
    for record in records:
        try:
            writer = Writer(tokenizer, name, record.tools)
            tokens, counted = encode_conversation(record, writer, seq_len, masked=masked)
        except Refused as error:
            leave_out(tally, record, f"can't be written: {error}", name)
            continue
        if tokens and beginning.put:  # else as the template writes it, whoever puts BOS before texts
            tokens, counted = _opened(tokens, counted, beginning)
            tokens, counted = tokens[:seq_len], counted[:seq_len]
        if len(tokens) >= 2 and any(counted[1:]):
            ids[filled, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
            mask[filled, : len(tokens)] = True
            said[filled, : len(tokens)] = torch.tensor(counted)
            filled += 1
            dated |= writer.dated
            untold += bool(record.tools) and not writer.writes_tools
        elif len(tokens) >= 2:
            silent += 1
            leave_out(tally, record, f"has none of the assistant's tokens among its first {seq_len}", name)
        else:
            leave_out(tally, record, f"has {len(tokens)} tokens, and one is judged by those before it", name)
        if filled == windows:
            break
    if silent and not filled:
        refuse_silence(name, silent, seq_len)
    return Padded(ids[:filled], mask[:filled], said[:filled], dated, untold)


def _opened(ids: list[int], counted: list[bool], beginning: Beginning) -> tuple[list[int], list[bool]]:
    """A text's ids as the model is to read them, and which of them count: BOS that was put there doesn't."""
    rest = counted[beginning.content(ids) :]
    opened = beginning.of(ids)
    return opened, [False] * (len(opened) - len(rest)) + rest


def refuse_silence(name: str, windows: int, seq_len: int) -> None:
    """Raise CalibrationError for a text without a token that is to be learned."""
    raise CalibrationError(
        f"calibration data {name}: in none of its {windows} windows of {seq_len} tokens is a token the assistant's; "
        f"give a longer --seq-len, or {NO_MASK}"
    )
