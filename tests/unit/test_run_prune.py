"""Whole runs that prune, in process, on tiny models: what is zero, what loads it, what is said of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import contents
from safetensors.torch import load_file

import llmshrink
from llmshrink.checkpoint.decompressed import Decompressed
from llmshrink.errors import RecipeError
from llmshrink.recipe.fields import BITSANDBYTES


def test_every_shipped_recipe_runs(model_of: Callable[..., Path], story: Path, tmp_path: Path) -> None:
    recipes = sorted(path.stem for path in (Path(__file__).parents[2] / "recipes").rglob("*.yaml"))
    assert len(recipes) >= 13
    for recipe in recipes:
        asked = llmshrink.recipes()[recipe]
        if asked.distill is not None:
            continue  # those are in test_distill_recipes.py
        if asked.quantize is not None and asked.quantize.method in BITSANDBYTES:
            continue  # those are in test_bitsandbytes.py
        fixed = asked.quantize is None or asked.quantize.activations != "none"
        group = {} if fixed else {"group_size": 32}
        report = llmshrink.compress(
            model_of("llama"), output=tmp_path / recipe, recipe=recipe, calibration=story,
            samples=6, seq_len=32, **group,
        )  # fmt: skip
        assert report.ok
        bits = {"w4a16": 4, "asym": 4, "w3a16": 3, "w2a16": 2, "w8a16": 8, "w8a8": 8, "dynamic": 8}.get(
            recipe.rpartition("-")[2]
        )
        assert {row.bits for row in report.sites} == {bits}
        if asked.prune is None:
            assert all((row.pruned is None or asked.structured) and row.zeros is None for row in report.sites)
            continue
        how = asked.prune.pattern or ("50 % by error" if asked.prune.ratios == "by-error" else "50 %")
        assert {row.pruned for row in report.sites} == {f"{asked.prune.method} {how}"}
        sizes = [row.shape[0] * row.shape[1] for row in report.sites]
        zeros = sum(size * (row.zeros or 0.0) for size, row in zip(sizes, report.sites, strict=True))
        assert zeros / sum(sizes) == pytest.approx(0.5, abs=0.002) if not asked.quantize else zeros / sum(sizes) >= 0.5
        assert asked.prune.pattern is None or all(two_of_four(tmp_path / recipe, row.name) for row in report.sites)


def test_an_empty_quantization_config_doesnt_go_on(model_of: Callable[..., Path], story: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(model_of("llama"), tmp_path / "model"))
    config = {**json.loads((source / "config.json").read_text()), "quantization_config": {}}
    (source / "config.json").write_text(json.dumps(config))
    report = llmshrink.prune(
        source, output=tmp_path / "out", recipe="magnitude-2of4", calibration=story, samples=6, seq_len=32
    )
    assert report.ok
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def two_of_four(folder: Path, site: str) -> bool:
    """Whether no four consecutive inputs of a stored matrix hold more than two weights."""
    return n_of_m(folder, site, 2, 4)


def n_of_m(folder: Path, site: str, keep: int, block: int) -> bool:
    """Whether no `block` consecutive inputs of a stored matrix hold more than `keep` weights."""
    reader = Decompressed(folder, json.loads((folder / "config.json").read_text()), torch.float32)
    weight = reader.read(f"{site}.weight")
    return bool(((weight.view(len(weight), -1, block) != 0).sum(-1) <= keep).all())


@pytest.mark.parametrize(
    ("recipe", "pattern"),
    [("magnitude-2of4", "1:4"), ("wanda-2of4", "4:8"), ("sparsegpt-2of4", "1:4"), ("alps-2of4", "4:8")],
)
def test_another_pattern_is_exact_in_every_stored_matrix(
    recipe: str, pattern: str, model_of: Callable[..., Path], story: Path, tmp_path: Path
) -> None:
    keep, block = map(int, pattern.split(":"))
    report = llmshrink.prune(
        model_of("llama"), output=tmp_path / "out", recipe=recipe, calibration=story,
        set=f"steps.0.prune.pattern='{pattern}'", samples=6, seq_len=32,
    )  # fmt: skip
    assert report.ok
    assert {row.pruned for row in report.sites} == {f"{recipe.removesuffix('-2of4')} {pattern}"}
    assert all(n_of_m(tmp_path / "out", row.name, keep, block) for row in report.sites)
    assert all(row.zeros == pytest.approx(1 - keep / block, abs=0.002) for row in report.sites)


def test_tied_embeddings_are_named_and_not_pruned(model_of: Callable[..., Path], story: Path, tmp_path: Path) -> None:
    for tied, named in (
        (True, "model.embed_tokens (tied to lm_head), outside"),
        (False, "model.embed_tokens, outside"),
    ):
        with pytest.raises(RecipeError) as refused:
            llmshrink.prune(
                model_of("llama", tie_word_embeddings=tied), output=tmp_path / "out", calibration=story,
                set="overrides=[{match: embed_tokens, prune: {pattern: '2:4'}}]", samples=6, seq_len=32,
            )  # fmt: skip
        assert named in str(refused.value) and "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def pruned(model_of: Callable[..., Path], story: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `llmshrink prune` makes without further words."""
    out = tmp_path_factory.mktemp("pruned") / "out"
    report = llmshrink.prune(model_of("llama"), output=out, calibration=story, samples=6, seq_len=32)
    assert report.ok and any("no engine is faster for them" in note for note in report.notes)
    return out


