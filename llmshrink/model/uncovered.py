"""Why an architecture isn't covered: what stands in the way, by name, found before a weight is read.

"Not in the table" alone helps nobody. Three things make a model more than a new row: weights that aren't those of an
nn.Linear (the fused experts of a mixture, GPT-2's transposed Conv1D), experts, which most calibration tokens never
reach, and layers that read the keys and values of another layer, so that a block isn't called with its input alone.
The first two show in the model's modules, which are built without memory; the last is said by the config.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llmshrink.errors import UnsupportedModelError
from llmshrink.model.blocks import find_blocks
from llmshrink.model.families import FAMILIES


def refuse_uncovered(block: nn.Module, prefix: str) -> None:
    """Raise UnsupportedModelError for any matrix in the block that isn't the weight of an nn.Linear."""
    found = uncovered_part(block, prefix)
    if found is not None:
        raise UnsupportedModelError(f"{found}: it isn't covered yet, so nothing was touched")


def refuse_family(config: Any, *, trust_remote_code: bool = False) -> None:
    """Raise UnsupportedModelError, naming what and why, unless the family of a transformers config is covered."""
    if config.model_type in FAMILIES:
        return
    raise UnsupportedModelError(
        f"architecture {config.model_type!r} isn't covered yet: {_reason(config, trust_remote_code)}; "
        f"nothing was touched; covered now: {', '.join(sorted(FAMILIES))}"
    )


def uncovered_part(block: nn.Module, prefix: str) -> str | None:
    """The matrix of a block that best says why it isn't covered, in words; None when all are nn.Linear weights."""
    others = [
        (f"{prefix}.{name}.{leaf}", module, parameter)
        for name, module in block.named_modules()
        for leaf, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim >= 2 and not (type(module) is nn.Linear and leaf == "weight")
    ]
    if not others:
        return None
    # A router and its experts' biases are matrices as well, but it is the experts that stand in the way.
    name, module, parameter = max(others, key=lambda item: _fused_experts(item[1], item[2]))
    kind, shape = type(module).__name__, list(parameter.shape)
    if _fused_experts(module, parameter):
        return f"{name}: fused experts, {shape[0]} in one tensor of shape {shape} of a {kind}"
    return f"{name}: a {kind} of shape {shape}, and formats and engines compress the weights of nn.Linear alone"


def _fused_experts(module: nn.Module, parameter: nn.Parameter) -> bool:
    return parameter.ndim == 3 and "expert" in type(module).__name__.lower()


def _reason(config: Any, trust_remote_code: bool) -> str:
    shared = getattr(config.get_text_config(), "num_kv_shared_layers", None)
    if shared:
        return f"its last {shared} layers share the keys and values of earlier ones (num_kv_shared_layers)"
    if getattr(config, "vision_config", None) is not None or getattr(config, "audio_config", None) is not None:
        return "it reads more than text, and what reads the rest would be taken for a part of the text model"
    untested = "no test has taken it from a checkpoint to logits, so it has no row in the table of families"
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        prefix, blocks = find_blocks(model)
    except Exception:  # it's refused either way; what its code raises without weights would only mislead
        return untested
    for number, block in enumerate(blocks):
        part = uncovered_part(block, f"{prefix}.{number}") or listed_experts(block, f"{prefix}.{number}")
        if part is not None:
            return part
    return untested


def listed_experts(block: nn.Module, prefix: str) -> str | None:
    """The list of experts in a block, in words, or None."""
    for name, module in block.named_modules():
        if isinstance(module, nn.ModuleList) and "expert" in name.rpartition(".")[2].lower():
            return f"{prefix}.{name}: {len(module)} experts, of which a token reaches only some"
    return None
