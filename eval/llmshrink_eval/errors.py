"""What stops an evaluation, as types.

EvalError is bad input: one line that names the value, the limit and the way out; the command line exits with 2.
EvalFailed is a measurement that ran and can't be trusted (NaN logits, an engine that died): it exits with 1.
"""

from __future__ import annotations


class EvalError(ValueError):
    """Bad input: str(error) is one line that a user can act on."""


class EvalFailed(RuntimeError):
    """It ran, and what came out is no measurement: str(error) is one line that says what and where."""
