"""A Llama's equal with loud channels: `python -m benchmarks.outliers MODEL OUT`, to see what they cost.

A few channels of what each norm puts out become a power of two louder, and the columns that they meet quieter by the
same. The model computes what it did, to the bit; rounded to 8 bits token by token, its other channels have few codes
left.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

READ = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def with_outliers(source: Path, out: Path, *, channels: int = 4, factor: float = 32.0) -> Path:
    """Write the equal of a Llama that lies in one file; returns its folder. channels: of each norm, drawn by a seed."""
    out.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.name != "model.safetensors":
            shutil.copy(path, out / path.name)
    tensors = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    blocks = sum(key.endswith(".input_layernorm.weight") for key in tensors)
    for number in range(blocks):
        for norm, linears in READ.items():
            block = f"model.layers.{number}"
            gain = tensors[f"{block}.{norm}.weight"]
            loud = torch.randperm(len(gain), generator=generator)[:channels]
            gain[loud] *= factor
            for linear in linears:
                tensors[f"{block}.{linear}.weight"][:, loud] /= factor
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def main() -> None:
    """Write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--factor", type=float, default=32.0)
    arguments = parser.parse_args()
    with_outliers(arguments.model, arguments.out, channels=arguments.channels, factor=arguments.factor)


if __name__ == "__main__":
    main()
