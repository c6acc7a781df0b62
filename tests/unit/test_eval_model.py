"""Loading: float32, decompressed from the first forward on, or streamed with the same numbers and little memory."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from llmshrink_eval.errors import EvalError
from llmshrink_eval.model import LoadOptions, load_model, model_limit
from llmshrink_eval.passes import input_device, run_pass
from llmshrink_eval.protocol import build_windows
from llmshrink_eval.results import Results
from llmshrink_eval.text import Text
from safetensors.torch import load_file, save_file

import llmshrink
from llmshrink.demo.tokenizer import build
from llmshrink.formats import compressed_tensors

IDS = torch.arange(40).view(2, 20)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return out


def test_a_cpu_computes_in_float32_whatever_is_asked(model_of: Callable[..., Path]) -> None:
    model = load_model(model_of("llama"), LoadOptions(dtype=torch.bfloat16))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert LoadOptions(device="cuda:1", dtype=torch.bfloat16).used_dtype == torch.bfloat16


def test_a_compressed_checkpoint_is_right_from_the_first_forward(
    model_of: Callable[..., Path], story: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file

    out = tmp_path / "out"
    llmshrink.quantize(
        model_of("llama"), output=out, recipe="rtn-w4a16", calibration=story, samples=6, seq_len=32, group_size=32
    )
    capfd.readouterr()
    model = load_model(out, LoadOptions())
    assert capfd.readouterr() == ("", "")
    first, second = logits(model), logits(model)
    assert torch.equal(first, second)
    stored = {key: tensor for file in out.glob("*.safetensors") for key, tensor in load_file(file).items()}
    plain = load_model(model_of("llama"), LoadOptions())
    for name, scheme in compressed_tensors.schemes(model.config.quantization_config.to_dict()).items():
        weight = compressed_tensors.read(name, stored.__getitem__, scheme).dequantize(torch.float32)
        assert torch.equal(model.get_submodule(name).weight, weight)
        plain.get_submodule(name).weight.data.copy_(weight)
    assert torch.equal(first, logits(plain))


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_streamed_model_says_the_same_to_the_bit(
    family: str, changes: dict[str, Any], model_of: Callable[..., Path], story: Path, tmp_path: Path
) -> None:
    folder = model_of(family, **changes)
    whole = load_model(folder, LoadOptions())
    streamed = load_model(folder, LoadOptions(offload=tmp_path))
    assert all(parameter.is_meta for parameter in streamed.parameters())
    assert input_device(streamed) == torch.device("cpu")
    assert torch.equal(logits(streamed), logits(whole))
    assert not list(tmp_path.iterdir())
    tokenizer: Any = build(128)
    text = Text("a text", (story.read_text()[:900],))
    windows = build_windows(text, tokenizer, protocol="gptq", window=32, limit=128)
    run_pass(whole, windows, tokenizer, keep=tmp_path / "base")
    found = run_pass(streamed, windows, tokenizer, against=tmp_path / "base")
    assert max(float(one.divergence.kl.max()) for one in found.windows if one.divergence) == 0.0
    assert all(parameter.is_meta for parameter in streamed.parameters())


def test_fused_experts_are_streamed_by_transformers_own_way(model_of: Callable[..., Path], tmp_path: Path) -> None:
    folder = model_of("mixtral", num_local_experts=4, num_experts_per_tok=2)
    whole, streamed = load_model(folder, LoadOptions()), load_model(folder, LoadOptions(offload=tmp_path))
    assert torch.equal(logits(streamed), logits(whole))


def test_what_cannot_be_loaded_is_one_line(tmp_path: Path, model_of: Callable[..., Path]) -> None:
    with pytest.raises(EvalError, match=r"no config\.json there; name a model"):
        load_model(tmp_path, LoadOptions())
    (tmp_path / "config.json").write_text('{"model_type": "nothing_known"}')
    with pytest.raises(EvalError, match="transformers can't read it") as caught:
        load_model(tmp_path, LoadOptions())
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(EvalError, match=r"a compressed checkpoint \(gptq\) is decompressed whole; leave --offload out"):
        load_model(tmp_path, LoadOptions(offload=tmp_path / "off"))


@pytest.mark.parametrize("offloaded", [False, True])
def test_a_checkpoint_that_is_not_whole_is_not_filled_with_random_numbers(
    offloaded: bool, model_of: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(model_of("llama"), tmp_path / "part")
    tensors = load_file(folder / "model.safetensors")
    lost = "model.layers.1.mlp.up_proj.weight"
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    options = LoadOptions(offload=tmp_path / "off" if offloaded else None)
    with pytest.raises(EvalError, match=rf"doesn't find {re.escape(lost)} in it; is the checkpoint whole\?"):
        load_model(folder, options)


def test_a_compression_that_transformers_does_not_know_is_refused(
    model_of: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(model_of("llama"), tmp_path / "foreign")
    tensors = load_file(folder / "model.safetensors")
    packed = {name: name.replace("_proj.weight", "_proj.weight_packed") for name in tensors}
    save_file({packed[name]: tensors[name] for name in tensors}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "somebodys"}}))
    with pytest.raises(EvalError, match=r"and \d+ more tensors in it; it may not know the compression, somebodys"):
        load_model(folder, LoadOptions())


def test_a_loader_of_the_callers_takes_over(model_of: Callable[..., Path]) -> None:
    asked: list[object] = []

    def loader(path: str, options: LoadOptions) -> Any:
        asked.append((path, options))
        return load_model(model_of("llama"), options).train()

    model = load_model("somewhere", LoadOptions(), loader)
    assert asked == [("somewhere", LoadOptions())]
    assert not model.training


def test_the_limit_is_the_configs(model_of: Callable[..., Path]) -> None:
    from transformers import AutoConfig

    assert model_limit(load_model(model_of("llama"), LoadOptions())) == 128
    assert model_limit(AutoConfig.for_model("gpt2")) == 1024
    assert model_limit(AutoConfig.for_model("mamba")) is None


def high_water(process: int) -> int:
    """The most that a process has had resident, in bytes; 0 where it is gone. Not getrusage: a process begins with the
    peak of the one that started it."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return 0
    return 0 if found is None else 1024 * int(found[1])


