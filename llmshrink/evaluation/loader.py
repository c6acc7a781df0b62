"""Checkpoints that transformers can't read by itself.

transformers reads `pack-quantized` through the compressed-tensors library, and the version that lives beside vLLM
(0.17) packs bits that don't divide 32 in another way than vLLM does: 2-, 3-, 5-, 6- and 7-bit checkpoints come
through here. The model is built without parameters and filled module by module, so that the compressed and the dense
form are never whole in memory together.

Where products are of 8 bits the model is the packed one (`llmshrink.load`), which computes what engines do: that
library rounds inputs to int8 with other scales than vLLM's, and what is measured should be what is served.

Our own format is read by transformers as soon as llmshrink is imported. Here it has been; in the process that measures
what a model costs it is not, until that process looks for the model's loader in this module.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmshrink_eval.refused import save_tensors

from llmshrink.checkpoint.beside import own_code
from llmshrink.checkpoint.decompressed import Decompressed
from llmshrink.checkpoint.files import read_config
from llmshrink.errors import CheckpointError
from llmshrink.formats import compressed_tensors, kv_cache, sparse24
from llmshrink.formats.eight_bit import EightBitScheme

if TYPE_CHECKING:
    import torch
    from llmshrink_eval.model import LoadOptions
    from torch import Tensor

READ_BY_TRANSFORMERS = frozenset({4, 8})
SHARD_BYTES = 500_000_000


def reader_of(folder: Path, *, offload: bool) -> Callable[[str, LoadOptions], Any] | None:
    """What loads the checkpoint in `folder`; None where transformers alone does. offload: whether it is streamed."""
    if rounds_inputs(folder):
        return load_packed
    if needed(folder) or caches_fp8(folder) or (offload and packed(folder)):
        return load
    return load_own_format if _quantization(folder).get("quant_method") == sparse24.METHOD else None


def rounds_inputs(folder: Path) -> bool:
    """Whether it holds products of 8 bits that the packed model computes; others are transformers' to take."""
    from llmshrink.runtime.scheme import of_groups

    try:
        return any(isinstance(scheme, EightBitScheme) for scheme in of_groups(_quantization(folder)).values())
    except CheckpointError:
        return False


def caches_fp8(folder: Path) -> bool:
    """Whether keys and values are cached in FP8, which compressed-tensors rounds twice if it computes in bfloat16."""
    try:
        return kv_cache.rounds(_quantization(folder))
    except CheckpointError:
        return False


def packed(folder: Path) -> bool:
    """Whether `folder` holds `pack-quantized` weights, some at least, which our reader reads."""
    return _quantization(folder).get("format") in (compressed_tensors.FORMAT, compressed_tensors.MIXED)


def needed(folder: Path) -> bool:
    """Whether it holds some that only our reader reads."""
    groups = (_quantization(folder).get("config_groups") or {}).values()
    bits = {(group.get("weights") or {}).get("num_bits") for group in groups}
    integers = any((group.get("input_activations") or {}).get("type") == "int" for group in groups)
    return packed(folder) and (integers or not bits <= READ_BY_TRANSFORMERS)


def _quantization(folder: Path) -> dict[str, Any]:
    """What config.json says of the quantization; empty where it says nothing, or isn't there: others refuse that."""
    try:
        found = read_config(folder).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}


def load(path: str, options: LoadOptions) -> Any:
    """The dense transformers model, in `options.used_dtype` on `options.device`.

    With `options.offload` the dense form is written there once, and loaded from there as any other model is. Raises
    CheckpointError when the checkpoint doesn't fit its config.
    """

    folder = Path(path)
    if options.offload is not None:
        return _load_offloaded(folder, options, options.offload)
    config, reader = _opened(folder, options.used_dtype, trust_remote_code=options.trust_remote_code)
    with reader:
        return _loaded(config, reader, options)


def _loaded(config: Any, reader: Decompressed, options: LoadOptions) -> Any:
    """The dense model, its tensors from the reader."""
    import torch

    from llmshrink.model.skeleton import Skeleton

    skeleton = Skeleton(
        config,
        reader,
        device=torch.device(options.device),
        dtype=options.used_dtype,
        trust_remote_code=options.trust_remote_code,
    )
    for name, module in list(skeleton.model.named_modules()):
        if any(parameter is not None for parameter in module._parameters.values()):
            skeleton.load(name)
    reader.round_too(skeleton.model, skeleton.key_of)
    skeleton.model.tie_weights()
    skeleton.model.config.use_cache = True
    return skeleton.model


def load_packed(path: str, options: LoadOptions) -> Any:
    """The packed model, in `options.used_dtype` on `options.device`. Raises CheckpointError where it is streamed."""
    from llmshrink.checkpoint.source import resolve
    from llmshrink.runtime.load import load as run

    if options.offload is not None:
        raise CheckpointError(
            f"{path}: rounds the inputs of its linears to 8 bits, which no dense copy of it does; leave --offload out"
        )
    trusted = options.trust_remote_code
    dtype = str(options.used_dtype).removeprefix("torch.")
    return run(resolve(path, trust_remote_code=trusted), device=options.device, dtype=dtype, trust_remote_code=trusted)


def load_own_format(path: str, options: LoadOptions) -> Any:
    """The model as transformers loads it where llmshrink is imported: its linears stay packed."""
    from llmshrink_eval.model import load_model

    return load_model(path, options)


def write_dense(folder: Path, target: Path, dtype: torch.dtype, *, trust_remote_code: bool = False) -> None:
    """A copy of the checkpoint in `folder` without its compression, every floating-point tensor in `dtype`."""
    config, reader = _opened(folder, dtype, trust_remote_code=trust_remote_code)
    if reader.rounds_too:
        raise CheckpointError(f"{folder}: {reader.rounds_too}, which no dense copy of it does; leave --offload out")
    target.mkdir(parents=True, exist_ok=True)
    index: dict[str, str] = {}
    size = 0
    with reader:
        for number, tensors in enumerate(_shards(reader, dtype)):
            name = f"model-{number:05}.safetensors"
            save_tensors(tensors, target / name, {"format": "pt"})
            index |= dict.fromkeys(tensors, name)
            size += sum(tensor.nbytes for tensor in tensors.values())
    document = {"metadata": {"total_size": size}, "weight_map": index}
    (target / "model.safetensors.index.json").write_text(json.dumps(document))
    config.dtype = dtype
    config.save_pretrained(target)
    if trust_remote_code:
        for name in own_code(folder):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / name, target / name)


def _opened(folder: Path, dtype: torch.dtype, *, trust_remote_code: bool) -> tuple[Any, Decompressed]:
    """The dense model's config and a reader that answers with its tensors."""
    from llmshrink_eval.configured import running_config

    raw = read_config(folder)
    config = running_config(folder, trust_remote_code=trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config, Decompressed(folder, raw, dtype)


def _shards(reader: Decompressed, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    names = reader.keys()
    for key in names:
        tensor = reader.read(key)
        shard[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        if sum(each.nbytes for each in shard.values()) >= SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard


def _load_offloaded(folder: Path, options: LoadOptions, offload: Path) -> Any:
    from llmshrink_eval.model import load_model

    dense = offload / "dense"
    # The model before this one, which has been let go by now, may have had more shards.
    shutil.rmtree(dense, ignore_errors=True)
    write_dense(folder, dense, options.used_dtype, trust_remote_code=options.trust_remote_code)
    return load_model(str(dense), replace(options, offload=offload / "weights"))
