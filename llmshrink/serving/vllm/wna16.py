"""`wna16_matmul` among vLLM's mixed-precision kernels: 2, 3, 4 and 8-bit grouped integers.

By default it is asked last, and so serves what the built-in kernels refuse: 2 and 3 bits everywhere, and on CPUs 8
bits, shapes that vLLM's own doesn't take, and 4 bits where the CPU has no AVX-512 (`cpu`). vLLM has the weight in one
of two layouts by then, which its parameters tell: codes packed along the inputs as [N, words] (compressed-tensors) or
as [words, N] (GPTQ).
"""

from __future__ import annotations

from typing import Any

import torch
from llmshrink_kernels.wna16 import PackedWeight, cpu, prepack_compressed_tensors
from torch import Tensor, nn

from llmshrink.serving.vllm.compat import MPLinearKernel, replace_parameter, scalar_types

DTYPES = (torch.float16, torch.bfloat16)
GROUP_SIZES = (-1, 32, 64, 128, 256)
BITS = {
    scalar_types.uint2b2: 2,
    scalar_types.uint3b4: 3,
    scalar_types.uint4b8: 4,
    scalar_types.uint8b128: 8,
    scalar_types.uint2: 2,
    scalar_types.uint3: 3,
    scalar_types.uint4: 4,
    scalar_types.uint8: 8,
}


class LlmshrinkLinearKernel(MPLinearKernel):  # type: ignore[misc]
    """On CUDA the fused kernel; on CPUs torch's int4 product for 4 and 8 bits in bfloat16, which is fast on all of them
    (`llmshrink_kernels.wna16.cpu`), else blocks of the weight in float32.
    """

    @classmethod
    def get_min_capability(cls) -> int:
        """Ampere."""
        return 80

    @classmethod
    def can_implement(cls, c: Any) -> tuple[bool, str | None]:
        """Whether it takes a rank's part of a layer (an MPLinearLayerConfig), and if not why."""
        why = refusal(c)
        return why is None, why

    def process_weights_after_loading(self, layer: Any) -> None:
        """Bring the weight into the kernel's layout."""
        inputs, outputs = self.config.partition_weight_shape
        words, scale, zero_point = self._get_weight_params(layer)
        packed = prepack_compressed_tensors(
            _rows_first(words, words.input_dim == 0),
            _rows_first(scale, scale.output_dim == 1),
            _rows_first(zero_point, zero_point.output_dim == 1) if self.config.zero_points else None,
            (outputs, inputs),
            bits=BITS[self.config.weight_type],
            group_size=self.config.group_size,
        )
        self.group_size = packed.group_size
        names = (self.w_q_name, self.w_s_name, self.w_zp_name)
        for name, tensor in zip(names, self._kept(layer, packed), strict=True):
            if name is not None and tensor is not None:
                replace_parameter(layer, name, nn.Parameter(tensor, requires_grad=False))

    def _kept(self, layer: nn.Module, packed: PackedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
        """What takes the place of words, scales and zero-points: the kernel's layout, or that of torch's product."""
        group = cpu.group_for(packed.bits, packed.group_size, packed.in_features)
        self.by_torch = group is not None and self.config.act_type == torch.bfloat16 and not packed.words.is_cuda
        if not self.by_torch:
            return packed.words, packed.scales, packed.zero_points
        assert group is not None
        scale_and_zero, left = cpu.pairs(packed.scales, packed.zero_points, group, packed)
        layer.register_buffer("llmshrink_left", left, persistent=False)
        return cpu.pack(packed), scale_and_zero, packed.zero_points

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: [..., K] -> [..., N]."""
        inputs, outputs = self.config.partition_weight_shape
        words, scales, zero_points = self._get_weight_params(layer)
        flat = x.reshape(-1, inputs)
        if self.by_torch:
            y: Tensor = torch.ops.llmshrink.int4_cpu_matmul(flat, words, scales, layer.llmshrink_left, outputs)
        else:
            y = torch.ops.llmshrink.wna16_matmul(
                flat,
                words,
                scales,
                zero_points if self.config.zero_points else None,
                BITS[self.config.weight_type],
                self.group_size,
                outputs,
                inputs,
            )
        y = y.view(*x.shape[:-1], outputs)
        return y if bias is None else y + bias


def refusal(c: Any) -> str | None:
    """Why the kernel doesn't take a layer (an MPLinearLayerConfig); None when it does."""
    inputs, outputs = c.partition_weight_shape
    bits = BITS.get(c.weight_type)
    if bits is None:
        return f"llmshrink's kernel takes integers of 2, 3, 4 and 8 bits, not {c.weight_type}"
    if c.act_type not in DTYPES or c.out_type not in (None, c.act_type):
        return f"llmshrink's kernel computes in float16 or bfloat16, not {c.act_type} to {c.out_type or c.act_type}"
    if c.group_size not in GROUP_SIZES:
        return f"llmshrink's kernel takes groups of {GROUP_SIZES}, not {c.group_size}"
    if c.group_size != -1 and inputs % c.group_size:
        return f"groups of {c.group_size} don't divide {inputs} inputs"
    if inputs != c.full_weight_shape[0] and inputs * bits % 32:
        return f"{inputs} inputs of a rank end inside a word at {bits} bits"
    if c.zero_points and outputs * bits % 32:
        return f"the zero-points of {outputs} outputs end inside a word at {bits} bits"
    return None


def _rows_first(parameter: Tensor, turned: bool) -> Tensor:
    """The parameter's data as compressed-tensors lies: outputs along the rows."""
    return parameter.data.t().contiguous() if turned else parameter.data
