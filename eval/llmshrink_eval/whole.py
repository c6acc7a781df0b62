"""A model as transformers loads it, held to what its folder says: every tensor there, and each the one that is meant.

transformers fills what it doesn't find with random numbers, and says so in a warning. Of several shards it reads every
tensor of every one, so that of two of one name the last file's stays, whatever the index says. The index decides here,
as where a model is read to be compressed: what it doesn't name isn't the model's, and a file that it names and that
isn't there is missed only by a model that needs what is in it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmshrink_eval.bounded import read_json
from llmshrink_eval.configfile import check_fits
from llmshrink_eval.errors import EvalError
from llmshrink_eval.sidefiles import check_generation
from llmshrink_eval.weightfiles import INDEX_FILE, SINGLE_FILE, Strays, read_header, strays, weight_files, weight_map_of

COPY_AGAIN = "download or copy it again"


def pretrained(path: Path, config: Any, *, trust_remote_code: bool = False, **settings: Any) -> Any:
    """`AutoModelForCausalLM.from_pretrained` of the folder `path`. config: as `configured.running_config` gives it.

    Raises EvalError for a tensor that isn't there, or that only a file has and not the index, and for a
    generation_config.json that is none; else whatever
    transformers raises.
    """
    from transformers import AutoModelForCausalLM

    check_generation(path)
    absent = _absent(path)
    _refuse_needed(path, config, absent, trust_remote_code=trust_remote_code)
    if not absent:
        held = [tensor for file in weight_files(path) for tensor in read_header(file)]
        check_fits(config, tensors=len(held), nbytes=sum(tensor.nbytes for tensor in held))
    with _readable(path, absent, settings.get("offload_folder")) as folder:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # named below, where transformers refers to a report that nobody sees
            trust_remote_code=trust_remote_code,
            **settings,
        )
    model, found = loaded
    model.config.name_or_path = model.name_or_path = str(path)
    unfit = sorted(map(tuple, found.get("mismatched_keys") or ()))
    if unfit:
        key, stored, built = unfit[0]
        raise EvalError(
            f"{path}: {key} is {list(stored)} in its file, and config.json makes it {list(built)}; {COPY_AGAIN}"
        )
    astray = strays(path)
    names = {*model.state_dict()} if astray.unindexed or astray.doubled else set()
    missing = sorted({*found["missing_keys"], *(astray.unindexed & names)})
    if missing:
        others = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        if missing[0] in astray.unindexed:
            cause = f"a file has it, and {INDEX_FILE} doesn't name it; {COPY_AGAIN}"
        elif absent:
            cause = (
                f"{absent.get(missing[0], min(absent.values()))} is missing, though {INDEX_FILE} names it; {COPY_AGAIN}"
            )
        else:
            method = getattr(config, "quantization_config", None)
            known = method.get("quant_method") if isinstance(method, dict) else getattr(method, "quant_method", None)
            cause = "is the checkpoint whole?" if known is None else f"it may not know the compression, {known}"
        raise EvalError(f"{path}: transformers doesn't find {missing[0]}{others} in it; {cause}")
    _as_indexed(model, path, astray)
    return model


def _absent(path: Path) -> dict[str, str]:
    """Key -> the file that the index names for it, of files that aren't there."""
    index = path / INDEX_FILE
    if (path / SINGLE_FILE).is_file() or not index.is_file():
        return {}
    weight_map = weight_map_of(index)
    gone = {name for name in set(weight_map.values()) if not (path / name).is_file()}
    return {key: name for key, name in weight_map.items() if name in gone}


def _refuse_needed(path: Path, config: Any, absent: dict[str, str], *, trust_remote_code: bool) -> None:
    """Raise EvalError, before gigabytes of the others are read, where the model has a parameter of an absent name."""
    if not absent:
        return
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    # Checkpoints of a base model lack its prefix.
    prefix = f"{model.base_model_prefix}."
    spelt = (key for name in model.state_dict() for key in (name, name.removeprefix(prefix)))
    needed = next((key for key in spelt if key in absent), None)
    if needed is not None:
        raise EvalError(f"{path / absent[needed]}: missing, though {INDEX_FILE} names it for {needed}; {COPY_AGAIN}")


@contextmanager
def _readable(path: Path, absent: dict[str, str], offload: str | None) -> Iterator[Path]:
    """The folder as transformers takes it: itself, or links to its files beside an index without what isn't there.

    transformers opens every file that an index names, and wants `metadata` in it, which says nothing that is needed.
    offload: where a streamed model keeps its files, and so the links, longer than it is loading.
    """
    index = path / INDEX_FILE
    if (path / SINGLE_FILE).is_file() or not index.is_file():
        yield path
        return
    described = read_json(index)
    if not absent and isinstance(described.get("metadata"), dict):
        yield path
        return
    kept = {key: name for key, name in described["weight_map"].items() if key not in absent}
    made = Path(tempfile.mkdtemp(prefix="llmshrink-index-", dir=offload))
    try:
        for file in path.iterdir():
            if file.name != INDEX_FILE:
                (made / file.name).symlink_to(file.absolute())
        (made / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": kept}))
        yield made
    finally:
        if offload is None:
            shutil.rmtree(made)


def _as_indexed(model: Any, path: Path, astray: Strays) -> None:
    """Give the model the tensors that the index means, where other files have some of the same names."""
    import torch
    from safetensors import safe_open

    parameters = model.state_dict()
    for key, file in sorted(astray.doubled.items()):
        target = parameters.get(key)
        with safe_open(file, framework="pt") as shard:
            meant = shard.get_tensor(key)
        if target is None or target.shape != meant.shape or not target.dtype.is_floating_point:
            raise EvalError(
                f"{path}: {key} is in several files, and {INDEX_FILE} means the one of {file.name}, which transformers "
                "doesn't take here; remove it from the others"
            )
        with torch.no_grad():
            target.copy_(meant)
