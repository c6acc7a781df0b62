"""What a weight IS after compression: methods return these, formats write them, everyone else reads them."""

from llmshrink.weights.activations import Activations, by_token, coded, round_inputs
from llmshrink.weights.bitsandbytes import NormalFloat4, RowInt8
from llmshrink.weights.dense import Dense
from llmshrink.weights.eight_bit import FP8, FP8_MOST, EightBit
from llmshrink.weights.grouped_int import SMALLEST_SCALE, GroupedInt, code_range
from llmshrink.weights.kv_cache import CacheScales, before_cache, round_cache
from llmshrink.weights.sparse24 import Sparse24

Solvable = Dense | GroupedInt | NormalFloat4 | RowInt8 | EightBit
"""What a method makes of a weight."""

__all__ = [
    "FP8",
    "FP8_MOST",
    "SMALLEST_SCALE",
    "Activations",
    "CacheScales",
    "Dense",
    "EightBit",
    "GroupedInt",
    "NormalFloat4",
    "RowInt8",
    "Solvable",
    "Sparse24",
    "before_cache",
    "by_token",
    "code_range",
    "coded",
    "round_cache",
    "round_inputs",
]
