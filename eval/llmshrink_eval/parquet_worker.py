"""Reads row groups of parquet files, to see whether that can be done, in a process whose memory is bounded.

A list in one row may repeat a value a billion times, and take a few bytes of the file; how large it is shows when it is
unpacked, and a file that is damaged may end whoever tries. `python -m llmshrink_eval.parquet_worker` answers each line
of its standard input, written by `leftout`, with one on its standard output, until the input ends. Both are JSON
objects: path, group, columns and free (as `leftout.FREE_BYTES`); and unusable, which is null, or why the group is.
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import Any

from llmshrink_eval import leftout
from llmshrink_eval.engines.child import bound_memory, decode, encode

SHARE, SPARE = 3, 1 << 28
"""Bytes it may take: so many times those that a group may unpack to, as arrays grow by copies, and so many more."""


def fault(job: dict[str, Any]) -> str | None:
    """Why a row group can't be used."""
    leftout.FREE_BYTES = job["free"]
    try:
        with leftout.Parquet(Path(job["path"])) as file:
            bound_memory(SHARE * file.allowed + SPARE)
            for _ in file.tables(job["group"], job["columns"]):
                pass
    except leftout.Unusable as error:
        return str(error)
    return None


def main() -> None:
    """Import, then answer until the input ends."""
    out = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    import pyarrow

    # Threads, and a pool that grows by gigabytes, would be counted as memory though they take none.
    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        try:
            os.write(out, encode({"unusable": fault(decode(line))}))
        except BrokenPipeError:  # nobody reads any more
            return


if __name__ == "__main__":
    main()
