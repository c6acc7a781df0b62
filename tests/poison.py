"""A folder as it may be downloaded: files in it are called as modules, and leave a mark when they are imported."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

MODULES = ("torch", "transformers", "safetensors", "vllm", "lm_eval", "datasets", "llmshrink_eval", "numpy", "yaml")
"""What verbs and their children import; where Python itself is asked for `llmshrink`, that one is found first."""


def poison(folder: Path, modules: Iterable[str]) -> Path:
    """Write such files into a folder that is there; returns where they would leave their names."""
    mark = folder.parent / "ran"
    for name in modules:
        (folder / f"{name}.py").write_text(f"open({str(mark)!r}, 'a').write({name!r})\nraise SystemExit(99)\n")
    return mark


def plain() -> dict[str, str]:
    """This process's environment without what makes Python look elsewhere, or not look in the current folder."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
