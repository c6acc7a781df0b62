"""The verbs as functions: what the command line does, with the same names and defaults, for notebooks and scripts."""

from __future__ import annotations

from llmshrink.api.bench import bench_kernels
from llmshrink.api.checkpoints import inspect, recipes, verify
from llmshrink.api.conversion import convert
from llmshrink.api.distillation import distill
from llmshrink.api.environment import doctor
from llmshrink.api.evaluate import compare, eval
from llmshrink.api.planning import plan, plan_convert, plan_distill
from llmshrink.api.publishing import push
from llmshrink.api.runs import compress, parse_size, prune, quantize
from llmshrink.api.runtime import generate, load
from llmshrink.api.serving import serve

__all__ = [
    "bench_kernels",
    "compare",
    "compress",
    "convert",
    "distill",
    "doctor",
    "eval",
    "generate",
    "inspect",
    "load",
    "parse_size",
    "plan",
    "plan_convert",
    "plan_distill",
    "prune",
    "push",
    "quantize",
    "recipes",
    "serve",
    "verify",
]
