"""Write a synthetic Llama for memory measurements: `python -m benchmarks.make_llama FOLDER`.

About 3 GB in bfloat16: hidden 2048, FFN 5632, 32 layers, in shards of `--shard-layers` layers that are made and written
one at a time, so that the writer itself needs little memory. Weights are seeded normal noise with the variance
1 / in_features (output projections 1 / (2 layers in_features)), so activations keep a sane scale; the tokenizer is the
demo's.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from llmshrink.demo import tokenizer

POSITIONS = 2048
HEAD_DIM = 64


def layer(index: int, layers: int, hidden: int, ffn: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The tensors of one decoder layer, bfloat16."""

    def noise(rows: int, columns: int, gain: float = 1.0) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) * (gain / math.sqrt(columns))).to(torch.bfloat16)

    closing = 1 / math.sqrt(2 * layers)
    weights = {
        "self_attn.q_proj": noise(hidden, hidden),
        "self_attn.k_proj": noise(hidden // 4, hidden),
        "self_attn.v_proj": noise(hidden // 4, hidden),
        "self_attn.o_proj": noise(hidden, hidden, closing),
        "mlp.gate_proj": noise(ffn, hidden),
        "mlp.up_proj": noise(ffn, hidden),
        "mlp.down_proj": noise(hidden, ffn, closing),
        "input_layernorm": torch.ones(hidden, dtype=torch.bfloat16),
        "post_attention_layernorm": torch.ones(hidden, dtype=torch.bfloat16),
    }
    return {f"model.layers.{index}.{name}.weight": tensor for name, tensor in weights.items()}


def write(folder: Path, *, hidden: int, ffn: int, layers: int, shard_layers: int, vocabulary: int, seed: int) -> int:
    """Write the checkpoint shard by shard. Returns its tensors' bytes."""
    from transformers import LlamaConfig

    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    places: dict[str, str] = {}
    size = 0
    starts = list(range(0, layers, shard_layers))
    for number, start in enumerate(starts):
        shard: dict[str, Tensor] = {}
        for index in range(start, min(start + shard_layers, layers)):
            shard |= layer(index, layers, hidden, ffn, generator)
        if number == 0:
            shard["model.embed_tokens.weight"] = torch.randn(vocabulary, hidden, generator=generator).to(torch.bfloat16)
            shard["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
            head = torch.randn(vocabulary, hidden, generator=generator) / math.sqrt(hidden)
            shard["lm_head.weight"] = head.to(torch.bfloat16)
        name = f"model-{number + 1:05}-of-{len(starts):05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, name)
        size += sum(tensor.nbytes for tensor in shard.values())
    listing = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listing, indent=1))
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD_DIM,
        num_key_value_heads=hidden // HEAD_DIM // 4,
        head_dim=HEAD_DIM,
        max_position_embeddings=POSITIONS,
        bos_token_id=None,
        eos_token_id=tokenizer.END_ID,
    ).save_pretrained(folder)
    tokenizer.build(POSITIONS).save_pretrained(folder)
    return size


def main() -> None:
    """Write the model and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=5632)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--shard-layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=tokenizer.VOCABULARY_SIZE)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(f"{arguments.folder}: {write(**vars(arguments)) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
