"""Every family with every scheme, end to end on tiny random models: the cells of the README's table; odd shapes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from families import BEGIN, FAMILIES, README, REFUSED, SCHEMES, Scheme, table
from helpers import make_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import llmshrink
from llmshrink.errors import LlmshrinkError, UnsupportedModelError
from llmshrink.model import families as covered
from llmshrink.recipe.assign import matches
from llmshrink.run.verify import read_reference

SMALL: dict[str, Any] = {"samples": 6, "seq_len": 32, "dtype": "float32"}


def weights(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def run(scheme: Scheme, source: Path, out: Path, story: Path, **changes: Any) -> Any:
    verb = getattr(llmshrink, scheme.verb)
    return verb(source, output=out, recipe=scheme.recipe, calibration=story, **{**SMALL, **scheme.options, **changes})


def logprobs(model: Any, reference: Mapping[str, Tensor]) -> Tensor:
    """Of the next token at every place that the run kept: float32 [positions]."""
    ids = reference["input_ids"]
    with torch.no_grad():
        found: Tensor = model(ids).logits[:, :-1].float().log_softmax(-1)
    return found.gather(-1, ids[:, 1:, None]).flatten()


def conserved(source: Path, out: Path, sites: set[str]) -> bool:
    """Whether everything but the sites' weights is in the output, byte for byte."""
    before, after = weights(source), weights(out)
    others = [key for key in before if key.removesuffix(".weight") not in sites]
    return all(torch.equal(before[key].view(torch.uint8), after[key].view(torch.uint8)) for key in others)


@pytest.mark.parametrize("column", SCHEMES)
@pytest.mark.parametrize("title", FAMILIES)
def test_cell(title: str, column: str, model_of: Callable[..., Path], story: Path, tmp_path: Path) -> None:
    family, scheme, out = FAMILIES[title], SCHEMES[column], tmp_path / "out"
    source = model_of(family.model_type, **family.changes)
    if (title, column) in REFUSED:
        with pytest.raises(LlmshrinkError) as refused:
            run(scheme, source, out, story)
        assert REFUSED[title, column] in str(refused.value)
        assert not any(tmp_path.rglob("*.safetensors"))
        return
    report = run(scheme, source, out, story)
    assert report.verification.mean_difference == 0.0
    assert all(row.changed for row in report.sites) or report.structure
    if scheme.worst is not None:
        assert report.quality.kl_mean <= scheme.worst
    if report.structure is None:
        assert conserved(source, out, {row.name for row in report.sites})
    assert llmshrink.inspect(out).bytes == sum(tensor.nbytes for tensor in weights(out).values())
    # The packed model, or transformers' own of the new shape, computes in float32 what the run did.
    reference = read_reference(out)
    found = logprobs(llmshrink.load(out, dtype="float32"), reference)
    difference = (found - reference["token_logprobs"]).abs()
    if any(row.activations for row in report.sites):
        # Sums in another order put an input to the next code here and there, and what comes after it feels that.
        assert float(difference.median()) < 1e-5 and float(difference.quantile(0.75)) < 1e-3
    else:
        assert float(difference.max()) < 1e-3


def test_the_table_in_the_readme_is_what_is_tested() -> None:
    assert f"{BEGIN}\n{table()}\n" in README.read_text(), "run python tests/families.py"


def test_every_covered_family_has_a_row() -> None:
    assert {family.model_type for family in FAMILIES.values()} == covered.FAMILIES.keys()
    assert {title for title, _ in REFUSED} <= FAMILIES.keys()


MERGED = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}


def merged(tensors: Mapping[str, Tensor], suffix: str = "weight") -> dict[str, Tensor]:
    """A Llama's tensors under Phi's names: what has rows for queries, keys and values, or gate and up, put together."""
    found = dict(tensors)
    for name, parts in MERGED.items():
        parent, _, leaf = name.rpartition(".")
        for key in [key for key in found if key.endswith(f"{parent}.{parts[0]}.{suffix}")]:
            start = key.removesuffix(f"{parts[0]}.{suffix}")
            found[f"{start}{leaf}.{suffix}"] = torch.cat([found.pop(f"{start}{part}.{suffix}") for part in parts])
    return found