@pytest.mark.slow
def test_a_checkpoint_of_3_gb_is_evaluated_in_less_than_2(story: Path, tmp_path: Path) -> None:
    """By the command that a user gives; neither its process nor any that it starts may have more."""
    from benchmarks.make_llama import write

    big = tmp_path / "big"
    assert write(big, hidden=2048, ffn=5632, layers=32, shard_layers=4, vocabulary=512, seed=0) > 2.8e9
    options = ["--window", "128", "--max-tokens", "256", "--offload", "--speed", "none"]
    places = ["--cache", str(tmp_path / "cache"), "-o", str(tmp_path / "report")]
    command = [str(Path(sys.executable).with_name("llmshrink")), "eval", str(big), "--text", str(story)]
    peaks: dict[int, int] = {}
    with (tmp_path / "said.txt").open("wb") as said:
        running = psutil.Popen([*command, *options, *places], stdout=said, stderr=said)
        while running.poll() is None:
            for process in (running, *running.children(recursive=True)):
                peaks[process.pid] = max(peaks.get(process.pid, 0), high_water(process.pid))
            time.sleep(0.05)
    assert running.returncode == 0, (tmp_path / "said.txt").read_text()
    assert 2e8 < max(peaks.values()) < 2e9, peaks
    (model,) = Results.read(tmp_path / "report" / "results.json").models
    assert model.perplexity is not None and model.perplexity.tokens == 254
    # What the results say is what was seen from outside.
    assert model.cost is not None and model.cost.peak_rss_bytes is not None
    assert any(abs(model.cost.peak_rss_bytes - peak) < 0.02 * peak for peak in peaks.values()), peaks
