"""How what each method costs grows with a layer's width: `python -m benchmarks.growth`.

Synthetic layers of width 512 to 4096 are solved as the shipped recipes ask for, square ones and such of a quarter of
the rows, from inputs that depend on each other and of which a few are loud, as a model's are. Printed are, for each
method, CPU seconds and bytes at each width, the exponents by which both grow from width to width, and the time in units
of GPTQ's. Time is fitted as a n^3 + b n^2 m + c n m, n inputs and m outputs, and added up over the layers of Llama 3 8B
and 70B; what that leaves out is said beside it.

Each layer and method has a process of its own, forked when the statistics are there: bytes are what that process comes
to hold beside them (Linux alone), next to what a plan counts for it (`run.workspace`). On a machine with other work
CPU seconds are the better measure, and its load is printed.

    python -m benchmarks.growth --most 1024 --json growth.json     # half a minute
    python -m benchmarks.growth --methods gptq sparsegpt alps --layer 14336x4096 4096x14336    # an hour
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from llmshrink_kernels.products import times_transposed
from torch import Tensor

from llmshrink.calibration.statistics import Statistics
from llmshrink.methods import NarrowSpec, QuantizeSpec, SiteSpec, grown, narrow, smoothing_factors, solve
from llmshrink.methods.pruning import Pattern, PruneSpec
from llmshrink.recipe.read import load_recipe
from llmshrink.run.workspace import narrowing, solving

LIMIT = 3.1
REFERENCE = "gptq"
KEPT = 0.75
"""Of a matrix's inputs, as `width-prune` keeps them."""
SMALL, SHARED, LOUD, LOUDER = 16, 0.1, 0.02, 12.0
SPREAD, DECAY = 0.3, -0.25
"""Directions that all inputs share; how many inputs are loud, and how much louder."""
MODELS = {"Llama 3 8B": (4096, 14336, 1024, 32), "Llama 3 70B": (8192, 28672, 1024, 80)}
"""Hidden size, FFN's, that of keys, blocks."""
GOALS = {"sparsegpt": 2.0, "alps": 4.0}
"""Of the recipes' time, to that of `gptq-w4a16`: the layer's solution and what comes before it."""
TOKENS, TIMED = 32_768, 4096
"""Calibrated on, 128 windows of 256; how many of them are timed."""


@dataclass(frozen=True)
class Method:
    """solve: of a weight by its statistics. bytes: what a plan counts, from (outputs, inputs)."""

    solve: Callable[[Tensor, Statistics], object]
    bytes: Callable[[int, int], int] | None


@dataclass(frozen=True)
class Took:
    """One layer by one method. seconds: of CPU. held, planned: bytes; None where they can't be told."""

    inputs: int
    outputs: int
    seconds: float
    held: int | None
    planned: int | None


def methods() -> dict[str, Method]:
    """By name, with what the shipped recipes ask of each."""
    rtn, gptq, eight = (_quantizing(name) for name in ("rtn-w4a16", "gptq-w4a16", "smoothquant-w8a8"))
    plain = QuantizeSpec(**{**vars(gptq), "corrected": 0.0})
    found = {
        "rtn": _of_site(SiteSpec(quantize=rtn)),
        "gptq": _of_site(SiteSpec(quantize=gptq)),
        "gptq, one stream": _of_site(SiteSpec(quantize=plain)),
    }
    for name in ("sparsegpt", "alps", "wanda", "magnitude"):
        (step,) = load_recipe(f"{name}-2of4").steps
        asked = step.prune
        assert asked is not None and asked.pattern is not None, name
        pattern = Pattern.n_of_m(*map(int, asked.pattern.split(":")))
        found[name] = _of_site(
            SiteSpec(
                prune=PruneSpec(asked.method, pattern, asked.repair, asked.corrected, asked.corrected_damp, asked.damp)
            )
        )
    alpha = eight.smooth
    assert not isinstance(alpha, str), "it smooths"
    found["smooth"] = Method(lambda weight, known: _smooth(weight, known, alpha), None)
    found["width"] = Method(
        lambda weight, known: narrow(weight, known, NarrowSpec(int(KEPT * weight.shape[1])), torch.bfloat16),
        lambda outputs, inputs: narrowing(NarrowSpec(int(KEPT * inputs)), outputs, inputs),
    )
    return found


def _quantizing(recipe: str) -> QuantizeSpec:
    asked = load_recipe(recipe).steps[0].quantize
    assert asked is not None, recipe
    return QuantizeSpec(**asked.model_dump())


