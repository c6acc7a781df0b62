"""From a model's name on the Hub to a published one, through the real entry point; the Hub is on 127.0.0.1."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from hub_server import TOKEN, HubServer

from llmshrink.demo import model_folder

LLMSHRINK = str(Path(sys.executable).with_name("llmshrink"))


def test_a_model_of_the_hub_becomes_a_published_one_that_can_be_used(tmp_path: Path) -> None:
    with HubServer(part=1 << 17) as hub:
        commit = hub.publish("owner/demo", Path(model_folder()))
        environment = {**os.environ, **hub.environment(tmp_path / "home")}

        def llmshrink(*arguments: str) -> str:
            command = [LLMSHRINK, *arguments]
            done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            assert TOKEN not in done.stdout + done.stderr
            return done.stdout

        hub.fail("PUT", "/part/2", cut=5000)
        made = ("--calibration", "demo", "--samples", "8", "--seq-len", "64")
        said = llmshrink("quantize", "owner/demo", "-o", "out", *made, "--push", "user/demo-w4", "--private")
        assert f"pushed      {hub.url}/user/demo-w4/tree/" in said
        files = hub.files("user/demo-w4")
        for path in (tmp_path / "out").rglob("*"):
            name = path.relative_to(tmp_path / "out").as_posix()
            assert path.is_dir() or name == "README.md" or files[name] == path.read_bytes()
        card = files["README.md"].decode()
        assert "base_model: owner/demo\n" in card and "license: apache-2.0\n" in card and commit in card
        assert not any(TOKEN.encode() in data or str(tmp_path).encode() in data for data in files.values())
        assert len(llmshrink("generate", "user/demo-w4", "Once", "--max-new-tokens", "8").split()) > 4
