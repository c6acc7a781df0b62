"""What a plan says before a run is what the run then is: bytes exactly, memory near enough, and nothing written."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import SERVABLE
from hub_server import HubServer, use

import llmshrink
from llmshrink.checkpoint.index import CheckpointIndex
from llmshrink.checkpoint.source import Source
from llmshrink.distillation import room
from llmshrink.errors import LlmshrinkError, NoRoomError, OutputError, RecipeError
from llmshrink.model.outline import outlined_stages
from llmshrink.run import fits, memory, quantize
from llmshrink.run import footprint as footprints
from llmshrink.run.asked import Options
from llmshrink.run.job import outline, prepare
from llmshrink.run.sizes import sizes_of

ModelOf = Callable[..., Path]
FEW = {"samples": 4, "seq_len": 32}


def files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}


def options(model: Path, story: Path, **more: Any) -> Options:
    return Options(model=str(model), output=Path("nowhere"), verb="compress", calibration=str(story), **FEW, **more)


@pytest.mark.parametrize(
    ("family", "recipe", "more"),
    [
        ("llama", "rtn-w4a16", {"bits": 3, "group_size": 64, "asymmetric": True, "max_shard_size": "8kB"}),
        ("llama", "magnitude-2of4", {"format": "llmshrink"}),
        ("qwen2", "width-prune", {"set": ["steps.0.width.channels=0.5", "steps.0.width.kv_groups=1"]}),
        ("qwen2", "depth-prune", {"set": "steps.0.depth.drop=1"}),
    ],
)
def test_every_file_of_weights_is_known_to_the_byte(
    model_of: ModelOf, story: Path, tmp_path: Path, family: str, recipe: str, more: dict[str, Any]
) -> None:
    asked = {"recipe": recipe, "calibration": story, **FEW, **more}
    made = llmshrink.plan(model_of(family), measured=False, **asked)
    llmshrink.compress(model_of(family), output=tmp_path / "out", verify=False, **asked)
    assert made.output_bytes == sum(files(tmp_path / "out").values())
    assert ("max_shard_size" in more) == (len(files(tmp_path / "out")) > 4)
    said = llmshrink.inspect(tmp_path / "out")
    assert made.bits_per_weight == pytest.approx(said.bits_per_weight, rel=1e-12)
    assert made.linear_bits_per_weight == pytest.approx(said.linear_bits_per_weight, rel=1e-12)
    taken = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert made.disk_bytes == pytest.approx(taken, rel=0.15)


@pytest.mark.parametrize("family", ["qwen2", "phi3"])
def test_an_outline_finds_the_stages_that_the_analysis_finds(model_of: ModelOf, story: Path, family: str) -> None:
    folder = model_of(family)
    whole = prepare(options(folder, story, recipe="rtn-w4a16"))
    index = CheckpointIndex.open(folder)
    source = Source(str(folder), folder, None, "folder")
    again = outline(options(folder, story, recipe="rtn-w4a16"), source, index, text_here=True)
    assert again.stages == whole.stages == outlined_stages(again.chain, 8)
    assert not index.reads
    assert {name: one.spec for name, one in again.assigned.items()} == {
        name: one.spec for name, one in whole.assigned.items()
    }


def test_a_plan_reads_no_text_from_elsewhere_and_writes_nothing(
    model_of: ModelOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = llmshrink.plan(model_of("llama"), output="out", **FEW)  # the public mix, which would be fetched
    assert made.ok and made.seconds is not None and made.seconds > 0 and not list(tmp_path.iterdir())
    assert set(made.to_dict()) >= {
        "peak_ram_bytes", "peak_vram_bytes", "disk_bytes", "output_bytes", "bits_per_weight", "seconds", "engines",
        "download_bytes",
    }  # fmt: skip
    assert json.loads(json.dumps(made.to_dict()))["engines"]["transformers"]["serves"] is True
    assert made.seconds == pytest.approx(sum(made.parts.values()))


def test_a_plan_says_what_is_computed_in_which_dtype_and_why(
    model_of: ModelOf, story: Path, cpu_with: Callable[[str], None]
) -> None:
    found = {}
    for flags in ("avx2", "avx2 avx512_bf16"):
        cpu_with(flags)
        found[flags] = llmshrink.plan(model_of("llama"), recipe="tuned-w2a16", calibration=story, measured=False, **FEW)
    slow, fast = found.values()
    assert slow.to_dict()["arithmetic"]["model"] == {
        "dtype": "float32", "why": "this CPU has no bfloat16 instructions",
    }  # fmt: skip
    assert {each.dtype for each in slow.arithmetic.values()} == {"float32"}
    assert {each.dtype for each in fast.arithmetic.values()} == {"bfloat16"}
    assert set(slow.arithmetic) == {"model", "tuning", "teaching"}
    assert "computed in float32: this CPU has no bfloat16 instructions" in slow.lines()
    assert "computed in bfloat16: this CPU multiplies bfloat16 (avx512_bf16)" in fast.lines()
    assert slow.output_bytes == fast.output_bytes


def test_memory_is_predicted_for_what_is_computed_in(
    model_of: ModelOf, story: Path, cpu_with: Callable[[str], None]
) -> None:
    found = {}
    for flags in ("avx2", "avx2 avx512_bf16"):
        cpu_with(flags)
        job = prepare(options(model_of("llama"), story, recipe="gptq-w4a16"))
        found[flags] = footprints.footprint(job, keep_paused=True, in_files=False)
    slow, fast = found.values()
    assert slow.streams == 2 * fast.streams and slow.ram > fast.ram


def test_parts_that_compute_in_different_dtypes_have_a_line_each(
    model_of: ModelOf, story: Path, cpu_with: Callable[[str], None]
) -> None:
    cpu_with("avx2")
    made = llmshrink.plan(
        model_of("llama"), recipe="tuned-w2a16", calibration=story, measured=False, dtype="bfloat16", **FEW
    )
    assert [line for line in made.lines() if line.startswith("computed in")] == [
        "computed in bfloat16 (model): as asked for",
        "computed in float32 (tuning and teaching): this CPU has no bfloat16 instructions",
    ]


def test_of_a_model_on_the_hub_only_headers_come(
    model_of: ModelOf, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HubServer() as hub:
        use(hub, monkeypatch, tmp_path / "home")
        hub.publish("owner/name", model_of("llama"))
        asked = {"recipe": "rtn-w4a16", "group_size": 32, "calibration": story, **FEW}
        made = llmshrink.plan("owner/name", **asked)
        whole = [one.path for one in hub.asked("GET", "/cdn/") if one.range is None]
    local = llmshrink.plan(model_of("llama"), measured=False, **asked)
    assert not whole and not list((tmp_path / "home").rglob("*.safetensors"))
    assert made.download_bytes == sum(files(model_of("llama")).values()) and local.download_bytes == 0
    assert made.output_bytes == local.output_bytes and made.seconds is not None
    assert any("download" in note for note in made.notes) and "download    " in made.lines()[1]


def test_the_cpus_on_which_vllm_serves_by_itself_are_said(model_of: ModelOf, story: Path) -> None:
    asked = {"recipe": "rtn-w4a16", "calibration": story, "measured": False, **FEW}
    model = model_of("llama", **SERVABLE)
    cpu = llmshrink.plan(model, group_size=32, **asked).engines["vllm-cpu"]
    assert cpu.serves and cpu.needs is None
    assert str(cpu).startswith("serves it by itself on CPUs with AVX-512, on others with llmshrink's plugin")
    assert llmshrink.plan(model, group_size=32, **asked).engines["vllm-cuda"].cpus is None
    alone = llmshrink.plan(model, group_size=16, **asked).engines["vllm-cpu"]
    assert str(alone) == "serves it on CPUs with AVX-512 alone"


def test_the_card_says_on_which_cpus(model_of: ModelOf, story: Path, tmp_path: Path) -> None:
    out, asked = tmp_path / "out", {"calibration": story, "samples": 8, "seq_len": 32, "group_size": 32}
    made = llmshrink.quantize(model_of("llama", **SERVABLE), output=out, recipe="rtn-w4a16", **asked)
    assert made.notes == ()
    said = "14 of 14 quantized sites by itself on CPUs with AVX-512, on others with llmshrink's plugin"
    limits = (out / "README.md").read_text().partition("## Known limits")[2]
    assert f"- vllm-cpu serves {said}" in limits


def test_what_no_engine_serves_is_said(model_of: ModelOf, story: Path) -> None:
    made = llmshrink.plan(model_of("llama"), recipe="rtn-w4a16", bits=3, calibration=story, measured=False, **FEW)
    assert not made.engines["vllm-cpu"].serves or made.engines["vllm-cpu"].needs is not None
    own = llmshrink.plan(
        model_of("llama"), recipe="magnitude-2of4", format="llmshrink", calibration=story, measured=False, **FEW
    )
    assert own.engines["vllm-cuda"].needs == "llmshrink's plugin"


def test_a_plan_refuses_what_the_run_would(model_of: ModelOf, story: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="use llmshrink prune"):
        llmshrink.plan(model_of("llama"), recipe="alps-2of4", verb="quantize", calibration=story, **FEW)
    with pytest.raises(RecipeError, match="distill TEACHER STUDENT"):
        llmshrink.plan(model_of("llama"), recipe="distill-recover", calibration=story, **FEW)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(OutputError, match="wasn't written by llmshrink"):
        llmshrink.plan(model_of("llama"), output=tmp_path / "out", calibration=story, **FEW)
    with pytest.raises(LlmshrinkError, match="are needed"):
        llmshrink.plan(model_of("llama"), calibration=story, samples=10**6)


def test_a_run_that_cannot_fit_stops_before_it_starts(
    model_of: ModelOf, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fits, "free_memory", lambda device: 1_000_000)
    with pytest.raises(NoRoomError, match=r"MB of memory more, 1\.00 MB are free; fewer --samples than 4"):
        llmshrink.quantize(model_of("llama"), output=tmp_path / "out", calibration=story, **FEW)
    assert not list(tmp_path.iterdir())
    made = llmshrink.plan(model_of("llama"), calibration=story, measured=False, **FEW)
    assert not made.ok and "--samples" in made.faults[0] and made.faults[0] in made.lines()[-1]


def test_teaching_that_cannot_fit_stops_before_its_first_step(
    model_of: ModelOf, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "free_memory", lambda device: 1000)
    asked = {"recipe": "w2-distill", "calibration": story, **FEW}
    with pytest.raises(NoRoomError, match=r"of weights on cpu, 1\.00 kB are free; take --teacher-quant"):
        llmshrink.compress(model_of("llama"), output=tmp_path / "out", **asked)
    assert not list(tmp_path.iterdir())
    made = llmshrink.plan(model_of("llama"), **asked, device="cpu")
    assert not made.ok and made.seconds is None and "teaching holds" in made.faults[0]


def test_activations_in_files_need_room_beside_the_output(
    model_of: ModelOf, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    placement = quantize.Placement(tmp_path / "spill", False)
    monkeypatch.setattr(quantize.Placement, "choose", lambda job, folder: placement)
    monkeypatch.setattr(quantize, "check_room", lambda folder, needed: asked.append(needed))
    job = prepare(options(model_of("llama"), story, recipe="gptq-w4a16"))
    quantize.check_fits(job, tmp_path)
    sizes, width = sizes_of(job), job.chain.skeleton.model.config.hidden_size
    tokens = [batch.input_ids.numel() for batch in job.batches]
    streams = 2 * sum(tokens) * width * job.chain.skeleton.dtype.itemsize
    assert asked == [sizes.output + sizes.beside + streams]


def test_control_groups_and_limits_of_address_space_are_limits_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = memory.free_memory(torch.device("cpu"))
    for name, text in {
        "memory.max": "300000000", "memory.current": "250000000", "memory.stat": "anon 1\ninactive_file 50000000\n",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    assert memory.free_memory(torch.device("cpu")) == 100_000_000 < free
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_memory(torch.device("cpu")) > 100_000_000
    limit = memory.psutil.Process().memory_info().vms + 50_000_000
    monkeypatch.setattr(memory.resource, "getrlimit", lambda kind: (limit, resource.RLIM_INFINITY))
    assert 0 < memory.free_memory(torch.device("cpu")) <= 50_000_000


def test_what_8_bit_inputs_are_rounded_in_is_counted(model_of: ModelOf, story: Path) -> None:
    """The widest input, in bfloat16, is divided in float32, and its codes are multiplied in it."""
    wide = 2048
    model = model_of("llama", intermediate_size=wide)
    found = {}
    for recipe in ("fp8-dynamic", "rtn-w4a16"):
        job = prepare(options(model, story, recipe=recipe, dtype="bfloat16"))
        active = job.stages[0]
        held = footprints._held(job, 0, active, footprints._rounded(job, active))
        found[recipe] = held.most, footprints.footprint(job, keep_paused=False, in_files=False).ram
    more = found["fp8-dynamic"][0] - found["rtn-w4a16"][0]
    assert 5 * wide < more < 10 * wide
    batch = max(batch.input_ids.numel() for batch in job.batches)
    assert found["fp8-dynamic"][1] - found["rtn-w4a16"][1] >= 0.9 * more * batch


PEAK = """
import re, sys
import llmshrink
asked = {"samples": 32, "recipe": sys.argv[1], **eval(sys.argv[4])}
if sys.argv[2] == "plan":
    print(llmshrink.plan("demo", measured=False, **asked).peak_ram_bytes)
