"""How far a student is from its teacher on held-out windows: in float32, over the whole vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from llmshrink.calibration.activations import Batch
from llmshrink.distillation.teacher import SplitModel, TeacherRows
from llmshrink.run import heldout
from llmshrink.run.heldout import LOGITS, Quality


def judge(student: SplitModel, teacher: TeacherRows, batches: Sequence[Batch], labels: Tensor) -> Quality:
    """Means over the positions of `batches` whose next token counts. The teacher's side is the `before`.

    labels: bool [windows, length], those tokens (`TokenWindows.labels`), of the windows that the batches are cut from.
    """
    device = student.weight.device
    columns: list[list[Tensor]] = []
    counted = iter(labels.split([len(batch.input_ids) for batch in batches]))
    for batch in batches:
        ids = batch.input_ids.to(device)
        mask = None if batch.mask is None else batch.mask.to(device)
        where = torch.zeros_like(ids, dtype=torch.bool)
        where[:, :-1] = next(counted)[:, 1:].to(device)
        said = teacher.rows(ids, mask, where)
        with _as_published(student):
            hidden = student.hidden(ids, mask)[where]
        targets = ids.roll(-1, 1)[where]
        head = student.head(hidden.dtype)
        rows = max(1, LOGITS // student.weight.shape[0])
        for start in range(0, len(hidden), rows):
            part = slice(start, min(start + rows, len(hidden)))
            after = head(hidden[part]).log_softmax(-1)
            columns.append(_compare(said(part).log_softmax(-1), after, targets[part]))
    return Quality.over(*(torch.cat([each[i] for each in columns]).double().cpu() for i in range(4)))


@contextmanager
def _as_published(student: SplitModel) -> Iterator[None]:
    """Meanwhile nothing has a gradient, and what only training does (OPT's dropout) isn't done."""
    training = student.model.training
    student.model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        student.model.train(training)


def _compare(before: Tensor, after: Tensor, target: Tensor) -> list[Tensor]:
    kl = (before.exp() * (before - after)).sum(-1)
    same = (before.argmax(-1) == after.argmax(-1)).float()
    return [each.gather(-1, target[:, None]).squeeze(-1) for each in (before, after)] + [kl, same]


def reference(student: SplitModel, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """What `verify` will hold a reload to; see `run.heldout.reference`."""
    with _as_published(student):
        head = student.head(torch.float32)
        return heldout.merge(
            [heldout.reference(batch, student.hidden(batch.input_ids, batch.mask), head) for batch in batches]
        )
