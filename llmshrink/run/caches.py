"""A block's cache of FP8 in the run: its scales from what the compressed model would cache, rounded with from then on.

Keys and values of one batch depend on no other's, but the scales are of all. So every calibration batch's forward stops
where it would write them, once the linears before that are solved; then the scales are known, and all go on with what
would be read back. What comes after (the output of attention, its errors, the next block) is the served model's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmshrink.calibration.activations import Batch
from llmshrink.errors import CheckpointError
from llmshrink.model.caches import CacheSite
from llmshrink.model.paused import pause
from llmshrink.weights import CacheScales, before_cache


class CalibratedCache:
    """The compressed block's. scales: None until `settle`; while they are, a forward stops before it writes."""

    def __init__(self, twin: nn.Module, site: CacheSite) -> None:
        self.site = site
        self.scales: CacheScales | None = None
        self._most = torch.zeros(2)
        before_cache(twin.get_submodule(site.local), self._through)

    def _through(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.scales is None:
            # By token, [batch, tokens, 2]: padding is told apart by whoever waits.
            pause(torch.stack([each.abs().amax((1, 3)) for each in (keys, values)], -1).float())
        assert self.scales is not None, "a forward went on before the scales were known"
        return self.scales.through(keys, values)

    def see(self, batch: Batch, most: Tensor) -> None:
        """Take what a stopped forward of `batch` said."""
        self._most = torch.maximum(self._most, batch.real(most).amax(0).cpu())

    def settle(self, dtype: torch.dtype) -> None:
        """Fix the scales. dtype: of a stored one. Raises CheckpointError where keys or values aren't finite."""
        if not bool(torch.isfinite(self._most).all()):
            raise CheckpointError(
                f"{self.site.key}: its keys or values have NaN or Inf; run in float32 with --dtype float32, or check "
                "the calibration text"
            )
        self.scales = CacheScales.of(self._most, dtype)

    def tensors(self) -> dict[str, Tensor]:
        """The scales as the checkpoint stores them."""
        assert self.scales is not None, self.site
        return dict(zip(self.site.scales, (self.scales.keys, self.scales.values), strict=True))
