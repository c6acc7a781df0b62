"""What a model costs: sizes from headers alone, peaks that are this model's own, speeds that are positive and right."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from helpers import make_model
from llmshrink_eval import running
from llmshrink_eval.cost import architecture, linear_bytes, stored_cost
from llmshrink_eval.engines.cost_process import CostProcess, cost_process
from llmshrink_eval.errors import EvalError
from llmshrink_eval.options import ModelSpec, Running
from llmshrink_eval.running import Usage, measure_speed
from llmshrink_eval.weightfiles import StoredTensor, read_header, weight_files
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
LINEARS = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96)
"""Of the tiny Llama: two blocks of q, k, v, o, gate, up, down."""


def test_a_dense_checkpoint_has_the_bits_of_its_dtype(model_of: Callable[..., Path]) -> None:
    folder = model_of("llama")
    cost = stored_cost(folder)
    stored = load_file(folder / "model.safetensors")
    assert cost.parameters == sum(tensor.numel() for tensor in stored.values())
    assert cost.bytes_on_disk == (folder / "model.safetensors").stat().st_size
    assert cost.bits_per_weight == 16
    assert cost.bits_per_weight_linears == 16
    assert architecture(folder).linears == LINEARS


def test_tied_weights_count_once(model_of: Callable[..., Path]) -> None:
    untied, tied = (architecture(model_of("llama", tie_word_embeddings=tied)) for tied in (False, True))
    assert untied.parameters - tied.parameters == 512 * 64


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe", "gpt2", "mamba"])
def test_files_and_model_agree_on_what_the_linears_are(family: str, tmp_path: Path) -> None:
    changes: dict[str, dict[str, Any]] = {
        "gemma3_text": {"sliding_window": 16},
        "qwen3_moe": {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "decoder_sparse_step": 1,
        },
        "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
        "mamba": {"state_size": 8},
    }
    folder = make_model(tmp_path / family, family, **changes.get(family, {}))
    original = architecture(folder)
    tensors = [tensor for file in weight_files(folder) for tensor in read_header(file)]
    assert original.blocks == 2
    # A Mamba mixer keeps two vectors beside its matrices.
    slack = 2 * 2 * 2 * 4 * 64 if family == "mamba" else 0
    assert 0 <= linear_bytes(tensors, 2) - 2 * original.linears <= slack


def test_a_packed_checkpoint_counts_scales_zero_points_and_shapes(
    model_of: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(model_of("llama"), tmp_path / "packed")
    stored = load_file(folder / "model.safetensors")
    packed, bits = {}, 0
    for key, tensor in stored.items():
        if ".layers." not in key or tensor.ndim != 2:
            packed[key] = tensor
            continue
        rows, columns = tensor.shape
        prefix = key.removesuffix(".weight")
        packed[f"{prefix}.weight_packed"] = torch.zeros(rows, columns // 8, dtype=torch.int32)
        packed[f"{prefix}.weight_scale"] = torch.zeros(rows, columns // 32, dtype=torch.bfloat16)
        packed[f"{prefix}.weight_zero_point"] = torch.zeros(rows // 8, columns // 32, dtype=torch.int32)
        packed[f"{prefix}.weight_shape"] = torch.zeros(2, dtype=torch.int64)
        packed[f"{prefix}.bias"] = torch.zeros(rows, dtype=torch.bfloat16)
        bits += rows * columns * 4 + rows * (columns // 32) * (16 + 4) + 128
    save_file(packed, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    (folder / "config.json").write_text(json.dumps(config))
    cost = stored_cost(folder)
    assert cost.parameters == stored_cost(model_of("llama")).parameters
    assert cost.bits_per_weight_linears == bits / LINEARS
    assert cost.bits_per_weight == 8 * sum(tensor.nbytes for tensor in packed.values()) / cost.parameters


def test_what_other_libraries_store_beside_a_weight_counts_too() -> None:
    linear = "model.layers.1.mlp.down_proj"
    tensors = [
        StoredTensor(f"{linear}.weight", "U8", (2048, 1), 2048),
        StoredTensor(f"{linear}.weight.absmax", "U8", (64,), 64),
        StoredTensor(f"{linear}.weight.quant_state.bitsandbytes__nf4", "U8", (90,), 90),
        StoredTensor(f"{linear}.bias", "F32", (64,), 256),
        StoredTensor("model.layers.1.input_layernorm.weight", "F32", (64,), 256),
        StoredTensor("model.layers.2.mlp.down_proj.weight", "F32", (64, 64), 16384),
        StoredTensor("lm_head.weight", "F32", (64, 64), 16384),
    ]
    assert linear_bytes(tensors, blocks=2) == 2048 + 64 + 90


def _with_header(file: Path, header: object, data: bytes = b"") -> Path:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (b"{", "isn't JSON"),
        ([], "isn't a JSON object"),
        ({"a": 1}, "isn't described"),
        ({"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}, "unknown dtype 'F33'"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "shape"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 5]}}, "isn't within the 4 bytes"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "takes 8 bytes and claims 4"),
        ({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}}, "takes 4398046511104 bytes"),
    ],
)
def test_a_damaged_header_is_bad_input(header: object, says: str, tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=says):
        read_header(_with_header(tmp_path / "a.safetensors", header, b"1234"))


def test_a_header_longer_than_its_file_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(EvalError, match="the file has 10"):
        read_header(tmp_path / "a.safetensors")


def test_a_config_of_no_known_model_is_bad_input(model_of: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(model_of("llama"), tmp_path / "strange")
    (folder / "config.json").write_text('{"model_type": "nothing_of_this_name"}')
    with pytest.raises(EvalError, match=r"transformers can't read it: .*nothing_of_this_name"):
        stored_cost(folder)


def test_a_small_model_after_a_large_one_is_not_charged_for_it() -> None:
    def touch(megabytes: int) -> int:
        with Usage() as usage:
            data = torch.ones(megabytes * 2**18)
            time.sleep(0.05)
            del data
        return usage.peak_rss_bytes

    touch(1)
    large, small = touch(300), touch(20)
    assert large - small == pytest.approx(280 * 2**20, rel=0.15)


def test_a_rise_too_short_for_the_sampler_is_seen_where_the_kernel_keeps_a_mark(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(running, "SAMPLE_SECONDS", 3600.0)
    mark = running.high_water()
    if mark is None:
        pytest.skip("needs a kernel that keeps VmHWM")
    over = mark - psutil.Process().memory_info().rss + 64 * 2**20
    with Usage() as usage:
        torch.ones(over // 4)
    assert usage.peak_rss_bytes >= mark + 2**20


def test_the_sampler_ends_with_the_work_even_if_it_fails() -> None:
    with pytest.raises(RuntimeError, match="broke"), Usage() as usage:
        raise RuntimeError("broke")
    assert usage.seconds > 0
    assert not [thread for thread in threading.enumerate() if thread.name == "memory sampler"]


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_speed_is_measured_for_each_batch_size(model_of: Callable[..., Path]) -> None:
    found = measure_speed(
        _load(model_of("llama")), torch.ones(3, 16, dtype=torch.int64), batch_sizes=(1, 7), new_tokens=4
    )
    assert [(speed.batch_size, speed.prompt_tokens, speed.new_tokens) for speed in found] == [(1, 16, 4), (7, 16, 4)]
    assert all(speed.prefill_tokens_per_second > speed.decode_tokens_per_second > 0 for speed in found)


class _Recorder:
    """Stands for a model: passes calls on and notes the tokens of each."""

    def __init__(self, model: Any, cache: bool = True) -> None:
        self.config, self.device, self.calls = model.config, model.device, []
        self._model, self._cache = model, cache
        self.forward = model.forward

    def __call__(self, ids: torch.Tensor, **options: Any) -> Any:
        self.calls.append(ids.shape[1])
        return self._model(ids, **{**options, "use_cache": options.get("use_cache", False) and self._cache})


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_decoding_reads_one_token_at_a_time_and_says_what_a_whole_forward_says(family: str, tmp_path: Path) -> None:
    model = _load(make_model(tmp_path / family, family, state_size=8))
    recorder = _Recorder(model)
    prompt = torch.arange(1, 9)[None]
    logits = []
    with torch.inference_mode():
        model.register_forward_hook(lambda _module, _inputs, output: logits.append(output.logits[0, -1]))
        running._timed(recorder, prompt, prompt[:, :3])
        assert recorder.calls == [8, 1, 1, 1]
        model(torch.cat([prompt, prompt[:, :3]], dim=1))
    torch.testing.assert_close(logits[3], logits[4], rtol=1e-4, atol=1e-4)


def test_a_model_without_a_cache_reads_everything_for_each_token(model_of: Callable[..., Path]) -> None:
    recorder = _Recorder(_load(model_of("llama")), cache=False)
    with torch.inference_mode():
        running._timed(recorder, torch.ones(1, 5, dtype=torch.int64), torch.ones(1, 3, dtype=torch.int64))
    assert recorder.calls == [5, 6, 7, 8]


def test_a_speed_beyond_the_models_positions_is_bad_input(model_of: Callable[..., Path]) -> None:
    with pytest.raises(EvalError, match=r"120 \+ 16 tokens .* 128 positions"):
        measure_speed(_load(model_of("llama")), torch.ones(1, 120, dtype=torch.int64), new_tokens=16)


TWICE = """
import json, sys
from pathlib import Path
from llmshrink_eval.engines.transformers import TransformersEngine
from llmshrink_eval.options import ModelSpec, Running
for folder in sys.argv[1:]:
    engine = TransformersEngine(ModelSpec("a model", Path(folder)), Running(), None)
    print(json.dumps(engine.cost((1,))))
