"""The model that is taught from, and what it says of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from llmshrink.distillation.chunked import Tail
from llmshrink.errors import LlmshrinkError

PROBE_TOKENS = 8


class SplitModel:
    """A model as its hidden states and its output layer, so that logits are made a few rows at a time."""

    def __init__(self, model: Any, name: str) -> None:
        from llmshrink_eval.head import split

        self.model = model
        probe = torch.arange(2, 2 + PROBE_TOKENS, device=next(model.parameters()).device).unsqueeze(0)
        with torch.no_grad():
            found = split(model, probe)
        if found is None:
            raise LlmshrinkError(
                f"{name}: its output layer isn't a linear layer that can be taken out of its forward; "
                "such a model can't be distilled"
            )
        self._splitter = found
        with found.head() as head:
            tail = head.tail
        factor = {"divide": 1 / tail.value, "multiply": tail.value}.get(tail.kind, 1.0)
        self.tail = Tail(cap=tail.value if tail.kind == "cap" else None, factor=factor)

    @property
    def weight(self) -> Tensor:
        """[vocabulary, width]."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        """[vocabulary], or None."""
        bias: Tensor | None = self.model.get_output_embeddings().bias
        return bias

    def hidden(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        """What the output layer reads: [batch, length, width]. input_ids int64, mask bool or None: [batch, length]."""
        return self._splitter.hidden(input_ids, mask)

    def head(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """The output layer: what it reads, [..., width] in `dtype`, to logits of at least float32.

        The product is in `dtype`; the weight is cast once, for as many calls as there will be.
        """
        weight, bias = (None if each is None else each.to(dtype) for each in (self.weight, self.bias))
        assert weight is not None
        wide = torch.promote_types(dtype, torch.float32)
        return lambda rows: self.tail(torch.nn.functional.linear(rows, weight, bias).to(wide))


class TeacherRows(Protocol):
    """A teacher that has whole logits."""

    def rows(self, input_ids: Tensor, mask: Tensor | None, where: Tensor) -> Callable[[slice], Tensor]:
        """The positions `where` (bool [batch, length]) of a batch -> logits of some of them."""
        ...


class LiveTeacher:
    """A teacher in memory. dtype: of its hidden states' product with its output layer."""

    def __init__(self, split: SplitModel, dtype: torch.dtype = torch.float32) -> None:
        self._split = split
        self._dtype = dtype

    def rows(self, input_ids: Tensor, mask: Tensor | None, where: Tensor) -> Callable[[slice], Tensor]:
        """One forward now, the logits as they are asked for."""
        with torch.no_grad():
            hidden = self._split.hidden(input_ids, mask)[where].to(self._dtype)
            head = self._split.head(self._dtype)
        return lambda rows: head(hidden[rows])

    def of(self, input_ids: Tensor, mask: Tensor | None, where: Tensor, window: Tensor) -> Callable[[slice], Tensor]:
        """As `rows`; which windows they are makes no difference."""
        return self.rows(input_ids, mask, where)
