"""The real vLLM serves a 4-bit checkpoint of every family, and says what transformers says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES, SERVABLE
from safetensors.torch import load_file

import llmshrink
from llmshrink.serving.vllm.check import compare, transformers_logits
from llmshrink.serving.vllm.engine import ENVIRONMENT, TIMEOUT, TOP, EngineResult, Generation, closest_dtype

MAX_TOKENS = 8


@pytest.fixture(scope="module")
def answers(
    model_of: Callable[..., Path], story: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, list[list[int]], dict[str, Any]]]:
    """Family -> its checkpoint, prompts longer than a window, and what the engine said, all in one process."""
    folder = tmp_path_factory.mktemp("families")
    questions = []
    for number, family in enumerate(FAMILIES.values()):
        source, out = (
            model_of(family.model_type, **{**family.changes, **SERVABLE, **family.served}),
            folder / f"{number}",
        )
        llmshrink.quantize(source, output=out, calibration=story, samples=8, seq_len=32, group_size=32, verify=False)
        ids = load_file(out / "verify" / "held_out.safetensors")["input_ids"]
        prompts = [window[: 24 - 3 * row].tolist() for row, window in enumerate(ids[:4])]
        asked = {"model": str(out), "dtype": closest_dtype(out), "prompts": prompts}
        questions.append({**asked, "max_tokens": MAX_TOKENS, "top": TOP})
    (folder / "questions.json").write_text(json.dumps(questions))
    script = Path(__file__).with_name("several.py")
    done = subprocess.run(
        [sys.executable, script, folder / "questions.json", folder / "answers.json"],
        env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads((folder / "answers.json").read_text())
    return {
        title: (Path(asked["model"]), asked["prompts"], answer)
        for title, asked, answer in zip(FAMILIES, questions, said, strict=True)
    }


@pytest.mark.parametrize("title", FAMILIES)
def test_cell(title: str, answers: dict[str, tuple[Path, list[list[int]], dict[str, Any]]]) -> None:
    folder, prompts, said = answers[title]
    assert "error" not in said, said["error"]
    generations = tuple(
        Generation(tuple(each["tokens"]), tuple(dict(step) for step in each["top"])) for each in said["generations"]
    )
    report = compare(EngineResult("vLLM", generations), prompts, transformers_logits(folder))
    assert report.ok, report
