"""The textbook GPTQ, as a yardstick: `python -m benchmarks.plain_gptq MODEL TOKENS OUT [--bits 4 --group-size 128]`.

Frantar et al. 2022 (arXiv 2210.17323), nothing added: the whole model in memory in float32, one stream, a hook on each
linear, min-max symmetric scales taken at each group's first column, columns in their order, one column at a time with
its update to all that follow, damping of 1 % of the mean diagonal. Blocks are done one after the other, all linears of
a block at once. The result is a plain checkpoint of dequantized weights.

TOKENS is a safetensors file with `input_ids`, int64 [samples, seq_len].
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.measure import import_everything, report

BATCH = 16


def gptq(weight: Tensor, hessian: Tensor, bits: int, group_size: int) -> Tensor:
    """weight: [out, in] float32, hessian: [in, in] float32 = X^T X / T. Returns the dequantized weight [out, in]."""
    W, Q = weight.clone(), torch.zeros_like(weight)
    H = hessian.clone()
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1
    W[:, dead] = 0
    H.diagonal().add_(0.01 * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    top = 2 ** (bits - 1)
    scale = torch.ones(len(W), 1)
    for i in range(W.shape[1]):
        if i % group_size == 0:
            scale = (W[:, i : i + group_size].abs().amax(1, keepdim=True) / (top - 0.5)).clamp_min(1e-5)
        column = W[:, i : i + 1]
        Q[:, i : i + 1] = (column / scale).round().clamp(-top, top - 1) * scale
        W[:, i:] -= ((column - Q[:, i : i + 1]) / U[i, i]) @ U[i : i + 1, i:]
    return Q


@torch.inference_mode()
def quantize(model: Any, input_ids: Tensor, bits: int, group_size: int) -> None:
    """Quantize every linear of every decoder block in place, each block on what the blocks before it now give."""
    calls: list[tuple[Tensor, dict[str, Any]]] = []
    layers = model.model.layers
    first = layers[0].register_forward_pre_hook(
        lambda _module, args, kwargs: calls.append((args[0], kwargs)), with_kwargs=True
    )
    for batch in input_ids.split(BATCH):
        model(input_ids=batch, use_cache=False)
    first.remove()
    for layer in layers:
        linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        hessians = {name: torch.zeros(module.in_features, module.in_features) for name, module in linears.items()}
        hooks = [_collect(module, hessians[name]) for name, module in linears.items()]
        for hidden, kwargs in calls:
            layer(hidden, **kwargs)
        for hook in hooks:
            hook.remove()
        for name, module in linears.items():
            hessian = hessians[name] / input_ids.numel()
            module.weight.copy_(gptq(module.weight, hessian, bits, group_size))
        calls = [(layer(hidden, **kwargs), kwargs) for hidden, kwargs in calls]


def _collect(module: nn.Linear, hessian: Tensor) -> Any:
    def hook(_module: nn.Module, args: tuple[Tensor, ...], _output: Tensor) -> None:
        tokens = args[0].flatten(0, -2)
        hessian.addmm_(tokens.T, tokens)

    return module.register_forward_hook(hook)


def main() -> None:
    """Quantize once and print the measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    arguments = parser.parse_args()
    import_everything()
    from transformers import AutoModelForCausalLM

    def work() -> None:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
        quantize(model, load_file(arguments.tokens)["input_ids"], arguments.bits, arguments.group_size)
        model.to(torch.bfloat16).save_pretrained(arguments.output)

    report(work)


if __name__ == "__main__":
    main()
