"""`llmshrink serve`: check, start, wait, say how to ask."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from llmshrink.serving import options as engine_options
from llmshrink.serving import preflight, server
from llmshrink.serving.launch import server_environment, server_words
from llmshrink.serving.server import Address

PROMPT = "Once upon a time"


def serve(checkpoint: Path, *, host: str, port: int, options: Sequence[str], say: Callable[[str], None] = print) -> int:
    """Serve a checkpoint until the server ends, and return its exit code; `llmshrink.serve` says the rest."""
    asked = engine_options.read(options)
    address = Address(host, port, asked.tls)
    passed = preflight.check(checkpoint, asked)
    address.check_free()
    for note in passed.notes:
        say(f"note        {note}")
    say(f"engine      vLLM {passed.engine.version} on {passed.device}; its log is on stderr")
    name = _last_name(options) or os.fspath(checkpoint)

    def ready(seconds: float) -> None:
        say(f"ready       after {seconds:.0f} s at {address.url}/v1 (Ctrl-C stops it)")
        say(curl(address, name, asked.api_key))

    words = server_words(passed.engine, checkpoint, [*options, "--host", host, "--port", str(port)])
    environment = server_environment(passed.engine, os.environ)
    return server.run(words, environment, address, say=lambda line: say(f"            {line}"), ready=ready)


def curl(address: Address, model: str, api_key: str | None = None) -> str:
    """A line for the shell that asks the server to go on from a prompt."""
    body = json.dumps({"model": model, "prompt": PROMPT, "max_tokens": 32, "temperature": 0})
    words = ["curl", f"{address.url}/v1/completions", "-H", "Content-Type: application/json"]
    if api_key is not None:
        words += ["-H", f"Authorization: Bearer {api_key}"]
    if address.tls:
        words.append("--insecure")
    return shlex.join([*words, "-d", body])


def _last_name(words: Sequence[str]) -> str | None:
    return engine_options.value(words, ("--served-model-name",))
