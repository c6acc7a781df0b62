"""llmshrink: a Hugging Face language model in, a smaller one out that is proven by measurement and served by vLLM.

The verbs of the command line are functions here, with the same names and defaults: `llmshrink.quantize(...)`,
`llmshrink.prune(...)`, `llmshrink.compare(...)` and so on; `llmshrink.load(...)` is for torch. They are looked up on
first use, because `import llmshrink` happens for `llmshrink --help` too, which has no time for torch. Once llmshrink is
imported, before transformers or after, `AutoModelForCausalLM.from_pretrained` reads its format too.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from llmshrink.errors import LlmshrinkError
from llmshrink.runtime.register import when_imported

if TYPE_CHECKING:
    from llmshrink.api import (
        bench_kernels,
        compare,
        compress,
        convert,
        distill,
        doctor,
        eval,
        generate,
        inspect,
        load,
        plan,
        plan_convert,
        plan_distill,
        prune,
        push,
        quantize,
        recipes,
        serve,
        verify,
    )

__version__ = "0.1.0"

__all__ = [
    "LlmshrinkError",
    "__version__",
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


def __getattr__(name: str) -> object:
    """Take a verb from `llmshrink.api` when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    verb = getattr(import_module("llmshrink.api"), name)
    globals()[name] = verb
    return verb


def __dir__() -> list[str]:
    return sorted(__all__)


when_imported()
