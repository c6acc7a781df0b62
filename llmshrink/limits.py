"""The numbers that people ask for: each has a range, which is far wider than what makes sense on any machine.

Beyond it a typing error is likelier than a wish, and what follows isn't a refusal but hours, or memory that
isn't there.
"""

from __future__ import annotations

from collections.abc import Mapping

from llmshrink.errors import LlmshrinkError

LIMITS: Mapping[str, tuple[int, int]] = {
    "samples": (1, 10**7),
    "seq_len": (1, 2**24),
    "batch_size": (1, 10**6),
    "seed": (0, 2**63 - 1),
    "serve_tp": (1, 1024),
    "steps": (1, 10**9),
    "accumulate": (1, 10**6),
    "warmup": (0, 10**9),
    "eval_steps": (1, 10**9),
    "generated_tokens": (0, 10**12),
    "teacher_cache_tokens": (1, 2**24),
    "max_new_tokens": (1, 10**6),
    "window": (2, 2**24),
    "stride": (1, 2**24),
    "max_tokens": (2, 10**12),
    "limit": (1, 10**9),
    "sample": (1, 10**9),
    "num_fewshot": (0, 1000),
}
"""Option, with underscores -> the least and the most."""
MOST_GROUP = 2**20
"""Inputs that share a scale: no matrix has as many."""
MOST_TOKENS = 2**32
"""Of a text that is held in memory, 9 bytes each: what sixteen thousand steps of 256 windows of 1024 take."""


def check_numbers(given: Mapping[str, object]) -> None:
    """Raise LlmshrinkError for the first number that is out of its option's range. Other values are passed over."""
    for name, value in given.items():
        if name not in LIMITS or not isinstance(value, int):
            continue
        least, most = LIMITS[name]
        option = f"--{name.replace('_', '-')}"
        if value < least:
            raise LlmshrinkError(f"{option} {_written(value)}: must be at least {least}")
        if value > most:
            raise LlmshrinkError(f"{option} {_written(value)}: must be at most {most:,}")


def check_tokens(windows: int, seq_len: int, what: str) -> None:
    """Raise LlmshrinkError where windows hold more than MOST_TOKENS. what: the options that ask for so many."""
    if windows * seq_len > MOST_TOKENS:
        raise LlmshrinkError(
            f"{what}: asks for {windows:,} windows of {seq_len:,} tokens, and no more than {MOST_TOKENS:,} tokens are "
            "held; give smaller numbers"
        )


def _written(value: int) -> str:
    """Python refuses to write out a number of more than 4300 digits."""
    return str(value) if abs(value) < 10**40 else f"(a number of {value.bit_length():,} bits)"
