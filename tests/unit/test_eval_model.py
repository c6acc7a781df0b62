"""Loading: float32, decompressed from the first forward on, or streamed with the same numbers and little memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llmshrink_eval.errors import EvalError
from llmshrink_eval.model import LoadOptions, load_model, model_limit
from llmshrink_eval.passes import input_device, run_pass
from llmshrink_eval.protocol import build_windows
from llmshrink_eval.text import Text

import llmshrink
from llmshrink.demo.tokenizer import build
from llmshrink.formats import compressed_tensors

ROOT = Path(__file__).parents[2]
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
    with pytest.raises(EvalError, match=r"no readable config\.json"):
        load_model(tmp_path, LoadOptions())
    (tmp_path / "config.json").write_text('{"model_type": "nothing_known"}')
    with pytest.raises(EvalError, match="transformers can't load it") as caught:
        load_model(tmp_path, LoadOptions())
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(EvalError, match=r"a compressed checkpoint \(gptq\) is decompressed whole; leave --offload out"):
        load_model(tmp_path, LoadOptions(offload=tmp_path / "off"))


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


MEASURE = """
import re, sys
from pathlib import Path
from transformers import AutoTokenizer
from llmshrink_eval.model import LoadOptions, load_model
from llmshrink_eval.passes import run_pass
from llmshrink_eval.protocol import build_windows
from llmshrink_eval.text import Text
folder, work = Path(sys.argv[1]), Path(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(folder)
text = Text("a text", (Path(sys.argv[3]).read_text(),))
windows = build_windows(text, tokenizer, protocol="gptq", window=128, max_tokens=256, limit=2048)
model = load_model(folder, LoadOptions(offload=work / "off"))
run_pass(model, windows, tokenizer, keep=work / "base")
# Not getrusage: a process begins with the peak of the one that started it.
print(1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]))
"""


@pytest.mark.slow
def test_a_checkpoint_of_3_gb_is_evaluated_in_less_than_2(story: Path, tmp_path: Path) -> None:
    from benchmarks.make_llama import write

    size = write(tmp_path / "big", hidden=2048, ffn=5632, layers=32, shard_layers=4, vocabulary=512, seed=0)
    assert size > 2.8e9
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "big"), str(tmp_path), str(story)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "eval", timeout=900)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 2e9, done.stdout
