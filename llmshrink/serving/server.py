"""vLLM's server as a child: started, waited for until it is healthy, its signals and its exit code passed on.

The child leads a process group of its own, so that Ctrl-C reaches it once, from here, and so that whatever it leaves
behind can be ended with it. What it prints goes to stderr; stdout has our lines alone. SIGINT, SIGTERM, SIGHUP and
SIGQUIT are passed on; a second one ends the whole group, for a server that hangs. Should this process be killed with no
chance to pass anything on, the whole group ends as well (`llmshrink_eval.engines.watched`).
"""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any, Self

from llmshrink_eval.engines.child import start
from llmshrink_eval.refused import refused

from llmshrink.errors import LlmshrinkError

POLL = 0.25
"""Seconds between two looks at a server that isn't healthy yet."""
PROGRESS = 15.0
"""Seconds between two lines while it starts: 15 s of CPU, which is minutes of wall time on a busy machine."""
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@dataclass(frozen=True)
class Address:
    """Where the server listens: host and port as given, and whether it speaks https."""

    host: str
    port: int
    tls: bool = False

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it. False for a name that nobody knows, too."""
        try:
            found = socket.getaddrinfo(self.host or None, None, flags=socket.AI_PASSIVE)
        except (OSError, UnicodeError):  # the latter of a name that none can be
            return False
        places = [ipaddress.ip_address(str(place[0]).partition("%")[0]) for *_, place in found]
        # Which addresses of IPv4 within IPv6 are loopback depends on Python's version.
        return all((getattr(place, "ipv4_mapped", None) or place).is_loopback for place in places)

    @property
    def reached(self) -> str:
        """The host by which this machine reaches it."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.host, self.host)

    @property
    def url(self) -> str:
        """Where this machine reaches it."""
        host = self.reached
        return f"{'https' if self.tls else 'http'}://{f'[{host}]' if ':' in host else host}:{self.port}"

    def check_free(self) -> None:
        """Raise LlmshrinkError where the server couldn't listen: the port is taken, the host isn't this machine's."""
        if not 0 < self.port < 65536:
            raise LlmshrinkError(f"--port {self.port}: a number from 1 to 65535 is expected")
        try:
            family, kind, _, _, place = socket.getaddrinfo(
                self.host or None, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(place)
        except (OSError, UnicodeError) as error:
            way = "name another with --port or --host"
            said = refused(error, way) if isinstance(error, OSError) else f"{error}; {way}"
            raise LlmshrinkError(
                f"can't listen on {self.host}, port {self.port}: {said[:1].lower()}{said[1:]}"
            ) from error


def run(
    words: Sequence[str],
    environment: dict[str, str],
    address: Address,
    *,
    say: Callable[[str], None],
    ready: Callable[[float], None],
) -> int:
    """Run a server until it ends; returns its exit code (128 + the signal's number where one ended it).

    words: a command of `llmshrink_eval.engines.child.python`; environment: all of it.
    say: gets a line every PROGRESS seconds while it starts. ready: called once, with the seconds it took, when its
    health check answers.
    """
    with _Child(words, environment) as child:
        start = time.monotonic()
        if _until_healthy(child.process, address, lambda seconds: say(f"starting, {seconds:.0f} s")):
            ready(time.monotonic() - start)
        status = child.process.wait()
    return 128 - status if status < 0 else status


def _until_healthy(process: subprocess.Popen[bytes], address: Address, waiting: Callable[[float], None]) -> bool:
    """Wait for the health check; False when the server ended before it answered."""
    start = said = time.monotonic()
    while process.poll() is None:
        if _healthy(address):
            return True
        now = time.monotonic()
        if now - said >= PROGRESS:
            said = now
            waiting(now - start)
        time.sleep(POLL)
    return False


def _healthy(address: Address) -> bool:
    import ssl
    from http.client import HTTPConnection, HTTPException, HTTPSConnection

    # Spoken to directly: no proxy knows our own child, where a redirect leads is another server, and its certificate
    # isn't for its loopback name.
    connection = (
        HTTPSConnection(address.reached, address.port, timeout=10, context=ssl._create_unverified_context())
        if address.tls
        else HTTPConnection(address.reached, address.port, timeout=10)
    )
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):  # the latter of what speaks no HTTP
        return False
    finally:
        connection.close()


class _Child:
    """While open: a child in a group of its own, to which signals go; afterwards nothing of the group is left."""

    process: subprocess.Popen[bytes]

    def __init__(self, words: Sequence[str], environment: dict[str, str]) -> None:
        self._words, self._environment = words, environment
        self._received: list[int] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # Handlers before the child: a signal in between would leave it behind.
        if threading.current_thread() is threading.main_thread():
            for handled in _PASSED_ON:
                self._before[handled] = signal.signal(handled, self._receive)
        try:
            self.process = start(self._words, self._environment, stdout=_STDERR)
        except BaseException:
            self._restore()
            raise
        for number in self._received:
            self.process.send_signal(number)
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self._kill()
            self.process.wait()
            assert self.process.stdin is not None
            self.process.stdin.close()
        finally:
            self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received.append(number)
        if not hasattr(self, "process"):
            return
        if len(self._received) == 1:
            self.process.send_signal(number)
        else:
            self._kill()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def _restore(self) -> None:
        for handled, before in self._before.items():
            signal.signal(handled, before)


_STDERR = 2
