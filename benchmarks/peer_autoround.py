"""AutoRound, run by the Python of its own environment: `PYTHON peer_autoround.py MODEL TOKENS OUT --bits 2`.

Imports nothing of ours. TOKENS is a safetensors file with `input_ids`, int64 [samples, seq_len]. OUT holds the weights
as they were rounded, dequantized (AutoRound's format `fake`), so that anything reads them. Prints {"seconds",
"cpu_seconds", "peak_rss", "version"}, the seconds without imports.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path


def main() -> None:
    """Quantize once and print the measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("tokens")
    parser.add_argument("output")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=200, help="200 is its own default")
    parser.add_argument("--dtype", default="auto", help="what the model computes in; auto: as stored")
    parser.add_argument("--batch-size", type=int, default=8, help="8 is its own default")
    arguments = parser.parse_args()
    import auto_round
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = load_file(arguments.tokens)["input_ids"]
    started, cpu = time.perf_counter(), time.process_time()
    rounding = auto_round.AutoRound(
        AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype),
        AutoTokenizer.from_pretrained(arguments.model),
        bits=arguments.bits,
        group_size=arguments.group_size,
        sym=True,
        iters=arguments.iterations,
        nsamples=ids.shape[0],
        seqlen=ids.shape[1],
        batch_size=arguments.batch_size,
        dataset=list(ids.split(1)),
        device_map="cpu",
    )
    rounding.quantize_and_save(arguments.output, format="fake")
    output = Path(arguments.output)
    if not (output / "config.json").is_file():
        # Newer releases write into a folder of their own inside.
        (made,) = output.iterdir()
        for file in made.iterdir():
            file.rename(output / file.name)
        made.rmdir()
    found = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({**found, "peak_rss": peak, "version": auto_round.__version__}), flush=True)


if __name__ == "__main__":
    main()
