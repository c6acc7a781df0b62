"""Block fine-tuning: what it starts from, what it may change, and that it is as repeatable as the rest of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import contents
from hypothesis import given, settings
from hypothesis import strategies as st

import llmshrink
from llmshrink.calibration.statistics import Statistics
from llmshrink.checkpoint.index import CheckpointIndex
from llmshrink.errors import CheckpointError, RecipeError
from llmshrink.formats import stored
from llmshrink.methods import PruneSpec, QuantizeSpec, SiteSpec, solve
from llmshrink.methods.learned import ScaledLinear
from llmshrink.methods.pruning import Pattern
from llmshrink.recipe.read import load_recipe
from llmshrink.run import quantize as runs
from llmshrink.run.tune import LAST, WARMUP, share_of_rate
from llmshrink.weights import Dense, GroupedInt, code_range

SMALL: dict[str, Any] = {"samples": 32, "seq_len": 32, "group_size": 32}
DEMO = ["steps.1.tune.steps=20", "steps.1.tune.lr=0.005", "steps.1.tune.scale_lr=0.002"]
SHORT = ["steps.1.tune.steps=12", "steps.1.tune.lr=0.005", "steps.1.tune.scale_lr=0.002"]


def statistics_of(width: int, seed: int) -> Statistics:
    generator = torch.Generator().manual_seed(seed)
    found = Statistics(width, cross=True, device=torch.device("cpu"))
    inputs = torch.randn(64, width, generator=generator)
    found.add(inputs, inputs + 0.1 * torch.randn(64, width, generator=generator))
    return found


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1000),
    bits=st.sampled_from([2, 3, 4, 8]),
    method=st.sampled_from(["gptq", "rtn"]),
    symmetric=st.booleans(),
    descent=st.sampled_from([0, 1]),
    pruned=st.booleans(),
)
def test_training_starts_at_what_the_solver_chose(
    seed: int, bits: int, method: str, symmetric: bool, descent: int, pruned: bool
) -> None:
    weight = torch.randn(6, 48, generator=torch.Generator().manual_seed(seed))
    search, corrected = ("trial", 1.0) if method == "gptq" else ("mse", 0.0)
    quantize = QuantizeSpec(
        method=method, bits=bits, group_size=16, symmetric=symmetric, scale_search=search, corrected=corrected,
        act_order=method == "gptq", descent=descent if method == "gptq" else 0,
    )  # fmt: skip
    prune = PruneSpec("magnitude", Pattern.n_of_m(2, 4), False, 0.0, 0.01, False) if pruned else None
    solved = solve(weight, statistics_of(48, seed), SiteSpec(prune, quantize).to_tune(), torch.bfloat16)
    plain = solve(weight, statistics_of(48, seed), SiteSpec(prune, quantize), torch.bfloat16)
    assert isinstance(solved.weight, GroupedInt)
    assert isinstance(plain.weight, GroupedInt)
    assert plain.residual is None
    assert torch.equal(plain.weight.codes, solved.weight.codes)
    assert solved.residual is not None
    module = ScaledLinear(solved.weight, None, latent=True, sparse=False)
    module.start_from(solved.residual)
    assert torch.equal(module.stored().codes, solved.weight.codes)
    assert torch.equal(module.stored().scale, solved.weight.scale)
    if not descent and not pruned:
        # What was rounded to a code inside the range lay less than half a code from it.
        low, high = code_range(bits)
        inside = (solved.weight.codes > low) & (solved.weight.codes < high)
        scale = solved.weight.scale.float().repeat_interleave(16, 1)
        assert ((solved.residual / scale).abs()[inside] <= 0.5 + 1e-3).all()


def test_frozen_codes_have_no_latents_to_start() -> None:
    weight = GroupedInt(torch.zeros(2, 4, dtype=torch.int8), torch.ones(2, 1), None, 4, 4)
    with pytest.raises(ValueError, match="frozen"):
        ScaledLinear(weight, None, latent=False, sparse=False).start_from(torch.zeros(2, 4))


def test_the_rate_rises_and_falls() -> None:
    shares = [share_of_rate(step, 60) for step in range(60)]
    assert shares[0] == pytest.approx(1 / WARMUP)
    assert max(shares) == pytest.approx(1.0)
    assert shares[WARMUP:] == sorted(shares[WARMUP:], reverse=True)
    assert LAST < shares[-1] < 2 * LAST
    assert share_of_rate(0, 1) == pytest.approx(1.0)


def test_a_tuned_block_is_nearer_and_still_plain_integers(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"calibration": "demo", "bits": 2, "group_size": 32, "samples": 32, "seq_len": 128}
    report = llmshrink.quantize("demo", output=tmp_path / "out", recipe="tuned-w3a16", set=DEMO, **asked)
    assert report.ok
    for row in report.sites:
        assert row.block_error is not None
        assert 0 < row.block_error[1] < row.block_error[0]
    plain = llmshrink.quantize("demo", output=tmp_path / "plain", recipe="gptq-w3a16", **asked)
    assert all(row.block_error is None for row in plain.sites)
    with CheckpointIndex.open(tmp_path / "out") as tuned, CheckpointIndex.open(tmp_path / "plain") as swept:
        assert {key: tuned.entry(key).shape for key in tuned} == {key: swept.entry(key).shape for key in swept}
        moved = [key for key in tuned if key.endswith("weight_packed") and not tuned.read(key).equal(swept.read(key))]
        assert moved, "codes are trained too"


def test_two_runs_agree_to_the_byte_wherever_activations_live(
    model_of: Callable[..., Path], story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for name, placement in (
        ("memory", runs.Placement(None, True)),
        ("again", runs.Placement(None, False)),
        ("files", runs.Placement(tmp_path / "spill", False)),
    ):
        monkeypatch.setattr(runs.Placement, "choose", lambda job, folder, placement=placement: placement)
        llmshrink.quantize(
            model_of("llama"), output=tmp_path / name, recipe="tuned-w3a16", calibration=story, set=SHORT, **SMALL
        )
        found.append(contents(tmp_path / name))
    assert found[0] == found[1] == found[2]
    assert not (tmp_path / "spill").exists()


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    model_of: Callable[..., Path], story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"recipe": "tuned-w3a16", "calibration": story, "set": SHORT, **SMALL}
    llmshrink.quantize(model_of("llama"), output=tmp_path / "whole", **asked)
    solve_block = runs._Run._solve

    def stop(self: Any, work: Any, walk: Any, number: int) -> None:
        if number == 1:
            raise KeyboardInterrupt
        solve_block(self, work, walk, number)

    with monkeypatch.context() as patch:
        patch.setattr(runs._Run, "_solve", stop)
        with pytest.raises(KeyboardInterrupt):
            llmshrink.quantize(model_of("llama"), output=tmp_path / "out", **asked)
    llmshrink.quantize(model_of("llama"), output=tmp_path / "out", **asked)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_pruned_weights_stay_pruned(model_of: Callable[..., Path], story: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "joint.yaml"
    recipe.write_text(
        "name: joint\nsteps:\n  - prune: {method: sparsegpt, pattern: '2:4'}\n  - quantize: {group_size: 32}\n"
        "  - tune: {steps: 8, lr: 0.05}\n"
    )
    report = llmshrink.compress(
        model_of("llama"), output=tmp_path / "out", recipe=recipe, calibration=story, samples=6, seq_len=32
    )
    assert report is not None
    assert report.ok
    with CheckpointIndex.open(tmp_path / "out") as index:
        import json

        config = json.loads((tmp_path / "out" / "config.json").read_text())
        for name, scheme in stored.schemes(config["quantization_config"]).items():
            whole = stored.whole(stored.read(name, index.read, scheme))
            assert not isinstance(whole, Dense)
            weight = whole.dequantize()
            assert ((weight.view(len(weight), -1, 4) != 0).sum(-1) <= 2).all()


def test_training_that_doesnt_help_isnt_used(
    model_of: Callable[..., Path], story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(self: Any, spec: Any) -> None:
        for module in self.learned.values():
            module.gain.data.mul_(1.5)

    monkeypatch.setattr("llmshrink.run.tune._Block.train", spoil)
    report = llmshrink.quantize(
        model_of("llama"), output=tmp_path / "out", recipe="tuned-w3a16", calibration=story, **SMALL
    )
    plain = llmshrink.quantize(
        model_of("llama"), output=tmp_path / "plain", recipe="gptq-w3a16", calibration=story, **SMALL
    )
    assert all("not used" in event for row in report.sites for event in row.events)
    assert [row.shape for row in report.sites] == [row.shape for row in plain.sites]
    same = {name: digest for name, digest in contents(tmp_path / "plain").items() if name.startswith("model-block")}
    assert same
    assert same.items() <= contents(tmp_path / "out").items()


def test_a_loss_that_isnt_a_number_names_block_and_step(
    model_of: Callable[..., Path], story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmshrink.run.tune._Block._mean_energy", lambda self: float("nan"))
    with pytest.raises(CheckpointError, match=r"model\.layers\.0: tuning step 1: the loss is nan; lower"):
        llmshrink.quantize(
            model_of("llama"), output=tmp_path / "out", recipe="tuned-w4a16", calibration=story, set=SHORT, **SMALL
        )


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ("[{tune: {}}]", "are tune"),
        ("[{prune: {pattern: '2:4'}}, {tune: {}}]", "are prune, tune"),
        ("[{tune: {}}, {quantize: {}}]", "are tune, quantize"),
        ("[{quantize: {method: bnb-nf4}}, {tune: {}}]", "fixed grid"),
        ("[{quantize: {}}, {tune: {steps: 0}}]", r"steps\[1\]\.tune\.steps"),
        ("[{quantize: {}}, {tune: {lr: 1.5}}]", r"steps\[1\]\.tune\.lr"),
    ],
)
def test_recipes_that_tune_nothing_are_refused(steps: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(f"name: bad\nsteps: {steps}\n")
    with pytest.raises(RecipeError, match=said):
        load_recipe(path)
