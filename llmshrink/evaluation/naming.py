"""What `demo` means, and how tasks are named."""

from __future__ import annotations

from collections.abc import Sequence

DEMO = "demo"


def task_names(tasks: str | Sequence[str] | None) -> tuple[str, ...]:
    """The names of a comma-separated list, or of a sequence, each once."""
    names = tasks.split(",") if isinstance(tasks, str) else tasks or ()
    return tuple(dict.fromkeys(name.strip() for name in names if name.strip()))


def is_demo_task(name: str) -> bool:
    """Whether it is one of the demo language's tasks, their group, or a pattern of them."""
    return name == DEMO or name.startswith(f"{DEMO}_")
