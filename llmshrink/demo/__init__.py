"""The demo: a small language whose entropy is known, and a model trained on it that ships with the package."""

from __future__ import annotations

from pathlib import Path


def model_folder() -> Path:
    """The shipped checkpoint: config, weights, tokenizer."""
    return Path(__file__).parent / "model"
