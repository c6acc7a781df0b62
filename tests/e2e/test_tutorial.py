"""docs/tutorial.md: every command is run, and prints what the page says, times, speeds and memory aside.

A command and its output are a `console` block. Numbers may differ by what another processor's rounding makes of them,
and by the error that their line has for them; what a model writes may be other words; a line of three dots stands for
any lines. A block under `<!-- engine -->` needs vLLM.
"""

from __future__ import annotations

import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from llmshrink.cli import run

PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"
BLOCK = re.compile(r"(<!-- engine -->\n)?```console\n\$ (.*?)\n(.*?)```", re.DOTALL)
MEASURED = (
    (r"time +.*", "TIME"),
    (r"(left|after|starting,) [\d:]+( s)?", r"\1 TIME"),
    (r"memory [\d.]+ [kMG]B", "MEMORY"),
    (r"memory +\d+ GiB", "MEMORY"),
    (r"[\d.]+ tokens/s", "SPEED"),
    (r"\(which runs .*\)", "(LINE)"),
    (r"vLLM [\d.+a-z]+", "vLLM"),
    (r"^\d+ tokens, decode", "TOKENS"),
)
ERROR = re.compile(r"(?:\+-|±) ([\d.]+)")
INTERVAL = re.compile(r"\((−?[\d.]+) to (−?[\d.]+) %\)")
NUMBER = re.compile(r"[-−]?\d[\d,]*(?:\.\d+)?")


def blocks(*, engine: bool) -> list[tuple[str, list[str]]]:
    """Commands with the lines that the page has for them."""
    found = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    return [(command, printed.splitlines()) for mark, command, printed in found if bool(mark) == engine]


def masked(line: str) -> str:
    for pattern, name in MEASURED:
        line = re.sub(pattern, name, line)
    return line.rstrip()


def spread(line: str) -> float:
    """How far the numbers of a line may be from another run's by its own account: three errors, or its interval."""
    errors = [3 * float(each) for each in ERROR.findall(line)]
    ends = [[float(end.replace("−", "-")) for end in each] for each in INTERVAL.findall(line)]
    return max([*errors, *(high - low for low, high in ends)], default=0.0)


def alike(expected: str, said: str) -> bool:
    """Whether two lines say the same: the same words, and numbers within a tenth, two of their last digit, or what both
    lines say of their error."""
    expected, said = masked(expected), masked(said)
    error = spread(expected) + spread(said)
    if NUMBER.sub("#", expected) != NUMBER.sub("#", said):
        return False
    for one, other in zip(NUMBER.findall(expected), NUMBER.findall(said), strict=True):
        digit = 10.0 ** -len(one.partition(".")[2])
        a, b = (float(each.replace(",", "").replace("−", "-")) for each in (one, other))
        if abs(a - b) > 0.1 * max(abs(a), abs(b)) + 2 * digit * ("." in one) + error * ("." in one):
            return False
    return True


def same(expected: list[str], said: list[str]) -> bool:
    """Whether lines are alike, `...` for any number of them."""
    # Logged, so that it isn't on the screen while pytest gathers logs; and not said where there is a GPU.
    expected, said = (
        [line for line in lines if not line.startswith("llmshrink kernels:")] for lines in (expected, said)
    )
    if not expected:
        return not said
    if expected[0] == "...":
        return any(same(expected[1:], said[skip:]) for skip in range(len(said) + 1))
    return bool(said) and alike(expected[0], said[0]) and same(expected[1:], said[1:])


def carried_out(command: str) -> list[str]:
    """What a line of the page prints, on stdout and stderr together; the only pipe it may have is to `head`."""
    words, _, reader = command.partition(" | ")
    program, *arguments = shlex.split(words)
    assert program == "llmshrink"
    screen = StringIO()
    with redirect_stdout(screen), redirect_stderr(screen):
        assert run(arguments) == 0, screen.getvalue()
    lines = screen.getvalue().splitlines()
    return lines[: int(reader.removeprefix("head -n "))] if reader else lines


def test_the_pages_commands_print_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu_with: Callable[[str], None]
) -> None:
    """The page is of a CPU with bfloat16 instructions: others would compute in float32, to figures a fifth away."""
    cpu_with("avx512_bf16")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ran = blocks(engine=False)
    assert " ".join(command.split()[1] for command, _ in ran) == "quantize inspect recipes verify eval generate"
    for command, expected in ran:
        said = carried_out(command)
        if command.split()[1] == "generate":
            expected, said = expected[-1:], said[-1:]
        assert same(expected, said), "\n".join([f"$ {command}", *said, "", "the page has:", *expected])


@pytest.mark.engine
@pytest.mark.long  # tests/engine/test_serve.py holds the server to more than the page says
def test_the_server_starts_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    carried_out(next(command for command, _ in blocks(engine=False)))
    ((command, expected),) = blocks(engine=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = shlex.split(command.replace("8000", port))
    program = str(Path(sys.executable).with_name(words[0]))
    server = subprocess.Popen([program, *words[1:]], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    said: list[str] = []
    until = time.monotonic() + 600
    while not (said and said[-1].startswith("curl")) and time.monotonic() < until:
        said.append(server.stdout.readline().rstrip("\n"))
        assert said[-1] or server.poll() is None, said
    server.send_signal(signal.SIGINT)
    server.wait(timeout=120)
    server.stdout.close()
    shown = [line for line in said if "starting," not in line]
    assert same([line.replace("8000", port) for line in expected if "starting," not in line], shown), shown


def test_what_is_not_alike_is_told_apart() -> None:
    assert alike("KL 0.00071 +- 0.00011 nats", "KL 0.00070 +- 0.00012 nats")
    assert not alike("KL 0.00071 nats", "KL 0.00271 nats")
    assert alike("KL 0.00081 +- 0.00011 nats", "KL 0.00102 +- 0.0004 nats")
    assert not alike("KL 0.00081 +- 0.00011 nats", "KL 0.00171 +- 0.00011 nats")
    assert alike("a change of 0.05 % (−0.04 to 0.15 %)", "a change of 0.1 % (−0.1 to 0.4 %)")
    assert not alike("a change of 0.05 % (−0.04 to 0.15 %)", "a change of 1.5 % (1.4 to 1.6 %)")
    assert not alike("28 quantized", "24 quantized")
    assert not alike("size 3", "bits 3")
    assert same(["a", "...", "b"], ["a", "x", "y", "b"]) and not same(["a", "b"], ["a", "x", "b"])
