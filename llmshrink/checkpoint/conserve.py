"""Conservation: no tensor of the source is lost on the way.

Each is replaced by named outputs, copied byte for byte, or dropped with a reason that the report repeats; a run that
can't say which of the three fails. (Loading a model and saving it again loses what its class doesn't know, such as
the multi-token-prediction heads that engines want.)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from llmshrink.errors import CheckpointError


@dataclass
class Ledger:
    """replaced: source key -> output keys. copied: keys. dropped: key -> reason. added: output keys that the source has
    nothing like."""

    replaced: dict[str, list[str]] = field(default_factory=dict)
    copied: set[str] = field(default_factory=set)
    dropped: dict[str, str] = field(default_factory=dict)
    added: set[str] = field(default_factory=set)

    def check(self, source_keys: Collection[str], output: Mapping[str, str]) -> None:
        """output: output key -> file. Raises CheckpointError naming the first tensors that are unaccounted for."""
        written = set(output)
        missing = sorted(self.added - written)
        assert not missing, missing
        lost = [
            key
            for key in sorted(source_keys)
            if not (
                key in self.dropped
                or (key in self.copied and key in written)
                or (key in self.replaced and written.issuperset(self.replaced[key]))
            )
        ]
        expected = self.copied.union(self.added, *self.replaced.values())
        unknown = sorted(written - expected)
        if lost or unknown:
            what = (
                f"{lost[0]} of the source is in no output"
                if lost
                else f"{unknown[0]} is in the output but not accounted for"
            )
            raise CheckpointError(
                f"{what} ({len(lost)} lost, {len(unknown)} unknown): the run is stopped, nothing is published"
            )
