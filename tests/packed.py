"""Small packed checkpoints, written directly: the runtime's tests need no solver."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmshrink.formats import compressed_tensors
from llmshrink.formats.compressed_tensors import GroupedIntScheme
from llmshrink.weights import GroupedInt


def rounded(weight: Tensor, scheme: GroupedIntScheme) -> GroupedInt:
    """The weight rounded to the nearest code, scales in its dtype; every other group's scale is negative."""
    rows, columns = weight.shape
    size = columns if scheme.group_size == -1 else scheme.group_size
    low, high = -(1 << (scheme.bits - 1)), (1 << (scheme.bits - 1)) - 1
    groups = weight.float().view(rows, -1, size)
    if scheme.symmetric:
        scale = (groups.abs().amax(-1) / high).clamp(min=1e-5)
        scale[:, ::2] *= -1
        zero = None
    else:
        scale = ((groups.amax(-1) - groups.amin(-1)) / (high - low)).clamp(min=1e-5)
        zero = (low - groups.amin(-1) / scale).round().clamp(low, high)
    scale = scale.to(weight.dtype)
    codes = groups / scale.float().unsqueeze(-1) + (0 if zero is None else zero.unsqueeze(-1))
    codes = codes.round().clamp(low, high).view(rows, columns).to(torch.int8)
    return GroupedInt(codes, scale, None if zero is None else zero.to(torch.int8), scheme.bits, size)


def pack_checkpoint(
    source: Path,
    target: Path,
    scheme: GroupedIntScheme,
    *,
    chosen: Callable[[str], bool] = lambda name: "layers" in name,
    **changes: Any,
) -> Path:
    """A packed copy of the model in `source`: its linears inside the blocks, or those `chosen`.

    changes: of the quantization_config, which names every linear literally otherwise.
    """
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    names = [
        key.removesuffix(".weight")
        for key, tensor in tensors.items()
        if key.endswith("proj.weight" if "lm_head.weight" not in key else ".weight") and tensor.ndim == 2
    ]
    names = [name for name in names if chosen(name)]
    for name in names:
        tensors |= compressed_tensors.tensors(name, rounded(tensors.pop(f"{name}.weight"), scheme))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    described = compressed_tensors.quantization_config(dict.fromkeys(names, scheme), ["lm_head"])
    config["quantization_config"] = {**described, **changes}
    (target / "config.json").write_text(json.dumps(config))
    return target
