"""results.json: the whole of an evaluation as plain data, written and read back by these types alone.

`Results` is the file. Its models stand in the order in which they were named, the original first where there is one.
A number that was not measured is None, never 0. The schema's version changes when a key changes its meaning or goes;
new keys may come without.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1


class Frozen(BaseModel):
    """Immutable, and closed: a misspelled field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Perplexity(Frozen):
    """token: exp(nats_per_token). word: exp(all nats / words). stderr: of nats_per_token, over windows or documents."""

    token: float
    word: float
    bits_per_byte: float
    nats_per_token: float
    stderr: float
    stderr_over: Literal["windows", "documents"]
    units: int = Field(description="how many windows or documents the standard errors were made from")
    tokens: int = Field(description="predicted tokens")
    words: int
    bytes: int
    windows: int
    excess_nats: float | None = Field(
        default=None, description="nats_per_token above the original's on the same windows"
    )
    excess_stderr: float | None = Field(default=None, description="of excess_nats, paired by window or document")


class WorstContext(Frozen):
    """A place where the two models disagree most. text: what they read; top: (token, probability), likeliest first."""

    window: int
    position: int
    kl: float
    text: str
    actual: str
    original_top: tuple[tuple[str, float], ...]
    compressed_top: tuple[tuple[str, float], ...]


class Divergence(Frozen):
    """KL(original || compressed) in nats at each position of the same tokens.

    method: "full" over the whole vocabulary; "top-k": over the engine's k likeliest tokens and the rest as one, a lower
    bound. baseline_error: the largest error in nats/token that the stored form of the original can have put into
    kl_mean. histogram: counts between consecutive edges (nats, log-spaced; the first bin takes what is below, the last
    what is above).
    """

    kl_mean: float
    kl_stderr: float
    kl_median: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    top5_overlap: float
    positions: int
    kl_units: int = Field(description="how many windows or documents kl_stderr was made from")
    method: str = "full"
    baseline_error: float = 0.0
    histogram_edges: tuple[float, ...] = ()
    histogram_counts: tuple[int, ...] = ()
    worst: tuple[WorstContext, ...] = ()


class Paired(Frozen):
    """A model against the original on the same items.

    difference: mean(compressed - original). low, high: its 95 % interval (`paired` says which). mcnemar_p: exact,
    two-sided, where the metric is right or wrong; None otherwise. lost, won: items right only before, only after.
    flipped: their document ids, lost ones first. recovery: compressed / original, with its own interval.
    bootstrap_low, bootstrap_high: the interval by resamples alone, the same where items aren't right or wrong.
    """

    difference: float
    low: float
    high: float
    mcnemar_p: float | None
    lost: int
    won: int
    flipped: tuple[int, ...]
    recovery: float | None
    recovery_low: float | None
    recovery_high: float | None
    bootstrap_low: float | None = None
    bootstrap_high: float | None = None


class Task(Frozen):
    """One downstream task. score: of `metric`, in its own unit. samples: path of the per-item file in the report."""

    metric: str
    higher_is_better: bool
    score: float
    stderr: float | None
    items: int
    chance: float | None = Field(default=None, description="what guessing scores; None when the task doesn't say")
    metrics: dict[str, float] = Field(default_factory=dict, description="every metric that lm-eval reports")
    warnings: tuple[str, ...] = Field(
        default=(), description="what lm-eval's model had to say while it ran, prompts that were cut off for instance"
    )
    version: str | None = Field(default=None, description="of the task's definition, as lm-eval has it")
    num_fewshot: int | None = Field(default=None, description="examples in the prompt, as used")
    data_fingerprint: str | None = Field(default=None, description="sha256 of the documents that were used")
    versus_original: Paired | None = None
    samples: str | None = None


class Speed(Frozen):
    """Tokens per second at a batch size, all sequences together; prompt and new_tokens are lengths in tokens."""

    batch_size: int
    prompt_tokens: int
    new_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float


