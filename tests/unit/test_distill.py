"""Distillation end to end on tiny models: what may change changes, what may not is the same to the bit."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import contents, make_model
from torch import Tensor

import llmshrink
from llmshrink.checkpoint.index import CheckpointIndex
from llmshrink.demo import model_folder
from llmshrink.distillation.asked import check_optimizer
from llmshrink.distillation.chunked import chunked_loss
from llmshrink.distillation.job import Options, prepare
from llmshrink.distillation.objective import Objective, TopK
from llmshrink.distillation.processes import Processes
from llmshrink.errors import LlmshrinkError
from llmshrink.formats import stored
from llmshrink.methods.learned import ScaledLinear
from llmshrink.run.progress import Silent
from llmshrink.weights import GroupedInt

SHORT: dict[str, Any] = {
    "steps": 6, "batch_size": 4, "seq_len": 32, "lr": 1e-2, "warmup": 1, "eval_steps": 2, "dtype": "float32",
}  # fmt: skip
CALIBRATED = {"samples": 8, "seq_len": 32}


@pytest.fixture(scope="module")
def teacher(model_of: Callable[..., Path]) -> Path:
    return model_of("llama")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher so far from every student that whatever moves it comes nearer."""
    return make_model(tmp_path_factory.mktemp("models") / "stranger", seed=3)


