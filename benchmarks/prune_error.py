"""What each way to prune costs a model's sites: `python -m benchmarks.prune_error MODEL CALIBRATION HELD_OUT`.

Each linear of the blocks is pruned by itself, on what the original gives it for the calibration text, plain and with
repair; its error is that of its output for the held-out text, ||(W - V) X||^2 / ||W X||^2. Printed is the mean over
the sites.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from llmshrink.calibration.statistics import Statistics
from llmshrink.methods.contract import measure, relative
from llmshrink.methods.pruning import Pattern, PruneSpec, names, prune
from llmshrink.model.blocks import find_blocks
from llmshrink.weights import Dense

BATCH = 8


def statistics_of(model: Any, sites: dict[str, Any], ids: torch.Tensor) -> dict[str, Statistics]:
    """Of each site's input, by name, over int64 [windows, length]."""
    found = {name: Statistics(site.in_features) for name, site in sites.items()}
    hooks = [
        site.register_forward_pre_hook(lambda _, given, name=name: found[name].add(given[0].flatten(0, 1)))
        for name, site in sites.items()
    ]
    for batch in ids.split(BATCH):
        model.model(batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


@torch.inference_mode()
def main() -> None:
    """Measure and print, a line for each way and one of JSON."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.kl import windows

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--samples", type=int, default=128, help="windows of each text")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--methods", nargs="+", choices=names(), default=list(names()))
    parser.add_argument("--damp", type=float, default=0.001)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    prefix, blocks = find_blocks(model)
    sites = {
        f"{prefix}.{number}.{name}": module
        for number, block in enumerate(blocks)
        for name, module in block.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    tokens = options.samples * options.seq_len
    seen, held = (
        statistics_of(model, sites, windows(tokenizer, text, tokens, options.seq_len))
        for text in (options.calibration, options.held_out)
    )
    results: dict[str, dict[str, float]] = {}
    for method in options.methods:
        for kind, repair in (("plain", False), ("repaired", True)):
            spec = PruneSpec(method, Pattern.n_of_m(2, 4), repair, corrected=0.0, damp=options.damp)
            errors = []
            for name, site in sites.items():
                weight = site.weight.detach()
                pruned = prune(weight, seen[name], spec).weight
                errors.append(relative(*measure(weight, Dense(pruned), held[name].hessian)))
            results.setdefault(method, {})[kind] = sum(errors) / len(errors)
        print(
            f"{method:>10}  " + "  ".join(f"{kind} {error:.4f}" for kind, error in results[method].items()), flush=True
        )
    print(json.dumps({"sites": len(sites), "tokens": tokens, "errors": results}))


if __name__ == "__main__":
    main()
