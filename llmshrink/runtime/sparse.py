"""A linear whose 2:4 weight stays without its zeros.

Its buffers are the checkpoint's own tensors (formats.sparse24), and so is its `state_dict` always: what is saved here
loads anywhere, and transformers can load straight into it. On CUDA the layer holds the kernels' layout in their place
(`words` and `scales`; llmshrink_kernels.sparse24.prepack draws it) and changes over when it moves.

`.to(dtype)` changes what the layer computes in, never the scales: rounding those would be another model. Values of 16
bits are the weight itself, and are rounded to float16 or bfloat16 as a dense layer's would be; float32 leaves them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from llmshrink_kernels.sparse24 import PackedSparse, expand, prepack, sparse24_matmul, unpack, unpack_positions
from torch import Tensor, nn

from llmshrink.formats import sparse24
from llmshrink.formats.sparse24 import Sparse24Scheme
from llmshrink.runtime.linear import DTYPES
from llmshrink.weights import Sparse24

BLOCK_BYTES = 2 << 20
"""Of the dense weight in float32 at a time, on a CPU: what its second cache holds; 32 MB take four times as long."""


class SparseLinear(nn.Module):
    """y = x W^T + b with W 2:4, in 4- or 8-bit grouped integers or 16 bits. x: [..., in_features] in `dtype`.

    On CUDA by `sparse24_matmul`; on a CPU by blocks of the weight brought back to float32. x W^T is within
    `naive.allowed_error` of exact for x's dtype, and 2**-21 |x| |W|^T more for sums in float32; the bias is added to
    what was rounded. float32 is for the CPU. No gradient goes through it on CUDA.

    stored: the checkpoint's tensors by suffix (`weight_values`, ...), or such on the meta device, to be loaded.
    """

    weight_values: Tensor
    weight_positions: Tensor
    weight_scale: Tensor | None
    weight_shape: Tensor
    words: Tensor | None
    scales: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        stored: dict[str, Tensor],
        scheme: Sparse24Scheme,
        shape: tuple[int, int],
        bias: nn.Parameter | None = None,
        *,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        assert dtype in DTYPES, dtype
        self.scheme, self.dtype, self.kind = scheme, dtype, dtype
        self.out_features, self.in_features = shape
        for suffix in sparse24.SUFFIXES:
            self.register_buffer(suffix, stored.get(suffix))
        self.register_buffer("words", None, persistent=False)
        self.register_buffer("scales", None, persistent=False)
        self.register_parameter("bias", bias)
        self.settle()

    @classmethod
    def of(cls, weight: Sparse24, bias: nn.Parameter | None, *, dtype: torch.dtype) -> SparseLinear:
        """The layer of a weight, on its device. Raises ValueError, on CUDA, for groups that the kernel can't take."""
        return cls(_stored(weight), Sparse24Scheme.of(weight), weight.shape, bias, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features]; returns [..., out_features] in its dtype. ValueError where x doesn't fit."""
        if x.shape[-1] != self.in_features or x.dtype != self.dtype:
            raise ValueError(
                f"x is {x.dtype} {list(x.shape)}; this layer takes {self.dtype} [..., {self.in_features}]"
                " (model.to(dtype) changes its dtype)"
            )
        y = self._by_blocks(x) if self.words is None else sparse24_matmul(x, self._packed(self.words))
        return y if self.bias is None else y + self.bias

    @property
    def nbytes(self) -> int:
        """What the weight takes in memory."""
        return sum(buffer.nbytes for buffer in self._buffers.values() if buffer is not None)

    def weight(self) -> Sparse24:
        """The weight as it is stored; a copy."""
        if self.words is None:
            return sparse24.read("weight", lambda key: getattr(self, key.rpartition(".")[2]), self.scheme)
        values, positions, scale = unpack(self._packed(self.words))
        group_size = self.in_features if self.scheme.group_size == -1 else self.scheme.group_size
        return Sparse24(values, positions, scale, self.scheme.bits, group_size)

    def extra_repr(self) -> str:
        """As `nn.Linear`'s, with bits and group."""
        group = "" if self.scheme.group_size is None else f", group_size={self.scheme.group_size}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None},"
            f" bits={self.scheme.bits}{group}, pattern=2:4"
        )

    def settle(self) -> None:
        """Bring the weight into the layout for this device, and values of 16 bits into the layer's dtype."""
        device = self.weight_shape.device if self.words is None else self.words.device
        sixteen = self.scheme.bits == 16
        if device.type == "meta":
            return
        if not has_kernel(device):
            self._unsettle()
            if sixteen and self.dtype != torch.float32:
                self.weight_values = self.weight_values.to(self.dtype)
            return
        if self.words is not None and not (sixteen and self.dtype not in (torch.float32, self.kind)):
            return
        weight = self.weight()
        values = weight.values.to(self.dtype) if sixteen and self.dtype != torch.float32 else weight.values
        size = -1 if self.scheme.group_size is None else self.scheme.group_size
        packed = prepack(values, weight.positions, weight.scale, bits=weight.bits, group_size=size)
        self.words, self.scales, self.kind = packed.words, packed.scales, values.dtype
        for suffix in sparse24.SUFFIXES:
            self._buffers[suffix] = None

    def _unsettle(self) -> None:
        """Bring the weight into the checkpoint's tensors."""
        if self.words is not None:
            for suffix, tensor in _stored(self.weight()).items():
                self._buffers[suffix] = tensor.to(self.words.device)
            self.words = self.scales = None

    def _packed(self, words: Tensor) -> PackedSparse:
        size = -1 if self.scheme.group_size is None else self.scheme.group_size
        bfloat = self.scheme.bits == 16 and self.kind == torch.bfloat16
        shape = (self.out_features, self.in_features)
        return PackedSparse(words, self.scales, self.scheme.bits, size, bfloat, *shape)

    def _by_blocks(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features).float()
        result = x.new_empty(flat.shape[0], self.out_features)
        step = max(1, BLOCK_BYTES // (4 * self.in_features))
        for start in range(0, self.out_features, step):
            stop = min(start + step, self.out_features)
            result[:, start:stop] = flat @ self._dense(start, stop).T
        return result.view(*x.shape[:-1], self.out_features)

    def _dense(self, start: int, stop: int) -> Tensor:
        """scale * value of some rows: float32 [stop - start, in_features]."""
        values, positions = self.weight_values[start:stop], self.weight_positions[start:stop]
        if self.scheme.bits == 4:
            dense = nn.functional.embedding(_pairs_and_places(values, positions), TABLE)
        else:
            dense = expand(values.float(), unpack_positions(positions, self.in_features // 2), self.in_features)
        if self.weight_scale is not None:
            groups = dense.view(stop - start, self.weight_scale.shape[1], -1)
            dense = groups * self.weight_scale[start:stop].float().unsqueeze(-1)
        return dense.view(stop - start, self.in_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        kept = {name: self._buffers[name] for name in ("weight_values", "weight_scale", "scales")}
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = self._buffers[name]
            if before is not None and after is not None and before.dtype != after.dtype:
                self._buffers[name] = before.to(after.device)
        self.settle()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.words is not None:
            for suffix, tensor in _stored(self.weight()).items():
                destination[f"{prefix}{suffix}"] = tensor.to(self.words.device)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        self._unsettle()
        super()._load_from_state_dict(*arguments, **options)
        self.settle()


def has_kernel(device: torch.device) -> bool:
    """Whether the weight lies in the kernels' layout there."""
    return device.type == "cuda"


def meta(scheme: Sparse24Scheme, shape: tuple[int, int], dtypes: dict[str, torch.dtype]) -> dict[str, Tensor]:
    """The tensors of such a linear by suffix, on the meta device. dtypes: of those that a file holds, by suffix."""
    out_features, in_features = shape
    kept = in_features // 2
    groups = 1 if scheme.group_size == -1 else in_features // (scheme.group_size or in_features)
    shapes = {
        "weight_values": (out_features, kept // 2 if scheme.bits == 4 else kept),
        "weight_positions": (out_features, -(-kept // 4)),
        "weight_scale": (out_features, groups),
        "weight_shape": (2,),
    }
    return {suffix: torch.empty(shapes[suffix], dtype=dtype, device="meta") for suffix, dtype in dtypes.items()}


def _stored(weight: Sparse24) -> dict[str, Tensor]:
    found = sparse24.tensors("", weight)
    return {name.removeprefix("."): tensor.to(weight.values.device) for name, tensor in found.items()}


def _pairs_and_places(values: Tensor, positions: Tensor) -> Tensor:
    """int32 [rows, groups]: for each group of four, its row of `TABLE`: positions in the upper byte, values below."""
    places = torch.stack([positions & 15, positions >> 4], -1).view(positions.shape[0], -1)[:, : values.shape[1]]
    return places.int() * 256 + values


def _table() -> Tensor:
    """float32 [16 * 256, 4]: what each pair of 4-bit values at each pair of positions is in four inputs.

    Looking groups up is several times as fast as scattering the values.
    """
    index = torch.arange(16 * 256, device="cpu")
    low, high = index >> 8 & 3, index >> 10
    first, second = ((index & 15) ^ 8) - 8, ((index >> 4 & 15) ^ 8) - 8
    table = torch.zeros(len(index), 4, dtype=torch.float32, device="cpu")
    table[index, low] = first.float()
    table[index, high] += second.float() * (low != high)
    return table


TABLE = _table()
