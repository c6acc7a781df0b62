"""The ways to choose a mask, by name. Adding one is a file with a decorated function, and its line in `__init__.py`."""

from __future__ import annotations

from collections.abc import Callable

from llmshrink.methods.pruning.contract import Pruner

_PRUNERS: dict[str, Pruner] = {}


def mask_chooser(name: str) -> Callable[[Pruner], Pruner]:
    """Make a pruner known as `name`."""

    def register(choose: Pruner) -> Pruner:
        assert name not in _PRUNERS, f"two pruners are called {name}"
        _PRUNERS[name] = choose
        return choose

    return register


def pruner(name: str) -> Pruner:
    """The pruner called `name`. Raises KeyError: recipes are checked against `names()` before a run."""
    return _PRUNERS[name]


def names() -> tuple[str, ...]:
    """All known pruners, sorted."""
    return tuple(sorted(_PRUNERS))
