"""Smoothing: the factors, that they change no number before rounding, and runs that use them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import contents, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import llmshrink
from benchmarks.outliers import with_outliers
from llmshrink.calibration.statistics import Loudest, louder
from llmshrink.cli import run as command
from llmshrink.errors import RecipeError
from llmshrink.methods import grown, kept_exact, shrunk, smoothing_factors
from llmshrink.methods.smooth import MOST

WINDOWS: dict[str, Any] = {"samples": 4, "seq_len": 32}
ALPHA = "steps.0.quantize.smooth=0.5"
few = settings(max_examples=25, deadline=None, derandomize=True)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def factor_of(loud: float, weight: float, alpha: float, unit: float) -> float:
    """Equation 4, one channel, rounded to a power of two. unit: the smallest channel's exponent."""
    if loud == 0 or weight == 0:
        return 1.0
    power = round(math.log2(loud**alpha / weight ** (1 - alpha))) - unit
    return float(2.0 ** max(0, power))


@few
@given(seed=st.integers(0, 2**16), alpha=st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]))
def test_factors_are_those_of_the_equation(seed: int, alpha: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs, weights = ((3 * torch.randn(24, generator=generator)).exp() for _ in range(2))
    inputs[3], weights[5] = 0, 0
    found = smoothing_factors(inputs, weights, alpha)
    pairs = list(zip(inputs.tolist(), weights.tolist(), strict=True))
    powers = [round(math.log2(x**alpha / w ** (1 - alpha))) for x, w in pairs if x and w]
    unit = max(min(powers), max(powers) - MOST)
    assert found.tolist() == [factor_of(x, w, alpha, unit) for x, w in pairs]
    assert found.min() >= 1 and found.max() <= 2**MOST


def test_with_nothing_to_smooth_every_factor_is_one() -> None:
    assert smoothing_factors(torch.zeros(5), torch.ones(5), 0.5).tolist() == [1.0] * 5
    assert smoothing_factors(torch.ones(5), torch.ones(5), 0.5).tolist() == [1.0] * 5


@few
@given(seed=st.integers(0, 2**16), dtype=st.sampled_from(DTYPES), spread=st.integers(0, 12))
def test_a_norm_and_its_linear_give_the_same_bits(seed: int, dtype: torch.dtype, spread: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    gain = (1 + random(32) * 2 ** (spread * torch.rand(32, generator=generator))).to(dtype)
    bias, weight = (0.1 * random(32)).to(dtype), (random(8, 32) / 5).to(dtype)
    hidden = random(4, 32).to(dtype)

    def normed(gain: Tensor, bias: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(hidden, (32,), gain, bias)

    wanted = smoothing_factors(normed(gain, bias).abs().amax(0).float(), weight.abs().amax(0).float(), 0.5)
    factors = kept_exact(wanted, [gain, bias], [weight])
    again = grown(weight, factors)
    for one, other in ((gain, shrunk(gain, factors)), (bias, shrunk(bias, factors))):
        assert torch.equal(other.double() * factors, one.double())
    assert torch.equal(again.double(), weight.double() * factors)
    if dtype != torch.float16:  # whose small numbers have fewer bits: there inputs may differ in the last of them
        assert torch.equal(factors, wanted)
        small = normed(shrunk(gain, factors), shrunk(bias, factors))
        assert torch.equal(small.double() * factors, normed(gain, bias).double())
        product = torch.nn.functional.linear
        assert torch.equal(product(small, again), product(normed(gain, bias), weight))


def test_factors_stop_where_float16_ends() -> None:
    gain, weight = torch.tensor([1.0, 3e-5]).half(), torch.tensor([[20.0, 1.0]]).half()
    found = kept_exact(torch.tensor([4096.0, 4096.0]), [gain], [weight])
    assert found.tolist() == [2048.0, float(found[1])] and found[1] < 4096
    assert torch.equal(shrunk(gain, found).double() * found, gain.double())


def test_the_loudest_of_two_sets_is_that_of_both() -> None:
    data = torch.randn(30, 7, generator=torch.Generator().manual_seed(0))
    parts, whole = [Loudest(7), Loudest(7)], Loudest(7)
    for part, rows in zip(parts, (data[:11], data[11:]), strict=True):
        part.add(rows.bfloat16())
        part.add(rows[:0])
    whole.add(data.bfloat16())
    assert torch.equal(louder(*parts).most, whole.most)
    assert torch.equal(whole.most, data.bfloat16().float().abs().amax(0))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture(scope="module")
def outliers(plain: Path) -> Path:
    """Its equal, to the bit, with a few channels that are 64 times as loud behind each norm."""
    return with_outliers(plain, plain.with_name("outliers"), factor=64.0)


def quantized(model: Path, out: Path, story: Path, **more: Any) -> Any:
    return llmshrink.quantize(model, output=out, calibration=story, **{"recipe": "gptq-w8a8", **WINDOWS, **more})


def test_it_takes_back_what_outliers_cost(outliers: Path, story: Path, tmp_path: Path) -> None:
    rough = quantized(outliers, tmp_path / "rough", story)
    smooth = quantized(outliers, tmp_path / "smooth", story, set=ALPHA)
    assert smooth.quality.kl_mean < rough.quality.kl_mean / 5
    assert smooth.ok and smooth.verification.mean_difference == 0.0
    assert smooth.quality.ppl_before == rough.quality.ppl_before  # the original's stream is the original's
    assert {row.name.rpartition(".")[2] for row in smooth.sites if row.smooth == 0.5} == {
        "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj",
    }  # fmt: skip
    assert "not smoothed: o_proj, down_proj: no norm of their block feeds them" in smooth.notes
    assert llmshrink.verify(tmp_path / "smooth").ok
    assert any(
        "10 sites are smoothed, with alpha 0.5" in line for line in llmshrink.inspect(tmp_path / "smooth").lines()
    )


def test_it_finds_the_same_whatever_the_outliers_were(plain: Path, outliers: Path, story: Path, tmp_path: Path) -> None:
    """A channel that is c times as loud, behind columns that are c times less, is divided by c times as much."""
    shards = []
    for model in (plain, outliers):
        quantized(model, tmp_path / model.name, story, set="steps.0.quantize.smooth=0.75")
        shards.append(load_file(tmp_path / model.name / "model-block-00001.safetensors"))
    powers = {float((shards[0][key] / shards[1][key]).float().unique()) for key in shards[0] if "layernorm" in key}
    assert len(powers) <= 2 and all(power.is_integer() for power in map(math.log2, powers))
    assert all(torch.equal(shards[0][key], shards[1][key]) for key in shards[0] if key.endswith("_proj.weight"))


def test_what_is_not_quantized_computes_the_original_to_the_bit(outliers: Path, story: Path, tmp_path: Path) -> None:
    """Only block 1's up_proj rounds: of all that its norm feeds the rest stays, and with it everything that is loud."""
    from transformers import AutoModelForCausalLM

    document = tmp_path / "one.yaml"
    document.write_text(
        "name: one\nsteps:\n  - quantize: {method: rtn, activations: int8, smooth: 0.5}\n"
        "ignore: [lm_head, '*.self_attn.*', '*.layers.0.*', down_proj]\n"
    )
    out = tmp_path / "out"
    report = quantized(outliers, out, story, recipe=str(document))
    assert report.ok and [row.name for row in report.sites if row.bits] == [
        "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj",
    ]  # fmt: skip
    before, norm = load_file(outliers / "model.safetensors"), "model.layers.1.post_attention_layernorm.weight"
    after = {key: value for file in out.glob("model-*.safetensors") for key, value in load_file(file).items()}
    assert not torch.equal(after[norm], before[norm])
    same = {key for key in before if key in after and torch.equal(after[key], before[key])}
    assert set(before) - same == {norm, *(f"model.layers.1.mlp.{each}_proj.weight" for each in ("gate", "up"))}
    # The smoothed float model: the new norm, and columns multiplied by what it was divided by.
    factors = (before[norm].double() / after[norm].double()).float()
    assert bool((factors.log2() == factors.log2().round()).all()) and factors.max() >= 4 * factors.min()
    original = AutoModelForCausalLM.from_pretrained(outliers, dtype=torch.bfloat16)
    equal = AutoModelForCausalLM.from_pretrained(outliers, dtype=torch.bfloat16)
    state = equal.state_dict()
    state[norm].copy_(after[norm])
    for each in ("gate", "up"):
        state[f"model.layers.1.mlp.{each}_proj.weight"].mul_(factors.bfloat16())
    ids = torch.arange(1, 33)[None]
    with torch.no_grad():
        assert torch.equal(original(ids).logits, equal(ids).logits)


MIXED = (
    "name: mixed\nsteps:\n  - quantize: {method: gptq, activations: int8, smooth: 0.5}\nignore: [lm_head, q_proj]\n"
    "overrides:\n  - {match: v_proj, quantize: {activations: none, bits: 4, group_size: 32}}\n"
    "  - {match: gate_proj|up_proj, quantize: {activations: fp8}}\n"
    "  - {match: o_proj, quantize: {smooth: none}}\n"
)


def taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no engine fused linears."""
    from llmshrink.recipe import assign

    split = assign._layers
    monkeypatch.setattr(assign, "_layers", lambda sites: [[site] for layer in split(sites) for site in layer])


def test_linears_of_one_input_share_its_factors(
    outliers: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ignored, 4-bit and 8-bit linears read one norm."""
    taken_apart(monkeypatch)
    (tmp_path / "mixed.yaml").write_text(MIXED)
    asked: dict[str, Any] = {"recipe": str(tmp_path / "mixed.yaml")}
    plan = llmshrink.plan(outliers, calibration=story, measured=False, **asked, **WINDOWS)
    out = tmp_path / "out"
    report = quantized(outliers, out, story, **asked)
    assert report.ok and report.verification.mean_difference == 0.0
    assert plan.output_bytes == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    before, after = load_file(outliers / "model.safetensors"), load_file(out / "model-block-00000.safetensors")
    norm, stays = "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_proj.weight"
    factors = before[norm] / after[norm]
    assert torch.equal(after[stays], before[stays] * factors) and not torch.equal(after[stays], before[stays])
    resumed(outliers, tmp_path / "again", story, monkeypatch, **asked)
    assert contents(tmp_path / "again") == contents(out)


def resumed(model: Path, out: Path, story: Path, monkeypatch: pytest.MonkeyPatch, **asked: Any) -> None:
    from llmshrink.run.work import SiteWork

    solve, done = SiteWork.solve, list[int]()

    def stopping(work: SiteWork, walk: Any, number: int) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(number)
        return solve(work, walk, number)

    with monkeypatch.context() as patch:
        patch.setattr(SiteWork, "solve", stopping)
        with pytest.raises(KeyboardInterrupt):
            quantized(model, out, story, **asked)
    assert quantized(model, out, story, **asked).blocks_kept == 1


@pytest.mark.parametrize(("recipe", "cache"), [("gptq-w8a8", "fp8"), ("fp8-dynamic", "none")])
def test_rerunning_and_spilling_give_the_same_bytes(
    recipe: str, cache: str, outliers: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmshrink.run.quantize import Placement

    for name, placement in {"kept": Placement(None, True), "files": Placement(tmp_path / "spill", False)}.items():
        monkeypatch.setattr(Placement, "choose", lambda job, folder, placement=placement: placement)
        quantized(outliers, tmp_path / name, story, recipe=recipe, set=[ALPHA, f"kv_cache={cache}"])
    assert contents(tmp_path / "kept") == contents(tmp_path / "files")


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        ("gemma", {}, "input_layernorm can't take the factors"),
        ("olmo2", {}, "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj: no norm of their block"),
        (
            "opt",
            {"ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
            "fc1: self_attn_layer_norm can't take the factors",
        ),
    ],
)
def test_a_model_that_cannot_be_smoothed_is_refused_by_name(
    family: str, changes: dict[str, Any], why: str, model_of: Callable[..., Path], story: Path, tmp_path: Path
) -> None:
    model = model_of(family, **changes)
    with pytest.raises(RecipeError, match="nothing of this model can be smoothed") as refused:
        quantized(model, tmp_path / "out", story, set=ALPHA)
    assert why in str(refused.value) and not list(tmp_path.iterdir())
    with pytest.raises(RecipeError, match="nothing of this model can be smoothed"):
        llmshrink.plan(model, recipe="gptq-w8a8", set=ALPHA, calibration=story, measured=False, **WINDOWS)


def test_norms_with_a_bias_are_divided_whole(model_of: Callable[..., Path], story: Path, tmp_path: Path) -> None:
    model = shutil.copytree(model_of("opt", ffn_dim=96, word_embed_proj_dim=64), tmp_path / "model")
    loud = load_file(model / "model.safetensors")
    for key in (key for key in loud if "layer_norm" in key):
        loud[key][::9] *= 32
    save_file(loud, model / "model.safetensors", {"format": "pt"})
    report = quantized(model, tmp_path / "out", story, set=ALPHA)
    assert report.ok
    before, after = (
        load_file(model / "model.safetensors"),
        load_file(tmp_path / "out" / "model-block-00000.safetensors"),
    )
    norm = next(key for key in before if "layers.0.self_attn_layer_norm.weight" in key).removesuffix("weight")
    factors = before[norm + "weight"] / after[norm + "weight"]
    assert factors.max() > 1 and torch.equal(before[norm + "bias"], after[norm + "bias"] * factors)


def test_the_plan_counts_it(outliers: Path, story: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"recipe": "fp8-dynamic", "calibration": story, **WINDOWS}
    plain, smooth = (llmshrink.plan(outliers, measured=False, **asked, **more) for more in ({}, {"set": ALPHA}))
    assert smooth.output_bytes == plain.output_bytes
    quantized(outliers, tmp_path / "out", story, recipe="fp8-dynamic", set=ALPHA)
    assert smooth.output_bytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    timed = llmshrink.plan(outliers, **asked, set=ALPHA)
    assert timed.seconds is not None and timed.parts["calibration"] > 0


@pytest.mark.parametrize(
    ("recipe", "value", "said"),
    [
        ("gptq-w8a8", "1.5", "steps[0].quantize.smooth: 1.5 isn't none or a number from 0 to 1"),
        ("gptq-w8a8", "true", "isn't none or a number from 0 to 1"),
        ("gptq-w8a8", "much", "isn't none or a number from 0 to 1"),
        ("gptq-w4a16", "0.5", "smooth 0.5 is for products of 8 bits, and activations are none"),
    ],
)
def test_bad_values_are_one_line_and_exit_code_2(
    recipe: str, value: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["quantize", "demo", "-o", str(tmp_path / "out"), "--recipe", recipe, "--samples", "4"]
    assert command([*words, "--set", f"steps.0.quantize.smooth={value}"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("fused", [True, False])
def test_linears_of_one_input_must_ask_alike(
    fused: bool, outliers: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fused:
        taken_apart(monkeypatch)
    document = tmp_path / "apart.yaml"
    document.write_text(
        "name: apart\nsteps:\n  - quantize: {method: rtn, activations: int8, smooth: 0.5}\n"
        "overrides:\n  - {match: k_proj, quantize: {smooth: none}}\n"
    )
    said = "are one layer in every engine, but asked for" if fused else "read one input, but ask for"
    with pytest.raises(RecipeError, match=rf"q_proj and .*k_proj {said} smooth 0\.5 and none"):
        quantized(outliers, tmp_path / "out", story, recipe=str(document))
    assert not (tmp_path / "out").exists()


def test_the_record_says_so_and_the_recipe_reads_back(outliers: Path, story: Path, tmp_path: Path) -> None:
    quantized(outliers, tmp_path / "out", story, set=ALPHA)
    record = json.loads((tmp_path / "out" / "llmshrink.json").read_text())
    assert any("not smoothed: o_proj, down_proj" in note for note in record["notes"])
    again = quantized(outliers, tmp_path / "again", story, recipe=str(tmp_path / "out" / "recipe.yaml"))
    assert again.ok
    one, other = (load_file(tmp_path / name / "model-block-00001.safetensors") for name in ("out", "again"))
    assert all(torch.equal(one[key], other[key]) for key in one)
