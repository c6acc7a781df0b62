"""Which families go with which schemes: declared here, tested cell by cell, and the README's table made of it.

    python tests/families.py

runs the test of every cell, the real engine's too, and writes the table into README.md when all of them pass. A column
is a line in SCHEMES, a row one in FAMILIES; a cell that can't be is one in REFUSED, with what the refusal says.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- families: written by `python tests/families.py` -->", "<!-- families: end -->"
TESTS = ("tests/unit/test_families.py", "tests/engine/test_families.py")
ENGINE = "4 bit in vLLM"
SERVABLE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
"""The smallest shapes that vLLM's CPU build serves."""


@dataclass(frozen=True)
class Family:
    """A tiny model of a `model_type`. changes: of its config. served: further ones in the shapes of SERVABLE."""

    model_type: str
    changes: dict[str, Any] = field(default_factory=dict)
    served: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scheme:
    """A recipe as a user asks for it. options: of the verb. worst: the largest KL on held-out text of any family.

    Random models lose more than trained ones: where `worst` is None only what is stored and computed is held to.
    """

    verb: Literal["quantize", "prune", "compress"]
    recipe: str
    options: dict[str, Any] = field(default_factory=dict)
    worst: float | None = None


FAMILIES: dict[str, Family] = {
    "Llama 2, 3": Family("llama"),
    "Mistral": Family("mistral", {"sliding_window": 8}),
    "Qwen2, 2.5": Family("qwen2"),
    "Qwen3": Family("qwen3", {"tie_word_embeddings": True}),
    "Gemma": Family("gemma"),
    "Gemma 2": Family("gemma2", {"num_hidden_layers": 3, "sliding_window": 8}, {"query_pre_attn_scalar": 32}),
    "Gemma 3 (text)": Family(
        "gemma3_text",
        {"num_hidden_layers": 4, "sliding_window": 8, "sliding_window_pattern": 3},
        {"query_pre_attn_scalar": 32},
    ),
    "Phi-3, 3.5, 4": Family("phi3", {"sliding_window": None}),
    "Phi-4-mini": Family("phi3", {"partial_rotary_factor": 0.5, "tie_word_embeddings": True}),
    "OPT": Family("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}, {"ffn_dim": 256, "word_embed_proj_dim": 128}),
    "OPT-350m": Family(
        "opt",
        {"ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
        {"ffn_dim": 256, "word_embed_proj_dim": 64},
    ),
    "SmolLM3": Family("smollm3", {"num_hidden_layers": 4}),
    "Granite 3": Family(
        "granite",
        {
            "embedding_multiplier": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
    ),
    "OLMo 2": Family("olmo2"),
    "OLMo 3": Family("olmo3", {"num_hidden_layers": 4, "sliding_window": 8}),
    "StarCoder2": Family("starcoder2", {"sliding_window": 8}),
}  # fmt: skip

SCHEMES: dict[str, Scheme] = {
    "8 bit": Scheme("quantize", "gptq-w8a16", {"group_size": 32}, worst=0.02),
    "8 bit, int8 inputs": Scheme("quantize", "gptq-w8a8", worst=0.05),
    "8 bit, FP8": Scheme("quantize", "fp8-dynamic", worst=0.3),
    "4 bit": Scheme("quantize", "gptq-w4a16", {"group_size": 32}),
    "4 bit, zero-points": Scheme("quantize", "gptq-w4a16-asym", {"group_size": 32}),
    "4 bit, FP8 cache": Scheme("quantize", "gptq-w4a16", {"group_size": 32, "kv_cache": "fp8"}),
    "3 bit": Scheme("quantize", "gptq-w3a16", {"group_size": 32}),
    "2 bit": Scheme("quantize", "gptq-w2a16", {"group_size": 32}),
    "4 bit, tuned": Scheme("quantize", "tuned-w4a16", {"group_size": 32, "set": "steps.1.tune.steps=2"}),
    "2:4": Scheme("prune", "sparsegpt-2of4"),
    "2:4, 4 bit": Scheme("compress", "sparsegpt-2of4-gptq-w4a16", {"group_size": 32, "format": "llmshrink"}),
    "half sparse": Scheme("prune", "sparsegpt-50"),
    "FFN channels": Scheme("prune", "width-prune"),
    "KV groups": Scheme(
        "prune", "width-prune", {"set": ["steps.0.width.channels=null", "steps.0.width.kv_groups=1"]}
    ),
    "blocks": Scheme("prune", "depth-prune", {"set": "steps.0.depth.drop=1"}),
}  # fmt: skip

OPT_HEADS = "its class takes hidden_size / heads for the width of a head"
NORM_OVER_HEADS = "q_norm and k_norm take the mean over all heads together"
REFUSED: dict[tuple[str, str], str] = {
    ("OPT", "KV groups"): OPT_HEADS,
    ("OPT-350m", "KV groups"): OPT_HEADS,
    ("OLMo 2", "KV groups"): NORM_OVER_HEADS,
    ("OLMo 3", "KV groups"): NORM_OVER_HEADS,
}
"""(family, column) -> what the refusal says."""


def table() -> str:
    """The README's table, as markdown: rows are families, `yes` is a test that passes, a number is a reason below."""
    columns = [*SCHEMES, ENGINE]
    reasons = list(dict.fromkeys(REFUSED.values()))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for title in FAMILIES:
        why = [REFUSED.get((title, column)) for column in columns]
        cells = ["yes" if each is None else f"no ({reasons.index(each) + 1})" for each in why]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    said = [f"({number}) {reason}." for number, reason in enumerate(reasons, 1)]
    return "\n".join([*lines, "", "\\\n".join(["`no` is refused by name before any work, with the reason:", *said])])


def written(readme: str) -> str:
    """The README with the table in its place."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> int:
    import pytest

    class Outcomes:
        left_out: list[str] = []  # noqa: RUF012  (one run, one list)

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.skipped:
                self.left_out.append(report.nodeid)

    outcomes = Outcomes()
    status = pytest.main([*(str(ROOT / test) for test in TESTS), "-q"], plugins=[outcomes])
    if status or outcomes.left_out:
        print(f"README.md stays: {len(outcomes.left_out)} tests were left out, pytest ended with {int(status)}")
        return 1
    README.write_text(written(README.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
