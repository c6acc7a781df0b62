"""A linear of vLLM whose weight is stored 2:4 (see llmshrink_kernels.sparse24.canonical).

It loads with vLLM's own parameter classes, so that the parts of a merged layer land one under the other and a rank
takes its rows (column parallel) or its columns (row parallel). Columns are cut between bytes: positions of eight inputs
are one byte, so a rank's inputs are a multiple of 8, and of the group. Scales load in float32, which holds every 16-bit
format's numbers, and go to the narrowest dtype that holds them exactly afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llmshrink.formats.sparse24 import Sparse24Scheme
from llmshrink.serving.vllm.compat import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    LinearMethodBase,
    ModelWeightParameter,
    register_weight_loader_v2_supported_method,
)


@register_weight_loader_v2_supported_method
class Sparse24LinearMethod(LinearMethodBase):  # type: ignore[misc]
    """y = x W^T + b, W 2:4: on CUDA by the fused kernel, elsewhere by plain torch through the same operator."""

    def __init__(self, scheme: Sparse24Scheme, name: str) -> None:
        self.scheme, self.name = scheme, name

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Empty parameters for one rank's part of the tensors that llmshrink.formats.sparse24 lists.

        Raises ValueError where the inputs can't be cut so.
        """
        inputs, outputs = input_size_per_partition, sum(output_partition_sizes)
        bits = self.scheme.bits
        self._check_cut(inputs, input_size)
        loader: Callable[..., None] = extra["weight_loader"]
        layer.in_features, layer.out_features = inputs, outputs
        width = inputs // 4 if bits == 4 else inputs // 2
        dtype = {4: torch.uint8, 8: torch.int8, 16: params_dtype}[bits]
        matrix = {"input_dim": 1, "output_dim": 0, "weight_loader": loader}
        values = ModelWeightParameter(data=torch.empty(outputs, width, dtype=dtype), **matrix)
        positions = ModelWeightParameter(data=torch.empty(outputs, -(-inputs // 8), dtype=torch.uint8), **matrix)
        layer.register_parameter("weight_values", values)
        layer.register_parameter("weight_positions", positions)
        shape = BasevLLMParameter(data=torch.empty(2, dtype=torch.int64), weight_loader=loader)
        layer.register_parameter("weight_shape", shape)
        if self.scheme.group_size is None:
            return
        if self.scheme.group_size == -1:
            column = torch.empty(outputs, 1, dtype=torch.float32)
            scale = ChannelQuantScaleParameter(data=column, output_dim=0, weight_loader=loader)
        else:
            grid = torch.empty(outputs, inputs // self.scheme.group_size, dtype=torch.float32)
            scale = GroupQuantScaleParameter(data=grid, **matrix)
        layer.register_parameter("weight_scale", scale)

    def process_weights_after_loading(self, layer: Any) -> None:
        """From what is stored to what the kernel reads. Raises ValueError naming the layer when it isn't 2:4."""
        from llmshrink_kernels.sparse24 import prepack, unpack_nibbles, unpack_positions

        values = layer.weight_values.data
        scale = None if self.scheme.bits == 16 else narrowest(layer.weight_scale.data, layer.params_dtype)
        try:
            packed = prepack(
                unpack_nibbles(values) if self.scheme.bits == 4 else values,
                unpack_positions(layer.weight_positions.data, layer.in_features // 2),
                scale,
                bits=self.scheme.bits,
                group_size=-1 if self.scheme.group_size is None else self.scheme.group_size,
            )
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        for stored in ("weight_values", "weight_positions", "weight_scale", "weight_shape"):
            if hasattr(layer, stored):
                delattr(layer, stored)
        layer.register_parameter("words", nn.Parameter(packed.words, requires_grad=False))
        scales = None if packed.scales is None else nn.Parameter(packed.scales, requires_grad=False)
        layer.register_parameter("scales", scales)
        layer.group_size, layer.bfloat = packed.group_size, packed.bfloat

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: [..., K] -> [..., N]."""
        y: Tensor = torch.ops.llmshrink.sparse24_matmul(
            x.reshape(-1, layer.in_features),
            layer.words,
            layer.scales,
            self.scheme.bits,
            layer.group_size,
            layer.bfloat,
            layer.out_features,
            layer.in_features,
        )
        y = y.view(*x.shape[:-1], layer.out_features)
        return y if bias is None else y + bias

    def _check_cut(self, inputs: int, whole: int) -> None:
        group = self.scheme.group_size
        if inputs % (4 if inputs == whole else 8):
            raise ValueError(
                f"{self.name}: a rank has {inputs} of {whole} inputs; 2:4 takes multiples of 4, cut at multiples of 8"
            )
        if group not in (None, -1) and inputs % group:
            raise ValueError(f"{self.name}: groups of {group} don't divide a rank's {inputs} of {whole} inputs")


def narrowest(scale: Tensor, preferred: torch.dtype) -> Tensor:
    """float32 -> the same numbers in `preferred`, else in the first 16-bit format that holds them, else as they are."""
    for dtype in (preferred, torch.bfloat16, torch.float16):
        narrow = scale.to(dtype)
        if torch.equal(narrow.float(), scale):
            return narrow
    return scale
