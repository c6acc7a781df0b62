"""Pruning by weights, as pure mathematics: which weights go, and what the others become.

pattern     what may be kept: n of every m, or a share of the weight
scores      magnitude and Wanda: a score for each weight
sparsegpt   the mask is chosen in a sweep that makes good what it takes
alps        the mask by ADMM, all weights moving
repair      least squares on what was kept, all rows together
allocate    how much of each weight goes, where some can spare more than others
prune       the whole: target, mask, repair; and its registry
"""

from llmshrink.methods.pruning import alps as alps
from llmshrink.methods.pruning import scores as scores
from llmshrink.methods.pruning import sparsegpt as sparsegpt
from llmshrink.methods.pruning.allocate import allocate
from llmshrink.methods.pruning.contract import Pattern, Pruned, Pruner, PruneSpec
from llmshrink.methods.pruning.prune import prune
from llmshrink.methods.pruning.registry import mask_chooser, names

__all__ = ["Pattern", "PruneSpec", "Pruned", "Pruner", "allocate", "mask_chooser", "names", "prune"]
