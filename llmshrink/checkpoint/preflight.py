"""What must be true before any work starts, beside the weights: configuration, tokenizer, room on disk.

The configuration is read by transformers, which knows every architecture's defaults; what can be refused from the
plain `config.json` is refused from there first, since transformers would ask for packages, or run the repository's
own code, before it came to the point.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from llmshrink_eval.errors import EvalError, one_line

from llmshrink.checkpoint.files import read_config
from llmshrink.checkpoint.index import CheckpointIndex
from llmshrink.checkpoint.source import Source
from llmshrink.errors import OutputError, SourceError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_DENSE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)


def check_source(source: Source, *, trust_remote_code: bool = False) -> None:
    """Refuse what can be seen from the folder alone.

    Raises SourceError: no config.json or a broken one, code of its own that isn't trusted, not a causal language
    model, already quantized, no tokenizer. Weights are checked by CheckpointIndex.open.
    """
    config = read_config(source.folder)
    unknown = unknown_type(config)
    if unknown is not None and (config.get("architectures") or "model_type" in config):
        raise SourceError(f"{source.name}: config.json {unknown}; correct it if it's misspelt, or upgrade transformers")
    if not trust_remote_code and _needs_own_code(config):
        raise SourceError(
            f"{source.name}: its config.json asks to run the repository's own Python (auto_map); "
            "read that code, and pass --trust-remote-code if you trust it"
        )
    _refuse_other_tasks(source, config)
    _refuse_quantized(source, config)
    if not any((source.folder / name).is_file() for name in _TOKENIZER_FILES):
        raise SourceError(
            f"{source.name}: no tokenizer in {source.folder} (tokenizer.json, tokenizer.model, ...); "
            "copy the tokenizer's files of the original model there"
        )


def load_config(source: Source, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's configuration through transformers. Raises SourceError as check_source does, and when it's broken."""
    check_source(source, trust_remote_code=trust_remote_code)
    from llmshrink_eval.configured import running_config
    from transformers import PretrainedConfig

    try:
        config = running_config(source.folder, trust_remote_code=trust_remote_code)
    except EvalError as error:
        raise SourceError(str(error)) from error
    assert isinstance(config, PretrainedConfig)
    if getattr(config, "is_encoder_decoder", False):
        raise _not_causal(source, f"{type(config).__name__.removesuffix('Config')} (it has an encoder)")
    return config


def check_dtypes(source: Source, index: CheckpointIndex, keys: Iterable[str]) -> None:
    """Refuse a model whose tensors `keys` aren't all floating-point numbers of 16 bits or more.

    Integers and 8-bit floats are codes that mean nothing without their scales, wherever those are. Raises SourceError
    naming the tensor and its dtype.
    """
    for key in keys:
        dtype = index.entry(key).dtype
        if dtype not in _DENSE:
            raise SourceError(
                f"{source.name}: already quantized: {key} is stored as {str(dtype).removeprefix('torch.')}, though "
                "config.json has no quantization_config; start from the original 16-bit model"
            )


def load_tokenizer(source: Source, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer through transformers. Raises SourceError when it's missing or can't be read."""
    from llmshrink_eval.configured import read_tokenizer
    from transformers import PreTrainedTokenizerBase

    try:
        tokenizer = read_tokenizer(source.folder, trust_remote_code=trust_remote_code)
    except EvalError as error:
        raise SourceError(str(error)) from error
    except Exception as error:
        raise SourceError(
            f"{source.name}: its tokenizer can't be read: {one_line(error)}; "
            "copy the tokenizer's files of the original model again"
        ) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def model_limit(config: PretrainedConfig) -> int | None:
    """Tokens that the model can read at once; None when its configuration names no limit."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    return limit if isinstance(limit, int) else None


def check_room(folder: Path, needed: int, what: str = "the output") -> None:
    """Raise OutputError when the disk that `folder` is (or will be) on has less than `needed` bytes free."""
    place = Path(os.path.abspath(folder))
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OutputError(
            f"{folder}: no space left for {what}: {needed:,} bytes needed, {free:,} free; "
            "free some, or name a folder on another disk"
        )


def _needs_own_code(config: dict[str, Any]) -> bool:
    auto_map = config.get("auto_map")
    if not isinstance(auto_map, dict) or not ({"AutoConfig", "AutoModelForCausalLM"} & auto_map.keys()):
        return False
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    # Many repositories carry code from before transformers learned their architecture; it isn't needed then.
    return config.get("model_type") not in CONFIG_MAPPING


def unknown_type(config: dict[str, Any]) -> str | None:
    """What is wrong with a config.json's model_type, in words; None when transformers knows it, or it brings code.

    transformers itself answers with the names of all models that it knows.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    name = config.get("model_type")
    if config.get("auto_map") or (isinstance(name, str) and name in CONFIG_MAPPING):
        return None
    if name is None:
        return "names no model_type"
    return f"has model_type {name!r}, which transformers {transformers.__version__} doesn't know"


def _refuse_other_tasks(source: Source, config: dict[str, Any]) -> None:
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        if "model_type" in config:
            return  # the model's code decides; a base class without a head is refused where its sites are found
        raise SourceError(
            f"{source.name}: config.json names neither architectures nor model_type; it isn't a transformers model"
        )
    name = str(architectures[0])
    if config.get("is_encoder_decoder") is True:
        raise _not_causal(source, f"{name} (it has an encoder)")
    if not name.endswith(_CAUSAL):
        raise _not_causal(source, name)


def _not_causal(source: Source, what: str) -> SourceError:
    return SourceError(
        f"{source.name}: {what} isn't a causal language model; name one whose config.json says ...ForCausalLM"
    )


def _refuse_quantized(source: Source, config: dict[str, Any]) -> None:
    found = config.get("quantization_config") or config.get("compression_config")
    if not found:
        text = config.get("text_config")
        found = text.get("quantization_config") if isinstance(text, dict) else None
    if not found:
        return
    method = found.get("quant_method", "an unnamed method") if isinstance(found, dict) else "an unnamed method"
    detail = next(
        (f", {found[key]}" for key in ("format", "bits", "fmt") if isinstance(found, dict) and key in found), ""
    )
    raise SourceError(
        f"{source.name}: already quantized ({method}{detail}); start from the original 16-bit model "
        "(its card names it as base_model), or dequantize this one first"
    )
