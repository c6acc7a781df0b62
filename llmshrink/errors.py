"""What a user did wrong, as types.

Every message is one line that names the value, the limit it broke and the way out; the command line prints it
alone on stderr and exits with 2. `assert` is for what only a bug can do, these are for what a person can do.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

PathLike = str | os.PathLike[str]
"""How every verb takes a path, in its Python twin."""


class LlmshrinkError(ValueError):
    """Bad input: str(error) is one line that a user can act on."""


class SourceError(LlmshrinkError):
    """The model named can't be found, isn't a causal language model, or is already quantized."""


class CheckpointError(LlmshrinkError):
    """The checkpoint's files are damaged, unsafe or contain values that no method can work with."""


class UnsupportedModelError(LlmshrinkError):
    """The architecture has a part that isn't covered yet; nothing is half-compressed."""


class CalibrationError(LlmshrinkError):
    """The calibration text is missing, empty or too short."""


class OutputError(LlmshrinkError):
    """The output folder is in the way, in use, or has no room."""


class NoRoomError(LlmshrinkError):
    """The memory here, or a device's, can't hold what a run needs."""


class RecipeError(LlmshrinkError):
    """A recipe that can't be read: `faults` has one line for each thing wrong with it."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults: list[str] = list(faults)
        super().__init__("; ".join(self.faults))
