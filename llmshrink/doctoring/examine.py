"""All checks, one after the other, each timed."""

from __future__ import annotations

import time
from collections.abc import Callable

from llmshrink.doctoring import engine, machine, packages, places
from llmshrink.doctoring.found import Checked, DoctorReport


def examine() -> DoctorReport:
    """Look at this environment. A check that needs a package that isn't there says so; `versions` has the fix."""
    checks: list[Checked] = []
    seconds: dict[str, float] = {}

    def take(name: str, look: Callable[[], Checked]) -> Checked:
        start = time.perf_counter()
        try:
            found = look()
        except ImportError as error:
            found = Checked(name, {}, f"not looked at, without {error.name or error}")
        seconds[name] = time.perf_counter() - start
        checks.append(found)
        return found

    packages.find.cache_clear()
    take("versions", packages.versions)
    take("processor", machine.processor)
    gpus = len(take("gpu", machine.gpu).facts.get("gpus", ()))
    take("vllm", lambda: engine.vllm(gpus=gpus))
    take("disk", places.disk)
    take("hub", places.hub)
    return DoctorReport(checks, seconds)
