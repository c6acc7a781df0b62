"""Values that no model has: config.json is held to what its fields can be before a class of transformers sees it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmshrink_eval import bounded, sidefiles
from llmshrink_eval.bounded import DEEPEST, Unreadable, parse_json, read_json, shown, too_deep
from llmshrink_eval.configfile import config_fault, read_config
from llmshrink_eval.configured import running_config
from llmshrink_eval.errors import EvalError
from llmshrink_eval.model import LoadOptions, load_model
from llmshrink_eval.sidefiles import check_generation, check_tokenizer

import llmshrink
from llmshrink.checkpoint.files import read_config as read_source_config
from llmshrink.checkpoint.source import resolve
from llmshrink.cli import run
from llmshrink.demo import model_folder
from llmshrink.errors import LlmshrinkError, SourceError

DEMO = Path(model_folder())
CONFIG: dict[str, Any] = json.loads((DEMO / "config.json").read_text())
WHOLE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size", "head_dim")
NOT_WHOLE = (-1, 10**12, 10**400, 2.5, float("nan"), float("inf"), "12", True, {"a": 1}, ["x"])


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Path]:
    def made(**changes: Any) -> Path:
        folder = Path(shutil.copytree(DEMO, tmp_path / "model", dirs_exist_ok=True))
        (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
        return folder

    return made


def refused(call: Callable[[], object]) -> str | None:
    """What is said of bad input; None where there is nothing to say. Any other exception is the test's."""
    try:
        call()
    except (EvalError, LlmshrinkError, Unreadable) as error:
        return str(error)
    return None


@pytest.mark.parametrize("value", NOT_WHOLE, ids=lambda value: str(value)[:12])
@pytest.mark.parametrize("name", WHOLE)
def test_a_size_that_no_model_has_is_refused(name: str, value: Any) -> None:
    fault = config_fault({**CONFIG, name: value})
    assert fault is not None and fault.startswith(f"{name} is ") and "a whole number from" in fault and len(fault) < 200


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, and has to be a whole number from 1 to 4,096"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000, and has to be"),
        ({"num_labels": 10**6}, "num_labels is 1000000"),
        ({"num_local_experts": -1}, "num_local_experts is -1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, and has to be a number from 0 to 1"),
        ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon is 'small'"),
        ({"rope_theta": 0}, "rope_theta is 0, and has to be a number above 0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": float("inf")}}, "rope_scaling: factor is inf"),
        ({"rope_parameters": {"full_attention": {"rope_theta": "x"}}}, "rope_parameters: full_attention: rope_theta"),
        ({"rope_parameters": {"rope_type": 3}}, "rope_parameters: rope_type is 3, and has to be text"),
        ({"rope_scaling": {"long_factor": [1.0, float("nan")]}}, "long_factor is [1.0, nan], and has to be finite"),
        ({"rope_parameters": []}, "rope_parameters is [], and has to be an object"),
        ({"text_config": "x"}, "text_config is 'x', and has to be an object"),
        ({"text_config": {"hidden_size": -4}}, "text_config: hidden_size is -4"),
        ({"sliding_window": "4096"}, "sliding_window is '4096'"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', and has to be true or false"),
        ({"hidden_act": 5}, "hidden_act is 5, and has to be text"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM', and has to be a list of texts"),
        ({"layer_types": ["full_attention", 3]}, "layer_types is ['full_attention', 3]"),
        ({"eos_token_id": 10**12}, "eos_token_id is 1000000000000"),
        ({"auto_map": 7}, "auto_map is 7, and has to be an object"),
        ({"anything": {"at": [{"all": 2**70}]}}, "and no number of a model has 64 bits"),
    ],
)
def test_a_field_that_is_not_what_one_of_its_name_is_is_refused(changes: dict[str, Any], says: str) -> None:
    fault = config_fault({**CONFIG, **changes})
    assert fault is not None and says in fault and "\n" not in fault


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": None, "head_dim": None, "sliding_window": None, "auto_map": None},
        {"pad_token_id": -1, "eos_token_id": [1, 2]},
        {"intermediate_size": [384, 256, 384, 384]},  # one for each layer
        {"time_step_limit": [0.0, float("inf")]},  # Mamba's
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6, "rope_type": "default"}, "sliding_attention": None}},
    ],
)
def test_what_real_configs_hold_is_taken(changes: dict[str, Any]) -> None:
    assert config_fault({**CONFIG, **changes}) is None


