"""Several processes that share a step, as `torchrun` starts them: one of them writes, all of them train."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from llmshrink.errors import LlmshrinkError


@dataclass(frozen=True)
class Processes:
    """rank: this one's number; count: of all."""

    rank: int
    count: int

    @classmethod
    def here(cls) -> Processes:
        """As the launcher's environment says: one, where there is no launcher.

        Raises LlmshrinkError where it asks for sharded parameters (docs/distillation.md says what fails with them).
        """
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            raise LlmshrinkError(
                "ACCELERATE_USE_FSDP is set: distill can't shard parameters; launch without --use_fsdp, or by torchrun"
            )
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def share(self, batch_size: int) -> int:
        """Windows of a batch for each. Raises LlmshrinkError where they can't be shared evenly."""
        if batch_size % self.count:
            raise LlmshrinkError(
                f"--batch-size {batch_size}: {self.count} processes can't share it evenly; give a multiple of that"
            )
        return batch_size // self.count

    def wait(self, device: torch.device) -> None:
        """Until all have come here. The first to be called joins them, over the network of `device`'s kind."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState(cpu=device.type == "cpu").wait_for_everyone()
