"""How an unfinished run in a workspace differs from the one that is asked for, in words for a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmshrink.run.arithmetic import processor

MACHINE = ("device", "instructions")
"""What of an identity tells kinds of machine apart."""


def first_difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """What differs first and how to finish the old run, for a message: values that a person can compare are shown,
    hashes are not. Another kind of machine comes before all else, since other things follow from it."""
    if any(old.get(key) != new.get(key) for key in MACHINE):
        caps = processor().caps
        elsewhere = f"where {' and '.join(caps)} isn't set" if caps else "there"
        return (
            f"of another kind of machine, whose sums end in other bits ({_machine(old)}; here {_machine(new)}): "
            f"finish it {elsewhere}"
        )
    for key in [*new, *old]:
        was, now = old.get(key), new.get(key)
        if was != now and key == "threads":
            return f"with another number of threads ({was}, now {now}): finish it with OMP_NUM_THREADS={was}"
        if was != now:
            hashes = any(isinstance(value, str) and len(value) == 64 for value in (was, now))
            return (
                f"with another {key if hashes else f'{key} ({was!r}, now {now!r})'}; repeat that command to finish it"
            )
    return None


def changed_beside(old: Mapping[str, str] | None, new: Mapping[str, str] | None) -> str | None:
    """As `first_difference`, of files that are copied; None where an earlier llmshrink noted none."""
    was, now = old if isinstance(old, dict) else {}, new or {}
    name = next((each for each in sorted({*was, *now}) if was.get(each) != now.get(each)), None)
    if not isinstance(old, dict) or name is None:
        return None
    return f"that began with another {name} in the model's folder; put that one back to finish it"


def _machine(identity: dict[str, Any]) -> str:
    """Device, instruction set and the dtype that is computed in."""
    training = identity.get("distill")
    dtype = training.get("dtype") if isinstance(training, dict) else identity.get("dtype")
    said = [identity.get(key) for key in MACHINE]
    return ", ".join(str(each).removeprefix("torch.") for each in (*said, dtype) if each is not None)
