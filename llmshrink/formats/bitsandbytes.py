"""bitsandbytes' checkpoints, as transformers' `save_pretrained` writes them and `from_pretrained` loads them.

A linear called `name` with N outputs and K inputs has, in NF4,

    name.weight                               uint8 [ceil(N*K/2), 1]     two codes a byte, the earlier one high
    name.weight.absmax                        float32 [ceil(N*K/64)]     uint8 with double quantization
    name.weight.quant_map                     float32 [16]               the levels, the same in every checkpoint
    name.weight.nested_absmax                 float32 [blocks / 256]     with double quantization
    name.weight.nested_quant_map              float32 [256]              with double quantization
    name.weight.quant_state.bitsandbytes__nf4 uint8                      JSON: shape, dtype, block sizes, offset

and in 8 bits

    name.weight         int8 [N, K]
    name.SCB            float32 [N]      the largest magnitude of each row
    name.weight_format  uint8 []         0: row after row

config.json's `quantization_config` is a BitsAndBytesConfig and names only the linears that stay as they are: which ones
are quantized is told by the keys. What has other options (FP4, other block sizes, 16-bit codes) isn't read here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from llmshrink_eval.bounded import parse_json, shown
from torch import Tensor

from llmshrink.errors import CheckpointError
from llmshrink.formats.groups import by_scheme, checked
from llmshrink.weights import NormalFloat4, RowInt8
from llmshrink.weights.bitsandbytes import BLOCK, NESTED_BLOCK, NF4, Nested

METHOD = "bitsandbytes"
STATE = "quant_state.bitsandbytes__nf4"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class BitsAndBytesScheme:
    """How a linear is stored. double: each block's absmax in 8 bits (NF4 alone). dtype: what is computed in."""

    kind: Literal["nf4", "int8"]
    double: bool = False
    dtype: torch.dtype = torch.bfloat16


def tensors(name: str, weight: NormalFloat4 | RowInt8) -> dict[str, Tensor]:
    """The checkpoint's tensors of the linear `name` (a module path, without `.weight`)."""
    if isinstance(weight, RowInt8):
        return {
            f"{name}.weight": weight.codes.contiguous(),
            f"{name}.SCB": weight.absmax.contiguous(),
            f"{name}.weight_format": torch.tensor(0, dtype=torch.uint8),
        }
    stored = {
        f"{name}.weight": weight.packed,
        f"{name}.weight.absmax": weight.absmax,
        f"{name}.weight.quant_map": torch.tensor(NF4),
        f"{name}.weight.{STATE}": torch.frombuffer(bytearray(_state(weight)), dtype=torch.uint8),
    }
    if weight.nested is not None:
        stored[f"{name}.weight.nested_absmax"] = weight.nested.scale
        stored[f"{name}.weight.nested_quant_map"] = weight.nested.table
    return stored


def _state(weight: NormalFloat4) -> bytes:
    found: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    if weight.nested is not None:
        found |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": weight.nested.offset}
    return json.dumps(found).encode()


def names(name: str, scheme: BitsAndBytesScheme) -> list[str]:
    """The keys that `tensors` writes for the linear `name`."""
    if scheme.kind == "int8":
        return [f"{name}.weight", f"{name}.SCB", f"{name}.weight_format"]
    nested = ("nested_absmax", "nested_quant_map") if scheme.double else ()
    return [f"{name}.weight", *(f"{name}.weight.{part}" for part in ("absmax", "quant_map", STATE, *nested))]


