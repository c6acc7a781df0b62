"""GPTQModel, run by the Python of its own environment: `PYTHON peer_gptqmodel.py MODEL TOKENS OUT --bits 4`.

Imports nothing of ours. TOKENS is a safetensors file with `input_ids`, int64 [samples, seq_len]. All else is at its own
defaults. Few read its format, so OUT holds the weights as its own layers dequantize them. Prints {"seconds",
"peak_rss", "version"}, the seconds without imports and without that last step.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from typing import Any


def dense(model: str, quantized: str, output: str, dtype: Any) -> int:
    """Write `model` with the weights of `quantized` in it; returns how many linears were quantized."""
    from gptqmodel import BACKEND, GPTQModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    whole: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    loaded: Any = GPTQModel.load(quantized, device="cpu", backend=BACKEND.TORCH).model
    linears = {name: module for name, module in loaded.named_modules() if hasattr(module, "dequantize_weight")}
    module: Any
    for name, module in linears.items():
        weight = whole.get_submodule(name).weight
        found = module.dequantize_weight().t()
        assert found.shape == weight.shape, name
        weight.data.copy_(found)
    whole.save_pretrained(output)
    AutoTokenizer.from_pretrained(model).save_pretrained(output)
    return len(linears)


def main() -> None:
    """Quantize once and print the measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("tokens")
    parser.add_argument("output")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=1, help="windows in a forward; its own default is 1")
    parser.add_argument("--dtype", default="float32", help="what the model computes in")
    arguments = parser.parse_args()
    # It asks for two loaders among its workers, and on two cores gives itself one.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    import gptqmodel
    import torch
    from safetensors.torch import load_file

    ids = load_file(arguments.tokens)["input_ids"]
    dtype = getattr(torch, arguments.dtype)
    config = gptqmodel.QuantizeConfig(bits=arguments.bits, group_size=arguments.group_size, sym=True)
    windows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids]
    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        model = gptqmodel.GPTQModel.load(arguments.model, config, device="cpu", dtype=dtype)
        model.quantize(windows, batch_size=arguments.batch_size)
        model.save(scratch)
        seconds = time.perf_counter() - started
        del model
        linears = dense(arguments.model, scratch, arguments.output, dtype)
    assert linears, "nothing was quantized"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(
        json.dumps({"seconds": seconds, "peak_rss": peak, "version": gptqmodel.__version__, "linears": linears}),
        flush=True,
    )


if __name__ == "__main__":
    main()
