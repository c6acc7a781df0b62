"""The real vLLM as it runs on an x86 CPU with AVX2 alone: without an int4 kernel, and with int8 sums that overflow.

The processes here are told that the CPU has nothing newer (`served.AVX2`), so that vLLM loads the extension for AVX2.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from served import AVX2, TESTS, llmshrink

import llmshrink as api
from llmshrink.serving.processor import processor_here
from llmshrink.serving.vllm.check import TOLERANCE, compare, transformers_logits
from llmshrink.serving.vllm.engine import engine_logprobs

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="vLLM has extensions by instructions on x86 alone"
)
OURS, OWN_INT4 = "LlmshrinkLinearKernel", "CPUWNA16LinearKernel"
OUR_INT8, OWN_INT8 = "LlmshrinkInt8Kernel", "CPUInt8ScaledMMLinearKernel"


def inside(environment: dict[str, str]) -> dict[str, Any]:
    """What a process of vLLM says of the kernels that it has."""
    variables = {**os.environ, "PYTHONPATH": os.fspath(TESTS), "VLLM_LOGGING_LEVEL": "ERROR", **environment}
    command = [sys.executable, os.fspath(TESTS / "engine" / "inside_vllm.py"), "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False, env=variables)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_ours_are_picked_where_vllms_own_are_not_there_or_wrong_and_are_right() -> None:
    """A checkpoint's origin doesn't matter to the choice; kinds that ours don't take stay with vLLM's."""
    found = inside(AVX2)
    assert not found["own_int4"] and found["lacks"] == ["AVX-512", "VNNI"]
    chosen = found["chosen"]
    assert {chosen[kind] for kind in chosen if kind.startswith("int4")} == {OURS} == {chosen["int8 weights"]}
    assert chosen["int8 products"] == OUR_INT8 and chosen["int8 products, static"] == OWN_INT8
    assert len(found["int4"]) == 16
    assert all(0 < error <= 1 for error in found["int4"].values()), found["int4"]
    assert found["int8_products"] <= 1
    # vLLM's own check takes multiples of 16 in any dtype; its packing raises for those that aren't of 32.
    assert found["to_amx"] == {"torch.bfloat16": [32, 96], "torch.float16": []}


def test_vllms_own_are_picked_where_they_are_there_and_right() -> None:
    if processor_here().lacks:
        pytest.skip(f"this CPU has no {' and no '.join(sorted(processor_here().lacks))}")
    found = inside({})
    assert found["own_int4"] and found["lacks"] == []
    chosen = found["chosen"]
    assert {chosen[kind] for kind in chosen if kind.startswith("int4")} == {OWN_INT4}
    assert chosen["int8 weights"] == OURS
    assert chosen["int8 products"] == OWN_INT8 == chosen["int8 products, static"]
    assert found["int8_products"] <= 1
    assert all(0 < error <= 1 for error in found["int4"].values()), found["int4"]


def test_the_demo_is_verified_in_the_engine(demo_w4: Path) -> None:
    report = json.loads(llmshrink("verify", demo_w4, "--engine", "vllm", "--json", environment=AVX2).stdout)
    assert report["ok"] and report["value"] < TOLERANCE / 10


def test_every_kind_of_int4_is_served_in_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With zero-points and without, in all groups, merged layers and single ones, and 8 bits beside them."""
    recipe = tmp_path / "mixed.yaml"
    recipe.write_text(
        "name: mixed\nsummary: every kind of integers that the plugin serves without AVX-512\n"
        "steps:\n  - quantize: {method: rtn, bits: 4, group_size: 128, symmetric: true}\n"
        "ignore: [lm_head]\n"
        "overrides:\n"
        '  - {match: "*.self_attn.[qkv]_proj", quantize: {symmetric: false, group_size: 32}}\n'
        '  - {match: "*.self_attn.o_proj", quantize: {group_size: -1}}\n'
        '  - {match: "model.layers.1.mlp.*", quantize: {symmetric: false, group_size: 64}}\n'
        '  - {match: "model.layers.2.mlp.*", quantize: {bits: 8, group_size: 32}}\n'
    )
    out = tmp_path / "mixed"
    api.quantize("demo", output=out, recipe=recipe)
    prompts = [[3, 5, 7, 9, 11, 13], [20, 21, 22]]
    for name, said in AVX2.items():
        monkeypatch.setenv(name, said)
    result = engine_logprobs(out, prompts, dtype="bfloat16")
    assert compare(result, prompts, transformers_logits(out), tolerance=10 * TOLERANCE).ok


def test_without_the_plugin_the_reason_and_the_way_out_come_before_the_engine(demo_w4: Path) -> None:
    off = {**AVX2, "LLMSHRINK_VLLM_KERNELS": "off"}
    for words in (("serve", demo_w4, "--dry-run"), ("verify", demo_w4, "--engine", "vllm")):
        said = llmshrink(*words, status=2, environment=off).stderr
        assert "int4 kernel for CPUs takes AVX-512, and this CPU has none" in said
        assert "unset LLMSHRINK_VLLM_KERNELS" in said and "--bits 4" not in said
    assert "would run" in llmshrink("serve", demo_w4, "--dry-run", environment=AVX2).stdout
