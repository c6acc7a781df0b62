"""A model from its folder, ready to be evaluated: in float32 on a CPU, decompressed, whole or streamed from disk.

A checkpoint in the compressed-tensors format is decompressed when it is loaded, so that the first forward is as right
as all others. With `offload` accelerate reads each layer's weights from the checkpoint's files when the layer runs and
lets them go after it: the memory is one layer's, and every forward reads the checkpoint again, so batches are best
large. A compressed checkpoint can't be streamed (compressed-tensors decompresses a model whole), and says so.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from llmshrink_eval.errors import EvalError


@dataclass(frozen=True)
class LoadOptions:
    """How to load. device: as torch spells it. dtype: that it computes in; float32 on a CPU, whatever is asked.

    offload: a folder for what accelerate writes (next to nothing for most models); weights are then streamed.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    offload: Path | None = None
    trust_remote_code: bool = False

    @property
    def used_dtype(self) -> torch.dtype:
        """A CPU computes in float32."""
        return torch.float32 if torch.device(self.device).type == "cpu" else self.dtype


Loader: TypeAlias = Callable[[str, LoadOptions], Any]
"""(folder, options) -> a model of transformers, decompressed and on its device: for checkpoints that only the caller
can read."""


def load_model(path: str | Path, options: LoadOptions, loader: Loader | None = None) -> Any:
    """Load a causal language model for evaluation: no gradients, no dropout.

    path: a folder. loader: takes its place where given. Raises EvalError in one line if it can't be loaded.
    """
    path = Path(path)
    if loader is not None:
        return _settled(loader(str(path), options))
    quantization = _quantization(path)
    if options.offload is not None and quantization is not None:
        raise EvalError(f"{path}: a compressed checkpoint ({quantization}) is decompressed whole; leave --offload out")
    from transformers import AutoModelForCausalLM

    arguments: dict[str, Any] = {
        "dtype": options.used_dtype,
        "trust_remote_code": options.trust_remote_code,
        "local_files_only": True,
    }
    if options.offload is not None:
        arguments |= {"device_map": {"": "disk"}, "offload_folder": str(options.offload)}
    with quiet():
        try:
            model = AutoModelForCausalLM.from_pretrained(path, **arguments)
        # What can be wrong with a foreign checkpoint is of every type: a missing file, a shape, an unknown class.
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), "no message")[:200]
            raise EvalError(f"{path}: transformers can't load it ({type(error).__name__}: {reason})") from error
        if options.offload is None:
            model.to(options.device)  # type: ignore[arg-type]
        if hasattr(model, "ct_decompress_hook"):
            with torch.no_grad():
                model(torch.zeros(1, 1, dtype=torch.int64, device=model.device))
    return _settled(model)


def model_limit(model_or_config: Any) -> int | None:
    """The longest input in tokens that the config states; None if it states none."""
    config = getattr(model_or_config, "config", model_or_config).get_text_config()
    for field in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(config, field, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars or loading reports of transformers while a model loads: what goes wrong is raised."""
    from transformers.utils import logging as messages

    bars, level = messages.is_progress_bar_enabled(), messages.get_verbosity()
    messages.disable_progress_bar()
    messages.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        messages.set_verbosity(level)
        if bars:
            messages.enable_progress_bar()


def _settled(model: Any) -> Any:
    model.eval()
    model.requires_grad_(False)
    return model


def _quantization(path: Path) -> str | None:
    """The method that config.json names, if the checkpoint is a compressed one."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvalError(f"{path}: no readable config.json ({error}); give a model's folder") from error
    settings = config.get("quantization_config")
    return None if settings is None else str(settings.get("quant_method", "quantized"))
