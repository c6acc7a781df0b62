"""The model card: what this checkpoint is, what it cost, and how to use it, in the Hub's front matter and words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmshrink.run.report import SiteRow, changes, rows_of, size, summary_of
from llmshrink.run.storage import format_of


def card(record: dict[str, Any], source: Path, bytes_after: int) -> str:
    """README.md for an output.

    record: llmshrink.json; source: the original's folder, whose licence carries over; bytes_after: of the weights.
    """
    quality, calibration = record["quality"], record["calibration"]
    rows = rows_of(record["sites"])
    quantized = [row for row in rows if row.bits is not None]
    schemes = sorted({f"{row.bits}-bit, groups of {row.group_size}" for row in quantized})
    how = f" ({'; '.join(schemes)})" if schemes else ""
    shape = summary_of(record)
    own = format_of(record) == "llmshrink"
    layout = "llmshrink `sparse24`: 2:4 without its zeros" if own else "compressed-tensors `pack-quantized`"
    layout = layout if own or quantized else "plain safetensors, in the original's dtype"
    revision = f" (revision {record['revision']})" if record["revision"] else ""
    lines = [
        "---",
        *_front_matter(record, source),
        f"tags: [{', '.join(_tags(rows, own=own, smaller=shape is not None))}]",
        "---",
        "",
        f"# {record['model']}, {record['recipe']}",
        "",
        f"Made by llmshrink {record['identity']['versions']['llmshrink']} "
        f"from {record['model']}{revision} with the recipe in `recipe.yaml`.",
        "",
        "| | original | this checkpoint |",
        "|---|---|---|",
        f"| weights on disk | {size(record['bytes_before'])} | {size(bytes_after)} |",
        f"| perplexity, {quality['tokens']} held-out tokens of the calibration text | "
        f"{quality['ppl_before']:.3f} | {quality['ppl_after']:.3f} |",
        "",
        f"KL divergence from the original on those tokens: {quality['kl_mean']:.5f} "
        f"(standard error {quality['kl_stderr']:.5f}) nats/token; "
        f"the most likely next token is the same at {quality['top1_agreement']:.1%} of positions.",
        "",
        *([f"- Shape: {shape}; its config.json says so, and it loads like any other model."] if shape else []),
        f"- Weights: of {len(rows)} linear layers in the blocks {changes(rows)}{how}; "
        f"embeddings{' ' if 'distill' in record else ', norms '}and the head are as they were.",
        *_distilled(record),
        f"- Calibration: {calibration['tokens']} tokens of {calibration['name']}.",
        f"- Format: {layout}; per-layer errors are in `llmshrink.json`.",
        *[f"- {note}" for note in record["notes"]],
        "",
        "```",
        *(["pip install llmshrink  # beside vLLM, which finds its plugin"] if own else []),
        "vllm serve <this folder>",
        "```",
        "",
    ]
    return "\n".join(lines)


def _distilled(record: dict[str, Any]) -> list[str]:
    """What a distillation did, as a line of the list."""
    if "distill" not in record:
        return []
    made = record["distill"]
    return [
        f"- Distilled from {made['teacher']}: {made['steps']} steps on {made['data']}; KL on held-out text "
        f"{made['before']['kl_mean']:.5f} before, {record['quality']['kl_mean']:.5f} after."
    ]


def _front_matter(record: dict[str, Any], source: Path) -> list[str]:
    lines = [f"base_model: {record['model']}"] if record["revision"] else []
    readme = source / "README.md"
    if readme.is_file():
        head = re.match(r"---\n(.*?)\n---\n", readme.read_text(errors="replace"), re.DOTALL)
        kept = ("license:", "license_name:", "license_link:")
        lines += [line for line in (head.group(1).splitlines() if head else []) if line.startswith(kept)]
    return [*lines, "library_name: transformers"]


def _tags(rows: Sequence[SiteRow], *, own: bool, smaller: bool) -> list[str]:
    quantized = any(row.bits is not None for row in rows)
    found = ["llmshrink", *(["compressed-tensors"] if quantized and not own else [])]
    found += ["quantized"] if quantized else []
    return [*found, *(["pruned"] if smaller or any(row.pruned is not None for row in rows) else [])]
