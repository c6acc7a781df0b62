"""GPTQ's inner loop, all rows and all candidates in one launch."""

from llmshrink_kernels.gptq_block.ops import sweep_block, trial_block

__all__ = ["sweep_block", "trial_block"]