else:
    llmshrink.compress("demo", output=sys.argv[3], verify=False, **asked)
    # Not getrusage's: a child's begins with that of the process that started it.
    print(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("recipe", "more"),
    [("gptq-w4a16", {}), ("gptq-w8a8", {"batch_size": 32, "set": "steps.0.quantize.smooth=0.5"})],
)
def test_memory_is_foretold_within_15_percent(recipe: str, more: dict[str, Any], tmp_path: Path) -> None:
    said = [
        int(
            subprocess.run(
                [sys.executable, "-c", PEAK, recipe, work, str(tmp_path / "out"), repr(more)],
                check=True, capture_output=True, text=True,
            ).stdout.splitlines()[-1]
        )
        for work in ("plan", "run")
    ]  # fmt: skip
    assert 0.85 < said[0] / said[1] < 1.15, said


def test_the_benchmark_of_plans_marks_what_is_out_of_its_bounds() -> None:
    from benchmarks.plan import cell

    assert cell("peak_ram_bytes", 1.16e6, 1e6) == "1.160 of 1.0M!" and cell("disk_bytes", 0.86e6, 1e6).endswith("M ")
    assert cell("seconds", 64, 100) == "0.640 of 100.0s!" and cell("cpu_seconds", 1.3, 1).endswith("s ")
