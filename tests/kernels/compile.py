"""Cases on stdin, facts on stdout, both JSON: kernels compiled for targets that needn't be here.

A case: {"kernel": "module:function", "capability": 90, "arguments": {...}, "constants": {...}, "num_warps": 4,
"num_stages": 3}, as `llmshrink_kernels.static.compile_for` takes them.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys


def main() -> None:
    # What ptxas and its companions print is not an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from llmshrink_kernels import static

    facts = []
    for case in json.load(sys.stdin):
        module, name = case["kernel"].split(":")
        found = static.compile_for(
            case["capability"],
            getattr(importlib.import_module(module), name),
            case["arguments"],
            case["constants"],
            num_warps=case["num_warps"],
            num_stages=case["num_stages"],
        )
        facts.append(dataclasses.asdict(found))
    json.dump(facts, answers)
    answers.close()


if __name__ == "__main__":
    main()
