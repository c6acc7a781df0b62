"""One model over the windows: its perplexity, and its divergence from an original whose pass is on disk.

A batch goes through the model up to its output layer; from there on each window is on its own. Its rows (the final
hidden states where distributions are looked at) become logits a few at a time, which are scored, compared with the
original's at the same place, and gone. So the memory beyond the model's own is a batch's activations and a few rows of
logits, whatever the vocabulary; and at no time is the original there beside the compressed model.

The rows of a window are cut in the same places whoever made them, and the original's go through the same `Head`: a
model compared with itself has bit for bit the same logits, and a KL of exactly 0.

Windows are batched with others of about their length. Each window's result is appended to a file as it comes
(`records`), so an interrupted pass goes on where it stopped, with the same batches and the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from llmshrink_kernels.products import multiply_fast
from torch import Tensor

from llmshrink_eval import records
from llmshrink_eval.baseline import Baseline, rounding_bound
from llmshrink_eval.divergence import Rows, join_rows, score_rows, window_divergence
from llmshrink_eval.errors import EvalFailed
from llmshrink_eval.head import Head, Splitter, split
from llmshrink_eval.protocol import Windows
from llmshrink_eval.records import WindowRecord

BATCH_TOKENS = 4096
"""Tokens in a forward: enough to fill a processor, and 0.4 GB of float32 for the widest step of a 1B model."""
WHOLE_LOGITS = 1 << 27
"""Logits in a forward where they can't be made row by row: 512 MB in float32."""
LOGITS = 1 << 20
ROWS = (64, 256)
"""Rows whose logits are made at once: LOGITS of them, in these bounds; fewer would read the head too often."""
SNIPPET_TOKENS = 12
PROOF_TOKENS = 64

Progress: TypeAlias = Callable[[int, int, float], None]
"""(windows done, windows in all, nats/token so far) -> None"""


@dataclass(frozen=True)
class Pass:
    """windows[w] is what was measured of window w. resumed: how many of them were there before."""

    windows: tuple[WindowRecord, ...]
    resumed: int

    @property
    def window_nats(self) -> list[float]:
        """The sum of -log p over each window's scored tokens, in nats."""
        return [record.nats for record in self.windows]


def finished(windows: Windows, folder: Path, *, keep: Path | None = None) -> Pass | None:
    """The pass that `run_pass` left in these folders, if it is whole: no model is needed then."""
    known = _known(_lines(folder))
    if len(known) < len(windows):
        return None
    if keep is not None:
        store = Baseline.open(keep, windows)
        if store is None or not store.complete:
            return None
    return Pass(tuple(known[window] for window in range(len(windows))), len(windows))


def begun(windows: Windows, folder: Path, *, keep: Path | None = None) -> int:
    """How many windows of the pass an earlier run has left in these folders: `run_pass` goes on after them."""
    known = set(_known(_lines(folder)))
    if known and keep is not None:
        store = Baseline.open(keep, windows)
        known &= set(store.done) if store is not None else set()
    return len(known)


