"""config.json before a model's class sees it: each field that sizes or shapes a model is of its type and in its range.

A class of transformers takes most fields as they are, and what follows of a wrong one is anything: a traceback, minutes
of building a million blocks, a NaN in every product. So the file is held to a table of what fields can be, whoever
reads the model, and for whatever verb. The limits are far above the largest models; fields that aren't in the table
are their class's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmshrink_eval.bounded import Unreadable, numbers_in, read_json, shown
from llmshrink_eval.errors import EvalError
from llmshrink_eval.refused import UNREAD, refused

CONFIG_LIMIT = 16_000_000
"""Bytes of a config.json."""
WAY_OUT = "correct it, or download the file again"
TEXT_PARTS = ("text_config", "llm_config", "language_config")
"""Where a model of several parts keeps its language model's fields."""


@dataclass(frozen=True)
class _Numbers:
    """Numbers that a field may have: finite, from `least` to `most`.

    whole: no fraction. above: `least` itself isn't one. many: in a list too, as one for each layer, or several ids.
    """

    least: float
    most: float
    whole: bool = True
    above: bool = False
    many: bool = False

    def fault(self, value: object) -> str | None:
        """What is wanted, where `value` isn't it."""
        if isinstance(value, list) and self.many:
            return next(filter(None, map(self.fault, value)), None)
        if isinstance(value, int | float) and not isinstance(value, bool) and self.least <= value <= self.most:
            fits = not self.whole or isinstance(value, int) or value.is_integer()
            if fits and not (self.above and value == self.least):
                return None
        kind = "a whole number" if self.whole else "a number"
        return f"{kind} {'above' if self.above else 'from'} {self.least:,} {'up ' * self.above}to {self.most:,}"


_WHOLE: dict[str, _Numbers] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), _Numbers(1, 4096)),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), _Numbers(1, 2**20)),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_key_value_heads"), _Numbers(1, 2**16, many=True)),
    "head_dim": _Numbers(0, 2**16, many=True),  # 0: of attention that has none
    **dict.fromkeys(
        ("intermediate_size", "n_inner", "ffn_dim", "moe_intermediate_size"), _Numbers(0, 2**24, many=True)
    ),
    "vocab_size": _Numbers(1, 2**24),
    "sliding_window": _Numbers(0, 2**31),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), _Numbers(1, 2**31)),
    **dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), _Numbers(-1, 2**31, many=True)),
}
_COUNTED = re.compile(r"(num|n)_.*(layers?|experts?|blocks?|labels)")
_COUNTS = _Numbers(0, 2**16, many=True)
_EPSILON = re.compile(r"(.*_)?(eps|epsilon)")
_EPSILONS = _Numbers(0, 1, whole=False)
_POSITIVE = _Numbers(0, 1e12, whole=False, above=True)
_BASES = ("rope_theta", "rotary_emb_base", "rope_local_base_freq")
_FLAGS = ("tie_word_embeddings", "is_encoder_decoder", "attention_bias", "mlp_bias")
_WORDS = ("model_type", "hidden_act", "hidden_activation", "activation_function")
_LISTS = ("architectures", "layer_types")
_MAPPINGS = (*TEXT_PARTS, "rope_parameters", "rope_scaling", "auto_map", "quantization_config")
_ROPE = ("rope_parameters", "rope_scaling")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model's folder. Raises EvalError, in one line, where there is none, it can't be read, or a
    field isn't what one of that name can be."""
    file = folder / "config.json"
    try:
        config = read_json(file, limit=CONFIG_LIMIT)
    except FileNotFoundError as error:
        raise EvalError(f"{folder}: no config.json there; name a model's folder") from error
    except OSError as error:
        raise EvalError(f"{file}: can't be read: {refused(error, UNREAD)}") from error
    except Unreadable as error:
        raise EvalError(f"{file}: can't be read as JSON: it {error}; download or copy it again") from error
    if not isinstance(config, dict):
        raise EvalError(f"{file}: not a JSON object; download or copy it again")
    fault = config_fault(config)
    if fault is not None:
        raise EvalError(f"{file}: {fault}; {WAY_OUT}")
    return config


