"""`--format llmshrink` and `convert`: the same weights in fewer bytes, or one line before any work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import contents, make_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import llmshrink
from llmshrink.checkpoint.index import CheckpointIndex
from llmshrink.errors import CheckpointError, LlmshrinkError, OutputError, RecipeError, SourceError
from llmshrink.run import convert as conversions
from llmshrink.run import disk
from llmshrink.run import quantize as runs
from llmshrink.runtime.sparse import SparseLinear

ModelOf = Callable[..., Path]
SMALL: dict[str, Any] = {"samples": 4, "seq_len": 32}
PLAIN: dict[str, Any] = {"recipe": "magnitude-2of4", **SMALL}
JOINT: dict[str, Any] = {"recipe": "sparsegpt-2of4-gptq-w4a16", "group_size": 32, **SMALL}
OTHER = {"llmshrink": "compressed-tensors", "compressed-tensors": "llmshrink"}


def weights(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def made(model_of: ModelOf, story: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """(plain or joint, format) -> an output; each to be copied before it is changed."""
    folder = tmp_path_factory.mktemp("made")
    found = {}
    for kind, options in (("plain", PLAIN), ("joint", JOINT)):
        for format in OTHER:
            out = found[kind, format] = folder / f"{kind}-{format}"
            report = llmshrink.compress(model_of("llama"), output=out, calibration=story, format=format, **options)  # type: ignore[arg-type]
            assert report.ok and report.verification is not None
            assert report.verification.mean_difference == 0.0
    return found


@pytest.mark.parametrize("kind", ["plain", "joint"])
@pytest.mark.parametrize("format", list(OTHER))
def test_convert_makes_what_the_run_would_have_made_and_back(
    kind: str, format: str, made: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    source = made[kind, format]
    report = llmshrink.convert(source, output=tmp_path / "there", format=OTHER[format])  # type: ignore[arg-type]
    assert report.ok and report.sites == 14 and report.verification.mean_difference == 0.0
    assert contents(tmp_path / "there") == contents(made[kind, OTHER[format]])
    llmshrink.convert(tmp_path / "there", output=tmp_path / "back", format=format)  # type: ignore[arg-type]
    assert contents(tmp_path / "back") == contents(source)
    assert llmshrink.verify(tmp_path / "there").ok
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "there"]


@pytest.mark.parametrize(("kind", "bits"), [("plain", 9.0), ("joint", 3.5)])
def test_inspect_counts_what_is_stored(
    kind: str, bits: float, made: dict[tuple[str, str], Path], model_of: ModelOf
) -> None:
    out = made[kind, "llmshrink"]
    report = llmshrink.inspect(out)
    linear = sum(row.shape[0] * row.shape[1] for row in report.sites)
    assert report.linear_bits_per_weight == pytest.approx(bits + 14 * 128 / linear, abs=1e-9)
    with CheckpointIndex.open(model_of("llama")) as source:
        assert report.weights == sum(torch.Size(source.entry(key).shape).numel() for key in source)
    assert report.bytes == sum(tensor.nbytes for tensor in weights(out).values())
    assert any("llmshrink's plugin" in note for note in report.notes)


def test_the_card_names_the_format_and_how_it_is_served(made: dict[tuple[str, str], Path]) -> None:
    text = (made["joint", "llmshrink"] / "README.md").read_text()
    assert "tags:\n- llmshrink\n- quantized\n- pruned\nmodel-index:\n" in text
    assert "- Format: llmshrink `sparse24`: 2:4 without its zeros" in text
    assert "pip install llmshrink" in text and "compressed-tensors" not in text
    standard = (made["joint", "compressed-tensors"] / "README.md").read_text()
    assert "no engine is faster for them" in standard and "pip install llmshrink" not in standard
    assert "on others with llmshrink's plugin" in standard  # CPUs without AVX-512, for which vLLM has no int4 kernel


def test_the_room_that_is_asked_for_is_the_room_that_is_taken(
    model_of: ModelOf, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(runs, "check_room", lambda folder, needed: asked.append(needed))
    monkeypatch.setattr(conversions, "check_room", lambda folder, needed: asked.append(needed))
    out = tmp_path / "out"
    llmshrink.compress(model_of("llama"), output=out, calibration=story, format="llmshrink", **JOINT)
    llmshrink.convert(out, output=tmp_path / "back", format="compressed-tensors")
    for_run, for_conversion = asked
    taken = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert taken <= for_run <= taken + 40_000
    assert for_conversion - 1_000_000 == sum(tensor.nbytes for tensor in weights(tmp_path / "back").values())


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    made: dict[tuple[str, str], Path],
    model_of: ModelOf,
    story: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    again: dict[str, Any] = {"output": out, "calibration": story, **JOINT}
    with monkeypatch.context() as patch:
        patch.setattr(runs, "finish", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            llmshrink.compress(model_of("llama"), format="llmshrink", **again)
    with pytest.raises(OutputError, match=r"another format \('llmshrink', now 'compressed-tensors'\)"):
        llmshrink.compress(model_of("llama"), **again)
    report = llmshrink.compress(model_of("llama"), format="llmshrink", **again)
    assert report.blocks_kept == 2
    assert contents(out) == contents(made["joint", "llmshrink"])


def test_a_conversion_that_was_stopped_goes_on_from_the_last_file(
    made: dict[tuple[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = made["joint", "llmshrink"], tmp_path / "out"
    written: list[str] = []
    write = disk.write_shard

    def stop_at_second(path: Path, *rest: Any) -> Any:
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(path.name)
        return write(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(disk, "write_shard", stop_at_second)
        with pytest.raises(KeyboardInterrupt):
            llmshrink.convert(source, output=out, format="compressed-tensors")
    assert not out.exists()
    first = written.copy()

    def record(path: Path, *rest: Any) -> Any:
        written.append(path.name)
        return write(path, *rest)

    monkeypatch.setattr(disk, "write_shard", record)
    assert llmshrink.convert(source, output=out, format="compressed-tensors").ok
    assert first[0] not in written[1:]
    assert contents(out) == contents(made["joint", "compressed-tensors"])


def test_small_shards_are_converted_tensor_by_tensor(model_of: ModelOf, story: Path, tmp_path: Path) -> None:
    for name, limit in (("whole", "5GB"), ("split", "10kB")):
        llmshrink.compress(
            model_of("llama"), output=tmp_path / name, calibration=story, format="llmshrink", max_shard_size=limit,
            **JOINT,
        )  # fmt: skip
        llmshrink.convert(tmp_path / name, output=tmp_path / f"{name}-standard", format="compressed-tensors")
    whole, split = (weights(tmp_path / f"{name}-standard") for name in ("whole", "split"))
    assert whole.keys() == split.keys() and all(torch.equal(whole[key], split[key]) for key in whole)


def test_a_site_that_is_left_alone_stays_dense(model_of: ModelOf, story: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "some.yaml"
    recipe.write_text(
        "name: some\nsteps:\n  - prune: {method: magnitude, pattern: '2:4'}\nignore: [lm_head, down_proj]\n"
    )
    out = tmp_path / "out"
    report = llmshrink.prune(
        model_of("llama"), output=out, recipe=recipe, calibration=story, format="llmshrink", **SMALL
    )
    assert report.ok
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    stays = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert [name for name in config["ignore"] if name != "lm_head"] == stays
    held = weights(out)
    source = weights(model_of("llama"))
    assert all(torch.equal(held[f"{name}.weight"], source[f"{name}.weight"]) for name in stays)
    assert llmshrink.convert(out, output=tmp_path / "back", format="compressed-tensors").sites == 12
    model = llmshrink.load(out, device="cpu")
    assert sum(isinstance(module, SparseLinear) for module in model.modules()) == 12


def test_inputs_that_do_not_fall_into_fours_stay_as_they_are(story: Path, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", intermediate_size=94)
    report = llmshrink.prune(
        source, output=tmp_path / "out", recipe="magnitude-2of4", calibration=story, format="llmshrink", **SMALL
    )
    assert report.ok
    assert any(
        "2:4 needs a multiple of 4 inputs, and it has 94" in note and "down_proj" in note for note in report.notes
    )
    down = [row for row in report.sites if row.name.endswith("down_proj")]
    assert [row.changed for row in down] == [False, False]
    with pytest.raises(RecipeError, match="it has 94"):
        llmshrink.prune(
            source, output=tmp_path / "strict", recipe="magnitude-2of4", calibration=story, format="llmshrink",
            strict=True, **SMALL,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"recipe": "gptq-w4a16"}, "it prunes nothing, and --format llmshrink stores 2:4 alone"),
        ({"recipe": "sparsegpt-50"}, "it prunes 50 % anywhere, and --format llmshrink stores 2:4 alone"),
        ({"recipe": "magnitude-2of4", "set": "steps.0.prune.pattern='4:8'"}, "it prunes 4:8, and"),
        ({**JOINT, "bits": 3}, "3 bits: --format llmshrink stores integers of 4 or 8"),
        ({**JOINT, "group_size": 16}, "groups of 16: --format llmshrink takes multiples of 32 or whole rows"),
        ({**JOINT, "asymmetric": True}, "asymmetric: --format llmshrink stores symmetric integers"),
        (
            {**JOINT, "set": "overrides=[{match: q_proj, ignore: true}]", "group_size": 32},
            "one layer in every engine",
        ),
        (
            {"recipe": "magnitude-2of4", "set": "overrides=[{match: q_proj, ignore: true}]"},
            "q_proj and .*k_proj are one layer in every engine, but only one of them is 2:4",
        ),
        (
            {"recipe": "magnitude-2of4", "set": "overrides=[{match: o_proj, prune: {pattern: '1:4'}}]"},
            "o_proj: pruned 1:4, and --format llmshrink stores 2:4 alone",
        ),
        ({"recipe": "magnitude-2of4", "format": "gguf"}, "--format gguf: not a format; choose compressed-tensors or"),
    ],
)
def test_what_the_format_can_not_hold_is_refused_before_work(
    options: dict[str, Any], said: str, model_of: ModelOf, story: Path, tmp_path: Path
) -> None:
    arguments = {"output": tmp_path / "out", "calibration": story, "format": "llmshrink", **SMALL, **options}
    with pytest.raises(LlmshrinkError, match=said) as refused:
        llmshrink.compress(model_of("llama"), **arguments)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_float32_models_are_told_the_way_out(story: Path, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", dtype="float32")
    with pytest.raises(RecipeError, match=r"q_proj: stored in float32, .* quantize too, bring the model to bfloat16"):
        llmshrink.prune(source, output=tmp_path / "out", calibration=story, format="llmshrink", **PLAIN)
    report = llmshrink.compress(source, output=tmp_path / "out", calibration=story, format="llmshrink", **JOINT)
    assert report.ok
    assert weights(tmp_path / "out")["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.float32
    assert llmshrink.convert(tmp_path / "out", output=tmp_path / "there", format="compressed-tensors").ok
    assert llmshrink.convert(tmp_path / "there", output=tmp_path / "back", format="llmshrink").ok
    assert contents(tmp_path / "back") == contents(tmp_path / "out")


def test_convert_names_the_first_layer_that_breaks_the_pattern(
    made: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(made["plain", "compressed-tensors"], source)
    file = source / "model-block-00001.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.self_attn.o_proj.weight"][5, 8:11] = 1.0
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(
        CheckpointError,
        match=r"model\.layers\.1\.self_attn\.o_proj: can't be stored as 2:4: row 5 holds more than two weights at "
        "inputs 8 to 11",
    ):
        llmshrink.convert(source, output=tmp_path / "out", format="llmshrink")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"recipe": "rtn-w4a16", "group_size": 32}, "q_proj: can't be stored as 2:4: row 0 holds more than two"),
        ({"recipe": "sparsegpt-50"}, "q_proj: can't be stored as 2:4: row 0 holds more than two"),
        ({**JOINT, "asymmetric": True}, "asymmetric, and only symmetric integers can"),
        ({**JOINT, "bits": 3}, "3 bits, and only 4 and 8 can"),
        ({**JOINT, "group_size": 16}, "groups of 16, and only multiples of 32 and whole rows can"),
    ],
)
def test_convert_refuses_what_is_not_2_of_4(
    options: dict[str, Any], said: str, model_of: ModelOf, story: Path, tmp_path: Path
) -> None:
    llmshrink.compress(model_of("llama"), output=tmp_path / "source", calibration=story, **{**SMALL, **options})
    with pytest.raises(CheckpointError, match=said) as refused:
        llmshrink.convert(tmp_path / "source", output=tmp_path / "out", format="llmshrink")
    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_convert_refuses_what_is_no_output_and_what_is_in_the_way(
    made: dict[tuple[str, str], Path], model_of: ModelOf, tmp_path: Path
) -> None:
    source = made["plain", "llmshrink"]
    with pytest.raises(SourceError, match="is stored as llmshrink already"):
        llmshrink.convert(source, output=tmp_path / "out", format="llmshrink")
    with pytest.raises(SourceError, match=r"no readable llmshrink\.json"):
        llmshrink.convert(model_of("llama"), output=tmp_path / "out", format="llmshrink")
    with pytest.raises(SourceError, match="no such folder"):
        llmshrink.convert(tmp_path / "nowhere", output=tmp_path / "out", format="llmshrink")
    with pytest.raises(OutputError, match=r"is the model .*, which is read"):
        llmshrink.convert(source, output=source, format="compressed-tensors", overwrite=True)
    with pytest.raises(LlmshrinkError, match="--format gguf: not a format"):
        llmshrink.convert(source, output=tmp_path / "out", format="gguf")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match="wasn't written by llmshrink"):
        llmshrink.convert(source, output=tmp_path / "out", format="compressed-tensors", overwrite=True)
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


def test_a_record_of_an_earlier_version_is_told_so(made: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(made["plain", "compressed-tensors"], source)
    record = json.loads((source / "llmshrink.json").read_text())
    del record["format_notes"], record["identity"]["format"]
    (source / "llmshrink.json").write_text(json.dumps(record))
    (source / "verify" / "verified.json").unlink()  # it says of the record what it was
    assert llmshrink.verify(source).ok
    with pytest.raises(SourceError, match=r"an earlier llmshrink's.*make the checkpoint again"):
        llmshrink.convert(source, output=tmp_path / "out", format="llmshrink")


def test_a_damaged_source_is_not_published(made: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(made["joint", "llmshrink"], source)
    file = source / "model-block-00000.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight_values"] ^= 0x11
    save_file(tensors, file, {"format": "pt"})
    report = llmshrink.convert(source, output=tmp_path / "out", format="compressed-tensors")
    assert not report.ok and "NOT VERIFIED" in "\n".join(report.lines())
    assert not (tmp_path / "out").exists()
