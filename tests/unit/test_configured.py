"""What a training left in config.json doesn't change how a model is run, measured and taught; files keep it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_model
from llmshrink_eval.configured import OURS, running_config, settle
from llmshrink_eval.errors import raised_by_model
from llmshrink_eval.model import LoadOptions, load_model

import llmshrink
from llmshrink.checkpoint.index import CheckpointIndex
from llmshrink.cli import run

SMALL: dict[str, Any] = {"samples": 8, "seq_len": 32, "group_size": 32}
LEFT: dict[str, Any] = {
    "return_dict": False,
    "use_return_dict": False,
    "use_cache": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "torchscript": True,
    "gradient_checkpointing": True,
    "attention_dropout": 0.3,
    "attn_implementation": "flash_attention_2",
    "_attn_implementation": "flash_attention_2",
    "pad_token_id": 70_000,
    "_name_or_path": "/somewhere/run-7",
}


def with_leftovers(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("plain") / "model", dtype="float32")


@pytest.fixture(scope="module")
def left(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_leftovers(Path(shutil.copytree(plain, tmp_path_factory.mktemp("left") / "model")), **LEFT)


@pytest.mark.parametrize("value", [None, "false", 1, []])
@pytest.mark.parametrize("name", ["use_cache", "return_dict", "output_hidden_states"])
def test_what_is_ours_may_be_of_any_type_in_the_file(name: str, value: Any, plain: Path, tmp_path: Path) -> None:
    folder = with_leftovers(Path(shutil.copytree(plain, tmp_path / "model")), **{name: value})
    assert getattr(running_config(folder), name) == OURS[name]


def test_our_settings_hold(left: Path) -> None:
    config = running_config(left)
    assert {name: getattr(config, name, OURS[name]) for name in OURS} == OURS
    assert config.output_attentions is False
    assert config._attn_implementation is None
    assert config.attention_dropout == 0.0
    assert config.pad_token_id is None
    assert settle(config) is config


@pytest.mark.parametrize(("padding", "kept"), [(0, 0), (-1, None), (63, 63), (64, None), (None, None)])
def test_a_padding_id_needs_a_row(padding: int | None, kept: int | None, plain: Path, tmp_path: Path) -> None:
    folder = with_leftovers(Path(shutil.copytree(plain, tmp_path / "m")), pad_token_id=padding, vocab_size=64)
    assert running_config(folder).pad_token_id == kept


def test_parts_of_a_config_are_settled_too() -> None:
    from transformers import Gemma3Config

    config = Gemma3Config(text_config={"use_cache": False, "attention_dropout": 0.1, "pad_token_id": 10**9})
    text = settle(config).text_config
    assert (text.use_cache, text.attention_dropout, text.pad_token_id) == (True, 0.0, None)


def test_a_model_is_measured_as_without_them(plain: Path, left: Path) -> None:
    ids = torch.arange(2, 26)[None]
    one, other = (load_model(folder, LoadOptions())(ids).logits for folder in (plain, left))
    assert torch.equal(one, other)


def test_it_says_the_same(plain: Path, left: Path) -> None:
    one, other = (llmshrink.generate(folder, "Once", max_new_tokens=8, chat=False).text for folder in (plain, left))
    assert one == other


def test_it_is_quantized_as_without_them_and_keeps_them(plain: Path, left: Path, story: Path, tmp_path: Path) -> None:
    for name, folder in (("plain", plain), ("left", left)):
        report = llmshrink.quantize(folder, output=tmp_path / name, calibration=story, **SMALL)
        assert report.ok
    with CheckpointIndex.open(tmp_path / "plain") as one, CheckpointIndex.open(tmp_path / "left") as other:
        assert one.fingerprint() == other.fingerprint()
    written = json.loads((tmp_path / "left" / "config.json").read_text())
    assert {name: written[name] for name in LEFT} == LEFT
    assert llmshrink.verify(tmp_path / "left").ok
    ids = torch.arange(2, 26)[None]
    loaded = [llmshrink.load(tmp_path / name)(ids).logits for name in ("plain", "left")]
    assert torch.equal(loaded[0], loaded[1])


def test_teacher_and_student_are_taught_as_without_them(plain: Path, left: Path, story: Path, tmp_path: Path) -> None:
    found = [
        llmshrink.distill(folder, folder, output=tmp_path / name, data=story, steps=1, seq_len=32, batch_size=2)
        for name, folder in (("plain", plain), ("left", left))
    ]
    assert found[0] is not None and found[1] is not None
    assert found[0].quality == found[1].quality
    assert found[1].before.kl_mean < 1e-6


@pytest.mark.parametrize(
    "fault", [{"hidden_act": "no_such_function"}, {"max_position_embeddings": 128, "head_dim": 15}]
)
@pytest.mark.parametrize("verb", ["quantize", "eval", "generate", "plan", "distill"])
def test_what_the_model_s_class_raises_is_one_line(
    verb: str,
    fault: dict[str, Any],
    model_of: Callable[..., Path],
    story: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Path(shutil.copytree(model_of("llama"), tmp_path / "m"))
    with_leftovers(folder, **fault)
    words = {
        "quantize": ["quantize", str(folder), "-o", str(tmp_path / "out"), "--calibration", str(story)],
        "eval": ["eval", str(folder), "--text", str(story), "-o", str(tmp_path / "report")],
        "generate": ["generate", str(folder), "Once"],
        "plan": ["plan", str(folder), "--calibration", str(story)],
        "distill": ["distill", str(folder), str(folder), "-o", str(tmp_path / "out"), "--data", str(story)],
    }[verb]
    capsys.readouterr()
    assert run(words) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("llmshrink: error: "), error
    assert "no_such_function" in error[0] or "head_dim" in fault, error
    assert not (tmp_path / "out").exists()


def test_only_what_the_model_itself_raises_is_the_model_s() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    model = LlamaForCausalLM(config)

    def ours(*_: Any) -> None:
        raise ZeroDivisionError("a bug of ours")

    with pytest.raises(IndexError) as caught:
        model(torch.tensor([[9]]))
    assert "the model's own code (transformers.models.llama.modeling_llama, line " in str(raised_by_model(caught.value))
    model.model.layers[0].register_forward_pre_hook(ours)
    with pytest.raises(ZeroDivisionError) as broken:
        model(torch.tensor([[1]]))
    assert raised_by_model(broken.value) is None


@pytest.mark.parametrize("limit", ["x", True, {"": 0}, [1]])
def test_a_tokenizers_limit_that_is_no_number_is_one_line(
    limit: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_model(tmp_path / "model")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": limit}))
    capsys.readouterr()
    assert run(["plan", str(folder), "--calibration", "demo", "--samples", "2", "--seq-len", "32"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("llmshrink: error: ") and said.count("\n") == 1 and "model_max_length" in said


@pytest.mark.parametrize("verb", ["plan", "generate", "eval"])
def test_a_folder_whose_name_isnt_utf8_is_to_be_renamed(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / os.fsdecode(b"mod\xff")
    try:
        make_model(tmp_path / "model").rename(folder)
    except OSError:
        pytest.skip("this file system takes no such name")
    more = {"plan": [], "generate": ["Once"], "eval": ["--text", "demo", "-o", str(tmp_path / "report")]}[verb]
    capsys.readouterr()
    assert run([verb, str(folder), *more]) == 2
    said = capsys.readouterr().err
    assert said.startswith("llmshrink: error: ") and said.count("\n") == 1
    assert "mod" in said and "the folder's name isn't UTF-8" in said and said.endswith("rename it\n")