def _of_site(spec: SiteSpec) -> Method:
    return Method(
        lambda weight, known: solve(weight, known, spec, torch.bfloat16),
        lambda outputs, inputs: solving(spec, outputs, inputs, "cross" in spec.reads),
    )


def _smooth(weight: Tensor, known: Statistics, alpha: float) -> Tensor:
    loudest = known.hessian.diagonal().sqrt()
    return grown(weight, smoothing_factors(loudest, weight.abs().amax(0), alpha))


def synthetic(inputs: int, *, tokens: int | None = None, seed: int = 0) -> Statistics:
    """Of inputs that share `SMALL` directions, depend on their neighbours by a decaying spectrum, and are loud here and
    there; with a cross term, as behind a compressed prefix. tokens: twice as many as inputs if None."""
    generator = torch.Generator().manual_seed(seed)
    tokens = tokens or 2 * inputs
    mix = torch.randn(inputs, inputs, generator=generator)
    mix *= SPREAD * (torch.arange(1, inputs + 1) / inputs).pow(DECAY).unsqueeze(1) / math.sqrt(inputs)
    mix.diagonal().add_(1.0)
    shared = torch.randn(SMALL, inputs, generator=generator)
    loud = torch.where(torch.rand(inputs, generator=generator) < LOUD, LOUDER, 1.0)
    known = Statistics(inputs, cross=True)
    for start in range(0, tokens, 4096):
        count = min(4096, tokens - start)
        original = torch.randn(count, inputs, generator=generator) @ mix
        original += SHARED * torch.randn(count, SMALL, generator=generator) @ shared
        original *= loud
        noise = torch.randn(count, inputs, generator=generator) * loud
        known.add(original + 0.1 * noise, original)
    return known


def before_the_solution(inputs: int, outputs: int) -> float:
    """CPU seconds of the layer's own products in both streams and of its statistics, for `TOKENS` tokens."""

    original = torch.randn(TIMED, inputs, generator=torch.Generator().manual_seed(2))
    compressed = original + 0.1

    def collect(weight: Tensor, _: Statistics) -> None:
        for each in (original, compressed):
            times_transposed(each, weight)
        Statistics(inputs, cross=True).add(compressed, original)

    seconds, _ = _in_a_process(Method(collect, None), Statistics(1), outputs, inputs)
    return seconds * TOKENS / TIMED


def measured(method: Method, known: Statistics, outputs: int, inputs: int, repeats: int) -> Took:
    """The median of `repeats` processes."""
    runs = [_in_a_process(method, known, outputs, inputs) for _ in range(repeats)]
    seconds = [run[0] for run in runs]
    held = [run[1] for run in runs if run[1] is not None]
    planned = None if method.bytes is None else method.bytes(outputs, inputs)
    return Took(inputs, outputs, statistics.median(seconds), max(held, default=None), planned)


