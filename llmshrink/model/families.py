"""What is known of each architecture beyond what running it tells: a small table, nothing else.

Blocks, taps and stages are found by running the model. What can't be found that way is how serving engines merge
linears (q/k/v into one matrix, gate/up into another: the shards of one engine layer must share one scheme), along which
dimension tensor parallelism cuts them, and which linears become narrower together. An architecture enters this table
when a test has taken it from a checkpoint to logits; all others are refused by name before any work starts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from llmshrink.errors import UnsupportedModelError


@dataclass(frozen=True)
class Narrowing:
    """Linears (last name part) that become narrower together: the outputs of `producers` are `consumer`'s inputs."""

    producers: tuple[str, ...]
    consumer: str


@dataclass(frozen=True)
class Family:
    """fused: engine layer -> the linears (last name part) it is made of. row_parallel: linears cut along inputs.

    ffn, attention: what gets narrower with fewer channels, and with fewer KV groups (query, key and value first).
    head_dim_in_vllm: whether vLLM reads the width of a head from the config; else it divides hidden_size by the heads.
    """

    fused: dict[str, tuple[str, ...]]
    row_parallel: tuple[str, ...]
    ffn: Narrowing
    attention: Narrowing
    head_dim_in_vllm: bool = True

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
    ffn=Narrowing(("gate_proj", "up_proj"), "down_proj"),
    attention=Narrowing(("q_proj", "k_proj", "v_proj"), "o_proj"),
)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": replace(_LLAMA, head_dim_in_vllm=False),
    "qwen3": _LLAMA,
}


def family_of(model_type: str) -> Family:
    """The table's row for a config's `model_type`. Raises UnsupportedModelError naming what is covered."""
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"architecture {model_type!r} isn't covered yet, so nothing was touched; "
            f"covered now: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]
