"""Whole runs that make a model smaller: plain transformers loads it and computes what the slice done by hand does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import contents, make_model
from llmshrink_eval.inert import escaped
from safetensors.torch import load_file, save_file
from torch import Tensor

import llmshrink
from llmshrink.errors import LlmshrinkError, SourceError
from llmshrink.run import quantize as runs

SMALL: dict[str, Any] = {"samples": 6, "seq_len": 32}
IDS = torch.randint(1, 300, (2, 24), generator=torch.Generator().manual_seed(0))
WIDTH: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "llama biased": {"attention_bias": True, "mlp_bias": True},
    "llama odd": {"intermediate_size": 97},
    "llama four groups": {"num_attention_heads": 8, "num_key_value_heads": 4},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 8},
}


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def weights(folder: Path) -> dict[str, Tensor]:
    return {key: t for file in folder.glob("*.safetensors") for key, t in load_file(file).items()}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def rows_in(part: Tensor, whole: Tensor) -> list[int]:
    """Which rows of `whole` the rows of `part` are."""
    return [int((whole == row).all(1).nonzero().item()) for row in part]


def sliced(source: Path, out: Path, *, kv_heads: int, head_dim: int) -> Any:
    """The source's model with the channels and groups that `out` kept taken from it by hand, as a new model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(out)
    whole, part = weights(source), weights(out)
    for number in range(config.num_hidden_layers):
        mlp, attention = f"model.layers.{number}.mlp", f"model.layers.{number}.self_attn"
        channels = rows_in(part[f"{mlp}.up_proj.weight"], whole[f"{mlp}.up_proj.weight"])
        keys = rows_in(part[f"{attention}.k_proj.weight"], whole[f"{attention}.k_proj.weight"])
        groups = sorted({row // head_dim for row in keys})
        assert channels == sorted(channels) and keys == [g * head_dim + i for g in groups for i in range(head_dim)]
        queries = whole[f"{attention}.q_proj.weight"].shape[0] // kv_heads
        heads = [g * queries + i for g in groups for i in range(queries)]
        for name, rows in (("gate_proj", channels), ("up_proj", channels)):
            _take(whole, f"{mlp}.{name}", rows)
        for name, rows in (("q_proj", heads), ("k_proj", keys), ("v_proj", keys)):
            _take(whole, f"{attention}.{name}", rows)
        whole[f"{mlp}.down_proj.weight"] = whole[f"{mlp}.down_proj.weight"][:, channels]
        whole[f"{attention}.o_proj.weight"] = whole[f"{attention}.o_proj.weight"][:, heads]
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict({key: tensor.float() for key, tensor in whole.items()}, strict=False)
    return model.eval()


def _take(tensors: dict[str, Tensor], name: str, rows: list[int]) -> None:
    for key in (f"{name}.weight", f"{name}.bias"):
        if key in tensors:
            tensors[key] = tensors[key][rows]


@pytest.mark.parametrize("case", WIDTH)
def test_a_narrower_model_is_the_slice_done_by_hand(
    case: str, model_of: Callable[..., Path], story: Path, tmp_path: Path
) -> None:
    source, out = model_of(case.split()[0], **WIDTH[case]), tmp_path / "out"
    before = json.loads((source / "config.json").read_text())
    report = llmshrink.prune(
        source, output=out, recipe="width-prune", calibration=story, repair=False,
        set=["steps.0.width.channels=61", "steps.0.width.kv_groups=1"], **SMALL,
    )  # fmt: skip
    assert report.ok and report.verification is not None and report.verification.mean_difference == 0.0
    after = json.loads((out / "config.json").read_text())
    heads = before["num_attention_heads"] // before["num_key_value_heads"]
    changed = {"intermediate_size": 61, "num_key_value_heads": 1, "num_attention_heads": heads, "head_dim": 16}
    assert after == {**before, **changed}
    by_hand = sliced(source, out, kv_heads=before["num_key_value_heads"], head_dim=16)
    assert torch.equal(logits(loaded(out)), logits(by_hand))
    assert not torch.allclose(logits(by_hand), logits(loaded(source)), atol=0.1)


def test_block_0_is_chosen_and_repaired_by_what_transformers_computes(
    model_of: Callable[..., Path], story: Path, tmp_path: Path
) -> None:
    """From the calibration windows and the model's own activations, in float64."""
    from transformers import AutoTokenizer

    from llmshrink.calibration.text import load_documents
    from llmshrink.calibration.tokens import build_windows

    source = model_of("qwen2")
    windows = build_windows(
        load_documents(str(story)), AutoTokenizer.from_pretrained(source), samples=6, seq_len=32, held_out=0, seed=0
    )[0].input_ids
    model, inputs = loaded(source), []
    down = model.model.layers[0].mlp.down_proj
    down.register_forward_pre_hook(lambda _m, args: inputs.append(args[0].reshape(-1, args[0].shape[-1]).double()))
    with torch.no_grad():
        model(windows)
    x, w = torch.cat(inputs), down.weight.detach().double()
    out, damp = tmp_path / "out", 0.001
    llmshrink.prune(
        source, output=out, recipe="width-prune", calibration=story, dtype="float32",
        set="steps.0.width.channels=70", **SMALL,
    )  # fmt: skip
    stored = weights(out)
    scores = x.square().mean(0) * w.square().sum(0)
    kept = sorted(scores.argsort(descending=True)[:70].tolist())
    name = "model.layers.0.mlp.{}.weight"
    assert rows_in(stored[name.format("gate_proj")], weights(source)[name.format("gate_proj")]) == kept
    ridge = damp * x.square().mean() * torch.eye(70, dtype=torch.float64)
    system = x[:, kept].T @ x[:, kept] / len(x) + ridge
    best = torch.linalg.solve(system, x[:, kept].T @ (x @ w.T) / len(x) + ridge @ w[:, kept].T).T
    found = stored[name.format("down_proj")].double()
    assert (found - best).norm() < 0.01 * best.norm()  # stored in bfloat16
    assert (found - w[:, kept]).norm() > 0.05 * best.norm()


def test_the_repair_brings_the_model_nearer(model_of: Callable[..., Path], story: Path, tmp_path: Path) -> None:
    kl = {}
    for name, sets in {
        "magnitude": ["importance=magnitude", "repair=false"],
        "activations": ["repair=false"],
        "repaired": ["corrected=0.0"],
        "corrected": [],
    }.items():
        report = llmshrink.prune(
            model_of("llama"), output=tmp_path / name, recipe="width-prune", calibration=story, samples=32, seq_len=32,
            set=["steps.0.width.channels=48", *(f"steps.0.width.{each}" for each in sets)],
        )  # fmt: skip
        kl[name] = report.quality.kl_mean
    assert kl["corrected"] < kl["repaired"] < kl["activations"] < kl["magnitude"]


DEPTH: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "qwen2 window": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "qwen3": {},
}


@pytest.mark.parametrize("by", ["angular", "loss"])
@pytest.mark.parametrize("case", DEPTH)
def test_a_shallower_model_is_the_original_with_blocks_passed_by(
    case: str, by: str, model_of: Callable[..., Path], story: Path, tmp_path: Path
) -> None:
    source, out = model_of(case.split()[0], num_hidden_layers=4, **DEPTH[case]), tmp_path / "out"
    report = llmshrink.prune(
        source, output=out, recipe="depth-prune", calibration=story,
        set=["steps.0.depth.drop=2", f"steps.0.depth.by={by}"], **SMALL,
    )  # fmt: skip
    assert report.ok and report.verification is not None and report.verification.mean_difference == 0.0
    record = json.loads((out / "llmshrink.json").read_text())["structure"]
    dropped, scores = record["dropped"], record["scores"]
    assert len(dropped) == 2 and sorted(scores[n] for n in dropped) == sorted(scores)[:2]
    original = loaded(source)
    for number in dropped:
        original.model.layers[number].forward = lambda hidden_states, *_args, **_kwargs: hidden_states
    shorter = loaded(out)
    assert torch.equal(logits(shorter), logits(original))
    assert shorter.config.num_hidden_layers == 2 and len(shorter.model.layers) == 2
    if "window" in case:
        kinds = ["full_attention" if n < 2 else "sliding_attention" for n in range(4) if n not in dropped]
        assert json.loads((out / "config.json").read_text())["layer_types"] == shorter.config.layer_types == kinds
    assert {row.name.split(".")[2] for row in report.sites} == {"0", "1"}


def test_the_scores_are_what_transformers_computes(model_of: Callable[..., Path], story: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from llmshrink.calibration.text import load_documents
    from llmshrink.calibration.tokens import build_windows

    source = model_of("llama", num_hidden_layers=4)
    windows = build_windows(
        load_documents(str(story)), AutoTokenizer.from_pretrained(source), samples=6, seq_len=32, held_out=0, seed=0
    )[0].input_ids
    model, ends = loaded(source), []
    for block in model.model.layers:
        block.register_forward_hook(lambda _m, args, out: ends.append((args[0], out)))
    with torch.no_grad():
        whole = model(windows).logits.double().log_softmax(-1)[:, :-1]
    cosines = [torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=-1) for x, y in ends]
    expected = {"angular": [float(c.acos().mean() / torch.pi) for c in cosines], "loss": []}
    for number in range(4):
        left_out = loaded(source)
        left_out.model.layers[number].forward = lambda hidden_states, *_args, **_kwargs: hidden_states
        with torch.no_grad():
            without = left_out(windows).logits.double().log_softmax(-1)[:, :-1]
        expected["loss"].append(float((whole.exp() * (whole - without)).sum(-1).mean()))
    for by, scores in expected.items():
        out = tmp_path / by
        llmshrink.prune(
            source, output=out, recipe="depth-prune", calibration=story, dtype="float32",
            set=f"steps.0.depth.by={by}", **SMALL,
        )  # fmt: skip
        found = json.loads((out / "llmshrink.json").read_text())["structure"]["scores"]
        assert found == pytest.approx(scores, rel=1e-3)


def test_tensors_under_a_blocks_number_go_with_it(story: Path, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", num_hidden_layers=3)
    tensors = load_file(source / "model.safetensors")
    for number in range(3):
        tensors[f"model.layers.{number}.self_attn.rotary_emb.inv_freq"] = torch.full((8,), float(number))
    tensors["model.layers.3.mtp.weight"] = torch.ones(2)
    tensors["mtp.layers.1.weight"] = torch.ones(3)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    out = tmp_path / "out"
    llmshrink.prune(source, output=out, recipe="depth-prune", calibration=story, set="steps.0.depth.drop=1", **SMALL)
    (dropped,) = json.loads((out / "llmshrink.json").read_text())["structure"]["dropped"]
    found = {key: float(t[0]) for key, t in weights(out).items() if key.endswith("inv_freq")}
    kept = [n for n in range(3) if n != dropped]
    assert found == {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": float(n) for i, n in enumerate(kept)}
    # What follows the last block still does; another list's numbers are its own.
    assert {key for key in weights(out) if "mtp" in key} == {"model.layers.2.mtp.weight", "mtp.layers.1.weight"}


@pytest.mark.parametrize("recipe", ["depth-prune", "width-prune"])
def test_other_verbs_take_the_result_for_what_it_is(
    recipe: str, model_of: Callable[..., Path], story: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    sets = ["steps.0.width.kv_groups=1"] if "width" in recipe else ["steps.0.depth.by=loss"]
    report = llmshrink.prune(model_of("llama"), output=out, recipe=recipe, calibration=story, set=sets, **SMALL)
    assert llmshrink.verify(out).ok
    described = llmshrink.inspect(out)
    assert described.bytes == sum(t.numel() * t.element_size() for t in map_all(out))
    assert described.weights == sum(t.numel() for t in map_all(out))
    assert f"structure    {report.structure}" in described.lines()
    assert report.structure is not None and any("structure" in line for line in report.lines())
    card = (out / "README.md").read_text()
    assert escaped(report.structure) in card and "pruned" in card
    for format in ("llmshrink", "compressed-tensors"):
        with pytest.raises(SourceError, match=r"plain model of another shape .* nothing to convert"):
            llmshrink.convert(out, output=tmp_path / "other", format=format)
    again = llmshrink.quantize(out, output=tmp_path / "w4", calibration=story, group_size=32, **SMALL)
    assert again.ok and again.bytes_before == described.bytes


def map_all(folder: Path) -> list[Tensor]:
    return list(weights(folder).values())


@pytest.mark.parametrize("recipe", ["depth-prune", "width-prune"])
def test_same_command_same_bytes_wherever_activations_live(
    recipe: str, model_of: Callable[..., Path], story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = ["steps.0.width.kv_groups=1"] if "width" in recipe else ["steps.0.depth.by=loss"]
    for name, placement in {
        "memory": runs.Placement(None, True),
        "files": runs.Placement(tmp_path / "spill", False),
    }.items():
        monkeypatch.setattr(runs.Placement, "choose", lambda job, folder, placement=placement: placement)
        llmshrink.prune(model_of("llama"), output=tmp_path / name, recipe=recipe, calibration=story, set=sets, **SMALL)
    assert contents(tmp_path / "memory") == contents(tmp_path / "files")


@pytest.mark.parametrize(
    ("recipe", "sets", "said"),
    [
        ("width-prune", "width.channels=0", "0 isn't a whole number of at least 1, or a share between 0 and 1"),
        ("width-prune", "width.channels=1.0", "1.0 isn't a whole number of at least 1, or a share"),
        ("width-prune", "width.channels=96", "96 of 96 FFN channels leaves all; keep 1 to 95"),
        ("width-prune", "width.channels=97", "97 of 96 FFN channels leaves all; keep 1 to 95"),
        ("width-prune", "width.channels=0.001", "0.001 of 96 FFN channels is none; keep 1 to 95"),
        ("width-prune", "width.kv_groups=2", "2 of 2 KV groups leaves all; keep 1 to 1"),
        ("width-prune", "width.channels=null", "takes nothing away; give channels: 0.75"),
        ("depth-prune", "depth.drop=0", "0 isn't a whole number of at least 1"),
        ("depth-prune", "depth.drop=1.0", "1.0 isn't a whole number of at least 1"),
        ("depth-prune", "depth.drop=2", "2 of 2 blocks; drop 1 to 1"),
        ("depth-prune", "depth.drop=7", "7 of 2 blocks; drop 1 to 1"),
        ("depth-prune", "depth.drop=0.1", "0.1 of 2 blocks is 0; drop 1 to 1"),
        ("depth-prune", "depth.by=angle", "'angle' isn't one of angular, loss; did you mean angular"),
    ],
)
def test_bad_amounts_are_one_line_before_anything_is_written(
    recipe: str, sets: str, said: str, model_of: Callable[..., Path], story: Path, tmp_path: Path
) -> None:
    with pytest.raises(LlmshrinkError) as caught:
        llmshrink.prune(
            model_of("llama"), output=tmp_path / "out", recipe=recipe, calibration=story, set=f"steps.0.{sets}", **SMALL
        )
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_what_the_format_and_other_verbs_say(model_of: Callable[..., Path], story: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"output": tmp_path / "out", "recipe": "width-prune", "calibration": story, **SMALL}
    with pytest.raises(LlmshrinkError, match="plain smaller model, which has no zeros that --format llmshrink"):
        llmshrink.prune(model_of("llama"), format="llmshrink", **given)
    with pytest.raises(LlmshrinkError, match="it would prune: use llmshrink prune for it"):
        llmshrink.quantize(model_of("llama"), **given)
    with pytest.raises(LlmshrinkError, match="repair: changes a prune or width step, and depth-prune has none"):
        llmshrink.prune(model_of("llama"), repair=False, **{**given, "recipe": "depth-prune"})


def test_weights_that_overflow_are_told_by_name(story: Path, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", dtype="float32")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][3, 5] = 1e30
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(LlmshrinkError, match=r"layers\.0\.mlp\.down_proj\.weight: weights of up to 1e\+30 overflow"):
        llmshrink.prune(source, output=tmp_path / "out", recipe="width-prune", calibration=story, **SMALL)


def test_checkpoints_of_the_base_model_keep_their_shorter_names(story: Path, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", num_hidden_layers=3, tie_word_embeddings=True)
    tensors = load_file(source / "model.safetensors")
    save_file({k.removeprefix("model."): t for k, t in tensors.items()}, source / "model.safetensors", {"format": "pt"})
    for recipe in ("depth-prune", "width-prune"):
        report = llmshrink.prune(source, output=tmp_path / recipe, recipe=recipe, calibration=story, **SMALL)
        assert report.ok
        assert all(key.startswith(("layers.", "embed_tokens", "norm")) for key in weights(tmp_path / recipe))