class Cost(Frozen):
    """What having and running the model costs. bits_per_weight: stored bits / weights of the original architecture."""

    bytes_on_disk: int = Field(description="of the safetensors files")
    parameters: int
    bits_per_weight: float
    bits_per_weight_linears: float | None = Field(description="only the linear layers inside the blocks")
    load_seconds: float | None = None
    peak_rss_bytes: int | None = Field(default=None, description="of the process that ran the model, at its highest")
    peak_vram_bytes: int | None = None
    speed: tuple[Speed, ...] = ()


class SiteError(Frozen):
    """What compressing one layer cost: relative squared error of its output, as the compressor recorded it."""

    name: str
    bits: int | None
    error: float | None


class Generation(Frozen):
    """A greedy continuation, for side-by-side reading."""

    prompt: str
    text: str


class ModelResult(Frozen):
    """Everything measured of one model. fingerprint: sha256 of its weights and config."""

    path: str
    name: str
    fingerprint: str
    role: Literal["original", "compressed"]
    engine: str
    dtype: str
    perplexity: Perplexity | None = None
    divergence: Divergence | None = None
    tasks: dict[str, Task] = Field(default_factory=dict)
    cost: Cost | None = None
    recovery: float | None = Field(default=None, description="mean over tasks of compressed / original score")
    site_errors: tuple[SiteError, ...] = ()
    generations: tuple[Generation, ...] = ()
    seconds: float = Field(default=0.0, description="wall time of measuring it, as first measured")
    cached: tuple[str, ...] = Field(default=(), description="parts that came from the cache in this run")


class RecordsLeftOut(Frozen):
    """Records that hold no text. count: of `read`. named: the first of them, each with its place and why."""

    count: int = 0
    read: int = 0
    named: tuple[str, ...] = ()


class TextUsed(Frozen):
    """The text that was scored. fingerprint: sha256 of its token ids and windows."""

    name: str
    protocol: Literal["gptq", "sliding"]
    window: int
    stride: int
    tokens: int
    fingerprint: str
    bos: bool = Field(default=False, description="whether every window begins with BOS")
    lacks_bos: bool = Field(default=False, description="whether it should, and the tokenizer has none")
    left_out: RecordsLeftOut = Field(default_factory=RecordsLeftOut)


class Requirement(Frozen):
    """One condition of --require, held to one model."""

    condition: str
    model: str
    value: float | None
    passed: bool


class Results(Frozen):
    """The file. settings: every option, as `used` has it; versions: of every package that a number depends on."""

    schema_version: int = SCHEMA_VERSION
    created: str
    command: str | None = None
    seed: int
    device: str
    versions: dict[str, str]
    settings: dict[str, object]
    text: TextUsed | None = None
    tasks_fingerprint: str | None = Field(default=None, description="sha256 of the tasks' definitions and data")
    models: tuple[ModelResult, ...]
    requirements: tuple[Requirement, ...] = ()
    summary: tuple[str, ...] = Field(default=(), description="the plain-language findings, one sentence each")

    @property
    def original(self) -> ModelResult | None:
        """The model that the others are held to, if there is one."""
        return next((model for model in self.models if model.role == "original"), None)

    def to_json(self) -> str:
        """As JSON. What it can't hold: an infinity becomes the largest float, half of a surrogate pair (of a file's
        name that is no UTF-8) a question mark."""
        return json.dumps(_plain(self.model_dump()), indent=2, ensure_ascii=False, allow_nan=False)

    def write(self, path: Path) -> None:
        """As JSON, whole or not at all."""
        unfinished = path.with_name(path.name + ".part")
        unfinished.write_text(self.to_json() + "\n", encoding="utf-8")
        unfinished.replace(path)

    @classmethod
    def read(cls, path: Path) -> Results:
        """What `write` wrote."""
        return cls.model_validate_json(path.read_text(encoding="utf-8"))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, float) and math.isinf(value):
        return math.copysign(sys.float_info.max, value)
    return value
