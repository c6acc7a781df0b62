"""Weights of 8 bits with inputs of 8 bits: what is stored, read, computed, and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.naive_quantized.base import FloatQuantizationCompressor, IntQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from safetensors.torch import load_file, save_file

import llmshrink
from llmshrink.errors import CheckpointError, LlmshrinkError, RecipeError
from llmshrink.formats import stored
from llmshrink.formats.compressed_tensors import MIXED, GroupedIntScheme, quantization_config, schemes
from llmshrink.formats.eight_bit import EightBitScheme, read, tensors
from llmshrink.formats.servable import eight_bit
from llmshrink.methods import QuantizeSpec, SiteSpec, solve
from llmshrink.recipe.schema import Recipe
from llmshrink.weights import FP8, Activations, EightBit, GroupedInt, by_token, coded

KINDS: list[Activations] = ["int8", "fp8"]
RECIPES = {"int8": "gptq-w8a8", "fp8": "fp8-dynamic"}
WINDOWS = {"samples": 6, "seq_len": 32}


def random_weight(kind: str, dtype: torch.dtype = torch.bfloat16) -> EightBit:
    """Codes take every value that there is."""
    generator = torch.Generator().manual_seed(0)
    every = torch.arange(256, dtype=torch.uint8)
    bytes_ = torch.cat([every, torch.randint(0, 256, (24 * 40 - 256,), dtype=torch.uint8, generator=generator)])
    codes = bytes_[torch.randperm(24 * 40, generator=generator)].view(24, 40)
    scale = (torch.rand(24, 1, generator=generator) + 0.01).to(dtype)
    if kind == "int8":
        return EightBit(codes.view(torch.int8), scale)
    codes = torch.where((codes & 127) == 127, torch.zeros_like(codes), codes)  # NaN
    return EightBit(codes.view(FP8), scale)


def library_scheme(kind: Activations) -> Any:
    config = quantization_config({"a.b": EightBitScheme(kind)}, ["lm_head"])
    return QuantizationConfig.model_validate(config).config_groups["group_0"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_the_library_decompresses_to_our_weight_bit_by_bit(kind: Activations, dtype: torch.dtype) -> None:
    weight = random_weight(kind, dtype)
    state = {key.removeprefix("a.b."): value for key, value in tensors("a.b", weight).items()}
    compressor = IntQuantizationCompressor if kind == "int8" else FloatQuantizationCompressor
    theirs = compressor.decompress(state, library_scheme(kind))["weight"]
    assert torch.equal(theirs.float(), weight.dequantize(dtype).float())
    back = read("a.b", tensors("a.b", weight).__getitem__, EightBitScheme(kind))
    assert torch.equal(back.codes.view(torch.uint8), weight.codes.view(torch.uint8))
    exact = weight.codes.double() * weight.scale.double()
    assert torch.equal(weight.dequantize(torch.float64), exact)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_library_compresses_reads_back(kind: Activations) -> None:
    weight = random_weight(kind, torch.float32)
    compressor = IntQuantizationCompressor if kind == "int8" else FloatQuantizationCompressor
    state = {"weight": weight.dequantize(), "weight_scale": weight.scale}
    theirs = compressor.compress(state, library_scheme(kind))
    found = read("a.b", lambda key: theirs[key.removeprefix("a.b.")], EightBitScheme(kind))
    assert torch.equal(found.dequantize(), weight.dequantize())


def test_inputs_are_rounded_as_engines_do_it() -> None:
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1.0, 300.0]).view(
        3, 1, 1
    )
    x[0, 0] = 0
    module = torch.nn.Linear(64, 8)
    module.quantization_status = QuantizationStatus.INITIALIZED  # type: ignore[assignment]
    fp8 = library_scheme("fp8").input_activations
    assert torch.equal(by_token(x[:, 1:], "fp8"), forward_quantize(module, x[:, 1:], "input", fp8))
    codes, scale = coded(x, "int8")
    assert codes.dtype == torch.int8 and scale.shape == (3, 5, 1)
    assert torch.equal(codes[0, 0], torch.zeros(64, dtype=torch.int8))
    largest = codes[x.abs().amax(-1) > 0].abs().amax(-1)
    assert torch.equal(largest, torch.full_like(largest, 127))
    assert bool(((by_token(x, "int8") - x).abs() <= 0.5001 * scale).all())


@pytest.mark.parametrize("kind", KINDS)
def test_weights_go_to_the_nearest_code(kind: Activations) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[3] = 0
    grid = {"bits": 8, "group_size": -1, "signed": False, "scale_search": "minmax", "act_order": False}
    spec = SiteSpec(None, QuantizeSpec("rtn", **grid, corrected=0.0, activations=kind))
    solved = solve(weight, None, spec, torch.float32)
    found = stored.as_stored(solved.weight, EightBitScheme(kind))
    assert isinstance(found, EightBit)
    grid_of = torch.arange(-127, 128) if kind == "int8" else torch.arange(256, dtype=torch.uint8).view(FP8).float()
    levels = grid_of[~grid_of.isnan()].double()
    nearest = (weight.double().unsqueeze(-1) - levels * found.scale.double().unsqueeze(-1)).abs().amin(-1)
    ours = (weight.double() - found.dequantize(torch.float64)).abs()
    assert bool((ours <= nearest + 1e-9).all()) and not bool(found.codes[3].float().any())
    whole = stored.whole(found)
    assert isinstance(whole, GroupedInt if kind == "int8" else EightBit)
    assert torch.equal(whole.dequantize(), solved.weight.dequantize())


def test_one_config_holds_both_kinds_and_packed_integers() -> None:
    sites = {
        "a.b": EightBitScheme("int8"),
        "a.c": GroupedIntScheme(4, 32, False),
        "a.d": EightBitScheme("fp8"),
        "e.f": None,
    }
    config = json.loads(json.dumps(quantization_config(sites, ["lm_head"])))
    assert config["format"] == MIXED
    assert schemes(config) == {name: scheme for name, scheme in sites.items() if scheme is not None}
    library = QuantizationConfig.model_validate(config)
    assert [group.format for group in library.config_groups.values()] == [
        "int-quantized", "pack-quantized", "float-quantized",
    ]  # fmt: skip
    config["config_groups"]["group_0"]["input_activations"]["dynamic"] = False
    with pytest.raises(CheckpointError, match="group_0 rounds activations in another way"):
        schemes(config)


def test_who_serves_it() -> None:
    shards = [(64, 48), (32, 48)]
    assert eight_bit("int8", shards).engines == {"vllm-cpu": None, "vllm-cuda": None}
    assert "FP8" in (eight_bit("fp8", shards).engines["vllm-cpu"] or "") and eight_bit("fp8", shards).served
    assert not eight_bit("int8", [(33, 48)], tp=2, parallel="column").served


def recipe(**changes: Any) -> dict[str, Any]:
    return {"name": "x", "steps": [{"quantize": {"method": "rtn", "activations": "int8", **changes}}]}


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (recipe(bits=4), "takes bits 8, group_size -1, symmetric true, signed false, so it can't follow bits: 4"),
        (recipe(activations="fp8", method="gptq"), "can't follow method: gptq"),
        (recipe(group_size=64, symmetric=False), "group_size: 64, symmetric: false"),
        ({"name": "x", "steps": [*recipe()["steps"], {"tune": {}}]}, "can't be trained by a tune step"),
        ({"name": "x", "steps": [*recipe()["steps"], {"distill": {}}]}, "can't be trained by a distill step"),
    ],
)  # fmt: skip
def test_what_goes_with_8_bit_inputs_is_said(document: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as refused:
        Recipe.model_validate(document)
    assert said in str(refused.value)


@pytest.fixture(scope="module")
def made(model_of: Callable[..., Path], story: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A kind of activations -> an output of its recipe, made once."""
    done: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in done:
            out = tmp_path_factory.mktemp("schemes") / kind
            report = llmshrink.quantize(
                model_of("llama"), output=out, recipe=RECIPES[kind], calibration=story, **WINDOWS
            )
            assert report.ok and {row.activations for row in report.sites} == {kind}
            done[kind] = out
        return done[kind]

    return make


