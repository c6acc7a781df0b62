"""Text to windows of tokens: fixed length, packed or padded, seeded, with a fingerprint.

Three kinds of text, three rules:

- one document (a ``.txt``, the demo language): its first ``samples * seq_len`` tokens in consecutive windows, the
  held-out windows are the tokens that follow. Tokenized as continuous text, without the special tokens that the
  tokenizer adds to a prompt: a window from the middle of a document has no beginning to mark;
- many documents: each tokenized as the model saw documents in training (with the tokenizer's own beginning mark where
  it has one), closed by EOS, packed end to end, then cut into windows;
- conversations: the chat template, one conversation a window, cut at ``seq_len`` or padded; padding is False in the
  mask and counts nowhere.

A document is never tokenized further than needed, though the tokens must equal those of the whole. A tokenizer's choice
at one place depends on what follows only within a word or a short run, so a prefix is tokenized and its last
`MARGIN_TOKENS` tokens are thrown away. How long the prefix must be follows from the characters per token measured on
its beginning.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmshrink.calibration.text import OTHER_WAYS, Document, Documents, Messages
from llmshrink.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_SAMPLES = 256
DEFAULT_SEQ_LEN = 2048
MARGIN_TOKENS = 1024
PROBE_CHARACTERS = 1 << 14


@dataclass(frozen=True)
class TokenWindows:
    """Token windows of equal length.

    input_ids: int64 [samples, seq_len]. mask: bool [samples, seq_len], False where a position is padding (always at
    the end of a window). name: the text's. fingerprint: sha256 over ids, mask and the tokenizer.
    """

    input_ids: Tensor
    mask: Tensor
    name: str
    fingerprint: str

    @property
    def tokens(self) -> int:
        """Tokens that count: all but padding."""
        return int(self.mask.sum())


def window_shape(samples: int | None, seq_len: int | None, *, limit: int | None) -> tuple[int, int]:
    """Resolve the defaults, 256 windows of 2048 tokens or of the model's limit where that is shorter.

    limit: the model's max_position_embeddings, None if it has none. Returns (samples, seq_len).
    Raises CalibrationError for a number below 1 or a window that is longer than the model's limit.
    """
    resolved = DEFAULT_SAMPLES if samples is None else samples
    length = min(DEFAULT_SEQ_LEN, limit or DEFAULT_SEQ_LEN) if seq_len is None else seq_len
    # A window of one token has no next token to be judged by.
    for flag, value, least in (("--samples", resolved, 1), ("--seq-len", length, 2)):
        if value < least:
            raise CalibrationError(f"{flag} {value}: must be at least {least}")
    if limit is not None and length > limit:
        raise CalibrationError(f"--seq-len {length}: the model's limit is {limit} positions; give at most that")
    return resolved, length


def build_windows(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    seq_len: int,
    held_out: int,
    seed: int,
    fewer: bool = False,
) -> tuple[TokenWindows, TokenWindows]:
    """Tokenize no more text than needed and cut it into (calibration, held-out) windows.

    samples, held_out: numbers of windows of seq_len tokens. The held-out windows follow the calibration windows in the
    same order of the text; where the text ends before, there are fewer of them, and where nothing at all is left they
    are the last calibration windows and their name says so. fewer: a text with less than samples windows gives what it
    has (a training run reads it again), the last of it still to the held-out windows, and at least one to each.
    Raises CalibrationError if the text is empty or has fewer than samples x seq_len tokens, with both numbers.
    """
    stream = documents.stream(seed)
    first = next(stream, None)
    if first is not None and not isinstance(first, str):
        ids, mask = _padded(_chain(first, stream), tokenizer, samples + held_out, seq_len, documents.name)
        samples = _at_most(samples, len(ids), held_out) if fewer else samples
        if len(ids) < samples:
            _refuse_conversations(documents.name, len(ids), int(mask.sum()), samples, seq_len)
    else:
        texts = _texts(_chain(first, stream), documents.name)
        wanted = (samples + held_out) * seq_len
        found = _continuous(texts, tokenizer, wanted) if documents.single else _packed(texts, tokenizer, wanted)
        samples = _at_most(samples, len(found) // seq_len, held_out) if fewer else samples
        if len(found) < samples * seq_len:
            _refuse(documents.name, len(found), samples, seq_len)
        windows = min(len(found) // seq_len, samples + held_out)
        ids = torch.tensor(found[: windows * seq_len], dtype=torch.int64).view(windows, seq_len)
        mask = torch.ones_like(ids, dtype=torch.bool)
    identity = tokenizer_hash(tokenizer)
    calibration = _windows(ids[:samples], mask[:samples], documents.name, identity)
    if held_out and len(ids) == samples:
        kept = min(held_out, samples)
        name = f"{documents.name} (the calibration windows again: the text has no more)"
        return calibration, _windows(ids[samples - kept : samples], mask[samples - kept : samples], name, identity)
    return calibration, _windows(ids[samples:], mask[samples:], documents.name, identity)


def _at_most(samples: int, windows: int, held_out: int) -> int:
    """How many of `windows` are left for work when `held_out` are kept apart, a quarter at most."""
    return max(1, min(samples, windows - min(held_out, max(1, windows // 4))))


def _refuse(name: str, tokens: int, samples: int, seq_len: int) -> None:
    needed = f"{samples} x {seq_len} = {samples * seq_len} are needed"
    if tokens == 0:
        raise CalibrationError(f"calibration data {name} is empty or white space: 0 tokens, {needed}; {OTHER_WAYS}")
    fits = tokens // seq_len
    shorter = f", or --samples {fits}" if fits else f", or --samples 1 --seq-len {tokens}" if tokens > 1 else ""
    raise CalibrationError(f"calibration data {name} has {tokens} tokens, {needed}; give more text{shorter}")


def _refuse_conversations(name: str, found: int, tokens: int, samples: int, seq_len: int) -> None:
    needed = f"{samples} conversations of up to {seq_len} tokens (at most {samples * seq_len}) are needed"
    if found == 0:
        raise CalibrationError(
            f"calibration data {name} is empty: its conversations have 0 tokens, {needed}; {OTHER_WAYS}"
        )
    raise CalibrationError(
        f"calibration data {name} has {tokens} tokens in {found} conversations, {needed}; "
        f"give more, or --samples {found}"
    )


def _chain(first: Document | None, rest: Iterator[Document]) -> Iterator[Document]:
    if first is not None:
        yield first
        yield from rest


def _texts(documents: Iterator[Document], name: str) -> Iterator[str]:
    for document in documents:
        if not isinstance(document, str):
            raise CalibrationError(f"calibration data {name} mixes texts with conversations; give one kind")
        yield document


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    encoded = tokenizer(text, add_special_tokens=special, return_attention_mask=False, verbose=False)
    return list(encoded["input_ids"])


def _continuous(pieces: Iterator[str], tokenizer: PreTrainedTokenizerBase, wanted: int) -> list[int]:
    """The first `wanted` tokens of one document (all of them where it has fewer, none where it is white space)."""
    text = _Prefix(pieces)
    length = PROBE_CHARACTERS
    while True:
        prefix = text.first(length)
        ids = _encode(tokenizer, prefix, special=False)
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


def _packed(texts: Iterator[str], tokenizer: PreTrainedTokenizerBase, wanted: int) -> list[int]:
    """Documents closed by EOS, end to end, until there are `wanted` tokens or no more documents."""
    ids: list[int] = []
    end = tokenizer.eos_token_id
    for text in texts:
        if not text.strip():
            continue
        ids += _encode(tokenizer, text, special=True)
        if end is not None and ids[-1] != end:
            ids.append(int(end))
        if len(ids) >= wanted:
            break
    return ids[:wanted]


def _padded(
    documents: Iterator[Document], tokenizer: PreTrainedTokenizerBase, windows: int, seq_len: int, name: str
) -> tuple[Tensor, Tensor]:
    """One conversation a window; one of fewer than two tokens has no next token to be judged by and is left out.

    Returns ids int64 and mask bool, [at most windows, seq_len].
    """
    if tokenizer.chat_template is None:
        raise CalibrationError(f"calibration data {name} has messages, the tokenizer has no chat template; give text")
    padding = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    ids = torch.full((windows, seq_len), int(padding), dtype=torch.int64)
    mask = torch.zeros((windows, seq_len), dtype=torch.bool)
    filled = 0
    for document in documents:
        if filled == windows:
            break
        if isinstance(document, str):
            raise CalibrationError(f"calibration data {name} mixes texts with conversations; give one kind")
        tokens = _conversation(document, tokenizer, name)[:seq_len] if document else []
        if len(tokens) >= 2:
            ids[filled, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
            mask[filled, : len(tokens)] = True
            filled += 1
    return ids[:filled], mask[:filled]


def _conversation(messages: Messages, tokenizer: PreTrainedTokenizerBase, name: str) -> Sequence[int]:
    from jinja2 import TemplateError

    try:
        text: Any = tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False)
    except TemplateError as error:
        raise CalibrationError(
            f"calibration data {name}: the chat template refuses a conversation ({error}); remove it"
        ) from error
    # The template writes the special tokens itself.
    return _encode(tokenizer, str(text), special=False)


def _windows(ids: Tensor, mask: Tensor, name: str, tokenizer_hash: str) -> TokenWindows:
    digest = hashlib.sha256(tokenizer_hash.encode())
    digest.update(repr(tuple(ids.shape)).encode())
    digest.update(ids.contiguous().numpy().tobytes())
    digest.update(mask.contiguous().numpy().tobytes())
    return TokenWindows(ids, mask, name, digest.hexdigest())


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of the fast tokenizer as it serialises itself, or of a slow one's vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = repr(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    return hashlib.sha256(described.encode()).hexdigest()
