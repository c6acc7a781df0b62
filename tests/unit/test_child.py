"""Python processes of ours: what they import, and that they end with whoever started them."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from llmshrink_eval.engines.child import import_path, isolated, ours, python

CHILD = """
import subprocess, sys, time
from llmshrink_eval.engines.child import end_with_input
end_with_input()
started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(started.pid, flush=True)
time.sleep(600)
"""
PARENT = """
import subprocess, sys, time
child = subprocess.Popen(
    [sys.executable, sys.argv[1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
)
print(child.pid, int(child.stdout.readline()), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP, signal.SIGTERM])
def test_a_child_and_what_it_started_end_with_the_parent(number: signal.Signals, tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.py" for name in ("child", "parent")}
    files["child"].write_text(CHILD)
    files["parent"].write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, files["parent"], files["child"]], env=ours({}), stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    started = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    assert len(started) == 2
    parent.send_signal(number)
    parent.wait()
    parent.stdout.close()
    gone, alive = psutil.wait_procs(started, timeout=30)
    for each in alive:
        each.kill()
    assert len(gone) == 2, alive


def test_a_child_and_its_own_leave_the_current_folder_out(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('json of the current folder')\n")
    (tmp_path / "there.py").write_text(
        "import json, subprocess, sys\n"
        "json.dumps(1)\n"
        "sys.exit(subprocess.run([sys.executable, '-c', 'import json; json.dumps(1)']).returncode)\n"
    )
    package = tmp_path / "elsewhere"
    package.mkdir()
    (tmp_path / "there.py").rename(package / "there.py")
    environment = isolated({"PYTHONPATH": str(package)})
    done = subprocess.run(python("there"), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_empty_place_of_modules_isnt_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["", "/somewhere", ""])
    assert import_path().split(":")[1:] == ["/somewhere"]
    assert ours({"A": "1"})["A"] == "1" and ours({})["PYTHONSAFEPATH"] == "1"
