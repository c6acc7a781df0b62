"""A checkpoint as a transformers model that computes with packed weights.

The modules are built without parameters; each linear that the checkpoint holds packed becomes a QuantLinear, each that
it holds as 2:4 without its zeros a SparseLinear, and each whose products are of 8 bits an EightBitLinear. Tensors come
from the files one at a time and go to their device at once, so that what is resident is the compressed model and one
tensor on its way; no weight is ever dense. A checkpoint that isn't compressed loads as transformers loads it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from llmshrink_eval.errors import EvalError, one_line
from llmshrink_eval.model import quiet
from llmshrink_eval.sidefiles import GENERATION_FILE, check_generation
from llmshrink_eval.whole import pretrained
from llmshrink_kernels.device import runs_triton
from llmshrink_kernels.wna16 import prepack
from llmshrink_kernels.wna16.cpu import group_for
from torch import Tensor, nn

from llmshrink.checkpoint.files import read_config
from llmshrink.checkpoint.index import CheckpointIndex
from llmshrink.checkpoint.preflight import load_config
from llmshrink.checkpoint.source import Source
from llmshrink.errors import CheckpointError, LlmshrinkError, SourceError
from llmshrink.formats import bitsandbytes, compressed_tensors, eight_bit, kv_cache, sparse24, stored
from llmshrink.formats.compressed_tensors import GroupedIntScheme
from llmshrink.formats.eight_bit import EightBitScheme
from llmshrink.formats.stored import Scheme
from llmshrink.methods.bnb import require
from llmshrink.model.skeleton import Skeleton
from llmshrink.run.asked import DTYPES, pick_arithmetic, pick_device
from llmshrink.run.memory import give_back
from llmshrink.runtime.eight_bit import EightBitLinear
from llmshrink.runtime.linear import QuantLinear
from llmshrink.runtime.scheme import of_groups, schemes
from llmshrink.runtime.sparse import SparseLinear
from llmshrink.weights import FP8, EightBit, GroupedInt, Sparse24, round_cache

logger = logging.getLogger("llmshrink")

MARKS = {".weight_packed": compressed_tensors.SUFFIXES, ".weight_values": sparse24.SUFFIXES}
"""What tells that a linear is packed, and what its tensors may be called. 8-bit codes are a `.weight` with a scale."""
PACKED = (QuantLinear, SparseLinear, EightBitLinear)
"""The modules of linears that are packed."""


class _Reader:
    """A compressed checkpoint under its dense names. Only what isn't packed is read here."""

    def __init__(self, index: CheckpointIndex) -> None:
        self._index = index
        self.why_not = index.why_not
        self.packed = packed_in(index)

    def keys(self) -> list[str]:
        own = {f"{name}.{suffix}" for name, suffixes in self.packed.items() for suffix in suffixes}
        return [key for key in self._index if key not in own] + [f"{name}.weight" for name in self.packed]

    def read(self, key: str) -> Tensor:
        return self._index.read(key)


def packed_in(index: CheckpointIndex) -> dict[str, tuple[str, ...]]:
    """Linear that is packed -> what its tensors may be called, by the checkpoint's tensors alone."""
    found = {
        key.removesuffix(mark): suffixes for mark, suffixes in MARKS.items() for key in index if key.endswith(mark)
    }
    weights = [key for key in index if key.endswith(".weight")]
    coded = [key for key in weights if index.entry(key).dtype in (torch.int8, FP8) or f"{key}_scale" in index]
    return found | {key.removesuffix(".weight"): eight_bit.SUFFIXES for key in coded}


def load(
    source: Source, *, device: str | None, dtype: str | None, trust_remote_code: bool, plain_too: bool = False
) -> Any:
    """See `llmshrink.load`. source: the model, resolved. plain_too: that it isn't compressed is no news."""
    place = pick_device(device)
    quantization = quantization_of(source)
    config = config_of(source, trust_remote_code)
    chosen = choose_dtype(dtype, config, place, quantization)
    if quantization is None:
        with CheckpointIndex.open(source.folder) as index:
            packed = next(iter(packed_in(index)), None)
        if packed is not None:
            raise CheckpointError(
                f"{source.name}: {packed} is packed, but config.json has no quantization_config; copy config.json again"
            )
        if not plain_too:
            logger.warning("%s isn't compressed: loaded as it is", source.name)
        loaded = _load_dense(source, config, place, chosen, trust_remote_code)
    elif quantization.get("quant_method") == bitsandbytes.METHOD:
        loaded = _load_bitsandbytes(source, quantization, place, chosen, trust_remote_code)
    else:
        with CheckpointIndex.open(source.folder) as index:
            loaded = _load_packed(source, config, quantization, index, place, chosen, trust_remote_code)
    loaded.requires_grad_(False)
    return loaded.eval()