def probabilities(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits.float().log_softmax(-1)
    return found


def agree(model: Any, folder: Path) -> bool:
    """Whether a model says in float32 what the checkpoint's weights do over dense products, where inputs are rounded.

    Sums in another order put an input to the next code here and there, and what comes after it feels that.
    """
    from llmshrink.serving.vllm.check import _decompressed

    ids = load_file(folder / "verify" / "held_out.safetensors")["input_ids"][:4]
    found, expected = (probabilities(each, ids) for each in (model, _decompressed(folder)))
    difference = (found - expected).abs().amax(-1)
    return float(difference.median()) < 1e-5 and float(difference.quantile(0.75)) < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_rounds_inputs_too(kind: Activations, made: Callable[[str], Path]) -> None:
    from transformers import AutoModelForCausalLM

    from llmshrink.serving.vllm.check import _decompressed

    folder = made(kind)
    ids = load_file(folder / "verify" / "held_out.safetensors")["input_ids"][:4]
    theirs = probabilities(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), ids)
    own = _decompressed(folder)
    ours = probabilities(own, ids)
    for module in own.modules():
        module._forward_pre_hooks.clear()
    weights_alone = probabilities(own, ids)
    inputs = library_scheme(kind).input_activations
    for name, module in own.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.quantization_status = QuantizationStatus.INITIALIZED  # type: ignore[assignment]
            module.register_forward_pre_hook(lambda m, args: (forward_quantize(m, args[0], "input", inputs),))
    theirs_on_ours = probabilities(own, ids)

    def kl(other: torch.Tensor) -> float:
        return float((theirs.exp() * (theirs - other)).sum(-1).mean())

    # int8: the library's scales are other ones than vLLM's, as weights.activations says.
    assert kl(theirs_on_ours) < 1e-9 < 1e-6 < kl(weights_alone)
    assert kl(ours) < (1e-9 if kind == "fp8" else 1e-1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_packed_model_computes_it_and_is_what_is_evaluated(kind: Activations, made: Callable[[str], Path]) -> None:
    from llmshrink_eval.model import LoadOptions, load_model

    from llmshrink.evaluation.loader import load_packed
    from llmshrink.evaluation.settings import Settings
    from llmshrink.evaluation.verbs import spec_of
    from llmshrink.runtime.eight_bit import EightBitLinear

    folder = made(kind)
    spec = spec_of(str(folder), Settings())
    assert spec.loader is load_packed and load_packed is spec_of(str(folder), Settings(offload=True)).loader
    model = load_model(folder, LoadOptions(), spec.loader)
    linears = [module for module in model.modules() if isinstance(module, EightBitLinear)]
    assert len(linears) == 14 and {linear.activations for linear in linears} == {kind}
    # A byte a weight, and two of its scale a row: memory is what is stored.
    assert sum(linear.nbytes for linear in linears) == sum(
        linear.out_features * (linear.in_features + 2) for linear in linears
    )
    assert agree(model, folder)
    with pytest.raises(CheckpointError, match="leave --offload out"):
        load_packed(str(folder), LoadOptions(offload=folder))
    said = llmshrink.generate(folder, "Once upon a time", max_new_tokens=4, dtype="bfloat16")
    assert said.new_tokens <= 4 and said.packed_bytes == sum(linear.nbytes for linear in linears)


UP = "model.layers.0.mlp.up_proj"


def shortened(found: dict[str, torch.Tensor]) -> None:
    for key in (f"{UP}.weight", f"{UP}.weight_scale"):
        found[key] = found[key][:-1].contiguous()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda found: found.pop(f"{UP}.weight_scale"), f"no tensor {UP}.weight_scale"),
        (lambda found: found.update({f"{UP}.weight": found[f"{UP}.weight"].float()}), f"{UP}.weight is torch.float32"),
        (shortened, f"{UP}.weight: has shape [95, 64], config.json makes it [96, 64]"),
    ],
)
def test_damaged_codes_are_refused_by_name(
    damage: Callable[[dict[str, torch.Tensor]], None], said: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(made("int8"), tmp_path / "out")
    file, index = folder / "model-block-00000.safetensors", folder / "model.safetensors.index.json"
    found, places = load_file(file), json.loads(index.read_text())
    damage(found)
    save_file(found, file, metadata={"format": "pt"})
    places["weight_map"] = {
        key: shard for key, shard in places["weight_map"].items() if shard != file.name or key in found
    }
    index.write_text(json.dumps(places))
    with pytest.raises(CheckpointError) as refused:
        llmshrink.load(folder)
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("described", "said"),
    [
        (None, "is packed, but config.json has no quantization_config"),
        ({UP: GroupedIntScheme(8, -1, True)}, "is packed, but no config group targets it"),
    ],
)
def test_codes_without_their_scheme_are_refused(
    described: Any, said: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(made("int8"), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = described and quantization_config(described, [])
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=said):
        llmshrink.load(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_done_with_it_is_refused_by_name(
    kind: str, made: Callable[[str], Path], model_of: Callable[..., Path], tmp_path: Path
) -> None:
    from llmshrink.evaluation.loader import write_dense

    folder = made(kind)
    with pytest.raises(LlmshrinkError, match="inputs to 8 bits"):
        llmshrink.convert(folder, output=tmp_path / "c", format="llmshrink")
    with pytest.raises(LlmshrinkError, match="rounds its inputs to 8 bits"):
        llmshrink.distill(model_of("llama"), folder, output=tmp_path / "d", steps=1)
    with pytest.raises(CheckpointError, match="no dense copy"):
        write_dense(folder, tmp_path / "e", torch.float32)
    assert not list(tmp_path.iterdir())
    found = llmshrink.inspect(folder)
    assert any("token by token" in line for line in found.lines())
    # Codes of 8 bits, and 16 bits of scale a row.
    rows, weights = (sum(count(row.shape) for row in found.sites) for count in (lambda s: s[0], lambda s: s[0] * s[1]))
    assert found.linear_bits_per_weight == pytest.approx(8 + 16 * rows / weights)
    assert "activations rounded" in (folder / "README.md").read_text()


def test_overrides_take_the_activations_away_and_a_killed_run_goes_on(
    model_of: Callable[..., Path], story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmshrink.run.work import SiteWork

    document = tmp_path / "mixed.yaml"
    document.write_text(
        "name: mixed\nsteps:\n  - quantize: {method: gptq, activations: int8}\noverrides:\n"
        "  - {match: down_proj, quantize: {activations: none, bits: 4, group_size: 32}}\n"
        "  - {match: o_proj, quantize: {activations: fp8}}\n"
    )
    options: dict[str, Any] = {"recipe": str(document), "calibration": story, **WINDOWS}
    whole = llmshrink.quantize(model_of("llama"), output=tmp_path / "whole", **options)
    kinds = {row.name.rpartition(".")[2]: (row.activations, row.bits, row.method) for row in whole.sites}
    assert kinds["down_proj"] == (None, 4, "gptq") and kinds["o_proj"] == ("fp8", 8, "rtn")
    assert kinds["q_proj"] == ("int8", 8, "gptq")
    solve_one, done = SiteWork.solve, []

    def stopping(work: SiteWork, walk: Any, number: int) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(number)
        return solve_one(work, walk, number)

    with monkeypatch.context() as patch:
        patch.setattr(SiteWork, "solve", stopping)
        with pytest.raises(KeyboardInterrupt):
            llmshrink.quantize(model_of("llama"), output=tmp_path / "again", **options)
    report = llmshrink.quantize(model_of("llama"), output=tmp_path / "again", **options)
    assert report.blocks_kept == 1 and report.quality == whole.quality
    packed = llmshrink.load(tmp_path / "again", dtype="float32")
    block = packed.model.layers[1]
    made_of = [type(part).__name__ for part in (block.mlp.down_proj, block.self_attn.o_proj, block.mlp.up_proj)]
    assert made_of == ["QuantLinear", "EightBitLinear", "EightBitLinear"]
    assert (block.self_attn.o_proj.activations, block.mlp.up_proj.activations) == ("fp8", "int8")
    assert agree(packed, tmp_path / "again") and llmshrink.verify(tmp_path / "again").ok


def test_parts_of_one_layer_must_round_alike(model_of: Callable[..., Path], story: Path, tmp_path: Path) -> None:
    document = tmp_path / "apart.yaml"
    document.write_text(
        "name: apart\nsteps:\n  - quantize: {method: rtn, activations: int8}\noverrides:\n"
        "  - {match: k_proj, quantize: {activations: fp8}}\n"
    )
    with pytest.raises(RecipeError, match="activations int8 and fp8"):
        llmshrink.quantize(
            model_of("llama"), output=tmp_path / "out", recipe=str(document), calibration=story, **WINDOWS
        )
    with pytest.raises(RecipeError, match="activations int8"):
        llmshrink.compress(
            model_of("llama"), output=tmp_path / "out", recipe="alps-2of4-gptq-w4a16", format="llmshrink",
            calibration=story, set=["steps.1.quantize={method: gptq, activations: int8}"], **WINDOWS,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()
