"""`llmshrink.load` and `llmshrink.generate`: a compressed checkpoint, running in torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from llmshrink.errors import PathLike

if TYPE_CHECKING:
    from llmshrink.runtime.generate import Generation


def load(
    model: PathLike, *, device: str | None = None, dtype: str | None = None, trust_remote_code: bool = False
) -> Any:
    """Load a model with its weights packed: transformers' own model, with a QuantLinear for each packed linear, a
    SparseLinear for each that is 2:4 without its zeros, and an EightBitLinear for each that rounds inputs to 8 bits.

    model: a Hub id (`id` or `id@revision`), a folder, or "demo"; compressed-tensors' pack-quantized of 2, 3, 4 or 8
    bits, or its int-quantized or float-quantized with inputs rounded token by token, by any tool, llmshrink's own
    format, or a model that isn't compressed, which then loads as it is. device: "cpu", "cuda", ...; None is the fastest
    that is there. dtype: "bfloat16", "float16" or "float32" (a CPU alone computes packed weights in that); None is the
    checkpoint's own, and on a CPU float32 where that is faster: for float16, and for bfloat16 where the CPU has no
    instructions for it and the weights aren't packed in 4 or 8 bits. The model is in evaluation mode, `generate` works,
    and its memory is the compressed size; `.to(dtype)` changes the activations' dtype and never the scales. Weights are
    padded to whole tiles: outputs to a multiple of 64, inputs (but for torch's int4 product on a CPU) to one of 256 for
    4 bits, 128 for 8, 512 for 3 and 2, or of half that where it makes a row shorter (with 3 bits by a sixteenth at
    least). Where no kernel runs (no CUDA, or no Triton), plain torch computes the same within the kernels' tolerance,
    and one notice is logged. Raises LlmshrinkError for bad input.
    """
    from llmshrink.checkpoint.source import resolve
    from llmshrink.runtime.load import load as run

    source = resolve(os.fspath(model), trust_remote_code=trust_remote_code)
    return run(source, device=device, dtype=dtype, trust_remote_code=trust_remote_code)


def generate(
    model: PathLike,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    device: str | None = None,
    dtype: str | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool | None = None,
    bos: Literal["auto", "always", "never"] = "auto",
    trust_remote_code: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Let a model go on from `prompt`, with its weights packed as `load` loads them.

    model, device, dtype: as in `load`. temperature: 0 takes the likeliest token each time; above, tokens are drawn from
    the likeliest that make up top_p. chat: whether the prompt is put into the tokenizer's chat template; None does so
    where there is one. bos: whether a prompt that isn't in one begins with BOS (auto: where the family or the tokenizer
    needs it). on_text: called with each piece of text as it comes. Raises LlmshrinkError for bad input.
    """
    from llmshrink.checkpoint.source import resolve
    from llmshrink.runtime.generate import Sampling
    from llmshrink.runtime.generate import generate as run

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    sampling.check()
    options: dict[str, Any] = {"device": device, "dtype": dtype, "chat": chat, "bos": bos, "on_text": on_text}
    source = resolve(os.fspath(model), trust_remote_code=trust_remote_code)
    return run(source, prompt, sampling, trust_remote_code=trust_remote_code, **options)
