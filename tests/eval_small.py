"""Small evaluations that several tests run: two tiny models that differ a little, a text, a few items of a task."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from eval_oracle import a_text
from llmshrink_eval.engines.transformers import TransformersEngine
from llmshrink_eval.options import ModelSpec, Options, Running, Scoring
from llmshrink_eval.results import Results

from llmshrink.demo.tasks import write_tasks

ITEMS = 6
WINDOW = 24


@dataclass
class Heard:
    """A progress that remembers what it was told. stop: (label, step) at which to raise KeyboardInterrupt."""

    stop: tuple[str, int] | None = None
    parts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    steps: int = 0

    def part(self, label: str) -> None:
        self.parts.append(label)
        self.steps = 0

    def step(self, done: int, total: int, state: str = "") -> None:
        self.steps += 1
        if self.stop is not None and self.stop[0] in self.parts[-1] and self.steps == self.stop[1]:
            raise KeyboardInterrupt

    def note(self, line: str) -> None:
        self.notes.append(line)


@dataclass(frozen=True)
class Small:
    """What there is to evaluate. cache: for this test alone."""

    original: Path
    text: str
    tasks_dir: Path
    cache: Path

    def options(
        self, *, text: bool = True, tasks: Sequence[str] = ("demo_facts",), speed: tuple[int, ...] = (), **changes: Any
    ) -> Options:
        """Options for it; keywords of Scoring and Running go where they belong."""
        scoring = {
            name: changes.pop(name) for name in ("protocol", "window", "stride", "max_tokens") if name in changes
        }
        running = {name: changes.pop(name) for name in ("batch_size", "offload", "dtype") if name in changes}
        return Options(
            scoring=Scoring(a_text([self.text]), **{"window": WINDOW, **scoring}) if text else Scoring(),
            running=Running(**running),
            speed=speed,
            cache=self.cache,
            **{"tasks": tuple(tasks), "tasks_dir": (self.tasks_dir,), "limit": ITEMS, **changes} if tasks else changes,
        )


def spec(folder: Path, name: str | None = None) -> ModelSpec:
    return ModelSpec(name=name or folder.name, folder=folder)


def disturb(source: Path, target: Path, scale: float, seed: int = 1) -> Path:
    """A copy of a model's folder whose weights are off by noise of `scale` times their own size."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(target / "model.safetensors")
    made = {
        name: (tensor.float() * (1 + scale * torch.randn(tensor.shape, generator=generator))).to(tensor.dtype)
        for name, tensor in tensors.items()
    }
    save_file(made, target / "model.safetensors", metadata={"format": "pt"})
    return target


def spoil(source: Path, target: Path) -> Path:
    """A copy of a model's folder whose output is NaN."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def measured(results: Results) -> dict[str, Any]:
    """All but what a second run may give otherwise: times, memory, and what came from the cache."""
    found = results.model_dump(exclude={"created", "command"})
    for model in found["models"]:
        for name in ("seconds", "cached"):
            del model[name]
        for name in ("load_seconds", "peak_rss_bytes", "speed"):
            (model["cost"] or {}).pop(name, None)
    return found


@dataclass
class Work:
    """What engines did, by the name of the model."""

    done: list[tuple[str, str]] = field(default_factory=list)

    def of(self, kind: str) -> list[str]:
        """The models on which work of this kind was done, in order."""
        return [name for each, name in self.done if each == kind]


def watched(monkeypatch: pytest.MonkeyPatch) -> Work:
    """Note each piece of work of every engine."""
    work = Work()

    def noting(kind: str) -> Callable[..., Any]:
        method = getattr(TransformersEngine, kind)

        def noted(engine: Any, *arguments: Any, **options: Any) -> Any:
            work.done.append((kind, engine._spec.name))
            return method(engine, *arguments, **options)

        return noted

    for kind in ("cost", "read", "tasks", "generations"):
        monkeypatch.setattr(TransformersEngine, kind, noting(kind))
    return work


def small(model_of: Callable[..., Path], story: Path, folder: Path) -> Small:
    """In a test's own folder."""
    write_tasks(folder / "tasks")
    return Small(model_of("llama"), story.read_text()[:1500], folder / "tasks", folder / "cache")