"""


def test_what_a_model_costs_does_not_depend_on_its_place(tmp_path: Path) -> None:
    """In a new Python process, whose first model would pay for all imports, and after a larger one."""
    small = make_model(tmp_path / "small", "llama")
    large = make_model(tmp_path / "large", "llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=8)
    order = [str(folder) for folder in (small, large, small)]
    done = subprocess.run([sys.executable, "-c", TWICE, *order], capture_output=True, text=True, cwd=ROOT / "eval")
    assert done.returncode == 0, done.stderr
    first, between, last = map(json.loads, done.stdout.splitlines())
    assert first["peak_rss_bytes"] == pytest.approx(last["peak_rss_bytes"], rel=0.04)
    assert between["peak_rss_bytes"] > 1.2 * first["peak_rss_bytes"]
    # Not a timing: importing the libraries alone takes a hundred times as long as loading this model.
    assert max(first["load_seconds"], last["load_seconds"]) < 10 * min(first["load_seconds"], last["load_seconds"])


def test_what_goes_wrong_where_it_is_measured_is_one_line_here(model_of: Callable[..., Path], tmp_path: Path) -> None:
    broken = shutil.copytree(model_of("llama"), tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"12345678")
    with pytest.raises(EvalError, match=r"it claims 4,050,.* bytes and the file has 8") as caught:
        cost_process().ask(ModelSpec("a model", broken), Running(), (1,))
    assert "\n" not in str(caught.value)
    odd = ModelSpec("a model", model_of("llama"), loader=lambda path, options: None)
    with pytest.raises(EvalError, match=r"a model: its loader \(.*lambda.*\) must be a function of a module"):
        cost_process().ask(odd, Running(), (1,))
    # And it goes on.
    assert cost_process().ask(ModelSpec("a model", model_of("llama")), Running(), ())["peak_rss_bytes"] > 0


def test_a_process_that_was_killed_is_started_again_wherever_one_works(
    model_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("llmshrink_eval", "torch"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise ImportError('not this one')")
    monkeypatch.chdir(tmp_path)
    process, asked = CostProcess(), ModelSpec("a model", model_of("llama"))
    try:
        begun = process._started()
        os.kill(begun.pid, signal.SIGKILL)
        begun.wait()
        assert process.ask(asked, Running(), ())["load_seconds"] > 0
    finally:
        process.close()
    assert process._worker is None
