"""What the chunked loss saves: peak memory and time of one loss and its gradients, beside autograd on whole logits.

    python -m benchmarks.distill_loss [--rows 2048] [--vocabulary 32768] [--width 512]

Each way runs in a process of its own. The prediction is counted in float32 logits: autograd holds five of the whole
batch at its peak (the teacher's log-probabilities and probabilities, the student's logits, log-probabilities and
gradient), the chunked loss six of `chunk_rows` rows (both models' logits, log-probabilities and
probabilities). Both have the gradients by the hidden states and, with --trained, by the weight.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

WAYS = ("autograd", "chunked")
HELD = {"autograd": 5, "chunked": 6}


def peak_bytes() -> int:
    """The process's own largest resident size so far; getrusage would begin with its parent's."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def step(way: str, rows: int, vocabulary: int, width: int, *, trained: bool) -> dict[str, float]:
    """One loss with its gradients. Returns the bytes that it added to the process's peak, and its seconds."""
    from llmshrink.distillation.chunked import chunked_loss
    from llmshrink.distillation.objective import Objective

    g = torch.Generator().manual_seed(0)
    hidden, other = (torch.randn(rows, width, generator=g) for _ in range(2))
    weight = torch.randn(vocabulary, width, generator=g) / width**0.5
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    frozen = weight.detach()
    (hidden[:8] @ weight[:8].t()).sum().backward()  # what the first product of a process costs
    hidden.grad = weight.grad = None
    before, started = peak_bytes(), time.perf_counter()
    if way == "chunked":
        loss = chunked_loss(hidden, weight, None, lambda part: other[part] @ frozen.t(), Objective()).total
    else:
        teacher = (other @ frozen.t()).log_softmax(-1)
        student = (hidden @ weight.t()).log_softmax(-1)
        loss = torch.nn.functional.kl_div(student, teacher, reduction="sum", log_target=True)
    loss.backward()
    return {"bytes": peak_bytes() - before, "seconds": time.perf_counter() - started, "loss": float(loss.detach())}


def main() -> None:
    """Print both ways, what was predicted, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--trained", action="store_true", help="the output layer learns too")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    shape = (asked.rows, asked.vocabulary, asked.width)
    if asked.way:
        print(json.dumps(step(asked.way, *shape, trained=asked.trained)))
        return
    from llmshrink.distillation.chunked import chunk_rows

    found = {}
    for way in WAYS:
        command = [sys.executable, "-m", "benchmarks.distill_loss", "--way", way]
        options = [f"--{name}={value}" for name, value in zip(("rows", "vocabulary", "width"), shape, strict=True)]
        options += ["--trained"] if asked.trained else []
        found[way] = json.loads(subprocess.run([*command, *options], capture_output=True, check=True).stdout)
    gradients = 4 * (asked.rows + (asked.vocabulary if asked.trained else 0)) * asked.width
    for way, rows in (
        ("autograd", asked.rows),
        ("chunked", min(asked.rows, chunk_rows(asked.vocabulary, torch.device("cpu")))),
    ):
        predicted = HELD[way] * 4 * rows * asked.vocabulary + gradients
        one = found[way]
        print(f"{way:9} {one['bytes'] / 1e6:8.0f} MB (predicted {predicted / 1e6:.0f})  {one['seconds']:.2f} s")
    first, second = (found[way] for way in WAYS)
    print(
        f"memory {second['bytes'] / first['bytes']:.3f}  time {second['seconds'] / first['seconds']:.2f}  of autograd's"
    )
    print(f"loss {first['loss']:.6g} and {second['loss']:.6g}")


if __name__ == "__main__":
    main()