SIDE_FILES = {name: DEMO / name for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json")}


def with_side(folder: Path, name: str, text: str) -> Path:
    shutil.copytree(DEMO, folder, dirs_exist_ok=True)
    (folder / name).write_text(text)
    return folder


def use(folder: Path) -> None:
    """What reads each of a model's side files."""
    from llmshrink.checkpoint.preflight import load_tokenizer

    words = load_tokenizer(resolve(str(folder)))
    words("Once there was")
    assert words.model_max_length >= 0
    load_model(folder, LoadOptions())


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("tokenizer_config.json", {"model_max_length": [1]}, "model_max_length is [1], and has to be a number from 0"),
        ("tokenizer_config.json", {"model_max_length": float("inf")}, "model_max_length is inf, and has to be"),
        ("tokenizer_config.json", {"model_input_names": 5}, "model_input_names is 5, and has to be a list of texts"),
        ("tokenizer_config.json", {"model_input_names": None}, "model_input_names is None, and has to be a list"),
        ("tokenizer_config.json", {"eos_token": 7}, "eos_token is 7, and has to be text, or an object with content"),
        ("tokenizer_config.json", {"chat_template": [{"name": "a"}]}, "chat_template is [{'name': 'a'}], and has"),
        ("tokenizer_config.json", {"padding_side": "up"}, "padding_side is 'up', and has to be left or right"),
        ("generation_config.json", {"temperature": float("nan")}, "temperature is nan, and has to be a number from 0"),
        ("generation_config.json", {"eos_token_id": ["x"]}, "eos_token_id is ['x'], and has to be a whole number"),
        ("generation_config.json", {"top_p": 10**400}, "top_p is a number of 1,329 bits, and has to be"),
        ("generation_config.json", {"do_sample": "yes"}, "do_sample is 'yes', and has to be true or false"),
    ],
)
def test_a_field_of_a_side_file_is_held_to_what_it_can_be(
    name: str, changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    text = json.dumps({**json.loads(SIDE_FILES[name].read_text()), **changes})
    folder = with_side(tmp_path / "model", name, text)
    said = refused(lambda: use(folder))
    assert said is not None and said.startswith(f"{folder / name}: {says}") and "\n" not in said and len(said) < 500


NO_SIDE_FILES = {
    "nested": "[" * 1_000_000,
    "deep": '{"a":' * 1_000_000,
    "list": "[1]",
    "number": "5",
    "empty": "",
    "cut": "{",
    "digits": '{"a": ' + "9" * 9999 + "}",
}


@pytest.mark.parametrize("kind", NO_SIDE_FILES)
@pytest.mark.parametrize("name", SIDE_FILES)
def test_a_side_file_that_is_none_is_one_line(name: str, kind: str, tmp_path: Path) -> None:
    folder = with_side(tmp_path / "model", name, NO_SIDE_FILES[kind])
    said = refused(lambda: use(folder))
    assert said is not None and said.startswith(f"{folder / name}: ") and "\n" not in said and len(said) < 500


def test_what_real_tokenizers_and_settings_hold_is_taken(tmp_path: Path) -> None:
    tokenizer = {
        "model_max_length": 1000000000000000019884624838656,  # for: none
        "bos_token": None,
        "pad_token": {"content": "<pad>", "__type": "AddedToken"},
        "chat_template": [{"name": "default", "template": "{{ messages }}"}],
    }
    for name, changes in (
        ("tokenizer_config.json", tokenizer),
        ("generation_config.json", {"eos_token_id": [1, 2], "temperature": 0, "top_p": 1, "pad_token_id": None}),
    ):
        text = json.dumps({**json.loads(SIDE_FILES[name].read_text()), **changes})
        folder = with_side(tmp_path / name, name, text)
        check_tokenizer(folder)
        check_generation(folder)


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("[" + "{}," * 9 + "{}]", True),
        ('["' + '{},\\"[' * 99 + '", 1, 2, 3]', False),  # within a text they are none
        ('[{"a": ["b", "c,"]}, "\\\\", {"d,": 2}]', False),
        ('"' + '\\"' * 50 + "," * 50, None),  # a text that doesn't end
    ],
)
def test_values_of_json_are_counted_before_they_are_made(
    text: str, refused: bool | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert bounded.MOST_VALUES == 5_000_000
    monkeypatch.setattr(bounded, "MOST_VALUES", 10)
    says = {True: "^has more than 10 values$", None: "^isn't JSON "}.get(refused)
    (tmp_path / "file.json").write_text(text)
    for read in (
        lambda: parse_json(text),
        lambda: parse_json(text.encode()),
        lambda: read_json(tmp_path / "file.json"),
    ):
        if says is None:
            assert read() == json.loads(text)
        else:
            with pytest.raises(Unreadable, match=says):
                read()
    if refused:  # what our own processes wrote isn't counted
        assert read_json(tmp_path / "file.json", limit=bounded.OWN_LIMIT) == json.loads(text)


def test_other_encodings_of_json_are_none() -> None:
    assert parse_json(b'\xef\xbb\xbf["a"]') == ["a"]
    for name in ("utf-16", "utf-16-le", "utf-32"):
        with pytest.raises(Unreadable, match=r"isn't (UTF-8|JSON)"):
            parse_json('["a"]'.encode(name))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(name=st.sampled_from(["tokenizer_config.json", "generation_config.json"]), data=st.data())
def test_any_side_file_is_used_or_refused_in_one_line(
    name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    fields = sorted(sidefiles._OF_TOKENIZER if name.startswith("tok") else sidefiles._OF_GENERATION)
    changes = data.draw(st.dictionaries(st.sampled_from(fields), json_values, min_size=1, max_size=2))
    text = json.dumps({**json.loads(SIDE_FILES[name].read_text()), **changes})
    folder = with_side(tmp_path_factory.mktemp("side"), name, text)
    said = refused(lambda: use(folder))
    assert said is None or (str(folder) in said and "\n" not in said and len(said) < 700)


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(CONFIG)), json_values, min_size=1, max_size=2))
def test_any_config_is_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("config")
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    said = refused(lambda: running_config(folder))
    assert said is None or ("config.json: " in said and "\n" not in said and len(said) < 1000)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "it isn't JSON"),
        (b'{"\xff": 1}', "it isn't UTF-8"),
        (b'{"a": ' * 200 + b"1" + b"}" * 200, "nested more than 100 deep"),
        (b"[" * 200_000, "nested more than 100 deep"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "it isn't JSON (Exceeds the limit (4300 digits)"),
        (b"[1]", "not a JSON object"),
        (b'{"a": "' + b"x" * 16_000_000 + b'"}', "it has more than 16,000,000 bytes"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_config_that_is_no_json_is_refused(text: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(EvalError) as caught:
        read_config(tmp_path)
    assert says in str(caught.value)
    with pytest.raises(SourceError) as of_ours:
        read_source_config(tmp_path)
    assert str(of_ours.value) == str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_act": "unknown"}, "hidden_act is 'unknown', which transformers doesn't know"),
        ({"rope_parameters": {"rope_type": "bogus", "rope_theta": 1e4}}, "rope_type is 'bogus', which transformers"),
        ({"num_hidden_layers": 4000}, "num_hidden_layers is 4,000, and the files hold 39 tensors"),
        ({"intermediate_size": 10**7}, "intermediate_size 10,000,000 makes a matrix of 10,000,000 x 128"),
        ({"num_key_value_heads": 60_000}, "num_key_value_heads 60,000 makes a matrix of 1,920,000 x 128"),
        ({"vocab_size": 10**7}, "vocab_size 10,000,000 makes a matrix"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ],
)
def test_what_loads_a_model_refuses_it_before_anything_is_built(
    changes: dict[str, Any], says: str, model: Callable[..., Path]
) -> None:
    folder = model(**changes)
    with pytest.raises(EvalError) as caught:
        load_model(folder, LoadOptions())
    assert says in str(caught.value)
    with pytest.raises(LlmshrinkError) as of_ours:
        llmshrink.load(folder)
    assert says in str(of_ours.value)


@pytest.mark.parametrize(
    "line",
    [
        ["plan", "MODEL"],
        ["quantize", "MODEL", "-o", "OUT"],
        ["prune", "MODEL", "-o", "OUT"],
        ["compress", "MODEL", "--recipe", "sparsegpt-2of4-gptq-w4a16", "-o", "OUT"],
        ["distill", "MODEL", "MODEL", "-o", "OUT"],
        ["generate", "MODEL", "hi"],
        ["eval", "MODEL", "--text", "demo", "-o", "OUT"],
        ["compare", "MODEL", "MODEL", "--text", "demo", "-o", "OUT"],
        ["serve", "MODEL"],
    ],
    ids=lambda line: line[0],
)
def test_every_verb_has_the_gate(
    line: list[str], model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"MODEL": str(model(num_attention_heads=-3)), "OUT": str(tmp_path / "out")}
    assert run([names.get(word, word) for word in line]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "num_attention_heads is -3, and has to be" in said[0]
    assert not (tmp_path / "out").exists()


def test_a_file_without_an_end_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    with pytest.raises(Unreadable, match="isn't a file"):
        read_json(tmp_path / "zero.json")


def test_depth_is_counted_without_a_call_for_a_level() -> None:
    deep: Any = 1
    for _ in range(DEEPEST):
        deep = [deep]
    assert not too_deep(deep) and too_deep([deep]) and too_deep({"a": {"b": deep}})
    assert parse_json("[" * DEEPEST + "1" + "]" * DEEPEST) == deep
    with pytest.raises(Unreadable, match="nested more than 100 deep"):
        parse_json("[" * 101 + "1" + "]" * 101)


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.binary(max_size=40) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_json_or_unreadable(text: bytes) -> None:
    said = refused(lambda: parse_json(text))
    assert said is None or (said.startswith(("isn't", "is nested")) and "\n" not in said)


def test_a_long_value_is_shown_short() -> None:
    assert shown(int("f" * 5000, 16)) == "a number of 20,000 bits"
    assert len(shown([10**20_000] * 1000)) < 500 and len(shown({"x" * 10_000: "y" * 10_000})) < 500
    assert bounded.shown("plain") == "'plain'"
