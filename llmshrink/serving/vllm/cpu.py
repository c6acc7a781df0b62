"""vLLM's own kernels for CPUs, asked whether this CPU has what they need; so that ours are asked where it hasn't.

vLLM 0.32's CPU build offers its int4 kernel on every CPU, and the extension that it loads on one without AVX-512
doesn't have it: the model loads, and the first forward raises. Its products of int8 are oneDNN's, which without VNNI
adds pairs of products in 16 bits: they overflow, and nothing is said (of codes at their limits a hundredth of the sum
is left). Both checks are asked as they are; what they accept is refused where the kernel isn't there, or a trial isn't
exact.

For products of int8 ours is `weights.eight_bit_product`: exact on every CPU. It takes what llm-compressor and we
write, weights with a scale a row and inputs rounded token by token. Other int8 checkpoints stay with vLLM's, and one
line says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from llmshrink.serving.vllm import compat
from llmshrink.weights.eight_bit_product import takes

NO_INT4 = "vLLM's CPU build has an int4 kernel for AVX-512 alone, and this CPU has none"
OVERFLOWS = "vLLM's products of int8 overflow on this CPU, which has no VNNI"
AMX_OUTPUTS = 32
"""What the outputs of an int8 weight must be a multiple of for vLLM's AMX kernel."""
_DONE = "_asked_by_llmshrink"
_logger = logging.getLogger("vllm.plugins.llmshrink")


class LlmshrinkInt8Kernel(compat.Int8ScaledMMLinearKernel):  # type: ignore[misc]
    """y = s_x s_w (q_x q_w^T) + b, the sum of codes exact, or within 2**-21 in blocks of float32."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """On CPUs, for which alone it is offered."""
        return True, None

    @classmethod
    def can_implement(cls, c: Any) -> tuple[bool, str | None]:
        """Whether it takes a layer (an Int8ScaledMMLinearLayerConfig), and if not why."""
        taken = c.is_channelwise and c.input_symmetric and not c.is_static_input_scheme
        return taken, None if taken else "llmshrink's product of int8 takes a scale a row, and inputs rounded by token"

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Keep the codes as they are stored, [N, K], and the scales as float32 [N, 1]."""
        codes, scale = (getattr(layer, name) for name in self.layer_param_names[:2])
        codes, scale = codes.data.contiguous(), scale.data.to(torch.float32).reshape(-1, 1)
        for name, tensor in zip(self.layer_param_names[:2], (codes, scale), strict=True):
            compat.replace_parameter(layer, name, nn.Parameter(tensor, requires_grad=False))
        self.whole = takes("int8", (codes.shape[0], codes.shape[1]), codes.device)

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: [..., K] -> [..., N]."""
        codes, scale = (getattr(layer, name) for name in self.layer_param_names[:2])
        y: Tensor = torch.ops.llmshrink.eight_bit_matmul(x.reshape(-1, codes.shape[1]), codes, scale, self.whole)
        y = y.view(*x.shape[:-1], codes.shape[0])
        return y if bias is None else y + bias


def mend() -> None:
    """Let vLLM's kernels refuse what they can't compute on this CPU, and offer ours for int8; again does no harm."""
    _also(compat.CPUWNA16LinearKernel, lambda _: None if compat.has_own_int4() else NO_INT4)
    _also(compat.CPUInt8ScaledMMLinearKernel, _overflows)
    compat.offer_int8_kernel(LlmshrinkInt8Kernel)
    compat.narrow_amx(_packs)


def _packs(outputs: int, dtype: torch.dtype) -> bool:
    """Whether vLLM's AMX kernel takes such a weight in the model's dtype, as far as its own check doesn't ask."""
    return dtype != torch.int8 or (outputs % AMX_OUTPUTS == 0 and torch.get_default_dtype() == torch.bfloat16)


def _also(kernel: Any, refusal: Callable[[Any], str | None]) -> None:
    """Have a kernel refuse, of the layers that it takes, those for which `refusal` has a reason."""
    own: Callable[[Any], tuple[bool, str | None]] = kernel.can_implement
    if hasattr(own, _DONE):
        return

    def can_implement(_cls: type, c: Any) -> tuple[bool, str | None]:
        taken, why = own(c)
        if taken:
            why = refusal(c)
        return taken and why is None, why

    setattr(can_implement, _DONE, True)
    kernel.can_implement = classmethod(can_implement)


def _overflows(c: Any) -> str | None:
    if exact():
        return None
    taken, why = LlmshrinkInt8Kernel.can_implement(c)
    if taken:
        return OVERFLOWS
    _warn(f"llmshrink's plugin: {OVERFLOWS}; {why}: this model's outputs may be wrong")
    return None


@cache
def exact() -> bool:
    """Whether vLLM's product of int8 is right on this CPU where sums of pairs are the largest; tried once."""
    inputs = 64
    try:
        codes = torch.full((32, inputs), 127, dtype=torch.int8)
        by_row, by_token = torch.ones(32, 1), torch.ones(4, 1)  # the handler reads the first where it lies
        handler = compat.create_onednn_scaled_mm(codes.t(), by_row, torch.float32, True, False, 32)
        y = torch.empty(4, 32, dtype=torch.float32)
        compat.onednn_scaled_mm(handler, codes[:4].contiguous(), y, by_token, None, None, None)
    except (RuntimeError, AttributeError):
        return True  # a build with other products than oneDNN's: nothing is known against them
    return bool((y == inputs * 127**2).all())


@cache
def _warn(line: str) -> None:
    _logger.warning(line)