def config_fault(config: Mapping[str, Any]) -> str | None:
    """What is wrong with the first field that isn't what one of its name can be; None: nothing. null is as absent."""
    for name, value in config.items():
        wanted = None if value is None else _wanted(name, value)
        if wanted is not None:
            return f"{shown(name)[1:-1]} is {shown(value)}, and has to be {wanted}"
    for name in TEXT_PARTS:
        fault = config_fault(config[name]) if config.get(name) else None
        if fault is not None:
            return f"{name}: {fault}"
    for name in _ROPE:
        fault = _rope_fault(config[name]) if config.get(name) else None
        if fault is not None:
            return f"{name}: {fault}"
    largest = next((each for each in numbers_in(config) if isinstance(each, int) and abs(each) >= 2**63), None)
    return None if largest is None else f"{shown(largest)} is in it, and no number of a model has 64 bits"


def check_fits(config: Any, *, tensors: int, nbytes: int | None = None) -> None:
    """Refuse a config of a far larger model than its files hold, before anything is built from it.

    config: transformers'. tensors, nbytes: of all files together. Raises EvalError: each block has a tensor of its own
    at least, and no format stores a weight in less than a bit.
    """
    text = config.get_text_config()

    def number(name: str) -> int:
        value = getattr(text, name, None)
        return value if isinstance(value, int) else 0

    layers, width = number("num_hidden_layers"), number("hidden_size")
    if layers > tensors:
        raise EvalError(
            f"config.json: num_hidden_layers is {layers:,}, and the files hold {tensors:,} tensors; the two don't "
            "belong together: download the model again"
        )
    for name in ("vocab_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        rows = number(name) * (number("head_dim") or 1 if name.endswith("heads") else 1)
        if nbytes is not None and width * rows > 8 * nbytes:
            raise EvalError(
                f"config.json: {name} {number(name):,} makes a matrix of {rows:,} x {width:,}, more than the "
                f"{nbytes:,} bytes of the files can hold; the two don't belong together: download the model again"
            )


def _wanted(name: str, value: Any) -> str | None:
    """What a field has to be, where it isn't."""
    if name in _WHOLE:
        return _WHOLE[name].fault(value)
    if name in _BASES:
        return _POSITIVE.fault(value)
    if _COUNTED.fullmatch(name):
        return _COUNTS.fault(value)
    if _EPSILON.fullmatch(name):
        return _EPSILONS.fault(value)
    if name in _FLAGS:
        return None if isinstance(value, bool) else "true or false"
    if name in _WORDS:
        return None if isinstance(value, str) else "text"
    if name in _MAPPINGS:
        return None if isinstance(value, dict) else "an object"
    if name in _LISTS:
        return None if isinstance(value, list) and all(isinstance(each, str) for each in value) else "a list of texts"
    return None


def _rope_fault(rope: Mapping[str, Any]) -> str | None:
    """As `config_fault`, of the settings of rotary positions: one object, or one for each type of layer."""
    for name, value in rope.items():
        if isinstance(value, dict):
            fault = _rope_fault(value)
            if fault is not None:
                return f"{name}: {fault}"
        elif name in ("rope_type", "type") and value is not None and not isinstance(value, str):
            return f"{name} is {shown(value)}, and has to be text"
        elif name in ("factor", "rope_theta", "original_max_position_embeddings"):
            wanted = None if value is None else _POSITIVE.fault(value)
            if wanted is not None:
                return f"{name} is {shown(value)}, and has to be {wanted}"
        elif any(not math.isfinite(each) for each in numbers_in([value]) if isinstance(each, float)):
            return f"{name} is {shown(value)}, and has to be finite"
    return None
