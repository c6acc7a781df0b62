"""What a training needs to go on, as files that can't run code: safetensors and JSON, where transformers keeps pickles.

    NAME.safetensors  the tensors, numbered
    NAME.json         the sha256 of that file, the value with each tensor's number in its place, and the value's sha256

Beside them transformers keeps its own account of the training, trainer_state.json; its sha256 is in sealed.json.

A state is a tree of dicts, lists and tuples whose leaves are tensors, numbers, text and None: the parameters that
learn, an optimizer's and a schedule's state dict, the states of random numbers. In the JSON a dict is its pairs, since
its keys may be numbers. The arguments of a training are kept nowhere: the command has them.
"""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llmshrink_eval.bounded import read_json
from torch import Tensor

from llmshrink.checkpoint.header import read_header
from llmshrink.checkpoint.index import CheckpointIndex
from llmshrink.errors import CheckpointError
from llmshrink.run import disk

MODEL, OPTIMIZER, SCHEDULE = "model", "optimizer", "schedule"
ACCOUNT = "trainer_state.json"
"""What transformers writes of a training."""
SEAL = "sealed.json"


def random_numbers(process: int) -> str:
    """The name of the states of random numbers of a process: each has its own."""
    return f"random-{process}"


def is_there(folder: Path, name: str) -> bool:
    """Whether a state was written to its end: its JSON comes last."""
    return (folder / f"{name}.json").is_file()


def write(folder: Path, name: str, value: Any) -> None:
    """Write a state into `folder`, which is made if need be. Raises TypeError for a leaf that isn't plain."""
    tensors: list[Tensor] = []
    tree = described(value, tensors)
    folder.mkdir(parents=True, exist_ok=True)
    sha256, _ = disk.write_tensors(folder / f"{name}.safetensors", {str(i): each for i, each in enumerate(tensors)})
    disk.write_json(folder / f"{name}.json", {"sha256": sha256, "value": tree, "value_sha256": _sum(tree)})


def read(folder: Path, name: str) -> Any:
    """The state, its tensors on the CPU. Raises CheckpointError where it isn't what was written there."""
    file = folder / f"{name}.safetensors"
    try:
        said = read_json(folder / f"{name}.json")
        if said["sha256"] != disk.sha256_of(file) or said["value_sha256"] != _sum(said["value"]):
            raise ValueError
        with CheckpointIndex(folder, read_header(file).entries) as index:
            return _made(said["value"], index)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder / name}.json: isn't what the training wrote there: remove {folder}, and the run goes on from the "
            "checkpoint before it, or from the start"
        ) from error


def seal(folder: Path) -> None:
    """Note the sum of what transformers wrote of the training: a checkpoint is whole from then on."""
    disk.write_json(folder / SEAL, {"sha256": disk.sha256_of(folder / ACCOUNT)})


def sealed(folder: Path) -> bool:
    """Whether that is there and what it was. Raises OSError where the system doesn't tell."""
    try:
        return bool(read_json(folder / SEAL)["sha256"] == disk.sha256_of(folder / ACCOUNT))
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return False


def _sum(tree: Any) -> str:
    return hashlib.sha256(disk.json_text(tree).encode()).hexdigest()


def described(value: Any, tensors: list[Tensor]) -> Any:
    """A state as JSON, its tensors put at the end of `tensors`. Raises TypeError for a leaf that isn't plain."""
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return {"float": value.hex()}
    if type(value) is list:
        return [described(each, tensors) for each in value]
    if type(value) is tuple:
        return {"tuple": [described(each, tensors) for each in value]}
    if isinstance(value, dict):
        return {"dict": [[described(key, tensors), described(each, tensors)] for key, each in value.items()]}
    # A subclass may be more than its numbers, as those of torchao are.
    if type(value) in (Tensor, torch.nn.Parameter) and value.layout == torch.strided and disk.can_hold(value.dtype):
        tensors.append(value.detach())
        return {"tensor": len(tensors) - 1}
    raise TypeError(f"{type(value).__name__} is neither a tensor nor a number")


def _made(tree: Any, index: CheckpointIndex) -> Any:
    if isinstance(tree, list):
        return [_made(each, index) for each in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, of),) = tree.items()
    if kind == "float":
        return float.fromhex(of)
    if kind == "tensor":
        return index.read(str(of))
    if kind == "tuple":
        return tuple(_made(each, index) for each in of)
    if kind == "dict":
        return {_made(key, index): _made(each, index) for key, each in of}
    raise ValueError(kind)


def random_state() -> dict[str, Any]:
    """The states of all random numbers of this process."""
    numpy: Any = np.random.get_state(legacy=False)
    key = torch.from_numpy(numpy["state"]["key"].astype(np.int64))
    return {
        "python": random.getstate(),
        "numpy": {**numpy, "state": {**numpy["state"], "key": key}},
        "torch": torch.random.get_rng_state(),
        "cuda": torch.cuda.random.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Go on with the random numbers of `random_state`; those of devices that aren't here any more are left."""
    random.setstate(state["python"])
    numpy = state["numpy"]
    key = numpy["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": key}})
    torch.random.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.random.set_rng_state_all(state["cuda"])
