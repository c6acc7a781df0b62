"""What goes on from a model's folder: what belongs to a model, by name; everything else stays behind and is counted."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import make_model

import llmshrink
from llmshrink.checkpoint import beside, source
from llmshrink.checkpoint.beside import belongs, left_behind, own_code, side_files
from llmshrink.errors import CheckpointError

SMALL = {"samples": 8, "seq_len": 32, "group_size": 32}
MODEL = {
    "tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "tokenizer_config.json", "generation_config.json", "preprocessor_config.json",
    "processor_config.json", "chat_template.jinja", "chat_template.json", "additional_chat_templates/tool_use.jinja",
    "LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md", "License.md", "qwen.tiktoken", "tekken.json", "source.spm",
    "MODEL_LICENSE", "THIRD_PARTY_NOTICES.txt", "COPYRIGHT", "TERMS_OF_USE.md", "LICENSES/MIT.txt", "licence.rst",
    "LICENSE-APACHE", "LICENSE.MIT.txt", "LICENSE-llama3.1.txt", "license_gemma_2.html", "LICENSE-CC-BY-NC-4.0.md",
    "LICENSES/Apache-2.0.txt", "LICENSES/CC-BY-4.0.txt", "LICENSES/GPL-3.0-or-later.txt", "LICENSES/BSD-3-Clause.txt",
    "LICENSES/CC0-1.0.txt", "LICENSES/0BSD.txt", "LICENSES/LicenseRef-Qwen.txt", "LICENSES/LICENSE-MIT.txt",
    "tokenizer.model.v3", "chat_template_tools.jinja", "tools.chat_template.jinja", "sentencepiece.bpe.model",
}  # fmt: skip
TRAINING = {
    "checkpoint-500/model.safetensors", "checkpoint-500/tokenizer.json", "runs/Nov01/events.out.tfevents.1",
    "wandb/run-1/x.wandb", "trainer_state.json", "all_results.json", "training_args.bin", "optimizer.pt", "data.arrow",
    "secrets.txt", ".env", "train.log", "train.py", "pytorch_model.bin", "adapter_model.safetensors", "q4.gguf",
    "requirements.txt", "evil.model",
}  # fmt: skip


def _write(folder: Path, names: set[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\x80\x04pickled" if name == "evil.model" else b"{}")


@pytest.mark.parametrize(
    "name",
    [
        "LICENSE.key", "license_server_password.txt", "notice_to_self.log", "license.txt.bak", "secret.jinja",
        "vocab-private-customers.json", "old.model", "id_rsa", "credentials.json", "a.pickle", "a.joblib", "a.pt2",
        "a.npy", "a.distcp", "model.bak", "tokenizer.json.bak", "events.out.tfevents.1", "LICENSES/key.pem",
        "additional_chat_templates/notes.txt", "x/LICENSE",
        "license.cc.pem", "license-code.sh", "license-cc-2.7z", "LICENSE-MIT.key", "license_code_key",
        "license.mit.txt.gpg", "LICENSE-" + "1." * 120 + "x", "LICENSE-" + "mit0-cc0-bsd3-" * 16 + "x",
        "license-apache..txt", "LICENSE-MIT\n.txt", "LICENSES/key.txt", "LICENSES/api-key.txt", "LICENSES/id_rsa.txt",
        "LICENSES/Apache-2.0", "LICENSES/MIT.pem", "LICENSES/token.md", "LICENSES/LicenseRef-hf_token.txt",
        "LICENSES/private/MIT.txt", "secret_chat_template.jinja", "my-secret-chat_template.jinja", "chat_template.pem",
    ],
)  # fmt: skip
def test_a_name_that_merely_looks_like_it_doesnt_belong(name: str) -> None:
    assert not belongs(name)


def test_only_what_belongs_to_a_model_goes_on(tmp_path: Path) -> None:
    _write(tmp_path, MODEL | TRAINING | {"README.md", "config.json", "model.safetensors", "sub/chat_template.jinja"})
    os.mkfifo(tmp_path / "merges-pipe.txt")
    (tmp_path / "vocab.txt").symlink_to(tmp_path / "nowhere")
    found = {name: path for path, name in side_files(tmp_path)}
    assert found.keys() == MODEL | {"SOURCE_README.md"}
    assert found["SOURCE_README.md"] == tmp_path / "README.md"
    left = left_behind(tmp_path)
    tops = {f"{name.partition('/')[0]}/" if "/" in name else name for name in TRAINING | {"sub/"}}
    assert set(left.names) == tops | {"merges-pipe.txt", "vocab.txt"}
    assert left.count == len(left.names)
    assert left.lines()[0].endswith(f"and {left.count - 4} more: not part of the model")


@pytest.mark.parametrize(
    "name", [b"\xff.tiktoken", b"LICENSES/\xff.txt", b"LICENSE-\xff.md", b"additional_chat_templates/\xff.jinja"]
)
def test_what_may_be_the_models_and_has_no_name_in_utf_8_is_refused_wherever_it_lies(
    name: bytes, tmp_path: Path
) -> None:
    _write(tmp_path, {"config.json", "tokenizer.json", "LICENSES/MIT.txt", "additional_chat_templates/a.jinja"})
    for each in (name, name + b".log"):  # the latter stays behind, as one of that ending does
        (tmp_path / os.fsdecode(each)).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="its name isn't UTF-8, so that no record could have it; rename"):
        list(side_files(tmp_path))
    (tmp_path / os.fsdecode(name)).unlink()
    assert len(list(side_files(tmp_path))) == 3


def test_links_are_followed_inside_the_folder_and_into_its_own_cache(tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1").write_text("blob")
    (snapshot / "bpe.codes").write_text("inside")
    (snapshot / "merges.txt").symlink_to("../../blobs/1")
    (snapshot / "vocab.txt").symlink_to("bpe.codes")
    assert {name for _, name in side_files(snapshot)} == {"merges.txt", "vocab.txt", "bpe.codes"}


@pytest.mark.parametrize(
    "name", ["merges.txt", "README.md", "LICENSE", "tokenizer.json", "additional_chat_templates/a.jinja"]
)
@pytest.mark.parametrize("far", ["private.txt", "models--other--name/blobs/1", "snapshots/abc/x"])
def test_a_link_that_leads_out_is_refused_by_name(name: str, far: str, tmp_path: Path) -> None:
    folder, target = tmp_path / "model", tmp_path / far
    _write(folder, {"config.json"})
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("private")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(target)
    for ask in (side_files, left_behind):
        with pytest.raises(
            CheckpointError, match=rf"{re.escape(name)} is a link to .*{re.escape(far)}, out of the model's"
        ):
            tuple(ask(folder) if ask is side_files else [ask(folder)])


@pytest.mark.parametrize("name", ["a", "merges.txt", "README.md"])
def test_links_that_lead_to_each_other_are_left_behind(name: str, tmp_path: Path) -> None:
    _write(tmp_path, {"config.json", "tokenizer.json"})
    (tmp_path / name).symlink_to("b")
    (tmp_path / "b").symlink_to(name)
    assert {found for _, found in side_files(tmp_path, besides=[tmp_path / "out"])} == {"tokenizer.json"}
    left = set(left_behind(tmp_path, besides=[tmp_path / "out"]).names)
    assert left == {name, "b"} - {"README.md"}


def test_many_names_are_counted_and_not_all_listed(tmp_path: Path) -> None:
    _write(tmp_path, {f"log-{number:03}.txt" for number in range(100)})
    left = left_behind(tmp_path)
    assert (left.count, len(left.names)) == (100, 20)
    assert left.lines() == ["left behind log-000.txt, log-001.txt, log-002.txt, log-003.txt and 96 more: not part of "
                            "the model"]  # fmt: skip


def test_code_goes_on_where_it_is_trusted_and_only_what_the_configs_name(tmp_path: Path) -> None:
    auto_map = {"AutoModelForCausalLM": "modeling_x.X", "AutoConfig": "owner/other--configuration_y.Y"}
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": auto_map}))
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_x.Slow", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (tmp_path / "modeling_x.py").write_text("import torch\nfrom .layers import A\nfrom . import shared, more\n")
    for name in ("layers", "shared", "more", "tokenization_x", "train", "configuration_y"):
        (tmp_path / f"{name}.py").write_text("from .modeling_x import X\n")
    code = {"modeling_x.py", "layers.py", "shared.py", "more.py", "tokenization_x.py"}
    assert own_code(tmp_path) == code
    assert {name for _, name in side_files(tmp_path)} == {"tokenizer_config.json"}
    assert {name for _, name in side_files(tmp_path, trust_remote_code=True)} == {"tokenizer_config.json", *code}
    assert left_behind(tmp_path, trust_remote_code=True).names == ("configuration_y.py", "train.py")


def test_an_original_s_card_stays_the_original_s(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("the output's")
    (tmp_path / "SOURCE_README.md").write_text("the original's")
    assert list(side_files(tmp_path)) == [(tmp_path / "SOURCE_README.md", "SOURCE_README.md")]
    assert left_behind(tmp_path).count == 0


def test_whatever_belongs_to_a_model_is_also_downloaded() -> None:
    names = {*MODEL, "README.md", "vocab.bpe", "bpe.codes", "COPYING"} - {"License.md"}
    assert all(belongs(name) for name in names)
    assert [n for n in names if not any(fnmatch.fnmatch(n, pattern) for pattern in source._WANTED)] == []
    assert beside.TERMS


@pytest.fixture
def training(tmp_path: Path) -> Path:
    folder = make_model(tmp_path / "model")
    _write(folder, TRAINING | {"LICENSE", "additional_chat_templates/tool_use.jinja"})
    return folder


def test_a_training_folder_s_output_is_the_model_alone(training: Path, story: Path, tmp_path: Path) -> None:
    report = llmshrink.quantize(training, output=tmp_path / "out", calibration=story, **SMALL)
    there = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert not there & TRAINING
    assert {"LICENSE", "additional_chat_templates/tool_use.jinja", "tokenizer.json"} <= there
    assert report.left_behind.count == len({name.partition("/")[0] for name in TRAINING})
    assert "secrets.txt" in report.to_dict()["left_behind"]["names"]
    assert any(line.startswith("note        left behind .env, adapter_model.safetensors") for line in report.lines())
    record = json.loads((tmp_path / "out" / "llmshrink.json").read_text())
    assert not {*record["files"]} & TRAINING
    assert "secrets" not in json.dumps(record)


def test_plan_says_what_stays_behind(training: Path, story: Path, tmp_path: Path) -> None:
    plan = llmshrink.plan(training, output=tmp_path / "out", calibration=story, measured=False, **SMALL)
    assert any(note.startswith("left behind ") for note in plan.notes)


def test_push_takes_what_belongs_to_a_model_of_an_older_output(
    model_of: Callable[..., Path], story: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    llmshrink.quantize(model_of("llama"), output=out, calibration=story, **SMALL)
    (out / "data.arrow").write_bytes(b"rows")
    record = json.loads((out / "llmshrink.json").read_text())
    (out / "llmshrink.json").write_text(json.dumps({**record, "files": [*record["files"], "data.arrow"]}))
    from llmshrink.hub.folder import contents
    from llmshrink.run.verify import read_record

    found = contents(out, read_record(out))
    assert "data.arrow" not in {item.path for item in found.items}
    assert "data.arrow stays here: it isn't part of what was made" in found.notes
    assert "tokenizer.json" in {item.path for item in found.items}


def test_convert_and_distill_leave_strangers_behind_too(
    model_of: Callable[..., Path], story: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(model_of("llama"), tmp_path / "model"))
    sparse = tmp_path / "sparse"
    llmshrink.prune(source, output=sparse, recipe="sparsegpt-2of4", calibration=story, samples=8, seq_len=32)
    (sparse / "data.arrow").write_bytes(b"rows")
    (sparse / "train.py").write_text("import os")
    converted = llmshrink.convert(sparse, output=tmp_path / "packed", format="llmshrink")
    assert converted.left_behind.names == ("data.arrow", "train.py")
    taught = llmshrink.distill(source, sparse, output=tmp_path / "taught", data=story, steps=1, seq_len=32)
    assert taught is not None and taught.left_behind.names == ("data.arrow", "train.py")
    for report, out in ((converted, tmp_path / "packed"), (taught, tmp_path / "taught")):
        assert not {"data.arrow", "train.py"} & {path.name for path in out.iterdir()}
        assert {"tokenizer.json", "recipe.yaml", "verify"} <= {path.name for path in out.iterdir()}
        assert "note        left behind data.arrow, train.py: not part of the model" in report.lines()
