"""transformers learns of llmshrink's format as soon as both are imported, in either order.

`import llmshrink` has no time for transformers, which takes seconds. So where transformers' registry of quantizers is
not there yet, its import is waited for: a finder that knows of that one module and steps aside when it is asked.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"


class _Awaited:
    """A finder that lets the others find the registry, and has ours entered once it has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != REGISTRY:
            return None
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(name, path, target) for finder in list(sys.meta_path))
        spec = next((each for each in found if each is not None), None)
        if spec is not None and spec.loader is not None:
            loader, run = spec.loader, spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register()

            loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    try:
        from llmshrink.runtime.hf import register

        register()
    except ImportError as error:
        # Whoever imports transformers for something else mustn't fail of a format that they don't use.
        warnings.warn(
            f"this transformers can't be taught llmshrink's format ({error}); llmshrink.load reads it", stacklevel=2
        )


def when_imported() -> None:
    """Register now where transformers' registry is there, else when it comes."""
    if hasattr(sys.modules.get(REGISTRY), "register_quantizer"):
        _register()
    elif not any(isinstance(finder, _Awaited) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Awaited())
