"""Keys and values cached in FP8: the arithmetic, the scales that a run finds, what is stored, read, and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compressed_tensors.modeling.kvcache import register_key_hook, register_value_hook
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from families import FAMILIES, SERVABLE
from helpers import contents, make_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import llmshrink
from llmshrink.calibration.activations import Batch
from llmshrink.errors import CheckpointError, LlmshrinkError, RecipeError, SourceError, UnsupportedModelError
from llmshrink.formats import kv_cache
from llmshrink.formats.servable import attention
from llmshrink.model import caches
from llmshrink.model.blocks import Call
from llmshrink.run import quantize as runs
from llmshrink.run.asked import Options
from llmshrink.run.job import prepare
from llmshrink.run.sizes import sizes_of
from llmshrink.run.verify import read_reference
from llmshrink.run.work import SiteWork
from llmshrink.serving import options, preflight
from llmshrink.serving.launch import Installed
from llmshrink.serving.options import EngineOptions
from llmshrink.serving.processor import Processor
from llmshrink.serving.vllm import compat, engine
from llmshrink.serving.vllm.kv_cache import mend, uncut
from llmshrink.weights import FP8, CacheScales, before_cache, round_cache
from llmshrink.weights.kv_cache import cached, cut_off

WINDOWS: dict[str, Any] = {"samples": 6, "seq_len": 32}
SMALL: dict[str, Any] = {**WINDOWS, "recipe": "rtn-w4a16", "group_size": 32, "kv_cache": "fp8"}
KINDS = ("Llama 2, 3", "Gemma 2", "Gemma 3 (text)", "Phi-3, 3.5, 4", "OPT", "SmolLM3", "OLMo 2")
"""Families that differ in what they do to keys and values before they cache them, or in which tokens read them."""
NUMBERS = torch.arange(256, dtype=torch.uint8).view(FP8).double()
FINITE = NUMBERS[torch.isfinite(NUMBERS)].unique()


def numbers(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    spread = 10 ** (torch.rand(4000, generator=generator) * 8 - 5)
    return torch.cat([torch.randn(4000, generator=generator) * spread, torch.zeros(1)]).to(dtype)


# The arithmetic.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cached_number_is_the_nearest_there_is(dtype: torch.dtype) -> None:
    x, scale = numbers(dtype), torch.tensor([0.0371]).to(dtype)
    inside = x.double().clamp(-448 * scale.double(), 448 * scale.double())
    grid = FINITE * scale.double()
    nearest = (inside[:, None] - grid).abs().amin(1)
    error = (cached(x, scale).double() - inside).abs()
    # What is read back is in the dtype of the model, and ties are told apart in float32.
    assert bool((error <= nearest + torch.finfo(dtype).eps * inside.abs() + 1e-9).all())


def test_numbers_of_a_cache_stay_what_they_are_and_zero_zero() -> None:
    scale = torch.tensor([0.25])
    grid = (FINITE * 0.25).float()
    assert torch.equal(cached(grid, scale), grid) and torch.equal(cut_off(grid, scale), grid)
    assert float(cached(torch.tensor([1e9]), scale)) == float(cut_off(torch.tensor([1e9]), scale)) == 448 * 0.25


def test_what_is_cut_off_is_the_next_number_towards_zero() -> None:
    x, scale = numbers(torch.float32), torch.tensor([0.5])
    magnitudes = FINITE[FINITE >= 0] * 0.5
    below = magnitudes[(torch.searchsorted(magnitudes, x.double().abs(), right=True) - 1).clamp(min=0)]
    assert torch.equal(cut_off(x, scale).double(), below * x.double().sign())


def test_the_library_rounds_as_we_do_in_float32() -> None:
    x, scale = numbers(torch.float32), torch.tensor([0.0371])
    theirs = fake_quantize(x, scale, None, QuantizationArgs.model_validate(kv_cache.kv_cache_scheme()))
    assert torch.equal(theirs, cached(x, scale))


def test_a_gradient_passes_as_if_nothing_were_rounded() -> None:
    x = numbers(torch.bfloat16).requires_grad_(True)
    out = cached(x, torch.tensor([0.5]))
    assert torch.equal(out, cached(x.detach(), torch.tensor([0.5])))
    out.sum().backward()
    assert x.grad is not None and bool((x.grad == 1).all())


def test_scales_leave_room_and_are_never_zero() -> None:
    scales = CacheScales.of(torch.tensor([224.0, 0.0]), torch.bfloat16)
    assert scales.keys.dtype == torch.bfloat16 and float(scales.keys) == 1.0 and float(scales.values) > 0
    keys, values = scales.through(torch.full((1, 1, 1, 2), 448.0), torch.zeros(1, 1, 1, 2))
    assert bool((keys == 448).all()) and not bool(values.any())


# A run.


def attentions(model: Any) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "k_scale")}


def cached_by_the_library(out: Path, ids: Tensor) -> dict[str, list[float]]:
    """The largest key and value of each attention before they are rounded, by transformers and compressed-tensors."""
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    most: dict[str, list[float]] = {}
    for name, module in attentions(model).items():
        most[name] = [0.0, 0.0]
        for place, register in enumerate((register_key_hook, register_value_hook)):

            def see(_module: nn.Module, x: Tensor, of: list[float] = most[name], place: int = place) -> None:
                of[place] = max(of[place], float(x.abs().max()))

            register(module, see)
    with torch.no_grad():
        model(ids)
    return most


@pytest.mark.parametrize("title", KINDS)
def test_scales_are_of_what_the_served_model_caches(
    title: str, model_of: Callable[..., Path], story: Path, tmp_path: Path
) -> None:
    family, out = FAMILIES[title], tmp_path / "out"
    source = model_of(family.model_type, **family.changes)
    report = llmshrink.quantize(source, output=out, calibration=story, dtype="float32", **SMALL)
    assert report.verification is not None and report.verification.mean_difference == 0.0
    asked = Options(str(source), tmp_path / "never", flags={"kv_cache": "fp8"}, calibration=str(story), **WINDOWS)
    ids = prepare(asked).calibration.input_ids
    record = json.loads((out / "llmshrink.json").read_text())["kv_cache"]
    most = cached_by_the_library(out, ids)
    assert len(record) == report.blocks and most.keys() == record.keys()
    for name, pair in most.items():
        # Scales are stored in bfloat16.
        assert record[name] == pytest.approx([2 * each / 448 for each in pair], rel=2**-8)
    # What the run computed is what transformers computes, and what we do.
    reference = read_reference(out)
    for model in (AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), llmshrink.load(out, dtype="float32")):
        with torch.no_grad():
            logprobs = model(reference["input_ids"]).logits[:, :-1].float().log_softmax(-1)
        found = logprobs.gather(-1, reference["input_ids"][:, 1:, None]).flatten()
        assert float((found - reference["token_logprobs"]).abs().mean()) < 1e-3


@pytest.fixture(scope="module")
def made(model_of: Callable[..., Path], story: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kv") / "out"
    llmshrink.quantize(model_of("llama"), output=out, calibration=story, kv_cache="fp8", group_size=32, **WINDOWS)
    return out


def test_rounding_is_in_what_is_measured(
    made: Path, model_of: Callable[..., Path], story: Path, tmp_path: Path
) -> None:
    plain = llmshrink.quantize(
        model_of("llama"), output=tmp_path / "plain", calibration=story, group_size=32, **WINDOWS
    )
    assert plain.kv_cache is None and "kv cache" not in "\n".join(plain.lines())
    with_scales, without = read_reference(made), read_reference(tmp_path / "plain")
    assert not torch.equal(with_scales["token_logprobs"], without["token_logprobs"])
    report = llmshrink.inspect(made)
    assert report.kv_cache is not None and any(line.startswith("kv cache") for line in report.lines())
    assert report.weights == llmshrink.inspect(tmp_path / "plain").weights
    card = (made / "README.md").read_text()
    assert "Keys and values are cached in FP8" in card and "cuts keys and values off" in card


def test_what_is_evaluated_rounds_as_engines_do(made: Path) -> None:
    """compressed-tensors takes the quotient in the dtype of the model: in bfloat16 one in fifteen comes out wrong."""
    from llmshrink_eval.model import LoadOptions

    from llmshrink.evaluation.loader import load, reader_of

    assert reader_of(made, offload=False) is load
    model, reference = load(str(made), LoadOptions()), read_reference(made)
    with torch.no_grad():
        logprobs = model(reference["input_ids"]).logits[:, :-1].float().log_softmax(-1)
        expected = llmshrink.load(made, dtype="float32")(reference["input_ids"]).logits[:, :-1].log_softmax(-1)
    assert float((logprobs - expected).abs().mean()) < 1e-3
    x, scale = numbers(torch.bfloat16), torch.tensor([0.0371]).bfloat16()
    theirs = fake_quantize(x, scale, None, QuantizationArgs.model_validate(kv_cache.kv_cache_scheme()))
    assert 0.03 < float((theirs != cached(x, scale)).float().mean()) < 0.1


def test_a_prompt_and_its_continuation_read_the_same_cache(made: Path) -> None:
    model, ids = llmshrink.load(made, dtype="float32"), torch.arange(1, 17)[None]
    said = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        assert torch.equal(model(said).logits[0, 15:-1].argmax(-1), said[0, 16:])


def test_sizes_are_known_to_the_byte(made: Path, model_of: Callable[..., Path], story: Path, tmp_path: Path) -> None:
    flags = {"kv_cache": "fp8", "group_size": 32}
    asked = Options(str(model_of("llama")), tmp_path / "never", flags=flags, calibration=str(story), **WINDOWS)
    assert dict(sizes_of(prepare(asked)).files) == {
        file.name: file.stat().st_size for file in made.glob("*.safetensors")
    }
    plan = llmshrink.plan(
        model_of("llama"), kv_cache="fp8", group_size=32, calibration=story, measured=False, **WINDOWS
    )
    assert plan.output_bytes == sum(file.stat().st_size for file in made.glob("*.safetensors"))
    assert any("cached in FP8" in note for note in plan.notes)


def test_rerunning_and_spilling_give_the_same_bytes(
    made: Path, model_of: Callable[..., Path], story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, placement in (("again", runs.Placement(None, False)), ("files", runs.Placement(tmp_path / "s", False))):
        monkeypatch.setattr(runs.Placement, "choose", lambda *_, placement=placement: placement)
        out = tmp_path / name
        llmshrink.quantize(model_of("llama"), output=out, calibration=story, kv_cache="fp8", group_size=32, **WINDOWS)
        assert contents(out) == contents(made)


def test_a_killed_run_goes_on_to_the_same_bytes(
    made: Path, model_of: Callable[..., Path], story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    solve = SiteWork.solve

    def until_the_second(work: SiteWork, walk: Any, number: int) -> Any:
        if number == 1:
            raise Killed
        return solve(work, walk, number)

    def run() -> Any:
        return llmshrink.quantize(
            model_of("llama"), output=tmp_path / "out", calibration=story, kv_cache="fp8", group_size=32, **WINDOWS
        )

    monkeypatch.setattr(SiteWork, "solve", until_the_second)
    with pytest.raises(Killed):
        run()
    monkeypatch.setattr(SiteWork, "solve", solve)
    assert run().blocks_kept == 1
    assert contents(tmp_path / "out") == contents(made)


@pytest.mark.parametrize("recipe", ["tuned-w4a16", "gptq-w8a8", "fp8-dynamic"])
def test_other_recipes_take_it(recipe: str, model_of: Callable[..., Path], story: Path, tmp_path: Path) -> None:
    changes = {"set": "steps.1.tune.steps=2", "group_size": 32} if recipe == "tuned-w4a16" else {}
    report = llmshrink.quantize(
        model_of("llama"),
        output=tmp_path / "out",
        recipe=recipe,
        calibration=story,
        kv_cache="fp8",
        **WINDOWS,
        **changes,
    )
    assert report.kv_cache is not None and report.verification is not None
    assert report.verification.mean_difference == 0.0


def test_padding_has_no_say(model_of: Callable[..., Path], tmp_path: Path) -> None:
    """What stands where windows are too short would be louder than the text."""
    attended = _Attention()
    calibrated = runs_cache(attended)
    batch = Batch(torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[True, True, False]]), held_out=False)
    calibrated.see(batch, torch.tensor([[[1.0, 2.0], [3.0, 0.5], [900.0, 900.0]]]))
    calibrated.settle(torch.float32)
    assert calibrated.scales is not None
    assert [float(calibrated.scales.keys), float(calibrated.scales.values)] == pytest.approx([6 / 448, 4 / 448])
    calibrated.see(batch, torch.tensor([[[torch.inf, 2.0], [3.0, 0.5], [0.0, 0.0]]]))
    with pytest.raises(CheckpointError, match="NaN or Inf"):
        calibrated.settle(torch.float32)


# Where keys and values are written.


class _Attention(nn.Module):
    """Writes `times` times to the cache that it is handed."""

    def __init__(self, times: int = 1) -> None:
        super().__init__()
        self.times, self.k_proj = times, nn.Linear(4, 4)

    def forward(self, x: Tensor, past_key_values: Any = None) -> Tensor:
        heads = self.k_proj(x)[:, None]
        for _ in range(self.times):
            if past_key_values is not None:
                heads, _ = past_key_values.update(heads, heads, 0)
        found: Tensor = heads[:, 0]
        return found


class _Block(nn.Module):
    def __init__(self, times: int) -> None:
        super().__init__()
        self.inner = _Attention(times)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x)
        return found


def runs_cache(attended: nn.Module) -> Any:
    from llmshrink.run.caches import CalibratedCache

    block = nn.Module()
    block.inner = attended
    return CalibratedCache(block, caches.CacheSite("inner", "a.inner", 1))


@pytest.mark.parametrize("times", [0, 2])
def test_a_block_that_does_not_write_once_is_refused_by_name(times: int) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"^m\.3 \(_Block\): .* in {times} places .* leave kv_cache out"):
        caches._writer(_Block(times), "m.3", Call((), {}, None), torch.zeros(1, 2, 4), [])
    assert caches._writer(_Block(1), "m.3", Call((), {}, None), torch.zeros(1, 2, 4), []) == ("inner", 0)


def test_what_stands_before_a_cache_is_otherwise_that_cache() -> None:
    class Kept:
        length = 7

        def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
            return keys + layer, values

    attended = _Attention()
    handle = round_cache(attended, CacheScales(torch.tensor([1.0]), torch.tensor([1.0])))
    out = attended(torch.ones(1, 2, 4), past_key_values=Kept())
    assert torch.equal(out, cached(attended.k_proj(torch.ones(1, 2, 4)), torch.tensor([1.0])))
    handle.remove()
    seen: list[Any] = []
    attended.forward = lambda x, past_key_values: seen.append(past_key_values.length)
    before_cache(attended, lambda keys, values: (keys, values))
    attended(torch.ones(1, 2, 4), past_key_values=Kept())
    assert seen == [7]


# What is stored.


def test_the_library_reads_the_scheme_that_is_written(made: Path) -> None:
    config = json.loads((made / "config.json").read_text())["quantization_config"]
    read = QuantizationArgs.model_validate(config["kv_cache_scheme"])
    assert (read.num_bits, read.type, read.strategy, read.dynamic) == (8, "float", "tensor", False)
    model = AutoModelForCausalLM.from_pretrained(made)
    stored = {key: tensor for file in made.glob("*.safetensors") for key, tensor in load_file(file).items()}
    scales = {key: tensor for key, tensor in stored.items() if key.endswith(("k_scale", "v_scale"))}
    assert len(scales) == 4
    for key, tensor in scales.items():
        assert tensor.shape == (1,) and tensor.dtype == torch.bfloat16
        assert torch.equal(model.get_parameter(key), tensor)


def damaged(made: Path, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    shutil.copytree(made, folder)
    file = folder / "model-block-00001.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    there = {key: name for key, name in document["weight_map"].items() if name != file.name or key in tensors}
    index.write_text(json.dumps({**document, "weight_map": there}))
    return folder


KEY = "model.layers.1.self_attn.k_scale"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop(KEY), f"{KEY}: no such tensor"),
        (lambda tensors: tensors[KEY].zero_(), f"{KEY} is 0, and a scale is above zero"),
        (lambda tensors: tensors[KEY].fill_(torch.nan), f"{KEY} is nan"),
        (lambda tensors: tensors.update({KEY: torch.ones(2)}), rf"{KEY} is torch.float32 \[2\]"),
    ],
)
def test_a_damaged_scale_is_named(made: Path, tmp_path: Path, change: Any, said: str) -> None:
    folder = damaged(made, tmp_path / "damaged", change)
    for reads in (llmshrink.load, llmshrink.verify):
        with pytest.raises(CheckpointError, match=said):
            reads(folder)


def test_a_changed_scale_does_not_verify(made: Path, tmp_path: Path) -> None:
    folder = damaged(made, tmp_path / "changed", lambda tensors: tensors[KEY].div_(64))
    assert not llmshrink.verify(folder).ok


# Who serves it, and what can't be done.


def test_heads_that_no_cpu_caches_in_fp8_are_said() -> None:
    assert attention(80, 4) == {} and attention(64, 4, fp8_cache=True) == {}
    assert "multiple of 32" in attention(80, 4, fp8_cache=True)["vllm-cpu"]


def test_serve_asks_for_what_the_cache_takes(
    model_of: Callable[..., Path], story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = model_of("llama", **SERVABLE)
    llmshrink.quantize(source, output=tmp_path / "out", calibration=story, **SMALL)
    monkeypatch.setattr(preflight, "installed", lambda: Installed("vllm-cpu", "0.32.0"))
    monkeypatch.setattr(preflight, "processor_here", Processor)  # one that lacks nothing
    for module in (preflight, engine):
        monkeypatch.setattr(module, "caches_fp8", lambda: True)
    notes = preflight.check(tmp_path / "out", EngineOptions()).notes
    assert any("cached in FP8" in note for note in notes) and not any("towards zero" in note for note in notes)
    monkeypatch.setenv("LLMSHRINK_VLLM_KERNELS", "off")
    assert any("towards zero" in note for note in preflight.check(tmp_path / "out", EngineOptions()).notes)
    other = preflight.check(tmp_path / "out", options.read(["--kv-cache-dtype=float16"]))
    assert not any("cached in FP8" in note for note in other.notes)
    for module in (preflight, engine):
        monkeypatch.setattr(module, "caches_fp8", lambda: False)
    monkeypatch.setattr(engine, "installed", lambda: Installed("vllm-cpu", "0.32.0"))
    with pytest.raises(preflight.ServeError, match=r"AVX-512 alone, .* serve it where vLLM runs on CUDA"):
        preflight.check(tmp_path / "out", EngineOptions())
    with pytest.raises(engine.EngineError, match=r"AVX-512 alone, .* --engine transformers"):
        engine.engine_logprobs(tmp_path / "out", [[1, 2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_the_plugin_hands_to_vllm_is_cut_off_to_the_nearest(dtype: torch.dtype) -> None:
    x, scale = numbers(dtype).clamp(-300, 300), 0.0371
    step = torch.tensor([scale])
    handed = uncut(x, scale)
    assert handed.dtype == dtype
    # Whether the engine cuts off or rounds.
    assert torch.equal(cut_off(handed.float(), step), cached(x.float(), step))
    assert torch.equal(cached(handed.float(), step), cached(x.float(), step))


def test_the_plugin_mends_caches_of_checkpoints_with_scales_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Attention:
        kv_cache_dtype = "fp8"

        def do_kv_cache_update(
            self, layer: Any, key: Tensor, value: Tensor, kv_cache: None, slot_mapping: None
        ) -> None:
            self.handed = (key, value)

    monkeypatch.setattr(compat, "CPUAttentionBackendImpl", Attention, raising=False)
    mend()
    mend()
    keys, values = torch.full((1, 1, 2), 1.1), torch.full((1, 1, 2), 2.2)
    for declared, dtype, mended in (({"num_bits": 8}, "fp8", True), (None, "fp8", False), ({}, "fp8_e5m2", False)):
        layer = SimpleNamespace(
            quant_config=SimpleNamespace(kv_cache_scheme=declared), _k_scale_float=1.0, _v_scale_float=2.0
        )
        own = Attention()
        own.kv_cache_dtype = dtype
        own.do_kv_cache_update(layer, keys, values, None, None)
        expected = (uncut(keys, 1.0), uncut(values, 2.0)) if mended else (keys, values)
        assert all(torch.equal(one, other) for one, other in zip(own.handed, expected, strict=True))


@pytest.mark.parametrize(
    ("verb", "recipe", "changes", "said"),
    [
        ("quantize", "gptq-w4a16", {"kv_cache": "int4"}, "--kv-cache: kv_cache: 'int4' isn't one of none, fp8"),
        ("quantize", "gptq-w4a16", {"set": "kv_cache=fp9"}, "did you mean fp8"),
        ("prune", "wanda-2of4", {"set": "kv_cache=fp8"}, "needs a quantize step"),
        ("compress", "w2-distill", {"kv_cache": "fp8"}, "can't be taught by a distill step"),
        ("quantize", "bnb-nf4", {"kv_cache": "fp8"}, "no place in bitsandbytes"),
        (
            "compress", "alps-2of4-gptq-w4a16", {"kv_cache": "fp8", "format": "llmshrink"},
            "--format llmshrink has no word for it",
        ),
    ],
)  # fmt: skip
def test_what_it_cannot_go_with_is_refused_before_any_work(
    verb: str, recipe: str, changes: dict[str, Any], said: str, model_of: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=said) as refused:
        getattr(llmshrink, verb)(model_of("llama"), output=tmp_path / "out", recipe=recipe, **changes)
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())


def test_a_model_that_has_scales_is_refused(model_of: Callable[..., Path], story: Path, tmp_path: Path) -> None:
    source = shutil.copytree(model_of("llama"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, KEY: torch.ones(1)}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"^{KEY}: the model has scales of a cache already"):
        llmshrink.quantize(source, output=tmp_path / "out", calibration=story, **SMALL)


def test_what_holds_weights_alone_refuses_it(made: Path, model_of: Callable[..., Path], tmp_path: Path) -> None:
    from llmshrink.evaluation.loader import write_dense

    with pytest.raises(CheckpointError, match="caches keys and values in FP8, which the llmshrink format has no word"):
        llmshrink.convert(made, output=tmp_path / "out", format="llmshrink")
    with pytest.raises(SourceError, match="can't be a student: its keys and values are cached in FP8"):
        llmshrink.distill(model_of("llama"), made, output=tmp_path / "out", data="demo")
    with pytest.raises(CheckpointError, match="caches keys and values in FP8, which no dense copy of it does"):
        write_dense(made, tmp_path / "dense", torch.float32)


@pytest.mark.parametrize(
    "change", [{"num_bits": 4}, {"strategy": "attn_head"}, {"dynamic": True}, {"symmetric": False}]
)
def test_a_cache_of_another_kind_is_refused(made: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    folder = shutil.copytree(made, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"].update(change)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LlmshrinkError, match="kv_cache_scheme of another kind"):
        llmshrink.load(folder)


def test_a_cache_without_a_quantized_weight_is_refused_before_any_work(tmp_path: Path, story: Path) -> None:
    source = make_model(
        tmp_path / "odd",
        hidden_size=60,
        intermediate_size=97,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=22,
    )
    out = tmp_path / "out"
    with pytest.raises(RecipeError, match="kv_cache fp8: nothing of this model can be quantized as asked"):
        llmshrink.compress(
            source, output=out, recipe="sparsegpt-2of4-gptq-w4a16", group_size=32, kv_cache="fp8", calibration=story,
            samples=6, seq_len=32,
        )  # fmt: skip
    assert not list(tmp_path.glob("out*"))
