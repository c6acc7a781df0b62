"""Give lm-eval the lines of a JSONL file beside this one, without the copy that `datasets` would keep of it.

A task that names its data by `dataset_path: json` leaves an Arrow copy in the user's cache, found again by path and
time of change. `demo.tasks` writes this module next to its data instead, where the task files name it: what is in the
file is what is asked, and nothing is left behind.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def load(file: str, **_: Any) -> dict[str, Any]:
    """The file's records as the split "test", in memory. lm-eval hands in the task's metadata too, which is unused."""
    from datasets import Dataset

    lines = (Path(__file__).parent / file).read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}
