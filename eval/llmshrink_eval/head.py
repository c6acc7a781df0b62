"""The last step of a model, alone: from final hidden states to logits, a few rows at a time.

A model's forward makes logits for a whole batch at once: [batch, length, vocabulary] in float32 is 4 GB for 8 windows
of 1024 tokens and 128k tokens of vocabulary. So the output layer is taken out of the forward. It runs with a stand-in
that keeps what the output layer would have read, and the logits are made from that by `Head`, row by row, where they
are needed. The same `Head`, stored beside a model's hidden states, gives that model's logits again without the model.

Some families do something to the logits after the output layer (Gemma caps them, Granite divides, Cohere multiplies).
`prove` finds which of the known ways it is by comparing with the model's own logits, and says so when it is none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from llmshrink_kernels.products import times_transposed
from torch import Tensor

TailKind: TypeAlias = Literal["none", "divide", "multiply", "cap"]

PROOF_TOLERANCE = 2e-6
"""Largest difference of log-probabilities, relative to the largest of their row, at which `Head` counts as the model's
own last step in float32. Two libraries may multiply, and their sums differ by the size of the terms."""


@dataclass(frozen=True)
class Tail:
    """What comes after the output layer: logits / value, logits * value, or value * tanh(logits / value)."""

    kind: TailKind = "none"
    value: float = 1.0

    def __call__(self, logits: Tensor) -> Tensor:
        """The same shape and dtype."""
        if self.kind == "divide":
            return logits / self.value
        if self.kind == "multiply":
            return logits * self.value
        if self.kind == "cap":
            return torch.tanh(logits / self.value) * self.value
        return logits


@dataclass(frozen=True)
class Head:
    """weight: [vocabulary, width]; bias: [vocabulary] or None; both in the dtype that the model computes in."""

    weight: Tensor
    bias: Tensor | None
    tail: Tail

    def __call__(self, rows: Tensor) -> Tensor:
        """rows: [rows, width], what the output layer reads. Returns logits, float32 [rows, vocabulary]."""
        return self.tail(times_transposed(rows, self.weight, self.bias)).float()


class Splitter:
    """A model as two steps: `hidden` (everything before the output layer), and `head` (the rest).

    width, dtype: of a row of hidden states.
    """

    def __init__(self, model: Any, tail: Tail, width: int, dtype: torch.dtype) -> None:
        self._model = model
        self._layer = model.get_output_embeddings()
        self._tail = tail
        self.width = width
        self.dtype = dtype

    def hidden(self, input_ids: Tensor, mask: Tensor | None, position_ids: Tensor | None = None) -> Tensor:
        """input_ids: int64 [batch, length]; mask: the same shape, or [batch, 1, length, length] to be added to the
        scores of attention, or None without padding; position_ids: as input_ids, or None for the model's own.
        [batch, length, width]."""
        read: list[Tensor] = []

        def keep(states: Tensor, *_: Any, **__: Any) -> Tensor:
            read.append(states)
            return states

        with _forward_replaced(self._layer, keep):
            more = {} if position_ids is None else {"position_ids": position_ids}
            self._model(input_ids=input_ids, attention_mask=mask, use_cache=False, **more)
        return read[0]

    @contextlib.contextmanager
    def head(self) -> Iterator[Head]:
        """The output layer's weights, for as long as the context is open: an offloaded one is read for it."""
        with _on_device(self._layer):
            yield _head(self._layer, self._tail)


def split(model: Any, input_ids: Tensor) -> Splitter | None:
    """Take the output layer out of a model, and prove on a few tokens that nothing else changes.

    input_ids: int64 [1, length] on the model's device. None if the model has no such layer, or if what `Head` gives is
    not what the model itself gives: then the model's own logits are all there is.
    """
    layer = model.get_output_embeddings()
    if not isinstance(layer, torch.nn.Linear):
        return None
    read: list[Tensor] = []
    forward = layer.forward

    def look(states: Tensor, *arguments: Any, **named: Any) -> Any:
        read.append(states)
        return forward(states, *arguments, **named)

    with _forward_replaced(layer, look):
        own = model(input_ids=input_ids, use_cache=False).logits[0].float().log_softmax(-1)
    if len(read) != 1:
        return None
    rows = read[0][0]
    with _on_device(layer):
        for tail in _tails(model.config.get_text_config()):
            made = _head(layer, tail)(rows)
            if made.shape == own.shape and _same(made.log_softmax(-1), own, rows.dtype):
                return Splitter(model, tail, rows.shape[-1], rows.dtype)
    return None


def _head(layer: torch.nn.Linear, tail: Tail) -> Head:
    return Head(layer.weight.detach(), None if layer.bias is None else layer.bias.detach(), tail)


def _same(made: Tensor, own: Tensor, dtype: torch.dtype) -> bool:
    """Log-probabilities up to rounding: in a narrow dtype a logit may fall to the next of its steps.

    NaN is no difference here: whoever reads the logits says where it is.
    """
    if dtype == torch.float32:
        close = (made - own).abs() <= PROOF_TOLERANCE * own.abs().amax(-1, keepdim=True).clamp(min=1)
    else:
        close = (made - own).abs() <= 8 * torch.finfo(dtype).eps * own.abs().clamp(min=1)
    return bool((close | (made == own) | own.isnan()).all())


def _tails(config: Any) -> Iterator[Tail]:
    """The ways that this model's config may mean, the most telling first."""
    for field, kind in (("final_logit_softcapping", "cap"), ("logits_scaling", "divide"), ("logit_scale", "multiply")):
        value = getattr(config, field, None)
        if value:
            yield Tail(kind, float(value))  # type: ignore[arg-type]
    yield Tail()


@contextlib.contextmanager
def _forward_replaced(layer: torch.nn.Module, forward: Any) -> Iterator[None]:
    """Meanwhile the layer runs this. accelerate and compressed-tensors put forwards of their own on the instance: one
    that was there comes back."""
    before = layer.__dict__.get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        if before is None:
            del layer.forward
        else:
            layer.forward = before


@contextlib.contextmanager
def _on_device(layer: torch.nn.Module) -> Iterator[None]:
    """Where the layer's weights are nowhere until it runs (accelerate's offload), have them here meanwhile."""
    if not hasattr(layer, "_hf_hook"):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(layer):
        yield