@pytest.fixture(scope="module")
def twins(model_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One model as a Llama and as a Phi-3."""
    from transformers import AutoConfig

    llama, phi = model_of("llama"), tmp_path_factory.mktemp("phi") / "phi"
    config = AutoConfig.from_pretrained(llama).to_dict()
    make_model(phi, "phi3", **{key: config[key] for key in ("rms_norm_eps", "rope_parameters")}, sliding_window=None)
    save_file(merged(weights(llama)), phi / "model.safetensors", {"format": "pt"})
    return llama, phi


@pytest.mark.parametrize("column", [column for column in SCHEMES if column != "half sparse"])
def test_merged_parameters_become_what_their_parts_become(
    column: str, twins: tuple[Path, Path], story: Path, tmp_path: Path
) -> None:
    """But for the last bits of sums; shares by error, which are given to each parameter, differ for good reason."""
    scheme = SCHEMES[column]
    apart, together = (run(scheme, source, tmp_path / source.name, story) for source in twins)
    assert together.quality.kl_mean == pytest.approx(apart.quality.kl_mean, rel=1e-2)
    found, expected = weights(together.output), weights(apart.output)
    parts = ("packed", "scale", "zero_point", "values", "positions")
    for suffix in ("weight", *(f"weight_{part}" for part in parts)):
        expected = merged(expected, suffix)
    for key in [key for key in expected if not key.endswith("weight_shape")]:
        one, other = found[key], expected[key]
        if one.is_floating_point():
            one, other = one.float(), other.float()
            assert float((one - other).norm() / other.norm()) < 1e-2, key
        else:
            assert float((one == other).float().mean()) > 0.98, key


def test_the_parts_of_a_merged_parameter_are_split_over_ranks_one_by_one(
    model_of: Callable[..., Path], story: Path, tmp_path: Path
) -> None:
    source = model_of("phi3", num_attention_heads=6, num_key_value_heads=3, hidden_size=96)
    with pytest.raises(LlmshrinkError, match=r"qkv_proj.*48 outputs can't be split over 32 ranks"):
        run(SCHEMES["8 bit"], source, tmp_path / "out", story, serve_tp=32, strict=True)


def test_a_narrower_shape_that_the_class_takes_no_config_for_is_refused(story: Path, tmp_path: Path) -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 64}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    source = make_model(tmp_path / "model", "phi3", rope_parameters=rope, original_max_position_embeddings=64)
    with pytest.raises(
        UnsupportedModelError, match=r"KV groups 2 -> 1.*takes no such phi3 .*must have length 16, got 8"
    ):
        run(SCHEMES["KV groups"], source, tmp_path / "out", story)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
    assert run(SCHEMES["FFN channels"], source, tmp_path / "out", story).verification.mean_difference == 0.0


@pytest.mark.parametrize("title", ["OPT-350m", "Gemma 2"])
def test_a_family_is_taught_by_its_original(
    title: str, model_of: Callable[..., Path], story: Path, tmp_path: Path
) -> None:
    """Through what comes after its blocks (a projection, a cap), and without the dropout that training would do."""
    family = FAMILIES[title]
    source = model_of(family.model_type, **family.changes)
    student = run(SCHEMES["2 bit"], source, tmp_path / "student", story).output
    short = {"steps": 3, "batch_size": 4, "seq_len": 32, "warmup": 1, "generated_tokens": 0, "dtype": "float32"}
    report = llmshrink.distill(source, student, output=tmp_path / "out", data=story, **short)
    assert report is not None and report.verification.mean_difference == 0.0


@pytest.mark.parametrize("title", ["OPT-350m", "Phi-4-mini"])
def test_a_smaller_student_is_cut_from_a_family(
    title: str, model_of: Callable[..., Path], story: Path, tmp_path: Path
) -> None:
    family = FAMILIES[title]
    source = model_of(family.model_type, **family.changes)
    short = {"steps": 2, "batch_size": 4, "seq_len": 32, "warmup": 1, "generated_tokens": 0, "dtype": "float32"}
    report = llmshrink.distill(source, output=tmp_path / "out", data=story, student_from="depth=1,width=64", **short)
    assert report is not None and report.verification.mean_difference == 0.0
    field = covered.FAMILIES[family.model_type].channels_field
    assert json.loads((tmp_path / "out" / "config.json").read_text())[field] == 64


def test_a_pattern_may_be_several() -> None:
    assert matches("down_proj|fc2", "model.layers.0.mlp.down_proj") and matches("down_proj|fc2", "decoder.layers.1.fc2")
    assert matches("lm_head|*.layers.0.*", "model.layers.0.mlp.up_proj")
    assert not matches("down_proj|fc2", "model.layers.0.mlp.up_proj")


UNEVEN: dict[str, Any] = {
    "hidden_size": 96, "intermediate_size": 101, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32,
}  # fmt: skip
ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "no group divides, Gemma 2": ("gemma2", UNEVEN),
    "no group divides, Phi-3": ("phi3", UNEVEN),
    "no group divides, OPT": ("opt", {**UNEVEN, "ffn_dim": 101, "word_embed_proj_dim": 50}),
    "one layer, Gemma 3": ("gemma3_text", {"num_hidden_layers": 1}),
    "one layer, Phi-3, tied": ("phi3", {"num_hidden_layers": 1, "tie_word_embeddings": True}),
    "one layer, Granite, tied, biased": (
        "granite", {"num_hidden_layers": 1, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "OPT without biases": (
        "opt", {"ffn_dim": 96, "word_embed_proj_dim": 64, "enable_bias": False, "layer_norm_elementwise_affine": False},
    ),
    "OPT, not tied": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64, "tie_word_embeddings": False}),
    "SmolLM3 with windows": (
        "smollm3", {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_odd_shapes(case: str, model_of: Callable[..., Path], story: Path, tmp_path: Path) -> None:
    family, changes = ODD[case]
    source, out = model_of(family, **changes), tmp_path / "out"
    report = run(SCHEMES["4 bit"], source, out, story, group_size=64)
    assert report.verification.mean_difference == 0.0
    assert conserved(source, out, {row.name for row in report.sites if row.changed})
    if "no group" in case:
        notes = {row.note for row in report.sites}
        assert any(note and note.startswith("group_size 32 instead of 64: 64 doesn't divide 96") for note in notes)
        assert any(note and note.startswith("stays as it is: 64 doesn't divide 101 inputs") for note in notes)
    reference = read_reference(out)
    found = logprobs(llmshrink.load(out, dtype="float32"), reference)
    assert float((found - reference["token_logprobs"]).abs().max()) < 1e-3


@pytest.mark.parametrize("column", ["4 bit", "2:4", "FFN channels", "blocks"])
def test_what_transformers_drops_at_load_is_copied(column: str, story: Path, tmp_path: Path) -> None:
    source, out = make_model(tmp_path / "model", num_hidden_layers=3), tmp_path / "out"
    tensors = weights(source)
    random = torch.Generator().manual_seed(1)
    extra = {
        key.replace("layers.2.", prefix): torch.randn(tensor.shape, generator=random).to(tensor.dtype)
        for prefix in ("layers.3.", "mtp.")
        for key, tensor in tensors.items()
        if "layers.2." in key
    }
    extra |= {"mtp.fc.weight": torch.randn(64, 128, generator=random), "model.layers.3.eh_proj.weight": torch.ones(4)}
    save_file(tensors | extra, source / "model.safetensors", {"format": "pt"})
    report = run(SCHEMES[column], source, out, story)
    assert report.verification.mean_difference == 0.0
    last = len({row.name.split(".")[2] for row in report.sites})
    found = weights(out)
    for key, tensor in extra.items():
        kept = found[key.replace("layers.3.", f"layers.{last}.")]
        assert kept.dtype == tensor.dtype and torch.equal(kept, tensor), key
    assert llmshrink.verify(out).ok and llmshrink.load(out) is not None


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 32}, "fused experts, 4 in one tensor"),
        ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4}, "a Conv1D of shape"),
    ],
)
def test_what_is_not_covered_is_refused_before_any_work(
    family: str, changes: dict[str, Any], why: str, story: Path, tmp_path: Path
) -> None:
    source = make_model(tmp_path / "model", family, **changes)
    for number, scheme in enumerate(SCHEMES.values()):
        with pytest.raises(UnsupportedModelError, match=f"architecture '{family}' isn't covered yet: .*{why}"):
            run(scheme, source, tmp_path / str(number), story)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
