"""What is known of each architecture beyond what running it tells: a small table, nothing else.

Blocks, taps and stages are found by running the model. What can't be found that way is how serving engines merge
linears (q/k/v into one matrix, gate/up into another: the shards of one engine layer must share one scheme) and along
which dimension tensor parallelism cuts them. An architecture enters this table when a test has taken it from a
checkpoint to logits; all others are refused by name before any work starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmshrink.errors import UnsupportedModelError


@dataclass(frozen=True)
class Family:
    """fused: engine layer -> the linears (last name part) it is made of. row_parallel: linears cut along inputs."""

    fused: dict[str, tuple[str, ...]]
    row_parallel: tuple[str, ...]

    def fused_name(self, site: str) -> str | None:
        """The engine layer that holds `site` together with others, by full name, or None."""
        parent, _, leaf = site.rpartition(".")
        for layer, members in self.fused.items():
            if leaf in members:
                return f"{parent}.{layer}"
        return None

    def parallel(self, site: str) -> Literal["column", "row"]:
        """Along which side tensor parallelism cuts a site: its outputs, or its inputs."""
        return "row" if site.rpartition(".")[2] in self.row_parallel else "column"


_LLAMA = Family(
    fused={"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")},
    row_parallel=("o_proj", "down_proj"),
)

FAMILIES: dict[str, Family] = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA}


def family_of(model_type: str) -> Family:
    """The table's row for a config's `model_type`. Raises UnsupportedModelError naming what is covered."""
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"architecture {model_type!r} isn't covered yet, so nothing was touched; "
            f"covered now: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]
