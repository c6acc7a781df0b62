"""Cases on stdin, facts on stdout, both JSON: kernels compiled for targets that needn't be here.

A case has the fields of `llmshrink_kernels.static.Case`, facts those of `llmshrink_kernels.static.Facts`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys


def main() -> None:
    # What ptxas and its companions print is not an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from llmshrink_kernels.static import Case

    facts = [dataclasses.asdict(Case(**case).compile()) for case in json.load(sys.stdin)]
    json.dump(facts, answers)
    answers.close()


if __name__ == "__main__":
    main()
