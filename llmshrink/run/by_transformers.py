"""A checkpoint of bitsandbytes, reloaded as anyone would: by plain transformers with that library.

That our own reader finds what the run computed says that no bit was lost; it doesn't say that another program loads it.
Here `from_pretrained` does, with no code of llmshrink in between. The library computes otherwise than with dequantized
weights in the run's order: NF4 by kernels of its own where there are few rows, 8-bit layers with activations that are
rounded to 8 bits too. Hence tolerances of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import redirect_stderr
from importlib.metadata import version
from io import StringIO
from pathlib import Path

import torch
from llmshrink_eval.errors import EvalError
from torch import Tensor

from llmshrink.calibration.activations import Batch
from llmshrink.errors import CheckpointError
from llmshrink.formats.bitsandbytes import BitsAndBytesScheme
from llmshrink.methods.bnb import require
from llmshrink.run import heldout

TOLERANCE = {"nf4": 5e-2, "int8": 1e-1}
"""nats, of the mean difference of next-token log-probabilities. Measured on models of 0.3 to 6 million parameters in
bfloat16: NF4 up to .019, int8 up to .031; another model's weights differ by whole nats."""


def library() -> str:
    """What reloads, by name and version."""
    return f"plain transformers {version('transformers')} with bitsandbytes {version('bitsandbytes')}"


def token_logprobs(folder: Path, scheme: BitsAndBytesScheme, windows: Sequence[Batch], device: torch.device) -> Tensor:
    """Log-probabilities of each next token as a run keeps them, float32 [positions]. windows: of one row each.

    Raises LlmshrinkError where bitsandbytes isn't there, CheckpointError where transformers can't load the folder.
    """
    require(f"verifying {folder}", "verify it where it is installed")
    from llmshrink_eval.configured import running_config
    from llmshrink_eval.whole import pretrained

    chatter = logging.getLogger("bitsandbytes.autograd._functions")
    level = chatter.level
    chatter.setLevel(logging.ERROR)  # a line for each product that it casts to float16 for
    try:
        with redirect_stderr(StringIO()), torch.no_grad():
            model = pretrained(folder, running_config(folder), device_map={"": device})
            rows = [model(window.input_ids.to(device)).logits for window in windows]
    except EvalError as error:
        raise CheckpointError(str(error)) from error
    except Exception as error:  # of every type: a missing file, a shape, an unknown class
        said = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{folder}: {library()} doesn't run it here ({type(error).__name__}: {said}); see the notes of llmshrink "
            "inspect, and verify it where it does"
        ) from error
    finally:
        chatter.setLevel(level)
    kept = [heldout.reference(window, row, lambda logits: logits) for window, row in zip(windows, rows, strict=True)]
    return heldout.merge(kept)["token_logprobs"]
