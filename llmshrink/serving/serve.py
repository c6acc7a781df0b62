"""`llmshrink serve`: check, start, wait, say how to ask."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from llmshrink.errors import LlmshrinkError
from llmshrink.serving import options as engine_options
from llmshrink.serving import preflight, server
from llmshrink.serving.launch import CACHE_GIB, server_environment, server_words
from llmshrink.serving.server import Address

PROMPT = "Once upon a time"


def serve(
    checkpoint: Path,
    *,
    host: str,
    port: int,
    options: Sequence[str],
    allow_anonymous: bool = False,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> int:
    """Serve a checkpoint until the server ends, and return its exit code; `llmshrink.serve` says the rest."""
    asked = engine_options.read(options)
    address = Address(host, port, asked.tls)
    passed = preflight.check(checkpoint, asked)
    address.check_free()
    if not (allow_anonymous or address.local or asked.api_key or os.environ.get("VLLM_API_KEY")):
        raise LlmshrinkError(
            f"--host {host}: other machines could ask this server, and nothing would ask who they are; set VLLM_API_KEY"
            " or give --api-key, or say --allow-anonymous where that is meant"
        )
    for note in passed.notes:
        say(f"note        {note}")
    environment = server_environment(passed.engine, os.environ, options, free=psutil.virtual_memory().available)
    words = server_words(passed.engine, checkpoint, [*options, "--host", host, "--port", str(port)])
    if dry_run:
        say(f"engine      vLLM {passed.engine.version} on {passed.device}")
        say(f"would run   {shlex.join(engine_options.masked(words))}")
        return 0
    say(f"engine      vLLM {passed.engine.version} on {passed.device}; its log is on stderr")
    if CACHE_GIB in environment.keys() - os.environ.keys():
        say(f"memory      {environment[CACHE_GIB]} GiB for keys and values ({CACHE_GIB} changes it)")
    name = engine_options.value(options, ("--served-model-name",)) or os.fspath(checkpoint)

    def ready(seconds: float) -> None:
        say(f"ready       after {seconds:.0f} s at {address.url}/v1 (Ctrl-C stops it)")
        say(curl(address, name, keyed=bool(asked.api_key or os.environ.get("VLLM_API_KEY"))))

    return server.run(words, environment, address, say=lambda line: say(f"            {line}"), ready=ready)


def curl(address: Address, model: str, *, keyed: bool = False) -> str:
    """A line for the shell that asks the server to go on from a prompt. keyed: with `...` where the key belongs."""
    body = json.dumps({"model": model, "prompt": PROMPT, "max_tokens": 32, "temperature": 0})
    words = ["curl", f"{address.url}/v1/completions", "-H", "Content-Type: application/json"]
    if keyed:
        words += ["-H", "Authorization: Bearer ..."]
    if address.tls:
        words.append("--insecure")
    return shlex.join([*words, "-d", body])