@pytest.fixture(scope="module")
def sparse(teacher: Path, story: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("students") / "sparse"
    llmshrink.prune(teacher, output=out, recipe="magnitude-2of4", calibration=story, **CALIBRATED)
    return out


@pytest.fixture(scope="module")
def quantized(teacher: Path, story: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("students") / "quantized"
    recipe = {"recipe": "rtn-w4a16", "bits": 3, "group_size": 32}
    llmshrink.quantize(teacher, output=out, calibration=story, **recipe, **CALIBRATED)
    return out


@pytest.fixture(scope="module")
def joint(teacher: Path, story: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2:4 and int4, in llmshrink's own format."""
    out = tmp_path_factory.mktemp("students") / "joint"
    recipe = {"recipe": "sparsegpt-2of4-gptq-w4a16", "group_size": 32, "format": "llmshrink"}
    llmshrink.compress(teacher, output=out, calibration=story, **recipe, **CALIBRATED)
    return out


def tensors(folder: Path) -> dict[str, Tensor]:
    with CheckpointIndex.open(folder) as index:
        return {key: index.read(key) for key in index}


def changed(before: Path, after: Path) -> set[str]:
    """The last parts of the names of the tensors that differ; both have the same, in the same dtypes and shapes."""
    old, new = tensors(before), tensors(after)
    assert old.keys() == new.keys()
    assert all(old[key].dtype == new[key].dtype and old[key].shape == new[key].shape for key in old)
    return {".".join(key.split(".")[-2:]) for key in old if not torch.equal(old[key], new[key])}


LINEARS = {f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")}
NORMS = {"input_layernorm.weight", "post_attention_layernorm.weight", "norm.weight"}


def test_a_mask_is_held_and_the_rest_learns(teacher: Path, sparse: Path, story: Path, tmp_path: Path) -> None:
    report = llmshrink.distill(teacher, sparse, output=tmp_path / "out", data=story, **SHORT)
    assert report.ok
    assert report.quality.kl_mean < report.before.kl_mean
    assert [point["step"] for point in report.curve] == [2, 4, 6]
    assert changed(sparse, tmp_path / "out") == LINEARS | NORMS
    old, new = tensors(sparse), tensors(tmp_path / "out")
    for key, weight in old.items():
        if key.endswith("proj.weight"):
            assert not new[key][weight == 0].any()
            assert ((new[key].view(len(weight), -1, 4) != 0).sum(-1) <= 2).all()
    assert llmshrink.verify(tmp_path / "out").ok
    assert llmshrink.inspect(tmp_path / "out").recipe == "magnitude-2of4, distilled"
    record = json.loads((tmp_path / "out" / "llmshrink.json").read_text())
    assert record["distill"]["objective"] == {"alpha": 0.0, "temperature": 1.0, "divergence": "forward_kl", "beta": 0.5}
    assert (tmp_path / "out" / "recipe.yaml").read_bytes() == (sparse / "recipe.yaml").read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Distilled" in card and "](distillation.svg)" in card
    assert (tmp_path / "out" / "distillation.svg").read_text().startswith("<?xml")
    losses = (tmp_path / "out" / "distillation.csv").read_text().splitlines()
    assert len(losses) == 8 and all(float(line.split(",")[1]) > 0 for line in losses[2:])


def test_codes_are_frozen_and_scales_learn(teacher: Path, quantized: Path, story: Path, tmp_path: Path) -> None:
    report = llmshrink.distill(teacher, quantized, output=tmp_path / "out", data=story, **SHORT)
    assert report.ok and report.quality.kl_mean < report.before.kl_mean
    found = changed(quantized, tmp_path / "out")
    assert found - NORMS == {name.replace(".weight", ".weight_scale") for name in LINEARS}
    assert (tmp_path / "out" / "config.json").read_bytes() == (quantized / "config.json").read_bytes()


def test_codes_learn_too_where_that_is_asked(stranger: Path, quantized: Path, story: Path, tmp_path: Path) -> None:
    settings = {**SHORT, "train": "weights", "lr": 0.3, "eval_steps": 6}
    report = llmshrink.distill(stranger, quantized, output=tmp_path / "out", data=story, **settings)
    assert report.ok
    assert {name.replace(".weight", ".weight_packed") for name in LINEARS} <= changed(quantized, tmp_path / "out")


@pytest.mark.parametrize("train", ["scales", "weights"])
def test_two_of_four_integers_keep_their_zeros(
    train: Any, stranger: Path, joint: Path, story: Path, tmp_path: Path
) -> None:
    settings = {**SHORT, "train": train, "lr": 0.3, "eval_steps": 6}
    assert llmshrink.distill(stranger, joint, output=tmp_path / "out", data=story, **settings).ok
    found = changed(joint, tmp_path / "out")
    kinds = {name.rpartition(".")[2] for name in found - NORMS}
    assert kinds == ({"weight_scale"} if train == "scales" else {"weight_scale", "weight_values"})


def test_a_plain_model_can_be_a_student(teacher: Path, story: Path, tmp_path: Path) -> None:
    student = make_model(tmp_path / "student", seed=3)
    report = llmshrink.distill(teacher, student, output=tmp_path / "out", data=story, **SHORT, alpha=0.3)
    assert report.ok and report.quality.kl_mean < report.before.kl_mean
    assert llmshrink.verify(tmp_path / "out").ok
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_training_that_harms_changes_nothing(sparse: Path, joint: Path, story: Path, tmp_path: Path) -> None:
    for student in (sparse, joint):
        out = tmp_path / student.name
        report = llmshrink.distill(student, student, output=out, data=story, **{**SHORT, "alpha": 0.9, "steps": 2})
        assert report.ok and report.before.kl_mean < 1e-9 and report.quality.kl_mean < 1e-9
        assert changed(student, out) == set()


class StopAt(Silent):
    """As a Ctrl-C at a line that begins so."""

    def __init__(self, line: str) -> None:
        self.line = line

    def note(self, line: str) -> None:
        if line.startswith(self.line):
            raise KeyboardInterrupt


def test_a_stopped_run_goes_on_to_the_same_bytes(teacher: Path, sparse: Path, story: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**SHORT, "generated_tokens": 200, "hidden_weight": 0.5}
    llmshrink.distill(teacher, sparse, output=tmp_path / "whole", data=story, **settings)
    for line in ("generated", "step 4/6"):
        with pytest.raises(KeyboardInterrupt):
            llmshrink.distill(teacher, sparse, output=tmp_path / "out", data=story, progress=StopAt(line), **settings)
        assert (tmp_path / "out.partial" / "training").is_dir()
    said: list[str] = []

    class Listen(Silent):
        def note(self, line: str) -> None:
            said.append(line)

    llmshrink.distill(teacher, sparse, output=tmp_path / "out", data=story, progress=Listen(), **settings)
    assert any(line.startswith("resumed") for line in said)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_a_run_that_died_between_its_last_two_steps_is_only_tidied(
    teacher: Path, sparse: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmshrink.run.journal import Workspace

    def die(self: Workspace) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Workspace, "_tidy", die)
    with pytest.raises(KeyboardInterrupt):
        llmshrink.distill(teacher, sparse, output=tmp_path / "out", data=story, **SHORT)
    monkeypatch.undo()
    before = contents(tmp_path / "out")
    waited: list[int] = []
    monkeypatch.setattr(Processes, "wait", lambda self, device: waited.append(self.rank))
    report = llmshrink.distill(teacher, sparse, output=tmp_path / "out", data=story, **SHORT)
    assert report is not None and report.ok and report.quality.kl_mean < report.before.kl_mean
    assert contents(tmp_path / "out") == before
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    # Another process of that run meets the first as often, and has nothing to do.
    monkeypatch.setattr(Processes, "here", lambda: Processes(1, 2))
    assert llmshrink.distill(teacher, sparse, output=tmp_path / "out", data=story, **SHORT) is None
    assert waited == [0, 1]
    assert contents(tmp_path / "out") == before


def test_a_cached_teacher_teaches_the_same(teacher: Path, sparse: Path, story: Path, tmp_path: Path) -> None:
    live = llmshrink.distill(teacher, sparse, output=tmp_path / "live", data=story, **SHORT)
    made = {**SHORT, "teacher_cache": tmp_path / "cache"}
    first = llmshrink.distill(teacher, sparse, output=tmp_path / "first", data=story, **made)
    again = llmshrink.distill(teacher, sparse, output=tmp_path / "again", data=story, **made)
    assert contents(tmp_path / "first") == contents(tmp_path / "again")
    assert first.before.kl_mean == pytest.approx(live.before.kl_mean, rel=1e-5)
    assert first.quality.kl_mean == pytest.approx(live.quality.kl_mean, rel=0.05)
    assert again.quality == first.quality
    with pytest.raises(LlmshrinkError, match="another --temperature"):
        llmshrink.distill(teacher, sparse, output=tmp_path / "hot", data=story, **made, temperature=2.0)
    with pytest.raises(LlmshrinkError, match=r"another --teacher-cache-tokens \(64, here 65\)"):
        llmshrink.distill(teacher, sparse, output=tmp_path / "k", data=story, **made, teacher_cache_tokens=65)
    with pytest.raises(LlmshrinkError, match="another teacher"):
        llmshrink.distill(sparse, sparse, output=tmp_path / "other", data=story, **made)
    # Stopped after the first file, before it was entered: it goes on.
    unfinished = tmp_path / "unfinished" / "outputs"
    unfinished.mkdir(parents=True)
    manifest = json.loads((tmp_path / "cache" / "outputs" / "manifest.json").read_text())
    (unfinished / "manifest.json").write_text(json.dumps({**manifest, "sha256": {}}))
    (unfinished / "windows-00000.safetensors").write_bytes(b"half")
    resumed = {**SHORT, "teacher_cache": tmp_path / "unfinished"}
    llmshrink.distill(teacher, sparse, output=tmp_path / "resumed", data=story, **resumed)
    assert contents(tmp_path / "resumed") == contents(tmp_path / "first")
    victim = next((tmp_path / "cache" / "outputs").glob("windows-*"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    with pytest.raises(LlmshrinkError, match="isn't what was written"):
        llmshrink.distill(teacher, sparse, output=tmp_path / "damaged", data=story, **made)


def test_a_cached_teacher_teaches_in_bfloat16_too(teacher: Path, sparse: Path, story: Path, tmp_path: Path) -> None:
    settings = {**SHORT, "steps": 1, "dtype": "bfloat16"}
    live = llmshrink.distill(teacher, sparse, output=tmp_path / "live", data=story, **settings)
    cached = llmshrink.distill(
        teacher, sparse, output=tmp_path / "cached", data=story, teacher_cache=tmp_path / "cache", **settings
    )
    assert cached.ok and cached.quality.kl_mean == pytest.approx(live.quality.kl_mean, rel=0.05)


def test_a_cached_loss_is_within_its_bound_of_the_live_one(tmp_path: Path) -> None:
    """With all of the vocabulary kept only float16 is left: less than 2e-4 nats a position."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 16, generator=g)
    weight, teacher = torch.randn(200, 16, generator=g), 3 * torch.randn(64, 200, generator=g)
    live = chunked_loss(hidden, weight, None, teacher.__getitem__, Objective()).total
    for k, bound in ((200, 2e-4), (64, 2e-2)):
        exact = TopK.of(teacher, k)
        kept = TopK(exact.ids, exact.logprobs.half().float(), exact.tail.half().float())
        rows = lambda part, kept=kept: TopK(kept.ids[part], kept.logprobs[part], kept.tail[part])  # noqa: E731
        cached = chunked_loss(hidden, weight, None, rows, Objective()).total
        assert abs(float(cached - live)) / 64 < bound * max(1.0, float(live) / 64)


def test_a_scaled_linear_is_its_checkpoint(story: Path) -> None:
    g = torch.Generator().manual_seed(0)
    for zero_point in (None, torch.randint(-4, 4, (6, 4), dtype=torch.int8, generator=g)):
        codes = torch.randint(-4, 4, (6, 32), dtype=torch.int8, generator=g)
        scale = torch.randn(6, 4, generator=g).bfloat16()
        weight = GroupedInt(codes, scale, zero_point, 3, 8)
        module = ScaledLinear(weight, None, latent=True, sparse=False)
        assert torch.equal(module.weight, weight.dequantize(torch.float32))
        assert torch.equal(module.stored().codes, codes)
        assert torch.equal(module.stored().scale, scale)
        module(torch.randn(5, 32, generator=g)).square().sum().backward()
        assert module.gain.grad is not None and module.gain.grad.ne(0).all()
        with torch.no_grad():
            module.gain.mul_(-3.0)  # no step turns a scale's sign, or makes it too small to divide by
        held = module.stored()
        assert (held.scale.float().abs() >= 9.9e-6).all()
        assert torch.equal(held.scale < 0, scale < 0)
        assert torch.equal(stored.whole(held).dequantize(torch.float32), module.weight.detach())


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_teacher_may_be_held_in_few_bits(
    quant: Any, sparse: Path, story: Path, tmp_path: Path, model_of: Callable[..., Path],
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    pytest.importorskip("bitsandbytes")
    settings = {**SHORT, "teacher_quant": quant}
    wide = model_of("llama", intermediate_size=128)
    report = llmshrink.distill(wide, sparse, output=tmp_path / "out", data=story, **settings)
    assert report.ok and report.quality.kl_mean < report.before.kl_mean
    assert report.teacher == f"model in {quant}"
    assert not [word for word in ("Loading weights", "MatMul8bitLt") if word in capfd.readouterr().err + caplog.text]


def test_a_teacher_whose_shapes_bitsandbytes_cannot_compute_is_refused(
    teacher: Path, sparse: Path, story: Path, tmp_path: Path
) -> None:
    """Blocks of 64 don't divide 96 inputs, which its kernel for CPUs with bfloat16 instructions wants."""
    functional = pytest.importorskip("bitsandbytes.functional")
    if not functional.has_avx512bf16():
        pytest.skip("bitsandbytes takes every shape on a CPU without bfloat16 instructions")
    with pytest.raises(LlmshrinkError, match="can't compute its shapes in nf4"):
        llmshrink.distill(teacher, sparse, output=tmp_path / "odd", data=story, **SHORT, teacher_quant="nf4")


def test_bitsandbytes_is_asked_for_only_where_it_is_needed(
    teacher: Path, sparse: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it weren't installed
    settings = {**SHORT, "steps": 1}
    assert llmshrink.distill(teacher, sparse, output=tmp_path / "without", data=story, **settings).ok
    for option, instead in (
        ({"teacher_quant": "nf4"}, "leave it out"),
        ({"teacher_quant": "int8"}, "leave it out"),
        ({"optim": "adamw_bnb_8bit"}, "take adamw_torch"),
    ):
        (name, value) = next(iter(option.items()))
        says = f"--{name.replace('_', '-')} {value}: needs bitsandbytes, .*: pip install '.*', or {instead}$"
        with pytest.raises(LlmshrinkError, match=says):
            llmshrink.distill(teacher, sparse, output=tmp_path / "out", data=story, **settings, **option)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported")
def test_every_optimizer_that_transformers_names_runs_or_is_refused_in_a_line() -> None:
    from transformers.training_args import OptimizerNames

    said = {}
    for name in (each.value for each in OptimizerNames):
        try:
            check_optimizer(name, torch.device("cpu"))
        except LlmshrinkError as error:
            said[name] = str(error)
    assert all(line.startswith(f"--optim {name}: ") and "\n" not in line for name, line in said.items())
    assert all(line.endswith("take adamw_torch") for line in said.values())
    assert not said.keys() & {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"}
    assert {"adamw_torch_xla", "adamw_torch_npu_fused"} <= said.keys()
    for name in ("galore_adamw", "galore_adafactor_layerwise", "lomo", "adalomo", "apollo_adamw"):
        assert "projects gradients" in said[name]


def test_an_optimizer_of_bitsandbytes_trains(teacher: Path, sparse: Path, story: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    settings = {**SHORT, "optim": "adamw_bnb_8bit"}
    report = llmshrink.distill(teacher, sparse, output=tmp_path / "out", data=story, **settings)
    assert report.ok and report.quality.kl_mean < report.before.kl_mean
    old, new = tensors(sparse), tensors(tmp_path / "out")
    assert not any(new[key][old[key] == 0].any() for key in old if key.endswith("proj.weight"))


def test_a_student_of_bitsandbytes_is_refused_at_once(
    model_of: Callable[..., Path], story: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    teacher = model_of("llama", intermediate_size=192)
    made = llmshrink.quantize(teacher, output=tmp_path / "nf4", recipe="bnb-nf4", calibration=story, **CALIBRATED)
    with pytest.raises(LlmshrinkError, match="nf4: can't be a student: quantized by bitsandbytes") as refused:
        llmshrink.distill(teacher, made.output, output=tmp_path / "out", data=tmp_path / "nowhere.txt", **SHORT)
    assert "\n" not in str(refused.value)
    assert {path.name for path in tmp_path.iterdir()} == {"nf4"}


def test_the_demo_teaches_with_its_own_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever folder its student is, as in a recipe's last step; and one that is cut twice is cut with it too."""
    monkeypatch.setattr("llmshrink.calibration.text._public_mix", lambda seed: iter([]))
    short: dict[str, Any] = {"output": tmp_path / "out", "steps": 1, "batch_size": 1, "seq_len": 16}
    for student in ({"student": str(model_folder())}, {"student": None, "student_from": "depth=3,width=256"}):
        job = prepare(Options(teacher="demo", **student, **short), Silent())
        assert (job.real.name, job.held_out.name) == ("demo", "demo")


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"alpha": 1.5}, "--alpha 1.5"),
        ({"temperature": 0.0}, "--temperature 0.0"),
        ({"steps": 0}, "--steps 0: must be at least 1"),
        ({"lr": 2.0}, "--lr 2.0"),
        ({"seq_len": 129}, "--seq-len 129: teacher and student allow 128"),
        ({"generated_tokens": -1}, "--generated-tokens -1"),
        ({"dtype": "float16"}, "--dtype float16"),
        ({"train": "scales"}, "isn't quantized"),
        ({"teacher_cache_tokens": 8}, "--teacher-cache-tokens 8: is of a --teacher-cache; give one"),
        ({"teacher_cache": Path("cache"), "teacher_cache_tokens": 0}, "--teacher-cache-tokens 0: must be at least 1"),
        (
            {"teacher_cache": Path("cache"), "teacher_cache_tokens": 10**6},
            "1000000: must be 1 to 512, which is the vocabulary",
        ),
        ({"optim": "galore_adamw"}, "--optim galore_adamw: projects gradients"),
        ({"optim": "adamw_bnb_8bits"}, "--optim adamw_bnb_8bits: .* it has adamw_bnb_8bit"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_written(
    fault: dict[str, Any], says: str, teacher: Path, sparse: Path, story: Path, tmp_path: Path
) -> None:
    with pytest.raises(LlmshrinkError, match=says):
        llmshrink.distill(teacher, sparse, output=tmp_path / "out", data=story, **{**SHORT, **fault})
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_or_touches_what_is_read_is_refused(teacher: Path, story: Path, tmp_path: Path) -> None:
    student = make_model(tmp_path / "models" / "student", seed=3)
    (tmp_path / "link").symlink_to(student)
    kept = contents(student)
    for out, says in (
        (student, "is the STUDENT"),
        (tmp_path / "link", "is the STUDENT"),
        (tmp_path / "models" / ".." / "models", "holds the STUDENT"),
        (student / "taught", "lies in the STUDENT"),
        (teacher, "is the TEACHER"),
        (teacher / "taught", "lies in the TEACHER"),
    ):
        with pytest.raises(LlmshrinkError, match=says):
            llmshrink.distill(teacher, student, output=out, data=story, overwrite=True, **SHORT)
    for cache in ("out", "out/cache", "out.partial/training"):
        with pytest.raises(LlmshrinkError, match=r"--teacher-cache .* which the run replaces; name a folder apart"):
            llmshrink.distill(
                teacher, student, output=tmp_path / "out", data=story, teacher_cache=tmp_path / cache, **SHORT
            )
    with pytest.raises(LlmshrinkError, match="lies in the TEACHER"):
        llmshrink.compress(teacher, output=teacher / "out", recipe="w2-distill", calibration=story)
    assert contents(student) == kept
    assert {path.name for path in tmp_path.iterdir()} == {"models", "link"}


@pytest.mark.parametrize("recipe", ["sparsegpt-2of4-distill", "w2-distill", "student-half"])
def test_a_recipe_that_ends_with_distill_runs_and_goes_on(
    recipe: str, teacher: Path, story: Path, tmp_path: Path
) -> None:
    last = len(llmshrink.recipes()[recipe].steps) - 1
    short = [f"steps.{last}.distill.{name}" for name in ("steps=4", "batch_size=4", "scale_lr=0.02")]
    if recipe == "w2-distill":
        short.append("steps.0.quantize.group_size=32")
    settings: dict[str, Any] = {"recipe": recipe, "calibration": story, "samples": 8, "seq_len": 32, "set": short}
    with pytest.raises(KeyboardInterrupt):
        llmshrink.compress(teacher, output=tmp_path / "out", progress=StopAt("before"), **settings)
    assert {path.name for path in tmp_path.iterdir()} == {"out.partial", "out.student"}
    said: list[str] = []

    class Listen(Silent):
        def note(self, line: str) -> None:
            said.append(line)

    report = llmshrink.compress(teacher, output=tmp_path / "out", progress=Listen(), **settings)
    assert report is not None and report.ok
    assert any("is there, from an earlier run" in line for line in said)
    assert report.quality.kl_mean <= report.before.kl_mean  # type: ignore[union-attr]
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert llmshrink.inspect(tmp_path / "out").recipe.startswith(recipe)


def test_recipes_are_for_their_verbs(teacher: Path, sparse: Path, story: Path, tmp_path: Path) -> None:
    for call, says in (
        (lambda out: llmshrink.compress(teacher, output=out, recipe="distill-recover"), "distill TEACHER STUDENT"),
        (lambda out: llmshrink.distill(teacher, sparse, output=out, recipe="w2-distill"), "use llmshrink compress"),
        (lambda out: llmshrink.prune(teacher, output=out, recipe="sparsegpt-2of4-distill"), "use llmshrink compress"),
        (lambda out: llmshrink.quantize(teacher, output=out, recipe="distill-recover"), "use llmshrink distill"),
    ):
        with pytest.raises(LlmshrinkError, match=says):
            call(tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("depth=2", "depth=2: the teacher has 2; give 1 to 1"),
        ("width=0", "not depth=N"),
        ("depth=1,depth=1", "not depth=N"),
        ("height=3", "not depth=N"),
    ],
)
def test_a_student_that_cannot_be_cut_is_refused(
    asked: str, says: str, teacher: Path, story: Path, tmp_path: Path
) -> None:
    with pytest.raises(LlmshrinkError, match=says):
        llmshrink.distill(teacher, student_from=asked, output=tmp_path / "out", data=story, **SHORT)
    with pytest.raises(LlmshrinkError, match="name a STUDENT"):
        llmshrink.distill(teacher, output=tmp_path / "out", data=story, **SHORT)
    assert not list(tmp_path.iterdir())


def test_a_smaller_student_is_cut_from_the_teacher_and_taught(teacher: Path, story: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**SHORT, "student_from": "depth=1,width=48"}
    report = llmshrink.distill(teacher, output=tmp_path / "out", data=story, **settings)
    assert report.ok and report.quality.kl_mean < report.before.kl_mean
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (1, 48)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert llmshrink.verify(tmp_path / "out").ok
    from transformers import AutoModelForCausalLM

    assert len(AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers) == 1


def test_another_tokenizer_is_refused(teacher: Path, story: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", vocab_size=999)
    with pytest.raises(LlmshrinkError, match="other tokenizers"):
        llmshrink.distill(teacher, other, output=tmp_path / "out", data=story, **SHORT)


def test_empty_data_is_refused(teacher: Path, sparse: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("  \n")
    with pytest.raises(LlmshrinkError, match="empty"):
        llmshrink.distill(teacher, sparse, output=tmp_path / "out", data=tmp_path / "empty.txt", **SHORT)


def test_a_loss_that_is_no_number_stops_at_its_step(
    teacher: Path, sparse: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmshrink.distillation.trainer import Distiller

    losses, calls = Distiller.losses, []

    def spoiled(self: Distiller, *arguments: Any) -> Any:
        calls.append(1)
        found, count = losses(self, *arguments)
        if len(calls) == 4:
            found = type(found)(found.total * torch.nan, found.entropy, found.divergence)
        return found, count

    monkeypatch.setattr(Distiller, "losses", spoiled)
    with pytest.raises(LlmshrinkError, match=r"step 4: the loss of windows \["):
        llmshrink.distill(teacher, sparse, output=tmp_path / "out", data=story, **SHORT)
    assert (tmp_path / "out.partial" / "training" / "checkpoint-2").is_dir()
    monkeypatch.undo()
    assert llmshrink.distill(teacher, sparse, output=tmp_path / "out", data=story, **SHORT).ok


def test_no_parameter_decays() -> None:
    from types import SimpleNamespace

    from llmshrink.distillation.trainer import DistillTrainer, Rates

    asked: Any = SimpleNamespace(
        optimizer=None, model=torch.nn.Linear(2, 2), args=None, _rates=Rates(0.1, 0.1, 0.2),
        get_optimizer_cls_and_kwargs=lambda args: (torch.optim.AdamW, {"lr": 0.1}),
    )  # fmt: skip
    groups = DistillTrainer.create_optimizer(asked).param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.1, 0.0), (0.2, 0.0)]


def test_nothing_is_dropped_while_a_student_learns() -> None:
    from llmshrink_eval.configured import settle
    from transformers import OPTConfig

    config = settle(OPTConfig(dropout=0.1, attention_dropout=0.2, layerdrop=0.3))
    assert (config.dropout, config.attention_dropout, config.layerdrop) == (0.0, 0.0, 0.0)
