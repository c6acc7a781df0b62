"""What runs a model: transformers in this process, or vLLM in its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from llmshrink_eval.options import ModelSpec, Running
    from llmshrink_eval.passes import Pass
    from llmshrink_eval.progress import Progress
    from llmshrink_eval.protocol import Windows
    from llmshrink_eval.tasks import TaskOptions, TaskRun


class Engine(Protocol):
    """One model, loaded when something is first asked of it.

    dtype: what it computes in. method: how a divergence is measured on it (`results.Divergence.method`).
    """

    @property
    def dtype(self) -> str: ...
    @property
    def method(self) -> str: ...

    def cost(self, batch_sizes: Sequence[int]) -> dict[str, Any]: ...
    def finished(self, windows: Windows, folder: Path, *, keep: Path | None) -> Pass | None: ...
    def read(
        self, windows: Windows, *, keep: Path | None, against: Path | None, folder: Path, progress: Progress
    ) -> Pass: ...
    def tasks(self, options: TaskOptions, progress: Progress) -> dict[str, TaskRun]: ...
    def generations(self, prompts: Sequence[str]) -> list[dict[str, Any]]: ...
    def close(self) -> None: ...


def open_engine(spec: ModelSpec, running: Running, tokenizer: Any) -> Engine:
    """The engine that `running` names, for one model; nothing is loaded yet."""
    if running.engine == "vllm":
        from llmshrink_eval.engines.vllm import VllmEngine

        return VllmEngine(spec, running, tokenizer)
    from llmshrink_eval.engines.transformers import TransformersEngine

    return TransformersEngine(spec, running, tokenizer)
