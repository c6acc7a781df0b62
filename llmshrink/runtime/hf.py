"""transformers' side of llmshrink's own format: `AutoModelForCausalLM.from_pretrained` on a sparse24 checkpoint.

transformers asks a registry which quantizer a checkpoint's `quant_method` belongs to; `register` puts ours there. The
quantizer puts a SparseLinear, still on the meta device, in the place of every linear that is stored as 2:4, and
transformers loads the checkpoint's tensors into it as into any other module.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmshrink.errors import CheckpointError, LlmshrinkError

METHOD = "llmshrink"
CHOOSES = "auto"


class LlmshrinkConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json, as it is."""

    def __init__(self, **described: Any) -> None:
        self.__dict__.update(described)
        self.quant_method: Any = METHOD


class LlmshrinkQuantizer(HfQuantizer):
    """Loads what llmshrink stored; makes nothing by itself."""

    requires_calibration = True

    def update_device_map(self, device_map: Any) -> Any:
        """One device: a layer's weight changes its layout there, which spreading or offloading knows nothing of."""
        import torch

        if device_map == CHOOSES:
            return {"": "cuda:0" if torch.cuda.is_available() else "cpu"}
        several = isinstance(device_map, dict) and len(set(device_map.values())) > 1
        if several or (isinstance(device_map, str) and device_map in ("balanced", "balanced_low_0", "sequential")):
            raise LlmshrinkError(
                f"device_map={device_map!r}: a sparse24 model is loaded onto one device; name it, pass 'auto', or "
                "serve it over several with vLLM"
            )
        return device_map

    def _process_model_before_weight_loading(self, model: Any, **given: Any) -> Any:
        """given: `checkpoint_files`, whose headers tell in what dtypes values and scales are stored."""
        import torch
        from torch import nn

        from llmshrink.checkpoint.header import read_header
        from llmshrink.formats import sparse24
        from llmshrink.runtime.linear import DTYPES
        from llmshrink.runtime.sparse import SparseLinear, meta

        self._dtype = dtype = model.dtype
        files = given["checkpoint_files"]
        if dtype not in DTYPES:
            raise LlmshrinkError(f"dtype {dtype}: sparse24 weights compute in float32, bfloat16 or float16")
        held = {entry.key: entry.dtype for file in files for entry in read_header(Path(file)).entries}
        modules = dict(model.named_modules())
        for name, scheme in sparse24.schemes(self.quantization_config.to_dict()).items():
            # A model without its head has its modules under shorter names.
            place = name if name in modules else name.removeprefix(f"{model.base_model_prefix}.")
            linear = modules.get(place)
            if type(linear) is not nn.Linear:
                raise CheckpointError(
                    f"{name} is stored as 2:4, and {type(linear).__name__} in this model; only nn.Linear can be"
                )
            dtypes = {}
            for key in sparse24.names(name, scheme):
                if key not in held:
                    raise CheckpointError(f"{key}: no such tensor in the checkpoint; it is damaged")
                dtypes[key.rpartition(".")[2]] = held[key]
            shape = (linear.out_features, linear.in_features)
            stored = meta(scheme, shape, dtypes)
            with torch.device("meta"):
                model.set_submodule(place, SparseLinear(stored, scheme, shape, linear.bias, dtype=dtype))
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        from llmshrink_kernels.device import runs_triton

        from llmshrink.runtime.sparse import SparseLinear

        if model.dtype != self._dtype:
            # Of a model without its head transformers finds every tensor under another name, and leaves its dtype.
            model.to(self._dtype)
        for module in model.modules():
            if isinstance(module, SparseLinear):
                module.settle()
        # Where there are no kernels this says so.
        runs_triton(model.device)
        return model

    def is_serializable(self) -> bool:
        """A SparseLinear's state is what the checkpoint holds."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients reach the inputs, but transformers' trainer has not been tried over it."""
        return False


def register() -> None:
    """Tell transformers of the two classes; once is enough, and more does no harm."""
    from transformers.quantizers import auto

    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(METHOD)(LlmshrinkConfig)
        auto.register_quantizer(METHOD)(LlmshrinkQuantizer)
