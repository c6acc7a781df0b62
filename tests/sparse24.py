"""Small checkpoints in llmshrink's 2:4 format, written from its description, beside the dense model that they mean."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from llmshrink_kernels.sparse24 import compress, pack_nibbles, pack_positions
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(frozen=True)
class Pair:
    """sparse: the checkpoint. dense: a plain one of the same numbers, zeros and all."""

    sparse: Path
    dense: Path


def two_of_four(weight: Tensor) -> Tensor:
    """The two largest of every four inputs; the others are zero."""
    fours = weight.view(weight.shape[0], -1, 4)
    kept = fours.abs().topk(2, dim=-1).indices
    mask = torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, kept, True)
    return (fours * mask).view_as(weight)


def write_pair(source: Path, folder: Path, *, bits: int, group_size: int | None, dtype: torch.dtype) -> Pair:
    """Both, from the model in `source`: every linear inside the blocks but the last down_proj, which stays dense.

    group_size: with 4 and 8 bits; -1 is a row. dtype: of everything else, and of the scales.
    """
    pair = Pair(folder / f"sparse-{bits}", folder / f"dense-{bits}")
    config = json.loads((source / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(source / "model.safetensors").items()}
    stays = f"model.layers.{config['num_hidden_layers'] - 1}.mlp.down_proj"
    linears = [key.removesuffix(".weight") for key in tensors if "layers" in key and key.endswith("proj.weight")]
    names = [name for name in linears if name != stays]
    dense, sparse = dict(tensors), dict(tensors)
    for name in names:
        stored, meant = stored_linear(two_of_four(tensors[f"{name}.weight"].float()), bits, group_size, dtype)
        del sparse[f"{name}.weight"]
        sparse |= {f"{name}.{suffix}": tensor.contiguous() for suffix, tensor in stored.items()}
        dense[f"{name}.weight"] = meant
    for target, contents in ((pair.sparse, sparse), (pair.dense, dense)):
        shutil.copytree(source, target)
        save_file(contents, target / "model.safetensors", metadata={"format": "pt"})
        (target / "config.json").write_text(json.dumps(config))
    config["dtype"] = "float32"
    (pair.dense / "config.json").write_text(json.dumps(config))
    config["dtype"] = str(dtype).removeprefix("torch.")
    config["quantization_config"] = described(names, bits, group_size, ignore=[stays, "lm_head"])
    (pair.sparse / "config.json").write_text(json.dumps(config))
    return pair


def described(names: list[str], bits: int, group_size: int | None, ignore: list[str]) -> dict[str, Any]:
    """The `quantization_config`."""
    weights = {
        "num_bits": bits,
        "type": "float" if bits == 16 else "int",
        "symmetric": True,
        "strategy": None if group_size is None else "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "pattern": "2:4",
    }
    return {
        "quant_method": "llmshrink",
        "format": "sparse24",
        "version": 1,
        "config_groups": {"group_0": {"targets": names, "weights": weights}},
        "ignore": ignore,
    }


def stored_linear(
    weight: Tensor, bits: int, group_size: int | None, dtype: torch.dtype
) -> tuple[dict[str, Tensor], Tensor]:
    """(the tensors that are stored, the weight that they mean in float32), of a 2:4 weight in float32."""
    shape = torch.tensor(weight.shape, dtype=torch.int64)
    if group_size is None:
        values, positions = compress(weight.to(dtype))
        return {"weight_values": values, "weight_positions": pack_positions(positions), "weight_shape": shape}, (
            weight.to(dtype).float()
        )
    rows, columns = weight.shape
    size = columns if group_size == -1 else group_size
    groups = weight.view(rows, -1, size)
    highest = (1 << (bits - 1)) - 1
    scale = (groups.abs().amax(-1) / highest).clamp(min=1e-5)
    scale[:, ::2] *= -1
    scale = scale.to(dtype)
    codes = (groups / scale.float().unsqueeze(-1)).round().clamp(-highest - 1, highest)
    values, positions = compress(codes.view(rows, columns).to(torch.int8))
    stored = {
        "weight_values": pack_nibbles(values) if bits == 4 else values,
        "weight_positions": pack_positions(positions),
        "weight_scale": scale,
        "weight_shape": shape,
    }
    return stored, (codes * scale.float().unsqueeze(-1)).view(rows, columns)
