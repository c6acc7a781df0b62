"""What a weight IS after compression: methods return these, formats write them, everyone else reads them."""

from llmshrink.weights.dense import Dense
from llmshrink.weights.grouped_int import SMALLEST_SCALE, GroupedInt, code_range
from llmshrink.weights.sparse24 import Sparse24

__all__ = ["SMALLEST_SCALE", "Dense", "GroupedInt", "Sparse24", "code_range"]
