"""The plugin in the real vLLM: it serves 2:4 and what vLLM has no kernel for, and leaves the rest as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packed import pack_checkpoint
from served import Served, llmshrink
from sparse24 import write_pair

from llmshrink.demo import language
from llmshrink.formats.compressed_tensors import GroupedIntScheme
from llmshrink.serving.processor import processor_here
from llmshrink.serving.vllm.check import TOLERANCE, compare, transformers_logits
from llmshrink.serving.vllm.engine import engine_logprobs

DEMO = Path(language.__file__).parent / "model"
MAX_TOKENS = 8


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    """What a process of vLLM says of the plugin inside it."""
    script = Path(__file__).with_name("inside_vllm.py")
    environment = {**os.environ, "PYTHONPATH": os.fspath(script.parents[1]), "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [sys.executable, os.fspath(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_registering_takes_milliseconds_and_may_be_done_again(facts: dict[str, Any]) -> None:
    said = facts["registration"]
    assert said["config"] == "LlmshrinkConfig"
    assert not said["kernels_loaded_before"]
    assert said["seconds"] < 0.1
    for platform in ("CUDA", "CPU"):
        assert said["kernels"][platform].count("LlmshrinkLinearKernel") == 1
        assert said["kernels"][platform][-1] == "LlmshrinkLinearKernel"
    assert "LlmshrinkLinearKernel" not in said["kernels"]["ROCM"]


def test_two_ranks_together_are_the_whole_layer(facts: dict[str, Any]) -> None:
    for bits in ("4", "8", "16"):
        for layer in ("qkv", "gate_up", "o", "down"):
            assert 0 < facts["ranks"][bits][layer] < 2**-8, (bits, layer)


def test_a_cut_inside_a_byte_or_a_group_is_refused_by_name(facts: dict[str, Any]) -> None:
    assert facts["refusals"]["byte"].startswith("a.down_proj: a rank has 20 of 40 inputs")
    assert facts["refusals"]["group"].startswith("a.down_proj: groups of 64 don't divide a rank's 96 of 192 inputs")


def test_grouped_integers_in_both_of_vllms_layouts(facts: dict[str, Any]) -> None:
    assert len(facts["grouped"]) == 12
    assert all(0 < error <= 1 for error in facts["grouped"].values()), facts["grouped"]


def test_targets_are_renamed_as_vllm_renames_a_wrapped_model(facts: dict[str, Any]) -> None:
    assert facts["renamed"] == ["language_model.model.layers.0.mlp.down_proj"]


def test_llmshrink_and_vllm_live_in_one_environment() -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    # The CPU build names companions of torch that it doesn't need here; they are left out on purpose.
    companions = tuple(
        f"requires {name}, which is not installed." for name in ("torchaudio", "torchcodec", "torchvision")
    )
    complaints = [line for line in done.stdout.splitlines() if not line.endswith(companions)]
    assert complaints in ([], ["No broken requirements found."])


def test_on_a_cpu_no_file_of_ours_that_needs_triton_is_imported(facts: dict[str, Any]) -> None:
    assert facts["triton_files"] == []


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "group_size"), [(16, None), (8, -1), (4, 64)])
def test_two_of_four_says_what_transformers_says_of_the_dense_model(
    bits: int, group_size: int | None, demo: Served, tmp_path: Path
) -> None:
    # Values of 16 bits are in float16, as the engine is: bfloat16 ones would be rounded to it.
    dtype = torch.float16 if bits == 16 else torch.bfloat16
    pair = write_pair(DEMO, tmp_path, bits=bits, group_size=group_size, dtype=dtype)
    result = engine_logprobs(pair.sparse, demo.prompts, max_tokens=MAX_TOKENS)
    report = compare(result, demo.prompts, transformers_logits(pair.dense))
    assert report.ok
    assert report.worst_kl < TOLERANCE / 10
    assert not compare(result, demo.prompts, transformers_logits(DEMO)).ok


@pytest.mark.slow
def test_bfloat16_values_are_served_in_bfloat16(demo: Served, tmp_path: Path) -> None:
    pair = write_pair(DEMO, tmp_path, bits=16, group_size=None, dtype=torch.bfloat16)
    result = engine_logprobs(pair.sparse, demo.prompts, max_tokens=MAX_TOKENS, dtype="bfloat16")
    report = compare(result, demo.prompts, transformers_logits(pair.dense), tolerance=10 * TOLERANCE)
    assert report.ok


@pytest.mark.slow
def test_own_reader_gives_the_reference_of_own_format(tmp_path: Path, demo: Served) -> None:
    pair = write_pair(DEMO, tmp_path, bits=4, group_size=32, dtype=torch.bfloat16)
    ours, plain = transformers_logits(pair.sparse), transformers_logits(pair.dense)
    for prompt in demo.prompts:
        # The dense copy has bfloat16 elsewhere too; the numbers are the same.
        torch.testing.assert_close(ours(prompt), plain(prompt), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "symmetric"), [(3, True), (8, False)])
def test_bits_without_a_kernel_of_vllms_are_served_by_ours(
    bits: int, symmetric: bool, demo: Served, tmp_path: Path
) -> None:
    folder = pack_checkpoint(DEMO, tmp_path / "packed", GroupedIntScheme(bits, 64, symmetric))
    result = engine_logprobs(folder, demo.prompts, max_tokens=MAX_TOKENS)
    assert compare(result, demo.prompts, transformers_logits(folder)).ok


@pytest.mark.slow
def test_standard_int4_is_the_same_without_the_plugin(
    demo: Served, demo_w4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "AVX-512" in processor_here().lacks:
        pytest.skip("vLLM's own int4 kernel for CPUs takes AVX-512, and this CPU has none")
    monkeypatch.setenv("VLLM_PLUGINS", "")
    assert engine_logprobs(demo_w4, demo.prompts, max_tokens=MAX_TOKENS) == demo.result


@pytest.mark.slow
def test_our_kernel_goes_first_when_asked(demo: Served, demo_w4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMSHRINK_VLLM_KERNELS", "first")
    result = engine_logprobs(demo_w4, demo.prompts, max_tokens=MAX_TOKENS)
    assert compare(result, demo.prompts, transformers_logits(demo_w4)).ok
    # Sums in another order: the last bits tell that it was another kernel.
    if not processor_here().lacks:
        assert result != demo.result


@pytest.mark.slow
def test_own_format_without_the_plugin_is_vllms_refusal(
    tmp_path: Path, demo: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = write_pair(DEMO, tmp_path, bits=4, group_size=64, dtype=torch.bfloat16)
    monkeypatch.setenv("VLLM_PLUGINS", "")
    with pytest.raises(ValueError, match=r"doesn't serve .*llmshrink"):
        engine_logprobs(pair.sparse, demo.prompts)


@pytest.mark.slow
def test_parts_of_a_fused_layer_that_differ_are_vllms_refusal(tmp_path: Path, demo: Served) -> None:
    pair = write_pair(DEMO, tmp_path, bits=4, group_size=64, dtype=torch.bfloat16)
    config = json.loads((pair.sparse / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["targets"].remove("model.layers.1.self_attn.v_proj")
    (pair.sparse / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.qkv_proj is one layer in vLLM, but its parts"):
        engine_logprobs(pair.sparse, demo.prompts)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", [pytest.param("magnitude-2of4", marks=pytest.mark.long), "sparsegpt-2of4-gptq-w4a16"]
)
def test_what_the_command_line_writes_is_verified_in_the_engine(
    recipe: str, tmp_path: Path, serve_once: Callable[[Path], Served]
) -> None:
    out = tmp_path / "out"
    words = ["--group-size", "64"] if "gptq" in recipe else []
    llmshrink("compress", "demo", "-o", out, "--recipe", recipe, "--format", "llmshrink", *words)
    report = json.loads(llmshrink("verify", out, "--engine", "vllm", "--json").stdout)
    assert report["ok"]
    assert report["value"] <= report["tolerance"] == TOLERANCE
    served = serve_once(out)
    assert compare(served.result, served.prompts, transformers_logits(out)).greedy_agreement > 0.9
