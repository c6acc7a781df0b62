"""Documents to rows of tokens: consecutive tokens of one text, texts packed end to end, conversations padded.

A document is never tokenized further than needed, though the tokens must equal those of the whole. A tokenizer's choice
at one place depends on what follows only within a word or a short run, so a prefix is tokenized and its last
`MARGIN_TOKENS` tokens are thrown away. How long the prefix must be follows from the characters per token measured on
its beginning.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmshrink.calibration.text import Completion, Document
from llmshrink.calibration.turns import NO_MASK, encode, encode_conversation, encode_spans, is_conversation
from llmshrink.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARGIN_TOKENS = 1024
PROBE_CHARACTERS = 1 << 14


def continuous(pieces: Iterator[str], tokenizer: PreTrainedTokenizerBase, wanted: int) -> list[int]:
    """The first `wanted` tokens of one document (all of them where it has fewer, none where it is white space)."""
    text = _Prefix(pieces)
    length = PROBE_CHARACTERS
    while True:
        prefix = text.first(length)
        ids = encode(tokenizer, prefix, special=False)
        if text.ended and len(prefix) == text.characters:
            return ids[:wanted] if prefix.strip() else []
        if len(ids) >= wanted + MARGIN_TOKENS:
            return ids[:wanted]
        characters_per_token = len(prefix) / max(len(ids), 1)
        length = int(1.1 * characters_per_token * (wanted + MARGIN_TOKENS)) + PROBE_CHARACTERS


class _Prefix:
    """The beginning of a text that arrives in pieces, as long as asked for."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self._pieces = pieces
        self._held: list[str] = []
        self.characters = 0
        self.ended = False

    def first(self, length: int) -> str:
        while self.characters <= length and not self.ended:
            piece = next(self._pieces, None)
            if piece is None:
                self.ended = True
            else:
                self._held.append(piece)
                self.characters += len(piece)
        self._held = ["".join(self._held)]
        return self._held[0][:length]


def packed(
    texts: Iterator[str | Completion], tokenizer: PreTrainedTokenizerBase, wanted: int, name: str, *, masked: bool
) -> tuple[list[int], list[bool]]:
    """Documents closed by EOS, end to end, until there are `wanted` tokens or no more documents.

    Returns ids, and whether each is a completion's (all are where nothing is masked).
    """
    ids: list[int] = []
    said: list[bool] = []
    end = tokenizer.eos_token_id
    for document in texts:
        prompt, rest = (document.prompt, document.completion) if isinstance(document, Completion) else ("", document)
        text = f"{prompt}{rest}"
        if not text.strip():
            continue
        if masked:
            if isinstance(document, str):
                raise CalibrationError(
                    f"calibration data {name} mixes texts with prompts and their completions; give one kind, "
                    f"or {NO_MASK}"
                )
            new, counted = encode_spans(tokenizer, text, [(len(prompt), len(text))], name, special=True)
        else:
            new = encode(tokenizer, text, special=True)
            counted = [True] * len(new)
        if end is not None and new[-1] != end:
            new.append(int(end))
            counted.append(True)
        counted[-1] |= new[-1] == end
        ids += new
        said += counted
        if len(ids) >= wanted:
            break
    return ids[:wanted], said[:wanted]


def padded(
    documents: Iterator[Document],
    tokenizer: PreTrainedTokenizerBase,
    windows: int,
    seq_len: int,
    name: str,
    *,
    masked: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One conversation a window; one of fewer than two tokens has no next token to be judged by and is left out, and so
    is one in which nobody whom a student is to imitate says anything.

    Returns ids int64, mask bool and said bool, [at most windows, seq_len].
    """
    if tokenizer.chat_template is None:
        raise CalibrationError(f"calibration data {name} has messages, the tokenizer has no chat template; give text")
    padding = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    ids = torch.full((windows, seq_len), int(padding), dtype=torch.int64)
    mask = torch.zeros((windows, seq_len), dtype=torch.bool)
    said = torch.zeros((windows, seq_len), dtype=torch.bool)
    filled = silent = 0
    for document in documents:
        if filled == windows:
            break
        if isinstance(document, str) or not is_conversation(document):
            raise CalibrationError(f"calibration data {name} mixes texts with conversations; give one kind")
        tokens, counted = encode_conversation(document, tokenizer, name, masked=masked) if document else ([], [])
        tokens, counted = tokens[:seq_len], counted[:seq_len]
        if len(tokens) >= 2 and any(counted[1:]):
            ids[filled, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
            mask[filled, : len(tokens)] = True
            said[filled, : len(tokens)] = torch.tensor(counted)
            filled += 1
        elif len(tokens) >= 2:
            silent += 1
    if silent and not filled:
        refuse_silence(name, silent, seq_len)
    return ids[:filled], mask[:filled], said[:filled]


def refuse_silence(name: str, windows: int, seq_len: int) -> None:
    """Raise CalibrationError for a text without a token that is to be learned."""
    raise CalibrationError(
        f"calibration data {name}: in none of its {windows} windows of {seq_len} tokens is a token the assistant's; "
        f"give a longer --seq-len, or {NO_MASK}"
    )
