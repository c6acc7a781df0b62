"""Where the sweep's inner loop runs as one kernel: on CUDA, with Triton at hand. Anywhere else torch takes the columns.

The kernels are imported on first use and only there: a run on the CPU neither needs nor imports Triton.
"""

from __future__ import annotations

import torch


def has_kernels(device: torch.device) -> bool:
    """Whether blocks on `device` are swept by `llmshrink_kernels.gptq_block`; on CUDA a notice says so if not."""
    if device.type != "cuda":
        return False
    from llmshrink_kernels.device import runs_triton

    return runs_triton(device)
