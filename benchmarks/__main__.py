"""`make bench`: our time and memory beside the peers', on the same model, text and machine.

    python -m benchmarks [--model FOLDER --calibration TEXT] [--samples 128 --seq-len 256] [--peer-python PYTHON]

Without a model the demo model is used. Every run is a fresh process; the contenders take turns, so that a change in the
machine's load meets them all; medians are compared. The contenders: the default recipe, the same with one stream (no
corrected target), a plain per-column float32 GPTQ loop, and llm-compressor's GPTQ where `--peer-python` (or the
environment variable LLMCOMPRESSOR_PYTHON) names the Python of an environment that has it. With `--judge TEXT` the first
result of each is also held against the original by KL.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

REFERENCES = ("plain GPTQ loop", "llm-compressor", "llm-compressor, batched")
BATCH_TOKENS = 2048
"""Tokens in a forward of ours; the peer runs once with its default of one window and once with as many."""


def contenders(arguments: argparse.Namespace, tokens: Path, folder: Path) -> dict[str, tuple[list[str], Path]]:
    """Name -> (command line, the folder it writes)."""
    python = sys.executable
    model, ours = (
        str(arguments.model),
        [
            *("--samples", str(arguments.samples), "--seq-len", str(arguments.seq_len)),
            *("--calibration", str(arguments.calibration)),
        ],
    )
    outs = [folder / name for name in ("ours", "one-stream", "plain", "peer", "peer-batched")]
    found = {
        "llmshrink": ([python, "-m", "benchmarks.ours", model, str(outs[0]), *ours], outs[0]),
        "llmshrink, one stream": (
            [python, "-m", "benchmarks.ours", model, str(outs[1]), *ours, "--set", "steps.0.quantize.corrected=0"],
            outs[1],
        ),
        REFERENCES[0]: ([python, "-m", "benchmarks.plain_gptq", model, str(tokens), str(outs[2])], outs[2]),
    }
    if arguments.peer_python:
        script = str(Path(__file__).parent / "peer_llmcompressor.py")
        batched = ["--batch-size", str(max(1, BATCH_TOKENS // arguments.seq_len))]
        for name, out, more in zip(REFERENCES[1:], outs[3:], ([], batched), strict=True):
            found[name] = ([arguments.peer_python, script, model, str(tokens), str(out), *more], out)
    return found


def measure(command: list[str]) -> dict[str, float]:
    """Run a child to its end; returns the JSON of its last line. Raises RuntimeError with its stderr if it failed."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")
    measured: dict[str, float] = json.loads(result.stdout.strip().splitlines()[-1])
    return measured


def table(runs: dict[str, list[dict[str, float]]], damage: dict[str, float]) -> list[str]:
    """Medians, and the ratio of each of ours to each reference."""
    seconds = {name: statistics.median(run["seconds"] for run in each) for name, each in runs.items()}
    memory = {name: statistics.median(run["peak_rss"] for run in each) for name, each in runs.items()}
    references = [name for name in REFERENCES if name in runs]
    lines = [f"{'':24}{'seconds':>9}{'peak GB':>9}{'KL':>9}" + "".join(f"   time / {name}" for name in references)]
    for name in runs:
        kl = f"{damage[name]:.4f}" if name in damage else "-"
        ratios = "".join(f"{seconds[name] / seconds[other]:>{len(other) + 10}.2f}" for other in references)
        lines.append(f"{name:24}{seconds[name]:9.2f}{memory[name] / 1e9:9.2f}{kl:>9}{ratios}")
    return lines


def judge(original: Path, outputs: dict[str, Path], text: Path) -> dict[str, float]:
    """KL of each output to the original, nats per token."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from benchmarks import kl

    model_type = AutoConfig.from_pretrained(original).model_type
    tokenizer = AutoTokenizer.from_pretrained(original)
    ids = kl.windows(tokenizer, text, tokens=102_400, window=256, model_type=model_type)
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval()
    loaded = ((name, kl.load(original, folder, own_reader=False)[0]) for name, folder in outputs.items())
    return {name: kl.divergence(model, compressed, ids).kl for name, compressed in loaded}


def main() -> None:
    """Run all contenders in turn and print the table."""
    from benchmarks.tokens import write_tokens
    from llmshrink.demo import language, model_folder

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=model_folder())
    parser.add_argument("--calibration", type=Path, help="a .txt; without it, text of the demo language")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--judge", type=Path, metavar="TEXT", help="measure the KL on this text (102,400 tokens)")
    parser.add_argument("--peer-python", default=os.environ.get("LLMCOMPRESSOR_PYTHON"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if arguments.calibration is None:
            arguments.calibration = folder / "demo.txt"
            arguments.calibration.write_text(language.text(1, 10 * arguments.samples * arguments.seq_len))
        tokens = folder / "tokens.safetensors"
        shape = {"samples": arguments.samples, "seq_len": arguments.seq_len}
        write_tokens(arguments.model, arguments.calibration, tokens, **shape)
        field = contenders(arguments, tokens, folder)
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in field}
        for _ in range(arguments.repeats):
            for name, (command, _) in field.items():
                runs[name].append(measure(command))
                print(f"{name}: {runs[name][-1]['seconds']:.2f} s", file=sys.stderr, flush=True)
        outputs = {name: output for name, (_, output) in field.items()}
        damage = judge(arguments.model, outputs, arguments.judge) if arguments.judge else {}
    print(f"{arguments.model}, {arguments.samples} x {arguments.seq_len} tokens, median of {arguments.repeats}:")
    print("\n".join(table(runs, damage)))


if __name__ == "__main__":
    main()