def quantization_of(source: Source) -> dict[str, Any] | None:
    """The quantization_config of config.json, or None. Raises SourceError when there is no config.json to read."""
    config = read_config(source.folder)
    text = config.get("text_config")
    found = config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)
    return found if isinstance(found, dict) and found else None


def choose_dtype(
    name: str | None, config: Any, device: torch.device, quantization: Mapping[str, Any] | None
) -> torch.dtype:
    """What is computed in: as asked for, else what the device computes fastest of the config's own dtype.

    On CUDA packed weights' kernels want 16 bits: bfloat16 for float32. quantization: of config.json, or None.
    """
    own = getattr(config, "dtype", None)
    own = getattr(torch, own, None) if isinstance(own, str) else own
    stored = own if isinstance(own, torch.dtype) else torch.float32
    chosen = pick_arithmetic(name, stored, device, int4=_by_int4(quantization)).dtype
    if quantization is None or device.type != "cuda" or chosen != "float32":
        return DTYPES[chosen]
    if name in DTYPES:
        raise LlmshrinkError("--dtype float32: on cuda packed weights run in bfloat16 or float16; choose one of them")
    return torch.bfloat16


def _by_int4(quantization: Mapping[str, Any] | None) -> bool:
    """Whether torch's int4 product multiplies any of the linears on a CPU.

    It takes bfloat16; what is packed otherwise is multiplied in float32 whatever the model computes in.
    """
    if quantization is None or quantization.get("quant_method") in (bitsandbytes.METHOD, sparse24.METHOD):
        return False
    groups = of_groups(quantization).values()
    return any(
        isinstance(each, GroupedIntScheme) and group_for(each.bits, each.group_size, 0) is not None for each in groups
    )


