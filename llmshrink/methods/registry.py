"""The methods by name. Adding one is a file with a decorated function, and its line in `methods/__init__.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmshrink.methods.contract import Solver

STATISTICS = frozenset({"hessian", "cross"})


@dataclass(frozen=True)
class Method:
    """A solver, its name, and which statistics it reads (those it doesn't read needn't be gathered).

    rows_together: a row's result depends on the other rows, so that sites are never stacked.
    """

    name: str
    solve: Solver
    reads: frozenset[str]
    rows_together: bool = False


_METHODS: dict[str, Method] = {}


def site_solver(
    name: str, *, reads: set[str] | frozenset[str], rows_together: bool = False
) -> Callable[[Solver], Solver]:
    """Make a solver known as `name`. reads: a subset of {"hessian", "cross"}. rows_together: see Method."""
    assert reads <= STATISTICS, reads - STATISTICS

    def register(solve: Solver) -> Solver:
        assert name not in _METHODS, f"two methods are called {name}"
        _METHODS[name] = Method(name, solve, frozenset(reads), rows_together)
        return solve

    return register


def solver(name: str) -> Method:
    """The method called `name`. Raises KeyError: recipes are checked against `names()` before a run."""
    return _METHODS[name]


def names() -> tuple[str, ...]:
    """All known methods, sorted."""
    return tuple(sorted(_METHODS))
