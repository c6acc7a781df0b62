"""A model from its folder, ready to be evaluated: in float32 on a CPU, decompressed, whole or streamed from disk.

A checkpoint in the compressed-tensors format is decompressed when it is loaded, so that the first forward is as right
as all others.

With `offload` accelerate reads each layer's weights from the checkpoint's files when the layer runs and lets them go
after it: the memory is one layer's, and every forward reads the checkpoint again, so batches are best large. The
model's skeleton is made without weights here and handed to accelerate with the place of every tensor, because
transformers' own loading looks at every tensor once, and mapped pages that were looked at count as resident until the
file is closed: 3 GB for a checkpoint of 3 GB. Where the model's parameters aren't tensors of the checkpoint one for one
(experts that transformers fuses as it loads), its own loading is what is left. A compressed checkpoint can't be
streamed (compressed-tensors decompresses a model whole), and is refused.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from llmshrink_eval.configfile import read_config
from llmshrink_eval.configured import multiply_in, running_config
from llmshrink_eval.errors import EvalError
from llmshrink_eval.weightfiles import strays, weight_files
from llmshrink_eval.whole import pretrained

M_MMAP_THRESHOLD = -3
"""glibc's name for the size from which a block is its own mapping (malloc.h)."""
LARGE_BLOCK = 1 << 20


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

    path: a folder. loader: takes its place where given. Raises EvalError in one line if it can't be loaded, or not all
    of it.
    """
    path = Path(path)
    if loader is not None:
        return _settled(loader(str(path), options))
    quantization = _quantization(path)
    if options.offload is not None and quantization is not None:
        raise EvalError(f"{path}: a compressed checkpoint ({quantization}) is decompressed whole; leave --offload out")
    with quiet():
        try:
            model = _load(path, options)
        except EvalError:
            raise
        # What can be wrong with a foreign checkpoint is of every type: a missing file, a shape, an unknown class.
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), "no message")[:200]
            raise EvalError(f"{path}: transformers can't load it ({type(error).__name__}: {reason})") from error
    return _settled(model)


def _load(path: Path, options: LoadOptions) -> Any:
    common: dict[str, Any] = {"dtype": options.used_dtype, "trust_remote_code": options.trust_remote_code}
    if options.offload is None:
        model = _whole(path, **common)
        model.to(options.device)
        if hasattr(model, "ct_decompress_hook"):
            with torch.no_grad():
                model(torch.zeros(1, 1, dtype=torch.int64, device=model.device))
        return model
    streamed = _streamed(path, options)
    if streamed is not None:
        return streamed
    return _whole(path, device_map={"": "disk"}, offload_folder=str(options.offload), **common)


def _whole(path: Path, **settings: Any) -> Any:
    """From transformers, every tensor of it."""
    config = running_config(path, trust_remote_code=settings["trust_remote_code"])
    config = multiply_in(config, settings["dtype"])
    return pretrained(path, config, **settings)


def _streamed(path: Path, options: LoadOptions) -> Any | None:
    """The model without weights, and accelerate told where they are; None if they aren't there under their names."""
    import accelerate
    from transformers import AutoModelForCausalLM

    config = running_config(path, trust_remote_code=options.trust_remote_code)
    trusted = options.trust_remote_code
    with accelerate.init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=options.used_dtype, trust_remote_code=trusted)
        model.tie_weights()
    places = _places(path)
    wanted = dict(model.named_parameters(remove_duplicate=False))
    for names in accelerate.utils.find_tied_parameters(model):
        stored = next((name for name in names if name in places), None)
        if stored is not None:
            places |= {name: places[stored] for name in names if name not in places}
    persistent = set(model.state_dict()) - set(wanted)
    if persistent or not set(wanted) <= set(places):
        return None
    _give_back_large_blocks()
    dtype = str(options.used_dtype).removeprefix("torch.")
    index = {
        name: {"safetensors_file": str(places[name][0]), "weight_name": places[name][1], "dtype": dtype}
        for name in wanted
    }
    assert options.offload is not None
    return accelerate.dispatch_model(
        model,
        device_map={"": "disk"},
        main_device=options.device,
        offload_dir=str(options.offload),
        offload_index=index,
    )


def _give_back_large_blocks() -> None:
    """From now on, for this process: glibc returns what a freed tensor took at once.

    Left to itself it learns from the first large tensors that come and go to keep such blocks, and weights that come
    and go by the hundred then leave it in pieces: 0.7 GB more by the end of a forward of a 3 GB checkpoint.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)


def _places(path: Path) -> dict[str, tuple[Path, str]]:
    """Tensor -> (file, its name there), from the headers of the checkpoint's safetensors: those that are its own."""
    from safetensors import safe_open

    places: dict[str, tuple[Path, str]] = {}
    for file in weight_files(path):
        with safe_open(file, framework="pt") as shard:
            places |= {name: (file, name) for name in shard.keys()}  # noqa: SIM118 (no mapping, it has only keys)
    astray = strays(path)
    places |= {name: (file, name) for name, file in astray.doubled.items()}
    return {name: place for name, place in places.items() if name not in astray.unindexed}


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
    """No progress bars or loading reports of three libraries while a model loads: what goes wrong is raised."""
    from transformers.utils import logging as messages

    bars, level = messages.is_progress_bar_enabled(), messages.get_verbosity()
    messages.disable_progress_bar()
    messages.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
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
    settings = read_config(path).get("quantization_config")
    return str(settings.get("quant_method", "quantized")) if settings else None