def _in_a_process(method: Method, known: Statistics, outputs: int, inputs: int) -> tuple[float, int | None]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1)) / math.sqrt(inputs)
            before = _forget_peak()
            started = time.process_time()
            method.solve(weight, known)
            seconds = time.process_time() - started
            peak = _status("VmHWM")
            held = None if before is None or peak is None else peak - before
            os.write(writer, json.dumps([seconds, held]).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as stream:
        said = stream.read()
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(f"a layer of {outputs} x {inputs} failed: what it said is above")
    seconds, held = json.loads(said)
    return seconds, held


def _forget_peak() -> int | None:
    """Let the process's peak be what it holds now; returns that, in bytes, or None where there is no such thing."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """The slope of log y over log x, by least squares."""
    logs = torch.tensor(points, dtype=torch.float64).log()
    x, y = (logs - logs.mean(0)).T
    return float((x * y).sum() / (x * x).sum())


def fit(took: Sequence[Took]) -> tuple[float, float, float]:
    """(a, b, c), none below 0, of seconds = a n^3 + b n^2 m + c n m, by least squares of relative errors."""
    rows = torch.tensor([_terms(each.outputs, each.inputs) for each in took], dtype=torch.float64)
    seconds = torch.tensor([each.seconds for each in took], dtype=torch.float64)
    scaled = rows / seconds.unsqueeze(1)
    best, found = math.inf, (0.0, 0.0, 0.0)
    for kept in ([0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]):
        part = torch.linalg.lstsq(scaled[:, kept], torch.ones(len(took), 1, dtype=torch.float64)).solution[:, 0]
        lost = float((scaled[:, kept] @ part - 1).square().sum())
        if bool((part >= 0).all()) and lost < best:
            whole = torch.zeros(3, dtype=torch.float64).index_copy_(0, torch.tensor(kept), part)
            best, found = lost, (float(whole[0]), float(whole[1]), float(whole[2]))
    return found


def _terms(outputs: int, inputs: int) -> tuple[float, float, float]:
    return inputs**3, inputs**2 * outputs, inputs * outputs


def predicted(fits: dict[str, tuple[float, float, float]], name: str, model: str) -> float:
    """CPU seconds for all layers of a model."""
    hidden, ffn, keys, blocks = MODELS[model]
    layers = [(hidden + 2 * keys, hidden), (hidden, hidden), (2 * ffn, hidden), (hidden, ffn)]
    if name == "width":
        layers = [(hidden, ffn)]
    total = 0.0
    for outputs, inputs in layers:
        total += sum(a * b for a, b in zip(fits[name], _terms(outputs, inputs), strict=True))
    return blocks * total


def a_layer(text: str) -> tuple[int, int]:
    """(outputs, inputs) of "4096x14336"; for argparse."""
    outputs, _, inputs = text.partition("x")
    if not (outputs.isdecimal() and inputs.isdecimal() and int(outputs) > 0 and int(inputs) >= 128):
        raise argparse.ArgumentTypeError(f"{text!r} isn't OUTPUTSxINPUTS, as 4096x14336, with 128 inputs or more")
    return int(outputs), int(inputs)


def report_layers(took: dict[str, list[Took]], before: dict[tuple[int, int], float]) -> list[str]:
    """The table of single layers. took: by method; before: `before_the_solution`, by (outputs, inputs)."""
    lines = [f"{'outputs x inputs':18}{'method':18}{'CPU s':>10}  x {REFERENCE}  in a run{'GB held':>10}  planned"]
    for shape, spent in before.items():
        of = {name: next(e for e in found if (e.outputs, e.inputs) == shape) for name, found in took.items()}
        reference = of.get(REFERENCE, next(iter(of.values()))).seconds
        for name, each in of.items():
            held = "-" if each.held is None else f"{each.held / 1e9:.2f}"
            planned = "-" if each.planned is None else f"{each.planned / 1e9:.2f}"
            whole = (spent + each.seconds) / (spent + reference)
            ratios = f"{each.seconds / reference:8.2f}{whole:10.2f}"
            lines.append(f"{f'{shape[0]} x {shape[1]}':18}{name:18}{each.seconds:10.1f}{ratios}{held:>10}{planned:>9}")
        lines.append(f"{'':18}before the solution {spent:8.1f}, {TOKENS:,} tokens in both streams")
    return lines


def layers(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure and print the layers that were named. Returns the figures."""
    known = methods()
    took: dict[str, list[Took]] = {name: [] for name in arguments.methods}
    before: dict[tuple[int, int], float] = {}
    for outputs, inputs in arguments.layer:
        seen = synthetic(inputs)
        for name in arguments.methods:
            took[name].append(measured(known[name], seen, outputs, inputs, arguments.repeats))
            print(f"{outputs} x {inputs} {name}: {took[name][-1].seconds:.2f} s", file=sys.stderr, flush=True)
        del seen
        before[outputs, inputs] = before_the_solution(inputs, outputs)
    print("\n".join(report_layers(took, before)))
    return {
        "took": {name: [vars(each) for each in found] for name, found in took.items()},
        "before_the_solution": {f"{outputs}x{inputs}": spent for (outputs, inputs), spent in before.items()},
    }


def growth(arguments: argparse.Namespace, sizes: Sequence[int]) -> tuple[dict[str, Any], list[str]]:
    """Measure and print layers of every width. Returns (the figures, methods that grow by more than `LIMIT`)."""
    known = methods()
    all_took: dict[str, list[Took]] = {name: [] for name in arguments.methods}
    for inputs in sizes:
        seen = synthetic(inputs)
        for outputs in (inputs, inputs // 4):
            for name in arguments.methods:
                took = measured(known[name], seen, outputs, inputs, arguments.repeats)
                all_took[name].append(took)
                print(f"{outputs} x {inputs} {name}: {took.seconds:.2f} s", file=sys.stderr, flush=True)
    fits = {name: fit(found) for name, found in all_took.items()}
    square = {name: [each for each in found if each.outputs == each.inputs] for name, found in all_took.items()}
    before = before_the_solution(sizes[-1], sizes[-1])
    print("\n".join(report(square, fits, before)))
    figures = {
        "took": {name: [vars(each) for each in found] for name, found in all_took.items()},
        "before_the_solution": before,
        "fits": fits,
        "predicted_cpu_seconds": {n: {m: predicted(fits, n, m) for m in MODELS} for n in fits},
    }
    steep = [name for name, found in square.items() if exponent([(e.inputs, e.seconds) for e in found[-2:]]) > LIMIT]
    return figures, steep


def widths(least: int, most: int) -> list[int]:
    """From `least`, doubling, to `most`."""
    return [least << power for power in range(16) if least << power <= most]


def report(took: dict[str, list[Took]], fits: dict[str, tuple[float, float, float]], before: float) -> list[str]:
    """The tables. took: by method, of square layers, in the order of their width. before: `before_the_solution` of the
    widest, which one whole run of a recipe spends too."""
    sizes = [each.inputs for each in next(iter(took.values()))]
    header = "".join(f"{size:>10}" for size in sizes)
    lines = [
        f"{'CPU seconds':18}{header}  exponent  last  x {REFERENCE}  in a run" + "".join(f"{m:>16}" for m in MODELS)
    ]
    for name, found in took.items():
        seconds = "".join(f"{each.seconds:10.3f}" for each in found)
        grows = [exponent([(e.inputs, e.seconds) for e in part]) for part in (found, found[-2:])]
        reference = took.get(REFERENCE, found)
        share = found[-1].seconds / reference[-1].seconds
        whole = (before + found[-1].seconds) / (before + reference[-1].seconds)
        hours = "".join(f"{predicted(fits, name, model) / 3600:14.2f} h" for model in MODELS)
        mark = "  over the goal" if whole > GOALS.get(name, math.inf) else ""
        lines.append(f"{name:18}{seconds}{grows[0]:10.2f}{grows[1]:6.2f}{share:8.2f}{whole:10.2f}{hours}{mark}")
    lines += ["", f"{'MB held':18}{header}  exponent  planned / held at the widest"]
    for name, found in took.items():
        if any(each.held is None for each in found):
            continue
        held = "".join(f"{(each.held or 0) / 1e6:10.1f}" for each in found)
        grows = [exponent([(e.inputs, max(e.held or 0, 1)) for e in found])]
        planned = found[-1].planned
        ratio = "-" if planned is None or not found[-1].held else f"{planned / found[-1].held:.2f}"
        lines.append(f"{name:18}{held}{grows[0]:10.2f}  {ratio}")
    lines += [
        "",
        f"In a run: with the layer's products and statistics of {TOKENS:,} tokens in both streams, {before:.1f} s at",
        "the widest, which every calibrated recipe spends too.",
        "In hours of one core for the solutions alone. Left out: the model's forwards, the Hessians of its inputs,",
        "reading and writing; and inputs that depend on each other more or less than these, which decide how many",
        "steps alps and the repair take.",
    ]
    return lines


def main() -> int:
    """Measure, and print tables or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--least", type=int, default=512, help="the narrowest layer")
    parser.add_argument("--most", type=int, default=4096, help="the widest; each is twice as wide as the one before")
    parser.add_argument("--methods", nargs="+", choices=list(methods()), default=list(methods()))
    parser.add_argument("--repeats", type=int, default=1, help="processes for each layer, whose median counts")
    parser.add_argument(
        "--layer", type=a_layer, nargs="+", metavar="OUTPUTSxINPUTS", help="these layers instead of square ones"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there too")
    arguments = parser.parse_args()
    sizes = widths(arguments.least, arguments.most)
    if arguments.least < 128 or arguments.least % 128 or len(sizes) < 2:
        parser.error(f"--least {arguments.least} --most {arguments.most}: give a multiple of 128, and twice as much")
    torch.set_num_threads(1)
    started = os.getloadavg()[0]
    figures, steep = (layers(arguments), []) if arguments.layer else growth(arguments, sizes)
    load = (started, os.getloadavg()[0])
    print(f"One thread, torch {torch.__version__}; load of the machine {load[0]:.1f} to {load[1]:.1f}.")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"torch": torch.__version__, "load": load, **figures}, indent=1) + "\n")
    if steep:
        print(f"over {LIMIT} from the last width but one to the last: {', '.join(steep)}")
    return 1 if steep else 0


if __name__ == "__main__":
    sys.exit(main())
