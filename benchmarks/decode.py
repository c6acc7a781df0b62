"""Decoding at batch 1 through `llmshrink.load`, beside the same model in bfloat16: `python -m benchmarks.decode`.

    python -m benchmarks.decode [--shape llama3-8b | small] [--bits 4] [--group-size 128] [--tokens 128] [-o results/]

A checkpoint of random codes of that shape is written, loaded packed, and one linear of each kind is held to float64;
then both models generate the same number of tokens, after a run that warms up. On a CUDA device the cache is static, so
that transformers compiles the forward into CUDA graphs for both alike. Random weights say nothing sensible, and take
exactly as long.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llmshrink.api.bench import commit
from llmshrink.formats.compressed_tensors import GroupedIntScheme, quantization_config

SHAPES: dict[str, dict[str, int]] = {
    "llama3-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 8192,
    },
    "small": {
        "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 2048,
    },
}  # fmt: skip
PROMPT = 16
REPEATS = 3


def linears(shape: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Path in a layer -> (outputs, inputs)."""
    hidden, ffn, width = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    queries, keys = shape["num_attention_heads"] * width, shape["num_key_value_heads"] * width
    return {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }


def config_of(shape: dict[str, int]) -> Any:
    """transformers' config of a shape."""
    from transformers import LlamaConfig

    options: dict[str, Any] = {**shape, "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    return LlamaConfig(**options)


def write(folder: Path, shape: dict[str, int], bits: int, group_size: int) -> None:
    """A packed checkpoint of random codes, layer by layer."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    places: dict[str, str] = {}

    def save(name: str, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, name))

    for index in range(shape["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        tensors = {
            f"{layer}.{norm}.weight": torch.ones(shape["hidden_size"], dtype=torch.bfloat16)
            for norm in ("input_layernorm", "post_attention_layernorm")
        }
        for path, (outputs, inputs) in linears(shape).items():
            tensors |= dict(packed(f"{layer}.{path}", outputs, inputs, bits, group_size, generator))
        save(f"model-layer-{index:05}.safetensors", tensors)
    table = (shape["vocab_size"], shape["hidden_size"])
    outside = {
        "model.embed_tokens.weight": torch.randn(table, generator=generator).to(torch.bfloat16),
        "lm_head.weight": (torch.randn(table, generator=generator) / math.sqrt(table[1])).to(torch.bfloat16),
        "model.norm.weight": torch.ones(shape["hidden_size"], dtype=torch.bfloat16),
    }
    save("model-outside.safetensors", outside)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    scheme = GroupedIntScheme(bits, group_size, True)
    sites = {f"model.layers.{i}.{path}": scheme for i in range(shape["num_hidden_layers"]) for path in linears(shape)}
    config = config_of(shape).to_dict()
    config["quantization_config"] = quantization_config(sites, ["lm_head"])
    (folder / "config.json").write_text(json.dumps(config))


def packed(
    name: str, outputs: int, inputs: int, bits: int, group_size: int, generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    """A linear's tensors: random words are random codes."""
    words = torch.randint(-(2**31), 2**31, (outputs, inputs * bits // 32), dtype=torch.int32, generator=generator)
    spread = torch.rand(outputs, inputs // group_size, generator=generator) + 0.5
    yield f"{name}.weight_packed", words
    yield f"{name}.weight_scale", (spread / (2 ** (bits - 1) * math.sqrt(inputs))).to(torch.bfloat16)
    yield f"{name}.weight_shape", torch.tensor([outputs, inputs])


def hold(model: Any, device: torch.device) -> None:
    """Raise AssertionError unless each kind of packed linear of the first layer computes what float64 says."""
    from llmshrink_kernels.wna16 import naive
    from llmshrink_kernels.wna16.prepack import unpack

    for path in linears(SHAPES["small"]):
        linear = model.model.layers[0].get_submodule(path)
        weight = linear.packed()
        codes, scale, zero_point = unpack(weight)
        dense = naive.dequantize(codes, scale, zero_point, weight.group_size).to(device)
        x = torch.randn(3, weight.in_features, device=device, dtype=torch.bfloat16)
        far = (linear(x).double() - x.double() @ dense.T).abs() / naive.allowed_error(x, dense, torch.bfloat16)
        assert far.max() <= 1, f"{path}: {far.max():.3g} times the allowed error"


def decode_rate(model: Any, tokens: int, device: torch.device) -> float:
    """New tokens a second, the median of some runs of a whole count and of a third of it.

    What every run has alike (the prompt, a new static cache, CUDA graphs recorded for it) is in both, and taken away.
    """
    prompt = torch.arange(2, 2 + PROMPT, device=device).unsqueeze(0)
    cache = {"cache_implementation": "static"} if device.type == "cuda" else {}

    def seconds(count: int) -> float:
        _wait(device)
        started = time.perf_counter()
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, min_new_tokens=count,
            do_sample=False, pad_token_id=0, eos_token_id=None, **cache,
        )  # fmt: skip
        _wait(device)
        return time.perf_counter() - started

    with torch.inference_mode():
        seconds(tokens)
        third = tokens // 3
        short = statistics.median(seconds(third) for _ in range(REPEATS))
        whole = statistics.median(seconds(tokens) for _ in range(REPEATS))
    return (tokens - third) / (whole - short)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _used(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def dense_model(shape: dict[str, int], device: torch.device) -> Any:
    """The same architecture with random bfloat16 weights, made on the device."""
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        return AutoModelForCausalLM.from_config(config_of(shape), dtype=torch.bfloat16).eval()


def measure(shape_name: str, bits: int, group_size: int, tokens: int, device: torch.device) -> dict[str, Any]:
    """Both models, one after the other."""
    import transformers

    import llmshrink

    shape = SHAPES[shape_name]
    scratch = Path(tempfile.mkdtemp())
    try:
        write(scratch / "packed", shape, bits, group_size)
        before = _used(device)
        model = llmshrink.load(scratch / "packed", device=str(device), dtype="bfloat16")
        held = _used(device) - before
        hold(model, device)
        ours = decode_rate(model, tokens, device)
        del model
    finally:
        shutil.rmtree(scratch)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch._dynamo.reset()
    theirs = decode_rate(dense_model(shape, device), tokens, device)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "commit": commit(),
        "shape": shape_name,
        "bits": bits,
        "group_size": group_size,
        "tokens": tokens,
        "packed_tokens_per_second": round(ours, 2),
        "bfloat16_tokens_per_second": round(theirs, 2),
        "ratio": round(ours / theirs, 3),
        "packed_device_bytes": held,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama3-8b" if torch.cuda.is_available() else "small")
    parser.add_argument("--bits", type=int, choices=(2, 4, 8), default=4)
    parser.add_argument("--group-size", type=int, choices=(32, 64, 128, 256), default=128)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("-o", "--output", type=Path, help="a folder for the result, as JSON")
    arguments = parser.parse_args()
    found = measure(
        arguments.shape, arguments.bits, arguments.group_size, arguments.tokens, torch.device(arguments.device)
    )
    print(
        f"{found['shape']} on {found['device']}, batch 1: {found['packed_tokens_per_second']} tokens/s packed"
        f" ({found['bits']} bits), {found['bfloat16_tokens_per_second']} in bfloat16: {found['ratio']}x"
    )
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        path = arguments.output / f"decode-{arguments.shape}-{found['date'][:10]}.json"
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(path)


if __name__ == "__main__":
    main()
