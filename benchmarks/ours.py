"""One timed run of `llmshrink.quantize`: `python -m benchmarks.ours MODEL OUT --calibration ... [--set ...]`."""

from __future__ import annotations

import argparse
import sys

from benchmarks.measure import import_everything, report


def main() -> int:
    """Quantize once and print the measure; 1 if the run fell short."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--calibration")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--recipe", default="gptq-w4a16")
    parser.add_argument("--set", action="append", default=[])
    arguments = parser.parse_args()
    import_everything()
    import llmshrink

    reports = []

    def work() -> None:
        reports.append(
            llmshrink.quantize(
                arguments.model,
                output=arguments.output,
                recipe=arguments.recipe,
                calibration=arguments.calibration,
                samples=arguments.samples,
                seq_len=arguments.seq_len,
                set=arguments.set,
                overwrite=True,
                verify=False,
            )
        )

    report(work)
    return 0 if reports[0].ok else 1


if __name__ == "__main__":
    sys.exit(main())
