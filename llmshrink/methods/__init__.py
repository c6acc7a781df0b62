"""Pure mathematics and its registry. Importing the package makes every method known: one line for each."""

from llmshrink.methods import bnb as bnb
from llmshrink.methods import gptq as gptq
from llmshrink.methods import rtn as rtn
from llmshrink.methods.contract import QuantizeSpec, ScaleSearch, SiteStatistics, Solved, SolveError, Solver
from llmshrink.methods.narrow import Narrowed, NarrowSpec, narrow
from llmshrink.methods.pruning import Pattern, PruneSpec
from llmshrink.methods.registry import Method, names, site_solver, solver
from llmshrink.methods.smooth import grown, kept_exact, shrunk, smoothing_factors
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
    "grown",
    "kept_exact",
    "names",
    "narrow",
    "shrunk",
    "site_solver",
    "smoothing_factors",
    "solve",
    "solver",
]
