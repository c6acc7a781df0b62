"""A model's config as it is run here: what its training left in it doesn't change how it is asked.

config.json says what a model is, and often how somebody once ran it: tuples instead of named outputs, hidden states
and attentions with every answer, no cache, gradient checkpointing, dropout, an attention kernel that isn't installed
here, a padding id that no row of the embedding has. None of that changes what the model computes, and all of it can
stop whoever reads its logits. So wherever a model is built here its config comes through `running_config`; files are
never changed by it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmshrink_eval.bounded import shown
from llmshrink_eval.configfile import TEXT_PARTS, WAY_OUT, read_config
from llmshrink_eval.errors import EvalError, one_line, panicked
from llmshrink_eval.sidefiles import check_tokenizer

if TYPE_CHECKING:
    import torch

OURS = {
    "return_dict": True,
    "use_cache": True,
    "output_hidden_states": False,
    "output_scores": False,
    "output_router_logits": False,
    "return_dict_in_generate": False,
    "torchscript": False,
    "gradient_checkpointing": False,
}
"""What holds while a model runs, where its config has such a field."""


ROPE_TYPES = ("axial", "default", "mrope", "su", "xdrope")
"""Kinds of rotary positions that classes make into one of transformers' own, beside those."""


def running_config(folder: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The config of the model in `folder`, as transformers reads it, settled as `settle` does.

    Raises EvalError, in one line, as `configfile.read_config` does, and for whatever transformers or the repository's
    own code makes of a field.
    """
    folder = Path(folder)
    read_config(folder)
    try:
        return _running_config(folder, trust_remote_code)
    except EvalError:
        raise
    except Exception as error:  # transformers raises whatever the field at fault leads to
        raise EvalError(
            f"{folder / 'config.json'}: transformers can't read it: {one_line(error)}; upgrade transformers, or "
            "correct the file"
        ) from error


def _running_config(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig, PretrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    found, _ = PretrainedConfig.get_config_dict(str(folder), local_files_only=True)
    own = trust_remote_code and "AutoConfig" in (found.get("auto_map") or {})
    kind = found.get("model_type")
    # attn_implementation would be looked for, and with output_attentions refused, before it could be changed.
    given: dict[str, Any] = {"output_attentions": False, "attn_implementation": None, "name_or_path": str(folder)}
    if own or not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True, **given)
        return settle(config)
    for part in (found, *(found[name] for name in TEXT_PARTS if found.get(name))):
        _check_names(folder, part)
    known: Any = CONFIG_MAPPING[kind]
    # What is ours whatever is written there needn't be of a type that transformers takes.
    written = {key: OURS.get(key, value) for key, value in found.items() if not _computed(known, key)}
    if written.get("auto_map", ()) is None:
        del written["auto_map"]
    return settle(known.from_dict(written, **given))


def _check_names(folder: Path, found: Mapping[str, Any]) -> None:
    """Raise EvalError for an activation or a kind of rotary positions that transformers hasn't: its classes say the
    name alone. found: as `read_config` has checked it."""
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for field in ("hidden_act", "hidden_activation", "activation_function"):
        name = found.get(field)
        if name is not None and name not in ACT2FN:
            raise EvalError(
                f"{folder / 'config.json'}: {field} is {shown(name)}, which transformers doesn't know; {WAY_OUT}"
            )
    for field in ("rope_parameters", "rope_scaling"):
        settings = found.get(field) or {}
        for each in (settings, *(part for part in settings.values() if isinstance(part, dict))):
            name = each.get("rope_type") or each.get("type")
            if name is not None and name not in {*ROPE_INIT_FUNCTIONS, *ROPE_TYPES}:
                raise EvalError(
                    f"{folder / 'config.json'}: {field}: rope_type is {shown(name)}, which transformers doesn't know; "
                    f"{WAY_OUT}"
                )


def multiply_in(config: Any, dtype: torch.dtype) -> Any:
    """The config, its linears of bitsandbytes' 4 bits multiplying in `dtype`: else they do in what config.json says,
    whatever the rest computes in, which is slow where that is bfloat16 and the CPU has no instructions for it."""
    found = getattr(config, "quantization_config", None)
    if isinstance(found, dict) and "bnb_4bit_compute_dtype" in found:
        config.quantization_config = {**found, "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")}
    return config


def read_tokenizer(folder: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of the model in `folder`, for which transformers reads config.json too. Raises EvalError for
    files that can't be a tokenizer's, and a folder whose name isn't UTF-8, else whatever transformers does."""
    from transformers import AutoTokenizer

    _check_spelling(os.fspath(folder))
    check_tokenizer(Path(folder))
    try:
        config = running_config(folder, trust_remote_code=trust_remote_code)
    except EvalError:  # whoever builds the model says what is wrong with it
        config = None
    try:
        found: Any = AutoTokenizer.from_pretrained(
            folder, config=config, trust_remote_code=trust_remote_code, local_files_only=True
        )
        _try(found)
    except BaseException as error:
        said = panicked(error)
        if said is None:
            raise
        raise EvalError(f"{folder}: {said}") from error
    return found


def _try(tokenizer: Any) -> None:
    """Read a text and write it again, as a library that panics does so at any."""
    try:
        tokenizer.decode(tokenizer("Once there was\n").input_ids)
    except Exception:
        return  # whoever reads a text says what is wrong then


def _check_spelling(folder: str) -> None:
    """Raise EvalError for a path that isn't text: the tokenizers library opens no other."""
    try:
        folder.encode()
    except UnicodeEncodeError as error:
        said = folder.encode("utf-8", "replace").decode()
        raise EvalError(
            f"{said}: the folder's name isn't UTF-8, and no tokenizer is read from there; rename it"
        ) from error


def settle(config: Any) -> Any:
    """The same config, changed in place: our settings, no dropout, no padding id without a row, attention as torch's;
    a quantization_config that says nothing goes, which transformers would take for a method without a name.

    config: transformers'. Its parts (`text_config`) are settled too.
    """
    parts = {id(part): part for part in (config, *_parts(config), config.get_text_config())}
    for part in parts.values():
        part.output_attentions = False
        for name, value in OURS.items():
            if getattr(part, name, value) != value:
                setattr(part, name, value)
        for name, share in list(vars(part).items()):
            dropped = name.endswith(("dropout", "pdrop", "layerdrop", "dropout_prob", "dropout_rate"))
            if dropped and isinstance(share, float | int) and not isinstance(share, bool):
                setattr(part, name, type(share)(0))
        rows, padding = getattr(part, "vocab_size", None), getattr(part, "pad_token_id", None)
        if isinstance(rows, int) and isinstance(padding, int) and not 0 <= padding < rows:
            part.pad_token_id = None
        if vars(part).get("quantization_config") == {}:
            del part.quantization_config
    # transformers then chooses as it does for a config that names none.
    config._attn_implementation = None
    config._experts_implementation = None
    return config


def _parts(config: Any) -> list[Any]:
    found = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return [part for part in found if hasattr(part, "get_text_config")]


def _computed(kind: type, key: str) -> bool:
    """Whether a class of configs computes a field itself, so that it can't be set."""
    found = getattr(kind, key, None)
    return isinstance(found, property) and found.fset is None
