"""The verbs as functions: what the command line does, with the same names and defaults, for notebooks and scripts."""

from __future__ import annotations

from llmshrink.api.checkpoints import inspect, recipes, verify
from llmshrink.api.compress import parse_size, quantize
from llmshrink.api.evaluate import compare, eval

__all__ = ["compare", "eval", "inspect", "parse_size", "quantize", "recipes", "verify"]
