"""What an evaluation is asked, in a user's words."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Settings:
    """The options that `eval` and `compare` share, with their defaults; `llmshrink eval --help` says what each does."""

    text: str | None = None
    bos: Literal["auto", "always", "never"] = "auto"
    protocol: Literal["gptq", "sliding"] = "gptq"
    window: int | None = None
    stride: int | None = None
    max_tokens: int | None = None
    tasks: str | Sequence[str] | None = None
    tasks_dir: str | os.PathLike[str] | None = None
    limit: int | None = None
    sample: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    engine: Literal["transformers", "vllm"] = "transformers"
    device: str | None = None
    dtype: str | None = None
    batch_size: int | None = None
    offload: bool = False
    speed: str | Sequence[int] | None = None
    prompts: Sequence[str] | None = None
    require: str | None = None
    seed: int = 0
    cache: str | os.PathLike[str] | None = None
    fresh: bool = False
    trust_remote_code: bool = False
