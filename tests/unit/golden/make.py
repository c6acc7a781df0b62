"""Made the `pack_*bit.safetensors` beside it, with compressed-tensors 0.20.0, in an environment of its own:

    python -m venv /tmp/golden && /tmp/golden/bin/pip install 'compressed-tensors==0.20.0'
    /tmp/golden/bin/python tests/unit/golden/make.py

The version that vLLM 0.32 pins (0.17) packs these bits otherwise, so that what is right can't be asked of it. Each file
holds one linear twice, `symmetric.*` and `asymmetric.*`: what the library stores, and the `weight` it reads back.
"""

from pathlib import Path

import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file

OUT_FEATURES, IN_FEATURES, GROUP_SIZE = 21, 60, 20


def linear(bits: int, symmetric: bool, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """One linear whose codes take every value, stored and read back by the library."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    groups = (OUT_FEATURES, IN_FEATURES // GROUP_SIZE)
    codes = torch.randint(low, high, (OUT_FEATURES, IN_FEATURES), generator=generator)
    zero_point = torch.zeros(groups) if symmetric else torch.randint(low, high, groups, generator=generator)
    scale = torch.rand(groups, generator=generator).add(0.5).to(torch.bfloat16)
    spread = (codes.view(*groups, GROUP_SIZE) - zero_point.unsqueeze(-1)) * scale.float().unsqueeze(-1)
    args = QuantizationArgs(
        num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=GROUP_SIZE, actorder=None
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    state = {
        "weight": spread.view(OUT_FEATURES, IN_FEATURES),
        "weight_scale": scale,
        "weight_zero_point": zero_point.to(torch.int8),
    }
    stored = PackedQuantizationCompressor.compress(state, scheme)
    weight = PackedQuantizationCompressor.decompress(stored, scheme)["weight"]
    return {**stored, "weight": weight, "codes": codes.to(torch.int8)}


def main() -> None:
    """Write a file for each number of bits that doesn't divide 32."""
    for bits in (3, 5, 6, 7):
        generator = torch.Generator().manual_seed(bits)
        tensors = {
            f"{kind}.{key}": value.contiguous()
            for kind, symmetric in (("symmetric", True), ("asymmetric", False))
            for key, value in linear(bits, symmetric, generator).items()
        }
        save_file(tensors, Path(__file__).with_name(f"pack_{bits}bit.safetensors"))


if __name__ == "__main__":
    main()
