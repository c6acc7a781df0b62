"""Checkpoints made by the command line, and the real engine's answer to each, asked once a session."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from served import Served, llmshrink

from llmshrink.serving.launch import installed
from llmshrink.serving.vllm.engine import engine_logprobs

PROMPTS, PROMPT_TOKENS, MAX_TOKENS = 6, 24, 8


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.engine)


@pytest.fixture(autouse=True, scope="session")
def _needs_vllm() -> None:
    if installed() is None:
        pytest.skip("needs vLLM in this environment (`make test` installs it)")


@pytest.fixture(scope="session")
def serve_once() -> Callable[[Path], Served]:
    """A checkpoint's folder -> the engine's answer to the beginnings of its held-out windows."""

    def ask(folder: Path) -> Served:
        from safetensors.torch import load_file

        ids = load_file(folder / "verify" / "held_out.safetensors")["input_ids"]
        prompts = [window[: PROMPT_TOKENS - 3 * row].tolist() for row, window in enumerate(ids[:PROMPTS])]
        return Served(folder, prompts, engine_logprobs(folder, prompts, max_tokens=MAX_TOKENS))

    return ask


@pytest.fixture(scope="session")
def demo_w4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, quantized by the default recipe."""
    out = tmp_path_factory.mktemp("engine") / "demo-w4"
    llmshrink("quantize", "demo", "-o", out)
    return out


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model rounded to nearest, its scales and norms then taught by it for a few steps."""
    from safetensors.torch import load_file

    student, out = (tmp_path_factory.mktemp("engine") / name for name in ("rounded", "taught"))
    llmshrink("quantize", "demo", "-o", student, "--recipe", "rtn-w4a16")
    llmshrink("distill", "demo", student, "-o", out, "--steps", "24", "--seq-len", "64", "--eval-steps", "12")
    before, after = (load_file(folder / "model-block-00000.safetensors") for folder in (student, out))
    scales = [key for key in before if key.endswith("weight_scale")]
    assert scales
    assert any((before[key] != after[key]).any() for key in scales)
    assert all((before[key] == after[key]).all() for key in before if key.endswith("weight_packed"))
    return out


@pytest.fixture(scope="session")
def demo(demo_w4: Path, serve_once: Callable[[Path], Served]) -> Served:
    return serve_once(demo_w4)


@pytest.fixture
def damaged(demo_w4: Path, tmp_path: Path) -> Path:
    """A copy of the demo's checkpoint in which the packed weights of one linear are another's."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(demo_w4, tmp_path / "damaged")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    key = "model.layers.1.mlp.down_proj.weight_packed"
    tensors = load_file(folder / index[key])
    tensors[key] = tensors[key].flip(0).contiguous()
    save_file(tensors, folder / index[key], metadata={"format": "pt"})
    return folder
