"""Whoever started the real vLLM is gone, and so is vLLM; and no module of the folder that it was started in has run."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from poison import MODULES, plain, poison

from llmshrink.demo import model_folder

PROGRAM = str(Path(sys.executable).with_name("llmshrink"))
OPTIONS = ("--dtype", "float16", "--enforce-eager", "--max-model-len", "128")
PATIENCE = 600


class Started:
    """A verb in a process, in a folder of poisoned modules."""

    def __init__(self, folder: Path, *words: str | Path) -> None:
        self.log = folder.parent / f"log-{words[0]}-{time.monotonic_ns()}"
        environment = {**plain(), "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [PROGRAM, *map(str, words)], cwd=folder, env=environment, stdout=log, stderr=log
            )
        self.family: list[psutil.Process] = []

    def until(self, there: Callable[[list[psutil.Process]], bool]) -> None:
        """Wait until its children are as they should be, and remember them."""
        deadline = time.monotonic() + PATIENCE
        while not there(self.family):
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.1)
            self.family = psutil.Process(self.process.pid).children(recursive=True)

    def end(self, number: signal.Signals) -> list[psutil.Process]:
        """Send it a signal; those of its children that are still there after 30 seconds."""
        self.process.send_signal(number)
        self.process.wait(PATIENCE)
        deadline = time.monotonic() + 30
        while (alive := [each for each in self.family if at_work(each)]) and time.monotonic() < deadline:
            time.sleep(0.1)
        for each in alive:
            each.kill()
        return alive


def at_work(process: psutil.Process) -> bool:
    """Whether it is there, and not only waits for somebody to ask how it ended."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def has_vllm(family: list[psutil.Process]) -> bool:
    """Whether one of them has imported vLLM as far as its kernels."""
    try:
        return any("/vllm/" in place.path for each in family for place in each.memory_maps())
    except psutil.Error:
        return False


def has_core(family: list[psutil.Process]) -> bool:
    """Whether the server has started the process that computes, and that one has got so far."""
    servers = {each.pid for each in family}
    return has_vllm([each for each in family if each.ppid() in servers])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def test_a_server_ends_with_whoever_started_it(demo_w4: Path, tmp_path: Path) -> None:
    (folder := tmp_path / "here").mkdir()
    mark = poison(folder, (*MODULES, "llmshrink"))
    numbers = (signal.SIGKILL, signal.SIGHUP)
    servers = [Started(folder, "serve", demo_w4, "--port", str(free_port()), *OPTIONS) for _ in numbers]
    # One when it answers, one on its way there.
    servers[1].until(has_core)
    assert servers[1].end(numbers[1]) == []
    servers[0].until(lambda _: "ready " in servers[0].log.read_text())
    assert has_core(servers[0].family)
    assert servers[0].end(numbers[0]) == []
    assert not mark.exists(), mark.read_text()


def test_an_engine_ends_with_whoever_asked_it(demo_w4: Path, story: Path, tmp_path: Path) -> None:
    (folder := tmp_path / "here").mkdir()
    mark = poison(folder, (*MODULES, "llmshrink"))
    text = ("--text", story, "--window", "32", "--max-tokens", "64", "-o", tmp_path / "out", "--cache", tmp_path / "c")
    asked = {
        signal.SIGKILL: Started(folder, "verify", demo_w4, "--engine", "vllm"),
        signal.SIGHUP: Started(folder, "verify", demo_w4, "--engine", "vllm"),
    }
    started = [(signal.SIGKILL, Started(folder, "eval", model_folder(), "--engine", "vllm", *text)), *asked.items()]
    for number, each in started:
        each.until(has_vllm)
        assert each.end(number) == []
    assert not mark.exists(), mark.read_text()