def default_batch_size(length: int) -> int:
    """Windows in a forward, for windows of so many tokens."""
    return max(1, BATCH_TOKENS // length)


def run_pass(
    model: Any,
    windows: Windows,
    tokenizer: Any,
    *,
    batch_size: int | None = None,
    keep: Path | None = None,
    against: Path | None = None,
    folder: Path | None = None,
    on_progress: Progress | None = None,
) -> Pass:
    """Read every window with a model.

    model: a causal language model of transformers. batch_size: windows in a forward; by their length where None. keep:
    where the pass is kept as a baseline. against: the folder of a complete baseline; gives each window's divergence.
    folder: where results are appended as they come, and found again; it must be of this model, these windows, this
    baseline alone. Raises EvalFailed if the logits have NaN or infinities, naming the first window and what it reads,
    or if the baseline is missing or damaged.
    """
    batch_size = default_batch_size(windows.input_ids.shape[1]) if batch_size is None else batch_size
    with torch.no_grad():
        runner = _Runner(model, windows, tokenizer, keep, against)
        lines = None if folder is None else _lines(folder)
        known = {} if lines is None else _known(lines)
        if runner.keep is not None:
            known = {window: record for window, record in known.items() if window in runner.keep.done}
        resumed, tokens = len(known), windows.scored.sum(1)
        for batch in _batches(windows, min(batch_size, runner.largest_batch)):
            pending = [window for window in batch if window not in known]
            for record in runner.run(batch, set(pending)) if pending else ():
                known[record.window] = record
                if lines is not None:
                    lines.append([records.to_json(record)])
            if on_progress is not None and known:
                scored = int(tokens[list(known)].sum())
                on_progress(len(known), len(windows), math.fsum(one.nats for one in known.values()) / max(1, scored))
    return Pass(tuple(known[window] for window in range(len(windows))), resumed)


class _Runner:
    """What stays the same from batch to batch."""

    def __init__(self, model: Any, windows: Windows, tokenizer: Any, keep: Path | None, against: Path | None) -> None:
        self._model, self._windows, self._tokenizer = model, windows, tokenizer
        self._device = input_device(model)
        if isinstance(model, torch.nn.Module):  # not an engine, which multiplies by its own
            multiply_fast(model)
        first = windows.input_ids[:1, : min(PROOF_TOKENS, int(windows.lengths[0]))].to(self._device)
        self._splitter: Splitter | None = split(model, first)
        self.against = None if against is None else Baseline.open(against, windows, self._device)
        if against is not None and (self.against is None or not self.against.complete):
            raise EvalFailed(f"{against} holds no complete pass of the original over these windows; run it first")
        self._vocabulary = int(model.config.get_text_config().vocab_size)
        self.keep = None if keep is None else self._start(keep, first)

    @property
    def largest_batch(self) -> int:
        """Windows in a forward, where the whole logits are made in it."""
        if self._splitter is not None:
            return len(self._windows)
        return max(1, WHOLE_LOGITS // (self._vocabulary * self._windows.input_ids.shape[1]))

    def _start(self, folder: Path, first: Tensor) -> Baseline:
        if self._splitter is None:
            width = int(self._model(input_ids=first, use_cache=False).logits.shape[-1])
            return Baseline.create(folder, self._windows, head=None, width=width, dtype=torch.float16)
        with self._splitter.head() as head:
            return Baseline.create(
                folder, self._windows, head=head, width=self._splitter.width, dtype=self._splitter.dtype
            )

    def run(self, batch: list[int], pending: set[int]) -> Iterator[WindowRecord]:
        """One forward, and the records of those of its windows that are pending."""
        lengths = self._windows.lengths[batch]
        longest = int(lengths.max())
        ids = self._windows.input_ids[batch, :longest].to(self._device)
        mask = None
        if int(lengths.min()) < longest:
            mask = (torch.arange(longest) < lengths[:, None]).long().to(self._device)
        if self._splitter is None:
            outputs = self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            yield from self._windows_of(batch, pending, outputs, lambda rows: rows.float())
            return
        outputs = self._splitter.hidden(ids, mask)
        with self._splitter.head() as head:
            yield from self._windows_of(batch, pending, outputs, head)

    def _windows_of(
        self, batch: list[int], pending: set[int], outputs: Tensor, head: Callable[[Tensor], Tensor] | Head
    ) -> Iterator[WindowRecord]:
        for window, output in zip(batch, outputs, strict=True):
            if window in pending:
                yield self._window(window, output, head)

    def _window(self, window: int, output: Tensor, head: Callable[[Tensor], Tensor] | Head) -> WindowRecord:
        """output: [length, width], what `head` makes logits of."""
        positions = self._windows.compared[window].nonzero().squeeze(-1)
        rows = output[positions.to(output.device)]
        targets = self._targets(window, positions).to(output.device)
        step = max(ROWS[0], min(ROWS[1], LOGITS // self._vocabulary))
        if self.against is not None:
            self.against.check(window)
        pieces: list[Rows] = []
        error = 0.0
        for start in range(0, len(rows), step):
            logits = head(rows[start : start + step])
            original = None
            if self.against is not None:
                original = self.against.logits(window, start, start + step, output.device)
                if not self.against.exact:
                    error += float(rounding_bound(original, logits).sum())
            piece = score_rows(logits, targets[start : start + step], original)
            if not bool(piece.finite.all()):
                self._refuse(window, int(positions[start + int((~piece.finite).nonzero()[0])]))
            pieces.append(piece)
        if self.keep is not None and window not in self.keep.done:
            self._keep(window, rows, step)
        joined = join_rows(pieces)
        compared = None if self.against is None else window_divergence(joined, positions, error)
        return WindowRecord(window, math.fsum(joined.nats.tolist()), compared)

    def _targets(self, window: int, positions: Tensor) -> Tensor:
        """The token after each position where it is scored, else -1."""
        following = torch.full((self._windows.input_ids.shape[1] + 1,), -1)
        following[:-1] = torch.where(self._windows.scored[window], self._windows.input_ids[window], -1)
        return following[positions + 1]

    def _keep(self, window: int, rows: Tensor, step: int) -> None:
        assert self.keep is not None
        if self.keep.exact:
            self.keep.write(window, [rows])
        else:
            starts = range(0, len(rows), step)
            self.keep.write(window, (rows[start : start + step].float().log_softmax(-1) for start in starts))

    def _refuse(self, window: int, position: int) -> None:
        # A NaN that attention reads reaches the whole window: then its beginning is what can be shown.
        end = min(max(position + 1, SNIPPET_TOKENS), int(self._windows.lengths[window]))
        ids = self._windows.input_ids[window, max(0, end - SNIPPET_TOKENS) : end].tolist()
        raise EvalFailed(
            f"NaN or infinite logits in window {window} of {len(self._windows)}, from its token {position} on"
            f" ({self._tokenizer.decode(ids)!r}): the model is broken, or its weights don't fit their type"
        )


def input_device(model: Any) -> torch.device:
    """Where token ids go: of an offloaded model, whose parameters are nowhere, where they run."""
    for module in (model.get_input_embeddings(), model):
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    device = next(iter(model.parameters())).device
    assert isinstance(device, torch.device)
    return device


def _batches(windows: Windows, size: int) -> Iterator[list[int]]:
    """Windows of about the same length together, so that little is padding; longest first, else in order."""
    order = windows.lengths.sort(descending=True, stable=True).indices.tolist()
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _lines(folder: Path) -> records.CheckedLines:
    return records.CheckedLines(folder / "windows.jsonl")


def _known(lines: records.CheckedLines) -> dict[int, WindowRecord]:
    return {record.window: record for record in map(records.from_json, lines.read())}
