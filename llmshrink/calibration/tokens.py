"""Text to windows of tokens: fixed length, packed or padded, seeded, with a fingerprint.

Three kinds of text, three rules:

- one document (a ``.txt``, the demo language): its first ``samples * seq_len`` tokens in consecutive windows, the
  held-out windows are the tokens that follow. Tokenized as continuous text, without the special tokens that the
  tokenizer adds to a prompt: a window from the middle of a document has no beginning to mark;
- many documents: each tokenized as the model saw documents in training (with the tokenizer's own beginning mark where
  it has one), closed by EOS, packed end to end, then cut into windows;
- conversations: the chat template, one conversation a window, cut at ``seq_len`` or padded; padding is False in the
  mask and counts nowhere. A completion that is a text is packed, with its prompt, like a document.

Where a model needs BOS (`llmshrink_eval.beginning` says when), every window begins with it, and is no longer for that.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import TYPE_CHECKING

import torch
from llmshrink_eval.beginning import Beginning, Bos, beginning_of
from llmshrink_eval.leftout import LeftOut, Tally
from llmshrink_eval.templates import DATE
from torch import Tensor

from llmshrink.calibration.packing import begun, continuous, packed, padded, refuse_silence
from llmshrink.calibration.reading import Reading
from llmshrink.calibration.records import Document, Record, leave_out, usable
from llmshrink.calibration.text import OTHER_WAYS, Documents
from llmshrink.calibration.turns import is_conversation
from llmshrink.errors import CalibrationError
from llmshrink.limits import check_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PEEKED = 32
"""Records by which it is decided whether a file is of texts, of conversations, or of prompts and completions."""
DEFAULT_SAMPLES = 256
DEFAULT_SEQ_LEN = 2048


@dataclass(frozen=True)
class TokenWindows:
    """Token windows of equal length.

    input_ids: int64 [samples, seq_len]. mask: bool [samples, seq_len], False where a position is padding (always at
    the end of a window). name: the text's. fingerprint: sha256 over ids, mask, `said` and the tokenizer. said: bool,
    the same shape, True where the assistant said the token (`turns.py`), and only that is learned; None: everything is.
    reading: what is to be told of how it was read.
    """

    input_ids: Tensor
    mask: Tensor
    name: str
    fingerprint: str
    said: Tensor | None = None
    reading: Reading = field(default_factory=Reading)

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
    check_tokens(resolved, length, f"--samples {resolved}")
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
    bos: Bos = "auto",
    model_type: str | None = None,
) -> tuple[TokenWindows, TokenWindows]:
    """Tokenize no more text than needed and cut it into (calibration, held-out) windows.

    samples, held_out: numbers of windows of seq_len tokens. The held-out windows follow the calibration windows in the
    same order of the text; where the text ends before, there are fewer of them, and where nothing at all is left they
    are the last calibration windows and their name says so. fewer: a text with less than samples windows gives what it
    has (a training run reads it again), the last of it still to the held-out windows, and at least one to each.
    mask_prompts: whether what the assistant said is told apart (`TokenWindows.said`), and windows without any of it are
    left out; None: where the text has turns. bos: whether each window begins with BOS; model_type: of the model's
    config, for "auto". Records that can't be used are left out and counted (`TokenWindows.reading`).
    Raises CalibrationError if the text is empty or has fewer than samples x seq_len tokens, with both numbers; for a
    mask of a text that has no turns; for a chat template that can't be used; and for a BOS that there isn't.
    """
    name, tally = documents.name, Tally()
    beginning = beginning_for(tokenizer, model_type, bos, seq_len)
    stream = usable(documents.stream(seed), tally, name)
    first = list(islice(stream, 1 if documents.single else PEEKED))
    document = _commonest(first)
    masked = _masked(document, mask_prompts, name)
    wanted = samples + held_out
    records = _alike(chain(first, stream), document, tally, name, masked=masked)
    reading = Reading(beginning)
    if document is not None and is_conversation(document):
        found = padded(records, tokenizer, wanted, seq_len, name, beginning, tally, masked=masked)
        ids, mask, said = found.ids, found.mask, found.said
        samples = _at_most(samples, len(ids), held_out) if fewer else samples
        if len(ids) < samples:
            _refuse_conversations(name, len(ids), int(mask.sum()), samples, seq_len, tally.result())
        reading = replace(reading, date=DATE if found.dated else None, untold_tools=found.untold)
    else:
        ids, said, tokens = _cut(documents, records, tokenizer, wanted * seq_len, seq_len, beginning, masked=masked)
        samples = _at_most(samples, len(ids), held_out) if fewer else samples
        if len(ids) < samples:
            _refuse(name, tokens, samples, seq_len, tally.result())
        ids, said = ids[:wanted], said[:wanted]
        mask = torch.ones_like(ids, dtype=torch.bool)
    if not documents.single:
        reading = replace(reading, left_out=tally.result())
    cut = _Cut(ids, mask, said if masked else None, name, tokenizer_hash(tokenizer), reading)
    if held_out and len(ids) == samples:
        same = f"{name} (the calibration windows again: the text has no more)"
        again = replace(cut, name=same).windows(slice(samples - min(held_out, samples), samples))
        return cut.windows(slice(0, samples)), again
    return cut.windows(slice(0, samples)), cut.windows(slice(samples, None))


def _masked(document: Document | None, mask_prompts: bool | None, name: str) -> bool:
    """Whether what the assistant said is told apart, in data that begins with this document."""
    turns = document is not None and not isinstance(document, str)
    masked = turns if mask_prompts is None else mask_prompts
    if masked and document is not None and not turns:
        raise CalibrationError(
            f"--mask-prompts: calibration data {name} has no turns, all of it is text; leave the option out, or give "
            "records of messages, or of prompt and completion"
        )
    return masked


def beginning_for(tokenizer: PreTrainedTokenizerBase, model_type: str | None, bos: Bos, seq_len: int) -> Beginning:
    """What windows of seq_len tokens begin with. Raises CalibrationError for a BOS that there isn't, or that fills
    them."""
    try:
        beginning = beginning_of(tokenizer, model_type, bos)
    except ValueError as error:
        raise CalibrationError(str(error)) from error
    if len(beginning.opening) >= seq_len:
        raise CalibrationError(
            f"--seq-len {seq_len}: every window begins with the {len(beginning.opening)} marks of the tokenizer's BOS; "
            f"give at least {len(beginning.opening) + 1}, or --bos never"
        )
    return beginning


def _at_most(samples: int, windows: int, held_out: int) -> int:
    """How many of `windows` are left for work when `held_out` are kept apart, a quarter at most."""
    return max(1, min(samples, windows - min(held_out, max(1, windows // 4))))


def _refuse(name: str, tokens: int, samples: int, seq_len: int, left_out: LeftOut) -> None:
    needed = f"{samples} x {seq_len} = {samples * seq_len} are needed"
    if tokens == 0:
        why = f": {left_out.words()}; " if left_out.count else " is empty or white space: "
        raise CalibrationError(f"calibration data {name}{why}0 tokens, {needed}; {OTHER_WAYS}")
    fits = tokens // seq_len
    shorter = f", or --samples {fits}" if fits else f", or --samples 1 --seq-len {tokens}" if tokens > 1 else ""
    raise CalibrationError(
        f"calibration data {name} has {tokens} tokens, {needed}{_left(left_out)}; give more text{shorter}"
    )


def _refuse_conversations(name: str, found: int, tokens: int, samples: int, seq_len: int, left_out: LeftOut) -> None:
    needed = f"{samples} conversations of up to {seq_len} tokens (at most {samples * seq_len}) are needed"
    if found == 0:
        why = f": {left_out.words()}; " if left_out.count else " is empty: "
        raise CalibrationError(f"calibration data {name}{why}its conversations have 0 tokens, {needed}; {OTHER_WAYS}")
    raise CalibrationError(
        f"calibration data {name} has {tokens} tokens in {found} conversations, {needed}{_left(left_out)}; "
        f"give more, or --samples {found}"
    )


def _left(left_out: LeftOut) -> str:
    return f"; {left_out.words()}" if left_out.count else ""


def _kind(document: Document) -> str:
    """In words, of what is read in the same way."""
    if is_conversation(document):
        return "conversation"
    return "text" if isinstance(document, str) else "prompt with its completion"


def _commonest(records: Sequence[Record]) -> Document | None:
    """The first document of the kind that most of these records are."""
    documents = [record.document for record in records if record.document is not None]
    kinds = Counter(map(_kind, documents))
    return max(documents, key=lambda document: kinds[_kind(document)], default=None)


def _alike(
    records: Iterator[Record], document: Document | None, tally: Tally, name: str, *, masked: bool
) -> Iterator[Record]:
    """The records of one kind with `document`; others are left out and counted. Where no prompts are masked, texts and
    prompts with completions are alike: texts."""
    for record in records:
        assert record.document is not None and document is not None
        meant, found = _kind(document), _kind(record.document)
        if meant == found or (not masked and "conversation" not in (meant, found)):
            yield record
        else:
            leave_out(tally, record, f"is a {found} among others that are each a {meant}", name)


def _cut(
    documents: Documents,
    texts: Iterator[Record],
    tokenizer: PreTrainedTokenizerBase,
    wanted: int,
    seq_len: int,
    beginning: Beginning,
    *,
    masked: bool,
) -> tuple[Tensor, Tensor, int]:
    """(ids int64 [windows, seq_len], which of them are a completion's, how many tokens were found)."""
    if documents.single:
        pieces = (record.document for record in texts)
        ids = continuous((piece for piece in pieces if isinstance(piece, str)), tokenizer, wanted)
        said = [True] * len(ids)
    else:
        ids, said = packed(texts, tokenizer, wanted, documents.name, beginning, masked=masked)
    ids, said = begun(ids, said, seq_len, beginning.opening, wanted)
    windows = len(ids) // seq_len
    found = torch.tensor(ids[: windows * seq_len], dtype=torch.int64).view(windows, seq_len)
    marks = torch.tensor(said[: windows * seq_len], dtype=torch.bool).view(windows, seq_len)
    if not masked:
        return found, marks, len(ids)
    taught = marks[:, 1:].any(1)
    if windows and not bool(taught.any()):
        refuse_silence(documents.name, windows, seq_len)
    return found[taught], marks[taught], len(ids)


@dataclass(frozen=True)
class _Cut:
    """All windows of a text, of which some become a `TokenWindows`. The fields are those."""

    ids: Tensor
    mask: Tensor
    said: Tensor | None
    name: str
    tokenizer: str
    reading: Reading

    def windows(self, which: slice) -> TokenWindows:
        ids, mask, said = self.ids[which], self.mask[which], self.said
        digest = hashlib.sha256(self.tokenizer.encode())
        digest.update(repr(tuple(ids.shape)).encode())
        digest.update(ids.contiguous().numpy().tobytes())
        digest.update(mask.contiguous().numpy().tobytes())
        if said is not None:
            said = said[which]
            digest.update(said.contiguous().numpy().tobytes())
        return TokenWindows(ids, mask, self.name, digest.hexdigest(), said, self.reading)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of the fast tokenizer as it serialises itself, or of a slow one's vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = repr(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    return hashlib.sha256(described.encode()).hexdigest()