def config_of(source: Source, trust_remote_code: bool) -> Any:
    """The dense model's configuration. Raises SourceError where there is none that transformers can read."""
    if quantization_of(source) is None:
        return load_config(source, trust_remote_code)
    from llmshrink_eval.configured import running_config

    try:
        config = running_config(source.folder, trust_remote_code=trust_remote_code)
    except EvalError as error:
        raise SourceError(str(error)) from error
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def _load_dense(source: Source, config: Any, device: torch.device, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    with _said_in_a_line(source):
        return pretrained(source.folder, config, dtype=dtype, trust_remote_code=trust_remote_code).to(device)


@contextmanager
def _said_in_a_line(source: Source) -> Iterator[None]:
    """While open, whatever loading raises becomes a SourceError in one line."""
    try:
        with quiet():
            yield
    except EvalError as error:
        raise SourceError(str(error)) from error
    except Exception as error:  # of every type: a missing file, a shape, an unknown class
        raise SourceError(f"{source.name}: transformers can't load it: {one_line(error)}") from error


def _load_bitsandbytes(
    source: Source, quantization: dict[str, Any], device: torch.device, dtype: torch.dtype, trust_remote_code: bool
) -> Any:
    """The model as transformers loads it, its linears that library's modules. CheckpointError for other options."""
    from llmshrink_eval.configured import multiply_in, running_config

    bitsandbytes.scheme_of(quantization)
    require(source.name, "load the original")
    # A line for each product of 8 bits, which it casts to float16 for.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    with _said_in_a_line(source):
        model = pretrained(
            source.folder,
            multiply_in(running_config(source.folder, trust_remote_code=trust_remote_code), dtype),
            dtype=dtype,
            device_map={"": device},
            trust_remote_code=trust_remote_code,
        )
    # After a forward on the CPU its NF4 weights are in another order, which a reload would take for the stored one.
    model.save_pretrained = _unsaved(source.folder)
    return model


def _load_packed(
    source: Source,
    config: Any,
    quantization: dict[str, Any],
    index: CheckpointIndex,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> Any:
    reader = _Reader(index)
    use_cache = getattr(config, "use_cache", True)
    skeleton = Skeleton(config, reader, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    model = skeleton.model
    packed = _packed_linears(skeleton, reader)
    described = _described(quantization, packed)
    if not all(isinstance(scheme, EightBitScheme) for scheme in described.values()):
        # Where there are no kernels this says so, for every way of computing without them.
        runs_triton(device)
    for module_name, stored_name in packed.items():
        linear = model.get_submodule(module_name)
        weight = _read(stored_name, index, described[module_name])
        if weight.shape != tuple(linear.weight.shape):
            raise CheckpointError(_misfit(f"{stored_name}.weight", weight.shape, linear.weight.shape))
        model.set_submodule(module_name, linear_of(weight, linear.bias, device=device, dtype=dtype))
        give_back()
    _load_rest(skeleton, index)
    scales = kv_cache.placed(kv_cache.scales(quantization, index, index.read), skeleton.key_of)
    for attention, of_cache in scales.items():
        round_cache(model.get_submodule(attention), of_cache.to(device))
    model.config.use_cache = use_cache
    model.config.name_or_path = source.name
    _generation_config(model, source.folder)
    model.save_pretrained = _unsaved(source.folder)
    return model


def _packed_linears(skeleton: Skeleton, reader: _Reader) -> dict[str, str]:
    """Module path -> name in the checkpoint, of each packed linear. CheckpointError where the module is no Linear."""
    places: dict[str, str] = {}
    for parameter, key in skeleton.key_of.items():
        stored = key.removesuffix(".weight")
        if key.endswith(".weight") and stored in reader.packed:
            name = parameter.removesuffix(".weight")
            module = skeleton.model.get_submodule(name)
            if type(module) is not nn.Linear:
                raise CheckpointError(
                    f"{name} is packed, and a {type(module).__name__} in this model; only nn.Linear can be run packed"
                )
            places[name] = stored
    missing = sorted(reader.packed.keys() - set(places.values()))
    if missing:
        raise CheckpointError(
            f"{missing[0]} and {len(missing) - 1} more are packed, and the model that config.json describes has no"
            " place for them; the two don't belong together: copy the checkpoint again"
        )
    return places


def _described(quantization: dict[str, Any], packed: dict[str, str]) -> Mapping[str, Scheme]:
    """Module path -> scheme of every packed linear. CheckpointError where the config doesn't say."""
    if quantization.get("quant_method") != sparse24.METHOD:
        return schemes(quantization, dict.fromkeys(packed, "Linear"))
    described = sparse24.schemes(quantization)
    for name in packed:
        if name not in described:
            raise CheckpointError(f"{name} is packed, but no config group targets it; the checkpoint is damaged")
    return described


def _read(name: str, index: CheckpointIndex, scheme: Scheme) -> GroupedInt | Sparse24 | EightBit:
    """One linear from the files."""
    if f"{name}.weight_g_idx" in index:
        raise CheckpointError(f"{name}.weight_g_idx: columns in a permuted order can't be run here; serve it with vLLM")
    weight = stored.read(name, index.read, scheme)
    assert isinstance(weight, GroupedInt | Sparse24 | EightBit), name
    return weight


def linear_of(
    weight: GroupedInt | Sparse24 | EightBit, bias: nn.Parameter | None, *, device: torch.device, dtype: torch.dtype
) -> QuantLinear | SparseLinear | EightBitLinear:
    """The module that computes with a weight, packed for the kernels on `device`."""
    if isinstance(weight, Sparse24):
        scale = None if weight.scale is None else weight.scale.to(device)
        moved = replace(weight, values=weight.values.to(device), positions=weight.positions.to(device), scale=scale)
        return SparseLinear.of(moved, bias, dtype=dtype)
    if isinstance(weight, EightBit):
        return EightBitLinear(EightBit(weight.codes.to(device), weight.scale.to(device)), bias, dtype=dtype)
    codes, scale, zero_point = (
        None if tensor is None else tensor.to(device) for tensor in (weight.codes, weight.scale, weight.zero_point)
    )
    assert codes is not None and scale is not None
    packed = prepack(codes, scale, zero_point, bits=weight.bits, group_size=weight.group_size)
    return QuantLinear(packed, bias, dtype=dtype)


def _load_rest(skeleton: Skeleton, index: CheckpointIndex) -> None:
    """Everything that isn't packed: parameters, those that share a tensor as one, and buffers that the files hold."""
    slots: dict[str, list[tuple[nn.Module, str]]] = {}
    for path, module in skeleton.model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                slots.setdefault(skeleton.key_of[f"{path}.{name}".lstrip(".")], []).append((module, name))
        for name, buffer in module._buffers.items():
            key = f"{path}.{name}".lstrip(".")
            if buffer is not None and key in index and not isinstance(module, PACKED):
                module._buffers[name] = index.read(key).to(buffer.device)
    for key, owners in slots.items():
        real = nn.Parameter(index.read(key).to(skeleton.device, skeleton.dtype), requires_grad=False)
        for module, name in owners:
            expected = module._parameters[name]
            assert expected is not None
            if real.shape != expected.shape:
                raise CheckpointError(_misfit(key, real.shape, expected.shape))
            module._parameters[name] = real


def _misfit(key: str, found: Sequence[int], expected: Sequence[int]) -> str:
    return (
        f"{key}: has shape {list(found)}, config.json makes it {list(expected)};"
        " the two don't belong together: download the model again"
    )


def _generation_config(model: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    if (folder / GENERATION_FILE).is_file():
        try:
            check_generation(folder)
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        except EvalError as error:
            raise SourceError(str(error)) from error
        except Exception as error:  # of any type, from whatever a field is made into
            raise SourceError(f"{folder / GENERATION_FILE}: can't be read: {one_line(error)}") from error


def _unsaved(folder: Path) -> Any:
    def save_pretrained(*_: Any, **__: Any) -> None:
        raise LlmshrinkError(f"a model of packed weights isn't saved by transformers; copy {folder}, which it is")

    return save_pretrained
