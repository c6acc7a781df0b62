"""A model as transformers loads it, held to what its folder says: every tensor there, and each the one that is meant.

transformers fills what it doesn't find with random numbers, and says so in a warning. Of several shards it reads every
tensor of every one, so that of two of one name the last file's stays, whatever the index says. The index decides here,
as where a model is read to be compressed: what it doesn't name isn't the model's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmshrink_eval.errors import EvalError
from llmshrink_eval.weightfiles import INDEX_FILE, Strays, strays

COPY_AGAIN = "download or copy it again"


def pretrained(path: Path, config: Any, *, trust_remote_code: bool = False, **settings: Any) -> Any:
    """`AutoModelForCausalLM.from_pretrained` of the folder `path`. config: as `configured.running_config` gives it.

    Raises EvalError for a tensor that isn't there, or that only a file has and not the index; else whatever
    transformers raises.
    """
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path,
        config=config,
        local_files_only=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # named below, where transformers refers to a report that nobody sees
        trust_remote_code=trust_remote_code,
        **settings,
    )
    model, found = loaded
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
        else:
            method = getattr(config, "quantization_config", None)
            known = method.get("quant_method") if isinstance(method, dict) else getattr(method, "quant_method", None)
            cause = "is the checkpoint whole?" if known is None else f"it may not know the compression, {known}"
        raise EvalError(f"{path}: transformers doesn't find {missing[0]}{others} in it; {cause}")
    _as_indexed(model, path, astray)
    return model


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
