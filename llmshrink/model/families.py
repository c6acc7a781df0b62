"""What is known of each architecture beyond what running it tells: a small table, nothing else.

Blocks, taps and stages are found by running the model. What can't be found that way is how serving engines merge
linears (q/k/v into one matrix, gate/up into another: the shards of one engine layer must share one scheme), along which
dimension tensor parallelism cuts them, which linears become narrower together, and what a parameter that is merged in
the checkpoint already (Phi's qkv_proj and gate_up_proj) is made of. Such a parameter is one site: its rows have one
input and don't depend on each other, and engines keep one scheme for it; its parts matter where rows are cut. An
architecture enters this table when the tests of families have taken it through every verb (tests/families.py); all
others are refused by name before any work starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from llmshrink.errors import UnsupportedModelError


@dataclass(frozen=True)
class Narrowing:
    """Linears (last name part) that become narrower together: the outputs of `producers` are `consumer`'s inputs."""

    producers: tuple[str, ...]
    consumer: str


Merged = Literal["heads", "halves"]
"""What a linear's outputs are, one part after the other: those of queries, keys and values, or two equal halves."""


@dataclass(frozen=True)
class Family:
    """fused: engine layer -> the linears (last name part) it is made of. row_parallel: linears cut along inputs.

    ffn, attention: what gets narrower with fewer channels, and with fewer KV groups (query, key and value first); or,
    in words, why it can't have fewer KV groups. merged: linears that the checkpoint has in one. channels_field: what
    config.json calls the FFN's channels.
    head_dim_in_vllm: whether vLLM reads the width of a head from the config; else it divides hidden_size by the heads.
    float16_in_vllm: whether vLLM computes the architecture in float16; else in bfloat16 alone, of the 16-bit dtypes.
    """

    fused: dict[str, tuple[str, ...]]
    row_parallel: tuple[str, ...]
    ffn: Narrowing
    attention: Narrowing | str
    merged: Mapping[str, Merged] = field(default_factory=dict)
    channels_field: str = "intermediate_size"
    head_dim_in_vllm: bool = True
    float16_in_vllm: bool = True

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

    def parts(self, site: str, outputs: int, heads: int, kv_heads: int) -> tuple[int, ...]:
        """How many outputs each linear has that a site is made of, in order; (outputs,) for one that isn't merged.

        heads, kv_heads: of queries, and of keys and values. Raises UnsupportedModelError when they don't add up.
        """
        merged = self.merged.get(site.rpartition(".")[2])
        if merged is None:
            return (outputs,)
        shares = (heads, kv_heads, kv_heads) if merged == "heads" else (1, 1)
        if outputs % sum(shares):
            made_of = f"{heads} heads of queries, {kv_heads} of keys and of values" if merged == "heads" else "halves"
            raise UnsupportedModelError(f"{site}: its {outputs} outputs aren't {made_of}: it isn't covered yet")
        return tuple(share * outputs // sum(shares) for share in shares)


_LLAMA = Family(
    fused={"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")},
    row_parallel=("o_proj", "down_proj"),
    ffn=Narrowing(("gate_proj", "up_proj"), "down_proj"),
    attention=Narrowing(("q_proj", "k_proj", "v_proj"), "o_proj"),
)

_GEMMA = replace(_LLAMA, float16_in_vllm=False)

_PHI3 = Family(
    fused={},
    row_parallel=("o_proj", "down_proj"),
    ffn=Narrowing(("gate_up_proj",), "down_proj"),
    attention=Narrowing(("qkv_proj",), "o_proj"),
    merged={"qkv_proj": "heads", "gate_up_proj": "halves"},
)

_OPT = Family(
    fused={"qkv_proj": ("q_proj", "k_proj", "v_proj")},
    row_parallel=("out_proj", "fc2"),
    ffn=Narrowing(("fc1",), "fc2"),
    attention="its class takes hidden_size / heads for the width of a head, so fewer heads would be wider ones",
    channels_field="ffn_dim",
)

_STARCODER2 = replace(
    _LLAMA,
    fused={"qkv_proj": ("q_proj", "k_proj", "v_proj")},
    row_parallel=("o_proj", "c_proj"),
    ffn=Narrowing(("c_fc",), "c_proj"),
)

_NORM_OVER_HEADS = "q_norm and k_norm take the mean over all heads together, so fewer heads change what the rest become"

FAMILIES: dict[str, Family] = {
    "gemma": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "granite": _LLAMA,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "olmo2": replace(_LLAMA, attention=_NORM_OVER_HEADS),
    "olmo3": replace(_LLAMA, attention=_NORM_OVER_HEADS),
    "opt": _OPT,
    "phi3": _PHI3,
    "qwen2": replace(_LLAMA, head_dim_in_vllm=False),
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
    "starcoder2": _STARCODER2,
}


def family_of(model_type: str) -> Family:
    """The table's row for a config's `model_type`. Raises UnsupportedModelError naming what is covered."""
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"architecture {model_type!r} isn't covered yet, so nothing was touched; "
            f"covered now: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]