def test_a_pruned_model_is_a_plain_one_that_transformers_loads(pruned: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert "quantization_config" not in json.loads((pruned / "config.json").read_text())
    kept = load_file(pruned / "verify" / "held_out.safetensors")
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)
        logprobs = model(kept["input_ids"]).logits.log_softmax(-1)
    found = logprobs[:, :-1].gather(-1, kept["input_ids"][:, 1:, None]).reshape(-1)
    # The run computed its blocks in bfloat16; transformers here in float32.
    assert (found - kept["token_logprobs"]).abs().mean() < 0.05


def test_the_card_of_a_pruned_model_does_not_call_it_quantized(pruned: Path) -> None:
    text = (pruned / "README.md").read_text()
    assert "tags:\n- llmshrink\n- pruned\nmodel-index:\n" in text
    assert "in the blocks 14 pruned (alps 2:4); all else" in text
    assert "- Format: plain safetensors" in text
    assert "quantized" not in text and "pack-quantized" not in text


def test_repair_is_the_recipes_choice_or_ones_own(model_of: Callable[..., Path], story: Path, tmp_path: Path) -> None:
    errors = {}
    for repair in (None, True, False):
        report = llmshrink.prune(
            model_of("llama"), output=tmp_path / str(repair), recipe="magnitude-2of4", calibration=story,
            repair=repair, samples=6, seq_len=32,
        )  # fmt: skip
        errors[repair] = [row.error for row in report.sites]
    assert errors[None] == errors[True] != errors[False]


BY_ERROR: dict[str, Any] = {
    "recipe": "sparsegpt-50", "samples": 6, "seq_len": 32,
    "set": ["steps.0.prune.ratios=by-error", "overrides=[{match: '*.1.mlp.down_proj', prune: {ratio: 0.25}}]"],
}  # fmt: skip


def test_ratios_by_error_differ_and_come_to_the_recipes_share(
    model_of: Callable[..., Path], story: Path, tmp_path: Path
) -> None:
    report = llmshrink.prune(model_of("llama"), output=tmp_path / "out", calibration=story, **BY_ERROR)
    assert report.ok
    rows = {row.name: row for row in report.sites}
    own = rows.pop("model.layers.1.mlp.down_proj")
    assert own.pruned == "sparsegpt 25 %" and own.zeros == pytest.approx(0.25, abs=0.01)
    assert {row.pruned for row in rows.values()} == {"sparsegpt 50 % by error"}
    zeros = {name: row.zeros for name, row in rows.items()}
    assert len({round(share, 2) for share in zeros.values() if share is not None}) > 3
    assert all(share is not None and 0.34 < share < 0.66 for share in zeros.values())
    weights = {name: row.shape[0] * row.shape[1] for name, row in rows.items()}
    gone = sum(weights[name] * (zeros[name] or 0.0) for name in rows)
    assert gone / sum(weights.values()) == pytest.approx(0.5, abs=0.002)


def test_ratios_are_found_once_and_a_stopped_run_goes_on_with_them(
    model_of: Callable[..., Path], story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmshrink.run import quantize as runs
    from llmshrink.run import ratios

    llmshrink.prune(model_of("llama"), output=tmp_path / "whole", calibration=story, **BY_ERROR)
    placement = runs.Placement(tmp_path / "spill", False)
    monkeypatch.setattr(runs.Placement, "choose", lambda job, folder: placement)
    for stop in ("solve", "replay"):
        with monkeypatch.context() as patch:
            if stop == "replay":
                patch.setattr(ratios, "curves", None)
            solve = ratios.RatioWork.solve
            done: list[int] = []

            def stopping(work: Any, walk: Any, number: int, solve: Any = solve, done: list[int] = done) -> Any:
                if done:
                    raise KeyboardInterrupt
                done.append(number)
                return solve(work, walk, number)

            if stop == "solve":
                patch.setattr(ratios.RatioWork, "solve", stopping)
                with pytest.raises(KeyboardInterrupt):
                    llmshrink.prune(model_of("llama"), output=tmp_path / "out", calibration=story, **BY_ERROR)
            else:
                report = llmshrink.prune(model_of("llama"), output=tmp_path / "out", calibration=story, **BY_ERROR)
                assert report.blocks_kept == 1
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_ratios_by_error_are_for_a_ratio(model_of: Callable[..., Path], story: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"has ratios and a pattern; give ratio: 0\.5, or leave ratios out"):
        llmshrink.prune(
            model_of("llama"), output=tmp_path / "out", calibration=story, set="steps.0.prune.ratios=by-error"
        )
