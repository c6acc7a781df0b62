"""A teacher that takes less memory: its linears in bitsandbytes' NF4 or int8, as transformers loads them.

What such a teacher says isn't what the original says (at 4 bits its own KL from the original is that of a 4-bit model),
and a student learns that too; it is for teachers that don't fit otherwise.
"""

from __future__ import annotations

import logging
from typing import Any, Literal, get_args

import torch
from llmshrink_eval.errors import one_line

from llmshrink.checkpoint.source import Source
from llmshrink.distillation.quiet import quiet
from llmshrink.errors import LlmshrinkError, SourceError
from llmshrink.methods.bnb import require
from llmshrink.run.arithmetic import automatic_training
from llmshrink.run.asked import DTYPES
from llmshrink.runtime.load import choose_dtype, config_of, quantization_of

TeacherQuant = Literal["nf4", "int8"]
QUANTS: tuple[TeacherQuant, ...] = get_args(TeacherQuant)


def check_narrow(quant: str | None) -> None:
    """Raise LlmshrinkError where a teacher can't be loaded so."""
    if quant is None:
        return
    if quant not in QUANTS:
        raise LlmshrinkError(f"--teacher-quant {quant}: choose {' or '.join(QUANTS)}, or leave it out")
    require(f"--teacher-quant {quant}", "leave it out")


def load_narrow(source: Source, quant: TeacherQuant, device: torch.device, trust_remote_code: bool) -> Any:
    """A teacher with narrow linears; its embeddings and output layer as they are. Raises SourceError."""
    from llmshrink_eval.configured import running_config
    from llmshrink_eval.errors import EvalError
    from llmshrink_eval.whole import pretrained
    from transformers import BitsAndBytesConfig

    if quantization_of(source) is not None:
        raise SourceError(f"{source.name}: is compressed already; leave --teacher-quant out")
    products = DTYPES[automatic_training(device.type).dtype]
    chosen = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=products)
        if quant == "nf4"
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    # A line for each product of 8 bits, which it casts to float16 for, in every forward of the run.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    try:
        with quiet():
            model = pretrained(
                source.folder,
                running_config(source.folder, trust_remote_code=trust_remote_code),
                quantization_config=chosen,
                dtype=choose_dtype(None, config_of(source, trust_remote_code), device, None),
                device_map={"": device},
                trust_remote_code=trust_remote_code,
            )
    except EvalError as error:
        raise SourceError(str(error)) from error
    except Exception as error:  # of every type: a missing file, a shape, an unknown class
        raise SourceError(f"{source.name}: can't be loaded in {quant}: {one_line(error)}") from error
    model.requires_grad_(False)
    model.eval()
    try:
        with torch.no_grad():
            model(torch.full((1, 2), 2, device=device))
    except RuntimeError as error:
        raise SourceError(
            f"{source.name}: bitsandbytes can't compute its shapes in {quant} here ({one_line(error)}); choose the "
            "other, or leave --teacher-quant out"
        ) from error
    return model
