"""`llmshrink doctor`: what of this environment would make a run fail, and how to mend it."""

from __future__ import annotations

from llmshrink.cli.show import JsonFlag, show


def doctor(json: JsonFlag = False) -> int:
    """Check versions, GPU, vLLM and the plugin, disk and the Hub.

    Exits with 1 when something needs mending, and says how. Nothing is written, and the network isn't asked.
    """
    from llmshrink import api

    report = api.doctor()
    show(report, as_json=json)
    return 0 if report.ok else 1
