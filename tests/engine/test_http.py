"""The line that the summary prints serves the checkpoint over HTTP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
from served import Served

from llmshrink.serving.launch import serve_command

START = 900.0
"""Seconds that a server may take to start on a busy machine."""


def answer(url: str, body: dict[str, object] | None = None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(url, data, {"Content-Type": "application/json"}), timeout=300) as response:
        said: bytes = response.read()
    return said


def wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server ended:\n{log.read_text()[-3000:]}"
        try:
            answer(f"{url}/health")
        except (URLError, OSError):
            time.sleep(1)
        else:
            return
    pytest.fail(f"the server wasn't healthy after {START:.0f} s:\n{log.read_text()[-3000:]}")


@pytest.fixture
def url(demo_w4: Path, tmp_path: Path) -> Iterator[str]:
    """The address of a server started by the line, with what makes it small and quick to start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    line = f"{serve_command(demo_w4)} --port {port} --dtype float16 --enforce-eager --max-model-len 128"
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    log = tmp_path / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            line, shell=True, env={**os.environ, **environment}, stdout=output, stderr=output, start_new_session=True
        )
    try:
        address = f"http://127.0.0.1:{port}"
        wait_until_healthy(address, process, log)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_the_printed_line_serves_the_same_tokens(url: str, demo: Served) -> None:
    model = json.loads(answer(f"{url}/v1/models"))["data"][0]["id"]
    body = {
        "model": model,
        "prompt": demo.prompts[0],
        "max_tokens": 4,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 1,
        "return_tokens_as_token_ids": True,
    }
    choice = json.loads(answer(f"{url}/v1/completions", body))["choices"][0]
    tokens = [int(token.removeprefix("token_id:")) for token in choice["logprobs"]["tokens"]]
    assert tokens == list(demo.result.generations[0].tokens[:4])
