"""Pure mathematics and its registry. Importing the package makes every method known: one line for each."""

from llmshrink.methods import bnb as bnb
from llmshrink.methods import gptq as gptq
from llmshrink.methods import rtn as rtn
from llmshrink.methods.contract import QuantizeSpec, ScaleSearch, SiteStatistics, Solved, SolveError, Solver
from llmshrink.methods.narrow import Narrowed, NarrowSpec, narrow
from llmshrink.methods.pruning import Pattern, PruneSpec
from llmshrink.methods.registry import Method, names, site_solver, solver
from llmshrink.methods.solve import SiteSpec, solve

__all__ = [
    "Method",
    "NarrowSpec",
    "Narrowed",
    "Pattern",
    "PruneSpec",
    "QuantizeSpec",
    "ScaleSearch",
    "SiteSpec",
    "SiteStatistics",
    "SolveError",
    "Solved",
    "Solver",
    "names",
    "narrow",
    "site_solver",
    "solve",
    "solver",
]
