"""llm-compressor, run by the Python of its own environment: `PYTHON peer_llmcompressor.py MODEL TOKENS OUT`.

Its GPTQ, or with `--sparse` its SparseGPT in 2:4, whose result is saved with its zeros. Imports nothing of ours. TOKENS
is a safetensors file with `input_ids`, int64 [samples, seq_len]. Prints {"seconds", "peak_rss", "version"}, the seconds
without imports.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from typing import Any


def modifier(arguments: argparse.Namespace) -> Any:
    """What llm-compressor is asked to do, all else at its own defaults."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.pruning import SparseGPTModifier
    from llmcompressor.modifiers.quantization import GPTQModifier

    if arguments.sparse:
        return SparseGPTModifier(sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=["re:.*lm_head"])
    weights = QuantizationArgs(
        num_bits=arguments.bits, type="int", symmetric=True, strategy="group", group_size=arguments.group_size
    )
    return GPTQModifier(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}, ignore=["lm_head"]
    )


def main() -> None:
    """Compress once and print the measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("tokens")
    parser.add_argument("output")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--sparse", action="store_true", help="SparseGPT in 2:4, instead of GPTQ")
    parser.add_argument("--dtype", default="auto", help="what the model computes in; auto: as stored")
    parser.add_argument("--batch-size", type=int, default=1, help="windows in a forward; its own default is 1")
    arguments = parser.parse_args()
    import llmcompressor
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = load_file(arguments.tokens)["input_ids"]
    started = time.perf_counter()
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = oneshot(
        model=AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype),
        tokenizer=tokenizer,
        dataset=data,
        recipe=modifier(arguments),
        batch_size=arguments.batch_size,
        max_seq_length=ids.shape[1],
        num_calibration_samples=ids.shape[0],
        output_dir=None if arguments.sparse else arguments.output,
    )
    if arguments.sparse:
        model.save_pretrained(arguments.output, disable_sparse_compression=True)
        tokenizer.save_pretrained(arguments.output)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"seconds": seconds, "peak_rss": peak, "version": llmcompressor.__version__}), flush=True)


if __name__ == "__main__":
    main()
