"""The model as a chain: embed, block 0, block 1, ..., tail. How every pass over a model walks it.

A chain knows how to turn tokens into the first block's input and the last block's output into logits, both through
the model's own code, and how each block is called for a batch. Whoever walks it loads a block, calls it, releases it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from llmshrink_kernels.products import multiply_fast
from torch import Tensor, nn

from llmshrink.calibration.activations import Batch
from llmshrink.errors import UnsupportedModelError
from llmshrink.model.blocks import Call, Enough, find_blocks, logits_of, record_calls, visiting
from llmshrink.model.families import Family, family_of
from llmshrink.model.sites import Stage, find_stages
from llmshrink.model.skeleton import Skeleton
from llmshrink.model.uncovered import refuse_uncovered

Check = Callable[[str, Tensor], None]


class Chain:
    """skeleton: where parameters come and go; blocks: in order; family: what the table knows of the architecture."""

    def __init__(self, skeleton: Skeleton) -> None:
        self.skeleton = skeleton
        self.family: Family = family_of(skeleton.model.config.model_type)
        self.prefix, self.blocks = find_blocks(skeleton.model)
        self._calls: dict[tuple[int, ...], list[Call]] = {}
        for number, block in enumerate(self.blocks):
            refuse_uncovered(block, self.name(number))
        multiply_fast(skeleton.model)

    def name(self, number: int) -> str:
        """Module name of a block, as `model.layers.3`."""
        return f"{self.prefix}.{number}"

    @property
    def heads(self) -> tuple[int, int]:
        """How many heads of queries a block has, and how many of keys and values."""
        config = self.skeleton.model.config.get_text_config()
        heads: int = config.num_attention_heads
        return heads, getattr(config, "num_key_value_heads", None) or heads

    @property
    def outside(self) -> list[str]:
        """Modules outside the blocks that own parameters."""
        return self.skeleton.outside(self.prefix)

    def calls(self, batch: Batch) -> list[Call]:
        """How the model calls each block for this batch. Without padding it depends on the batch's shape alone."""
        shape = tuple(batch.input_ids.shape)
        if batch.mask is None and shape in self._calls:
            return self._calls[shape]
        width = self.skeleton.model.config.get_text_config().hidden_size
        hidden = torch.zeros(*shape, width, dtype=self.skeleton.dtype, device=self.skeleton.device)
        mask = None if batch.mask is None else batch.mask.to(self.skeleton.device)
        outside = [self.skeleton.model.get_submodule(name) for name in self.outside]
        calls = record_calls(self.skeleton.model, self.blocks, outside, hidden, mask)
        if batch.mask is None:
            self._calls[shape] = calls
        return calls

    def embed(self, batch: Batch) -> Tensor:
        """The first block's input, [batch, tokens, dim]. The embedding must be loaded."""
        first: list[Tensor] = []

        def visit(i: int, own: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            first.append(args[0] if args else kwargs["hidden_states"])
            raise Enough

        with visiting(self.blocks, visit), torch.no_grad(), suppress(Enough):
            self.skeleton.model.base_model(input_ids=batch.input_ids.to(self.skeleton.device), use_cache=False)
        return first[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits for the last block's output: [batch, tokens, dim] -> [batch, tokens, vocabulary]."""
        return logits_of(self.skeleton.model, self.blocks, hidden)

    def load_block(self, number: int, *, check: Check | None = None) -> dict[str, Tensor]:
        """Make a block real, and let the next one be read meanwhile; what `Skeleton.load` returns."""
        stored = self.skeleton.load(self.name(number), check=check)
        if number + 1 < len(self.blocks):
            self.skeleton.expect(self.name(number + 1))
        return stored

    def load_tail(self) -> None:
        """Make what comes after the blocks real (final norm, head) in float32, for logits of full precision."""
        embedding = self.skeleton.model.get_input_embeddings()
        names = [name for name in self.outside if self.skeleton.model.get_submodule(name) is not embedding]
        self.skeleton.load(*names, dtype=torch.float32)

    def load_outside(self, *, check: Check | None = None) -> None:
        """Make embedding, final norm and head real."""
        self.skeleton.load(*self.outside, check=check)

    def release_outside(self) -> None:
        self.skeleton.release(*self.outside)

    def analyse(self, batch: Batch, check: Check) -> list[list[Stage]]:
        """Walk the whole model once, one block at a time, on one short batch; returns each block's stages.

        Every parameter is read once and given to `check`. The model's own forward and the chain of recorded calls run
        side by side and must agree to the bit, else the chain isn't the model and UnsupportedModelError is raised.
        """
        self.load_outside(check=check)
        calls = self.calls(batch)
        chained = self.embed(batch)
        stages: list[list[Stage]] = []

        def visit(i: int, own: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal chained
            self.load_block(i, check=check)
            block = self.blocks[i]
            with _OwnForward(block):
                found, chained = find_stages(block, self.name(i), i, calls[i], chained, self.skeleton.key_of)
            stages.append(found)
            out = own(*args, **kwargs)
            self.skeleton.release(self.name(i))
            return out

        with visiting(self.blocks, visit), torch.no_grad():
            ids = batch.input_ids.to(self.skeleton.device)
            expected = self.skeleton.model(input_ids=ids, use_cache=False).logits
        found = self.logits(chained)
        self.release_outside()
        if not torch.equal(found, expected):
            difference = float((found.float() - expected.float()).abs().max())
            raise UnsupportedModelError(
                f"{type(self.skeleton.model).__name__}: walking its blocks one by one differs from its own forward "
                f"(logits by {difference:.3g}), so it isn't covered yet; nothing was touched"
            )
        return stages


class _OwnForward:
    """While open, a block that is being visited runs its own forward again instead of the visitor."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __enter__(self) -> None:
        self._visitor = self.block.__dict__.pop("forward")

    def __exit__(self, *exc: object) -> None:
        self.block.forward = self._visitor
