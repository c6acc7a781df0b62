"""Pure mathematics and its registry. Importing the package makes every method known: one line for each."""

from llmshrink.methods import gptq as gptq
from llmshrink.methods import rtn as rtn
from llmshrink.methods.contract import QuantizeSpec, ScaleSearch, SiteStatistics, Solved, SolveError, Solver
from llmshrink.methods.registry import Method, names, site_solver, solver

__all__ = [
    "Method",
    "QuantizeSpec",
    "ScaleSearch",
    "SiteStatistics",
    "SolveError",
    "Solved",
    "Solver",
    "names",
    "site_solver",
    "solver",
]
