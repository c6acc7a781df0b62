"""llm-compressor's GPTQ, run by the Python of its own environment: `PYTHON peer_llmcompressor.py MODEL TOKENS OUT`.

Imports nothing of ours. TOKENS is a safetensors file with `input_ids`, int64 [samples, seq_len]. Prints
{"seconds", "peak_rss", "version"}, the seconds without imports.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time


def main() -> None:
    """Quantize once and print the measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("tokens")
    parser.add_argument("output")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=1, help="windows in a forward; its own default is 1")
    arguments = parser.parse_args()
    import llmcompressor
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = load_file(arguments.tokens)["input_ids"]
    weights = QuantizationArgs(
        num_bits=arguments.bits, type="int", symmetric=True, strategy="group", group_size=arguments.group_size
    )
    recipe = GPTQModifier(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}, ignore=["lm_head"]
    )
    started = time.perf_counter()
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    oneshot(
        model=AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto"),
        tokenizer=AutoTokenizer.from_pretrained(arguments.model),
        dataset=data,
        recipe=recipe,
        batch_size=arguments.batch_size,
        max_seq_length=ids.shape[1],
        num_calibration_samples=ids.shape[0],
        output_dir=arguments.output,
    )
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"seconds": seconds, "peak_rss": peak, "version": llmcompressor.__version__}), flush=True)


if __name__ == "__main__":
    main()
