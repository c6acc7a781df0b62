"""Run as a script in a process of its own: the engine's answers for several checkpoints, one after the other.

`python several.py QUESTIONS ANSWERS`: a list of what `llmshrink.serving.vllm.worker` is asked, and of what it says or
`{"error": ...}`. Importing vLLM costs twice what a tiny model does, and is paid once.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

from llmshrink.serving.vllm.worker import generate


def answer(question: dict[str, Any]) -> dict[str, Any]:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    try:
        return {"generations": generate(question)}
    except Exception as error:  # whatever the engine raises is that model's answer, and not the others'
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    finally:
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([answer(question) for question in asked]))
