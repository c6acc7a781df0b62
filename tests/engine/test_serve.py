"""`llmshrink serve` with the real vLLM: over HTTP, the same greedy tokens as transformers; it ends cleanly."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import Request, urlopen

import psutil
import pytest
from served import Served, llmshrink

from llmshrink.serving.vllm.check import Reference, transformers_logits

OPTIONS = ["--dtype", "float16", "--enforce-eager", "--max-model-len", "128"]
CLOSE = 2**-6
"""Two first choices closer than float16 can tell apart may go either way, and all that follows with them."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@dataclass
class Server:
    """`llmshrink serve`, healthy. lines: all that it said on stdout."""

    process: subprocess.Popen[str]
    port: int
    lines: list[str]
    folder: Path

    @property
    def family(self) -> list[psutil.Process]:
        """It and everything under it."""
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """What follows a prompt, as token ids."""
        body = {
            "model": str(self.folder),
            "prompt": prompt,
            "max_tokens": count,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 1,
            "return_tokens_as_token_ids": True,
        }
        address = f"http://127.0.0.1:{self.port}/v1/completions"
        request = Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urlopen(request, timeout=300) as response:
            choice = json.loads(response.read())["choices"][0]
        return [int(token.removeprefix("token_id:")) for token in choice["logprobs"]["tokens"]]


@contextmanager
def serving(folder: Path, log: Path) -> Iterator[Server]:
    port = free_port()
    command = [str(Path(sys.executable).with_name("llmshrink")), "serve", str(folder), "--port", str(port), *OPTIONS]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    assert process.stdout is not None
    family: list[psutil.Process] = []
    try:
        lines = []
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if line.startswith("curl "):
                break
        assert lines and lines[-1].startswith("curl "), log.read_text()[-3000:]
        server = Server(process, port, lines, folder)
        family = server.family
        yield server
    finally:
        for member in family or [psutil.Process(process.pid)]:
            if member.is_running():
                member.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(demo_w4: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(demo_w4, tmp_path_factory.mktemp("serve") / "log.txt") as running:
        yield running


def ended(family: list[psutil.Process]) -> bool:
    """Whether all of them have ended within a minute."""
    deadline = time.monotonic() + 60
    while any(member.is_running() and member.status() != psutil.STATUS_ZOMBIE for member in family):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def assert_greedy(found: list[int], prompt: list[int], reference: Reference) -> None:
    tokens = list(prompt)
    for theirs in found:
        top = reference(tokens)[-1].topk(2)
        if top.values[0] - top.values[1] < CLOSE:
            break
        assert int(top.indices[0]) == theirs
        tokens.append(theirs)
    assert len(tokens) > len(prompt)


def test_the_tokens_are_those_of_transformers(server: Server, demo: Served) -> None:
    reference = transformers_logits(server.folder)
    for prompt in demo.prompts:
        assert_greedy(server.greedy(prompt, 8), prompt, reference)


def test_the_curl_that_it_prints_gets_an_answer(server: Server) -> None:
    words = shlex.split(server.lines[-1])
    done = subprocess.run([*words, "--silent", "--fail"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["choices"][0]["text"].strip()
    assert server.lines[-2].startswith("ready ")


def test_it_listens_on_this_machine_alone(server: Server) -> None:
    listening = {
        connection.laddr.ip
        for member in server.family
        for connection in member.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == server.port
    }
    assert listening == {"127.0.0.1"}


def test_a_second_one_on_its_port_is_refused_at_once(server: Server) -> None:
    said = llmshrink("serve", server.folder, "--port", str(server.port), status=2)
    assert f"port {server.port}: address already in use" in said.stderr


@pytest.mark.slow
def test_two_of_four_int4_by_the_command_line_over_http_and_ctrl_c(tmp_path: Path, demo: Served) -> None:
    out = tmp_path / "w24-int4"
    recipe = ["--recipe", "sparsegpt-2of4-gptq-w4a16", "--group-size", "64"]
    llmshrink("compress", "demo", "-o", out, *recipe, "--format", "llmshrink")
    with serving(out, tmp_path / "log.txt") as running:
        reference = transformers_logits(out)
        for prompt in demo.prompts:
            assert_greedy(running.greedy(prompt, 8), prompt, reference)
        family = running.family
        assert len(family) >= 3
        running.process.send_signal(signal.SIGINT)
        # The API server ends itself with 0 on a Ctrl-C.
        assert running.process.wait(120) == 0
        assert ended(family)
