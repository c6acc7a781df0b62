"""Serving without an engine: the line that serves, and the comparison with a reference."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from llmshrink.serving import launch
from llmshrink.serving.launch import INSTALL_CPU, INSTALL_CUDA, Installed, serve_command
from llmshrink.serving.vllm import engine
from llmshrink.serving.vllm.check import ROUNDED_TOLERANCE, TOLERANCE, Reference, compare, tolerance_of
from llmshrink.serving.vllm.engine import EngineError, EngineResult, Generation, engine_logprobs

VOCABULARY = 50
PROMPTS = [[1, 2, 3], [4], [5, 6]]


def model(seed: int = 0) -> Reference:
    """A bigram model: random logits for each last token."""
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3
    return lambda tokens: table[list(tokens)]


def engine_like(reference: Reference, top: int = 20, steps: int = 4) -> EngineResult:
    """What an engine would say that computes exactly like the reference."""
    generations = []
    for prompt in PROMPTS:
        tokens, tops = list(prompt), []
        for _ in range(steps):
            likeliest = reference(tokens)[-1].double().log_softmax(-1).topk(top)
            tops.append(dict(zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)))
            tokens.append(int(likeliest.indices[0]))
        generations.append(Generation(tuple(tokens[len(prompt) :]), tuple(tops)))
    return EngineResult("an engine", tuple(generations))


def test_an_engine_that_computes_the_same_is_right() -> None:
    report = compare(engine_like(model()), PROMPTS, model())
    assert report.ok
    assert report.positions == 4 * len(PROMPTS)
    assert report.kl == pytest.approx(0, abs=1e-12)
    assert report.max_abs_diff == pytest.approx(0, abs=1e-12)
    assert report.greedy_agreement == 1


def test_an_engine_with_other_weights_is_wrong() -> None:
    report = compare(engine_like(model(1)), PROMPTS, model())
    assert not report.ok
    assert report.worst_kl > 100 * TOLERANCE
    assert report.worst_kl >= report.kl


def test_the_worst_prompt_is_the_one_that_is_off() -> None:
    right = engine_like(model())
    off = Generation(
        right.generations[2].tokens,
        tuple({token: logprob - 0.5 for token, logprob in step.items()} for step in right.generations[2].top),
    )
    report = compare(EngineResult("an engine", (*right.generations[:2], off)), PROMPTS, model())
    assert not report.ok
    assert report.worst_prompt == 2
    assert report.max_abs_diff == pytest.approx(0.5)


def test_the_divergence_of_the_whole_vocabulary_is_exact() -> None:
    theirs, ours = model(1), model()
    result = engine_like(theirs, top=VOCABULARY, steps=1)
    p, q = (reference([3])[-1].double().log_softmax(-1) for reference in (ours, theirs))
    report = compare(EngineResult("an engine", result.generations[:1]), PROMPTS[:1], ours)
    assert report.kl == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-5)


def test_what_is_rounded_on_its_way_leaves_the_engine_more_room() -> None:
    weights, inputs = {"weights": {"num_bits": 8}}, {"weights": {"num_bits": 8}, "input_activations": {"num_bits": 8}}
    found = {
        name: tolerance_of({"quantization_config": {"config_groups": groups, "kv_cache_scheme": None}})
        for name, groups in (("weights", {"a": weights}), ("both", {"a": weights, "b": inputs}))
    }
    assert found == {"weights": TOLERANCE, "both": ROUNDED_TOLERANCE}
    assert tolerance_of({}) == TOLERANCE < ROUNDED_TOLERANCE < 5e-2


def test_a_nan_is_never_right() -> None:
    right = engine_like(model())
    broken = Generation(right.generations[1].tokens, ({7: float("nan")}, *right.generations[1].top[1:]))
    report = compare(EngineResult("an engine", (right.generations[0], broken, right.generations[2])), PROMPTS, model())
    assert not report.ok
    assert report.worst_prompt == 1


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (None, "vllm serve out"),
        (Installed("vllm", "0.33.0"), "vllm serve out"),
        (Installed("vllm", "0.32.0+cpu"), "VLLM_CPU_INT4_W4A8=0 vllm serve out"),
    ],
)
def test_the_line_is_that_of_the_vllm_at_hand(
    found: Installed | None, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "installed", lambda: found)
    assert serve_command(Path("out")) == line
    assert serve_command(Path("out"), tp=2) == f"{line} --tensor-parallel-size 2"


def test_the_cpu_distribution_is_served_by_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "installed", lambda: Installed("vllm-cpu", "0.32.0"))
    line = serve_command(Path("it's out"))
    assert line.startswith("VLLM_CPU_INT4_W4A8=0 ")
    assert "-m vllm.entrypoints.openai.api_server --host 127.0.0.1 --model 'it'\"'\"'s out'" in line


def test_without_vllm_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "installed", lambda: None)
    for there, line in ((False, INSTALL_CPU), (True, INSTALL_CUDA)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        with pytest.raises(EngineError, match=f"{re.escape(line)}; or verify with --engine transformers"):
            engine_logprobs(Path("out"), PROMPTS)


def test_the_lines_that_install_vllm_are_the_readmes() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert INSTALL_CPU in readme and INSTALL_CUDA in readme


def test_a_folder_without_a_config_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engine, "installed", lambda: Installed("vllm-cpu", "0.32.0"))
    with pytest.raises(EngineError, match=r"config\.json"):
        engine_logprobs(tmp_path, PROMPTS)


def test_an_engine_that_dies_is_reported_by_its_last_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engine, "installed", lambda: Installed("vllm", "0.33.0"))
    (tmp_path / "config.json").write_text("{}")
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho out of memory\nexit 7\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    with pytest.raises(EngineError, match=r"status 7 .*: out of memory"):
        engine_logprobs(tmp_path, PROMPTS)


def test_an_engine_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engine, "installed", lambda: Installed("vllm", "0.33.0"))
    (tmp_path / "config.json").write_text("{}")
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nsleep 600\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    with pytest.raises(EngineError, match="within 0 s"):
        engine_logprobs(tmp_path, PROMPTS, timeout=0.2)
