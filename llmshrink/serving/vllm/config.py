"""vLLM's view of `quant_method: llmshrink`: which layer gets which method.

vLLM renames modules (a multimodal wrapper puts `language_model.` before them) and merges linears (q/k/v, gate/up): the
literal names of the checkpoint are taken through the model's own mapper first, then each merged layer must have one
scheme.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from llmshrink.serving.fused import one_scheme
from llmshrink.serving.vllm.compat import QuantizationConfig, register_quantization_config
from llmshrink.serving.vllm.plugin import NAME

if TYPE_CHECKING:
    from llmshrink.formats.sparse24 import Sparse24Scheme


class LlmshrinkConfig(QuantizationConfig):  # type: ignore[misc]
    """The `quantization_config` of a checkpoint in llmshrink's own format."""

    def __init__(self, schemes: dict[str, Sparse24Scheme]) -> None:
        super().__init__()
        self.schemes = schemes

    def get_name(self) -> str:
        """The quant_method."""
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """What the kernels take."""
        return [torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Ampere."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: everything is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LlmshrinkConfig:
        """Read it; CheckpointError, a ValueError, says what is wrong with it."""
        # Here, and not when every vLLM process registers: it brings the kernels' operators.
        from llmshrink.formats import sparse24

        return cls(sparse24.schemes(config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the targets as vLLM renames the model's modules."""
        self.schemes = hf_to_vllm_mapper.apply_dict(self.schemes)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """The 2:4 method for the layers that are stored so, vLLM's dense one for other linears, None for the rest."""
        # In the worker only: the layers take a second to import, and vLLM's API process doesn't.
        from llmshrink.serving.vllm.compat import LinearBase, UnquantizedLinearMethod
        from llmshrink.serving.vllm.sparse24 import Sparse24LinearMethod

        found = one_scheme(self.schemes, prefix, self.packed_modules_mapping.get)
        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod() if found is None else Sparse24LinearMethod(found, prefix)
        if found is not None:
            raise ValueError(f"{prefix} is stored 2:4, but is a {type(layer).__name__} in vLLM; only linears can be")
        return None


def register() -> None:
    """Make the config known to vLLM; again does no harm."""
    register_quantization_config(NAME)(LlmshrinkConfig)
