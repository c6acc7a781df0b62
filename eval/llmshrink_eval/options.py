"""What is asked of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llmshrink_eval.beginning import Bos
from llmshrink_eval.cache import default_folder
from llmshrink_eval.results import SiteError
from llmshrink_eval.text import Text

if TYPE_CHECKING:
    from llmshrink_eval.model import Loader

Engine = Literal["transformers", "vllm"]
ProtocolName = Literal["gptq", "sliding"]

SPEED_PROMPT = 128
SPEED_NEW = 16
SHOWN_PROMPTS = 3
SHOWN_TOKENS = 48


@dataclass(frozen=True)
class ModelSpec:
    """A model to measure.

    name: as reports show it. folder: where it is. loader: reads what transformers can't; a function
    of a module, since another process asks for it by its name. site_errors: what its
    compressor recorded.
    """

    name: str
    folder: Path
    loader: Loader | None = None
    site_errors: tuple[SiteError, ...] = ()


@dataclass(frozen=True)
class Scoring:
    """The text and how it is read; see `protocol`. text: None when no text is scored."""

    text: Text | None = None
    protocol: ProtocolName = "gptq"
    window: int | None = None
    stride: int | None = None
    max_tokens: int | None = None


@dataclass(frozen=True)
class Running:
    """How models are run. device: as torch spells it. dtype: likewise, or "auto" for the model's own; a
    CPU computes in float32 whatever is asked. offload: a folder. bos: whether what models read begins with BOS (see
    `beginning`)."""

    engine: Engine = "transformers"
    device: str = "cpu"
    dtype: str = "auto"
    batch_size: int | None = None
    offload: Path | None = None
    trust_remote_code: bool = False
    bos: Bos = "auto"


@dataclass(frozen=True)
class Options:
    """Everything else. speed: batch sizes to time. prompts: what each model is asked to go on from; None: taken from
    the text. fresh: look nothing up in the cache. command: as the user gave it, for the report."""

    scoring: Scoring = field(default_factory=Scoring)
    running: Running = field(default_factory=Running)
    tasks: tuple[str, ...] = ()
    tasks_dir: tuple[Path, ...] = ()
    limit: int | None = None
    sample: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    speed: tuple[int, ...] = ()
    prompts: tuple[str, ...] | None = None
    require: str | None = None
    seed: int = 0
    cache: Path = field(default_factory=default_folder)
    fresh: bool = False
    command: str | None = None
