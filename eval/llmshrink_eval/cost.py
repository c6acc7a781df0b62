"""What a model costs to keep: bytes on disk and bits per weight, from its files' headers and its config alone.

The weights that a checkpoint stands for are those of the ORIGINAL architecture: the model that its config describes,
built without memory (on the meta device) and without its quantization, with tied weights counted once. The bits are
those that lie in the files, with every scale, zero point, shape and index that unpacking needs, and without the
headers; so a checkpoint in bfloat16 has exactly 16 bits per weight (8 less of it for what is stored twice or missing).

"Linears" are the matrices inside the blocks, what compressors work on. In the model: every parameter of two or more
dimensions inside a list of modules, embeddings and convolutions left out; fused experts, [E, out, in], are in. In the
files: every module of a block that holds such a matrix, packed or not, its biases left out. Modules with other names
on disk than in memory are found either way, since both sides are told by their place (`.<block>.`) and shape.

What it costs to run is in `running`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmshrink_eval.errors import EvalError, one_line
from llmshrink_eval.weightfiles import StoredTensor, read_header, weight_files

if TYPE_CHECKING:
    from torch import nn

_BLOCK = re.compile(r"(?:^|\.)(\d+)\.")
_INSIDE_WEIGHT = re.compile(r"\.weight\..*$")


@dataclass(frozen=True)
class StoredCost:
    """What lies on the disk. bits_per_weight_linears: None when the model has no matrices inside blocks."""

    bytes_on_disk: int
    parameters: int
    bits_per_weight: float
    bits_per_weight_linears: float | None


@dataclass(frozen=True)
class Architecture:
    """The uncompressed model: its parameters, those of the matrices inside its blocks, and how many blocks it has."""

    parameters: int
    linears: int
    blocks: int


def stored_cost(folder: Path, *, trust_remote_code: bool = False) -> StoredCost:
    """Size of the checkpoint in `folder`; no weight is read.

    Raises EvalError when the files' headers are damaged or the config describes no model that transformers knows.
    """
    files = weight_files(folder)
    tensors = [tensor for file in files for tensor in read_header(file)]
    original = architecture(folder, trust_remote_code=trust_remote_code)
    linears = 8 * linear_bytes(tensors, original.blocks)
    return StoredCost(
        bytes_on_disk=sum(file.stat().st_size for file in files),
        parameters=original.parameters,
        bits_per_weight=8 * sum(tensor.nbytes for tensor in tensors) / original.parameters,
        bits_per_weight_linears=linears / original.linears if original.linears else None,
    )


def architecture(folder: Path, *, trust_remote_code: bool = False) -> Architecture:
    """Count the parameters of the model that `folder`'s config describes, as if nothing had been compressed.

    Raises EvalError, with transformers' reason, when it can't be built.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from llmshrink_eval.configured import running_config

    try:
        config = running_config(folder, trust_remote_code=trust_remote_code)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except EvalError:
        raise
    except Exception as error:  # of whatever type the model's own code raises
        reason = one_line(error)
        raise EvalError(f"{folder}: transformers can't build the model of its config.json: {reason}") from error
    blocks = getattr(config.get_text_config(), "num_hidden_layers", None)
    return Architecture(
        # Module.parameters() gives a tied weight once.
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        linears=sum(parameter.numel() for parameter in _matrices(model)),
        blocks=blocks if isinstance(blocks, int) else _longest_list(model),
    )


def linear_bytes(tensors: Iterable[StoredTensor], blocks: int) -> int:
    """Stored bytes of the matrices inside the first `blocks` blocks, with all that unpacking them needs."""
    modules: dict[str, list[StoredTensor]] = defaultdict(list)
    for tensor in tensors:
        inside = _BLOCK.search(tensor.key)
        # Further blocks (a multi-token-prediction head, say) are stored, and no part of the model that is run.
        if inside and int(inside[1]) < blocks:
            modules[_INSIDE_WEIGHT.sub(".weight", tensor.key).rpartition(".")[0]].append(tensor)
    return sum(
        tensor.nbytes
        for module in modules.values()
        if any(_is_matrix(tensor.shape) for tensor in module)
        for tensor in module
        if tensor.key.rpartition(".")[2] != "bias"
    )


def _is_matrix(shape: tuple[int, ...]) -> bool:
    """Whether this is a matrix or a stack of them; a depthwise convolution's kernel, [channels, 1, width], isn't."""
    return len(shape) == 2 or (len(shape) == 3 and shape[1] != 1)


def _matrices(model: nn.Module) -> Iterable[Any]:
    from torch import nn

    seen: set[int] = set()
    for owner in _in_blocks(model):
        if isinstance(owner, nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            continue
        for parameter in owner.parameters(recurse=False):
            if parameter.ndim >= 2 and id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter


def _in_blocks(model: nn.Module) -> Iterable[nn.Module]:
    """Every module inside an entry of a list of modules."""
    return (module for name, module in model.named_modules() if _BLOCK.search(name + "."))


def _longest_list(model: nn.Module) -> int:
    from torch import nn

    return max((len(module) for module in model.modules() if isinstance(module, nn.ModuleList)), default=0)