def layout(
    name: str, scheme: BitsAndBytesScheme, shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Key -> (dtype, shape) of what `tensors` gives. dtype: of the weight that it was.

    Of NF4's state with double quantization the length isn't known before its offset is: the longest is told.
    """
    out_features, in_features = shape
    if scheme.kind == "int8":
        return {
            f"{name}.weight": (torch.int8, shape),
            f"{name}.SCB": (torch.float32, (out_features,)),
            f"{name}.weight_format": (torch.uint8, ()),
        }
    count = out_features * in_features
    blocks = -(-count // BLOCK)
    nested = Nested(torch.empty(0), torch.empty(0), -1.2345678901234567e-100) if scheme.double else None
    packed = torch.empty((-(-count // 2), 1), dtype=torch.uint8, device="meta")
    absmax = torch.empty(blocks, dtype=torch.uint8 if scheme.double else torch.float32, device="meta")
    state = _state(NormalFloat4(packed, absmax, nested, shape, dtype))
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        f"{name}.weight": (torch.uint8, tuple(packed.shape)),
        f"{name}.weight.absmax": (absmax.dtype, (blocks,)),
        f"{name}.weight.quant_map": (torch.float32, (len(NF4),)),
        f"{name}.weight.{STATE}": (torch.uint8, (len(state),)),
    }
    if scheme.double:
        found[f"{name}.weight.nested_absmax"] = (torch.float32, (-(-blocks // NESTED_BLOCK),))
        found[f"{name}.weight.nested_quant_map"] = (torch.float32, (256,))
    return found


def read(name: str, get: Callable[[str], Tensor], scheme: BitsAndBytesScheme) -> NormalFloat4 | RowInt8:
    """The linear `name`, from its checkpoint tensors.

    get: key -> tensor; its errors (a key that isn't there) pass through. Raises CheckpointError naming a tensor whose
    shape, dtype or content isn't what `scheme` says.
    """

    def part(key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        return checked(get, f"{name}.{key}", (dtype,), shape, scheme)

    if scheme.kind == "int8":
        codes = get(f"{name}.weight")
        if codes.dtype != torch.int8 or codes.dim() != 2:
            raise CheckpointError(
                f"{name}.weight is {codes.dtype} {list(codes.shape)}, and 8-bit codes are int8 [out, in]; the "
                "checkpoint is damaged or not of this format"
            )
        if int(part("weight_format", torch.uint8, ())) != 0:
            raise CheckpointError(f"{name}.weight_format isn't 0: only codes row after row can be read here")
        return RowInt8(codes, part("SCB", torch.float32, (codes.shape[0],)))
    shape, dtype, offset = _read_state(f"{name}.weight.{STATE}", get, scheme)
    count = shape[0] * shape[1]
    blocks = -(-count // BLOCK)
    packed = part("weight", torch.uint8, (-(-count // 2), 1))
    absmax = part("weight.absmax", torch.uint8 if scheme.double else torch.float32, (blocks,))
    if part("weight.quant_map", torch.float32, (len(NF4),)).tolist() != list(NF4):
        raise CheckpointError(f"{name}.weight.quant_map: isn't NF4's sixteen levels; the checkpoint is damaged")
    nested = None
    if offset is not None:
        scale = part("weight.nested_absmax", torch.float32, (-(-blocks // NESTED_BLOCK),))
        nested = Nested(scale, part("weight.nested_quant_map", torch.float32, (256,)), offset)
    return NormalFloat4(packed, absmax, nested, shape, dtype)


def _read_state(
    key: str, get: Callable[[str], Tensor], scheme: BitsAndBytesScheme
) -> tuple[tuple[int, int], torch.dtype, float | None]:
    """(shape, the original's dtype, the offset of double quantization) from a quant_state."""
    raw = get(key)
    try:
        state = parse_json(bytes(raw.tolist()))
        shape, dtype, offset = state["shape"], DTYPES[state["dtype"]], state.get("nested_offset")
        rows, columns = (int(each) for each in shape)
        assert rows > 0 and columns > 0 and (offset is None or isinstance(offset, float)), state
    except (ValueError, KeyError, TypeError, AssertionError, OverflowError) as error:
        raise CheckpointError(f"{key}: isn't a quant_state of bitsandbytes; the checkpoint is damaged") from error
    asked = ("nf4", BLOCK, *((NESTED_BLOCK, "float32") if scheme.double else (None, None)))
    found = tuple(state.get(name) for name in ("quant_type", "blocksize", "nested_blocksize", "nested_dtype"))
    if found != asked or (offset is None) == scheme.double:
        raise CheckpointError(
            f"{key}: says {shown(state)}; only NF4 in blocks of {BLOCK}, nested as config.json says, can be read here"
        )
    return (rows, columns), dtype, offset


def quantization_config(sites: Mapping[str, BitsAndBytesScheme | None], ignore: Iterable[str]) -> dict[str, object]:
    """The `quantization_config` of config.json. One checkpoint has one scheme.

    sites: module path of every linear inside the blocks -> its scheme, or None when it stays as it is. ignore: further
    linears that stay as they are (`lm_head`).
    """
    targets, ignored = by_scheme(sites, ignore)
    (scheme,) = targets
    narrow = scheme.kind == "nf4"
    return {
        "_load_in_4bit": narrow,
        "_load_in_8bit": not narrow,
        "bnb_4bit_compute_dtype": str(scheme.dtype).removeprefix("torch.") if narrow else "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4" if narrow else "fp4",
        "bnb_4bit_use_double_quant": scheme.double,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": ignored,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": narrow,
        "load_in_8bit": not narrow,
        "quant_method": METHOD,
    }


def scheme_of(config: Mapping[str, object]) -> BitsAndBytesScheme:
    """The one scheme of a `quantization_config`. Raises CheckpointError naming the option that isn't read here."""
    found = {name: config.get(name, default) for name, default in _DEFAULTS.items()}
    dtype = DTYPES.get(str(found["bnb_4bit_compute_dtype"]).removeprefix("torch."), torch.float32)
    if found["load_in_8bit"] and not found["load_in_4bit"]:
        wanted: dict[str, object] = {"llm_int8_has_fp16_weight": False}
        scheme = BitsAndBytesScheme("int8", False, dtype)
    else:
        wanted = {"load_in_4bit": True, "load_in_8bit": False}
        wanted |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "uint8"}
        scheme = BitsAndBytesScheme("nf4", bool(found["bnb_4bit_use_double_quant"]), dtype)
    for name, value in wanted.items():
        if found[name] != value:
            raise CheckpointError(
                f"quantization_config is {METHOD} with {name} {found[name]!r}; only NF4 stored in uint8, and 8-bit "
                "codes, can be read here: transformers loads it"
            )
    return scheme


_DEFAULTS: dict[str, object] = {
    "load_in_4bit": False,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_use_double_quant": False,
    "bnb_4bit_compute_dtype": "float32",
    "llm_int8_has_fp16_weight": False,
}
"""BitsAndBytesConfig's, of the fields that are read here."""


def schemes(config: Mapping[str, object], keys: Iterable[str]) -> dict[str, BitsAndBytesScheme]:
    """Module path -> scheme. keys: of the checkpoint, since the config names no module that is quantized.

    Raises CheckpointError for options that aren't read here, or where no key is a quantized linear's.
    """
    scheme = scheme_of(config)
    mark = ".SCB" if scheme.kind == "int8" else f".weight.{STATE}"
    found = {key.removesuffix(mark): scheme for key in keys if key.endswith(mark)}
    if not found:
        raise CheckpointError(
            f"quantization_config is {METHOD}, and no tensor is called *{mark}: config.json and the weights don't "
            "belong together; copy both again"
        )
    return found
