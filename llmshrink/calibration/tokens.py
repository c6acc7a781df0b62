"""Text to windows of tokens: fixed length, packed or padded, seeded, with a fingerprint.

Three kinds of text, three rules:

- one document (a ``.txt``, the demo language): its first ``samples * seq_len`` tokens in consecutive windows, the
  held-out windows are the tokens that follow. Tokenized as continuous text, without the special tokens that the
  tokenizer adds to a prompt: a window from the middle of a document has no beginning to mark;
- many documents: each tokenized as the model saw documents in training (with the tokenizer's own beginning mark where
  it has one), closed by EOS, packed end to end, then cut into windows;
- conversations: the chat template, one conversation a window, cut at ``seq_len`` or padded; padding is False in the
  mask and counts nowhere. A completion that is a text is packed, with its prompt, like a document.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmshrink.calibration.packing import continuous, packed, padded, refuse_silence
from llmshrink.calibration.text import OTHER_WAYS, Completion, Document, Documents
from llmshrink.calibration.turns import is_conversation
from llmshrink.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_SAMPLES = 256
DEFAULT_SEQ_LEN = 2048


@dataclass(frozen=True)
class TokenWindows:
    """Token windows of equal length.

    input_ids: int64 [samples, seq_len]. mask: bool [samples, seq_len], False where a position is padding (always at
    the end of a window). name: the text's. fingerprint: sha256 over ids, mask, `said` and the tokenizer. said: bool,
    the same shape, True where the assistant said the token (`turns.py`), and only that is learned; None: everything is.
    """

    input_ids: Tensor
    mask: Tensor
    name: str
    fingerprint: str
    said: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens that count: all but padding."""
        return int(self.mask.sum())

    @property
    def labels(self) -> Tensor:
        """bool [samples, seq_len]: tokens whose prediction counts; never a window's first, which nothing predicts."""
        counted = self.mask.clone() if self.said is None else self.mask & self.said
        counted[:, 0] = False
        return counted


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
    mask_prompts: bool | None = False,
) -> tuple[TokenWindows, TokenWindows]:
    """Tokenize no more text than needed and cut it into (calibration, held-out) windows.

    samples, held_out: numbers of windows of seq_len tokens. The held-out windows follow the calibration windows in the
    same order of the text; where the text ends before, there are fewer of them, and where nothing at all is left they
    are the last calibration windows and their name says so. fewer: a text with less than samples windows gives what it
    has (a training run reads it again), the last of it still to the held-out windows, and at least one to each.
    mask_prompts: whether what the assistant said is told apart (`TokenWindows.said`), and windows without any of it are
    left out; None: where the text has turns.
    Raises CalibrationError if the text is empty or has fewer than samples x seq_len tokens, with both numbers; and for
    a mask of a text that has no turns.
    """
    stream = documents.stream(seed)
    first = next(stream, None)
    turns = first is not None and not isinstance(first, str)
    masked = turns if mask_prompts is None else mask_prompts
    if masked and first is not None and not turns:
        raise CalibrationError(
            f"--mask-prompts: calibration data {documents.name} has no turns, all of it is text; leave the option out, "
            "or give records of messages, or of prompt and completion"
        )
    if first is not None and is_conversation(first):
        kept = padded(_chain(first, stream), tokenizer, samples + held_out, seq_len, documents.name, masked=masked)
        ids, mask, said = kept
        samples = _at_most(samples, len(ids), held_out) if fewer else samples
        if len(ids) < samples:
            _refuse_conversations(documents.name, len(ids), int(mask.sum()), samples, seq_len)
    else:
        texts = _texts(_chain(first, stream), documents.name)
        wanted = (samples + held_out) * seq_len
        ids, said, tokens = _cut(documents, texts, tokenizer, wanted, seq_len, masked=masked)
        samples = _at_most(samples, len(ids), held_out) if fewer else samples
        if len(ids) < samples:
            _refuse(documents.name, tokens, samples, seq_len)
        ids, said = ids[: samples + held_out], said[: samples + held_out]
        mask = torch.ones_like(ids, dtype=torch.bool)
    spoken = said if masked else None
    identity = tokenizer_hash(tokenizer)
    calibration = _windows(ids, mask, spoken, slice(0, samples), documents.name, identity)
    if held_out and len(ids) == samples:
        again = slice(samples - min(held_out, samples), samples)
        name = f"{documents.name} (the calibration windows again: the text has no more)"
        return calibration, _windows(ids, mask, spoken, again, name, identity)
    return calibration, _windows(ids, mask, spoken, slice(samples, None), documents.name, identity)


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


def _texts(documents: Iterator[Document], name: str) -> Iterator[str | Completion]:
    for document in documents:
        if is_conversation(document):
            raise CalibrationError(f"calibration data {name} mixes texts with conversations; give one kind")
        assert isinstance(document, str | Completion)
        yield document


def _cut(
    documents: Documents,
    texts: Iterator[str | Completion],
    tokenizer: PreTrainedTokenizerBase,
    wanted: int,
    seq_len: int,
    *,
    masked: bool,
) -> tuple[Tensor, Tensor, int]:
    """(ids int64 [windows, seq_len], which of them are a completion's, how many tokens were found)."""
    if documents.single:
        ids = continuous((piece for piece in texts if isinstance(piece, str)), tokenizer, wanted)
        said = [True] * len(ids)
    else:
        ids, said = packed(texts, tokenizer, wanted, documents.name, masked=masked)
    windows = len(ids) // seq_len
    found = torch.tensor(ids[: windows * seq_len], dtype=torch.int64).view(windows, seq_len)
    marks = torch.tensor(said[: windows * seq_len], dtype=torch.bool).view(windows, seq_len)
    if not masked:
        return found, marks, len(ids)
    taught = marks[:, 1:].any(1)
    if windows and not bool(taught.any()):
        refuse_silence(documents.name, windows, seq_len)
    return found[taught], marks[taught], len(ids)


def _windows(
    ids: Tensor, mask: Tensor, said: Tensor | None, which: slice, name: str, tokenizer_hash: str
) -> TokenWindows:
    ids, mask = ids[which], mask[which]
    digest = hashlib.sha256(tokenizer_hash.encode())
    digest.update(repr(tuple(ids.shape)).encode())
    digest.update(ids.contiguous().numpy().tobytes())
    digest.update(mask.contiguous().numpy().tobytes())
    if said is not None:
        said = said[which]
        digest.update(said.contiguous().numpy().tobytes())
    return TokenWindows(ids, mask, name, digest.hexdigest(), said)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of the fast tokenizer as it serialises itself, or of a slow one's vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = repr(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    return hashlib.sha256(described.encode()).hexdigest()
