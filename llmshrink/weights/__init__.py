"""What a weight IS after compression: methods return these, formats write them, everyone else reads them."""

from llmshrink.weights.bitsandbytes import NormalFloat4, RowInt8
from llmshrink.weights.dense import Dense
from llmshrink.weights.grouped_int import SMALLEST_SCALE, GroupedInt, code_range
from llmshrink.weights.sparse24 import Sparse24

Solvable = Dense | GroupedInt | NormalFloat4 | RowInt8
"""What a method makes of a weight."""

__all__ = ["SMALLEST_SCALE", "Dense", "GroupedInt", "NormalFloat4", "RowInt8", "Solvable", "Sparse24", "code_range"]
