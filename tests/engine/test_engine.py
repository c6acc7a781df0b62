"""The real vLLM serves what we write, and says what transformers says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from served import Served, llmshrink

from llmshrink.serving.processor import processor_here
from llmshrink.serving.vllm.check import TOLERANCE, compare, transformers_logits
from llmshrink.serving.vllm.engine import EngineError, engine_logprobs


def test_log_probabilities_are_those_of_transformers(demo: Served) -> None:
    report = compare(demo.result, demo.prompts, transformers_logits(demo.folder))
    assert report.ok
    assert report.worst_kl <= TOLERANCE
    assert report.positions == sum(len(generation.tokens) for generation in demo.result.generations)


def test_greedy_tokens_are_those_of_transformers(demo: Served) -> None:
    logits = transformers_logits(demo.folder)
    for prompt, generation in zip(demo.prompts, demo.result.generations, strict=True):
        tokens = list(prompt)
        for theirs in generation.tokens:
            top = logits(tokens)[-1].topk(2)
            # Two first choices closer than float16 can tell apart may go either way, and all that follows with them.
            if top.values[0] - top.values[1] < 2**-6:
                break
            assert int(top.indices[0]) == theirs
            tokens.append(theirs)


def test_damaged_weights_are_told_from_right_ones_by_the_worst_prompt(demo: Served, damaged: Path) -> None:
    report = compare(demo.result, demo.prompts, transformers_logits(damaged))
    assert not report.ok
    assert report.worst_kl > 10 * TOLERANCE
    one_by_one = [
        compare(type(demo.result)(demo.result.engine, (generation,)), [prompt], transformers_logits(damaged)).kl
        for prompt, generation in zip(demo.prompts, demo.result.generations, strict=True)
    ]
    assert report.worst_prompt == one_by_one.index(max(one_by_one))


def test_verify_runs_the_engine_and_says_what_it_found_of_a_checkpoint_that_was_taught(taught: Path) -> None:
    report = json.loads(llmshrink("verify", taught, "--engine", "vllm", "--json").stdout)
    assert report["ok"]
    assert report["engine"].startswith("vLLM ")
    assert report["value"] <= report["tolerance"] == TOLERANCE


def test_verify_of_a_damaged_checkpoint_exits_1_and_names_the_worst_prompt(damaged: Path) -> None:
    said = llmshrink("verify", damaged, "--engine", "vllm", status=1)
    assert "held-out window" in said.stdout


@pytest.mark.long  # tests/engine/test_families.py and test_schemes.py hold groups of 32 and zero-points
def test_wiki7m_is_served_in_mixed_groups_and_asymmetric(
    wiki7m: Path, calibration_text: Path, tmp_path: Path, serve_once: Callable[[Path], Served]
) -> None:
    if "AVX-512" in processor_here().lacks:
        pytest.skip("groups of 16 are for vLLM's own int4 kernel, which takes AVX-512, and this CPU has none")
    recipe = tmp_path / "mixed.yaml"
    recipe.write_text(
        "name: mixed\nsummary: every kind of int4 that the CPU engine serves\n"
        "steps:\n  - quantize: {method: gptq, bits: 4, group_size: 128, symmetric: true}\n"
        "ignore: [lm_head]\n"
        "overrides:\n"
        '  - {match: "*.self_attn.[qkv]_proj", quantize: {symmetric: false, group_size: 16}}\n'
        '  - {match: "*.self_attn.o_proj", quantize: {group_size: -1}}\n'
        '  - {match: "model.layers.2.mlp.*", quantize: {group_size: 64}}\n'
        '  - {match: "model.layers.3.mlp.*", quantize: {group_size: 32}}\n'
        '  - {match: "model.layers.5.*", ignore: true}\n'
    )
    out = tmp_path / "wiki7m"
    words = ["--recipe", recipe, "--calibration", calibration_text, "--samples", "8", "--seq-len", "64"]
    llmshrink("quantize", wiki7m, "-o", out, *words)
    served = serve_once(out)
    assert compare(served.result, served.prompts, transformers_logits(out)).ok


def test_bits_that_the_cpu_build_does_not_serve_are_refused_at_once(tmp_path: Path, story: Path) -> None:
    from llmshrink.formats.compressed_tensors import GroupedIntScheme, quantization_config

    config = {"quantization_config": quantization_config({"a.b": GroupedIntScheme(5, 64, True)}, [])}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(EngineError, match="5-bit"):
        engine_logprobs(tmp_path, [[1, 2]])


def test_what_the_engine_itself_refuses_is_one_line(model_of: Callable[..., Path]) -> None:
    heads_of_no_kernel = model_of("llama", head_dim=16)
    with pytest.raises(EngineError, match="doesn't serve") as refused:
        engine_logprobs(heads_of_no_kernel, [[1, 2]])
    assert "\n" not in str(refused.value)


def test_the_reference_is_the_whole_distribution(demo: Served) -> None:
    logits = transformers_logits(demo.folder)(demo.prompts[0])
    assert logits.dtype == torch.float32
    assert logits.shape[0] == len(demo.prompts[0])
