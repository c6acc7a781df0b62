"""`llmshrink.doctor`: the twin of `llmshrink doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmshrink.doctoring.found import DoctorReport


def doctor() -> DoctorReport:
    """Look at this environment: versions and their conflicts, processor, GPU, vLLM and the plugin, disk, the Hub.

    Nothing is written and the network isn't asked. `report.problems` has what needs mending, each with its fix.
    """
    from llmshrink.doctoring.examine import examine

    return examine()
