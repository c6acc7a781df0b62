"""`llmshrink generate` through the real entry point, and that it says what the dequantized model says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import llmshrink
from llmshrink.runtime.linear import QuantLinear

NOTICE = "llmshrink kernels: cpu has no Triton kernels; computing by plain torch"
LLMSHRINK = str(Path(sys.executable).with_name("llmshrink"))


def generate(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([LLMSHRINK, "generate", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def demo4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "demo-w4"
    llmshrink.quantize("demo", output=out, calibration="demo", recipe="rtn-w4a16")
    return out


@pytest.fixture(scope="module")
def wiki4(wiki7m: Path, calibration_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wiki") / "wiki-w4"
    llmshrink.quantize(
        wiki7m, output=out, calibration=calibration_text, samples=4, seq_len=128, group_size=64, recipe="rtn-w4a16"
    )
    return out


def test_the_text_is_on_stdout_and_the_cost_on_stderr(demo4: Path) -> None:
    done = generate(demo4, "Once upon a time", "--max-new-tokens", "24")
    assert len(done.stdout.split()) > 2
    *notices, line = done.stderr.strip().splitlines()
    assert notices == ([] if torch.cuda.is_available() else [NOTICE])
    for said in (
        r"\d+ tokens",
        r"decode [\d.]+ tokens/s",
        r"prefill [\d.]+ tokens/s",
        r"packed\)",
        r"peak memory [\d.]+ ",
    ):
        assert re.search(said, line), (said, line)
    assert generate(demo4, "Once upon a time", "--max-new-tokens", "24").stdout == done.stdout


def test_json_holds_the_text_and_the_numbers(demo4: Path) -> None:
    done = generate(demo4, "Once upon a time", "--max-new-tokens", "5", "--json")
    found = json.loads(done.stdout)
    assert done.stderr == ""
    assert found["text"] in generate(demo4, "Once upon a time", "--max-new-tokens", "5").stdout
    assert found["new_tokens"] <= 5 and found["device"] == "cpu" and not found["chat"]
    assert 0 < found["packed_bytes"] < found["weight_bytes"] < found["peak_memory_bytes"]
    assert found["decode_tokens_per_second"] > 0 and found["prefill_tokens_per_second"] > 0


def test_an_uncompressed_model_speaks_too_and_is_said_to_be_one() -> None:
    done = generate("demo", "Once upon a time", "--max-new-tokens", "4")
    assert "demo isn't compressed: loaded as it is" in done.stderr and done.stdout.strip()


@pytest.mark.parametrize("fixture", ["demo4", "wiki4"])
def test_greedy_tokens_are_those_of_the_dequantized_model(fixture: str, request: pytest.FixtureRequest) -> None:
    from llmshrink_eval.model import LoadOptions
    from transformers import AutoTokenizer

    from llmshrink.evaluation.loader import load as dense

    folder = request.getfixturevalue(fixture)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    packed, expected = llmshrink.load(folder, device="cpu", dtype="float32"), dense(str(folder), LoadOptions())
    assert any(isinstance(module, QuantLinear) for module in packed.modules())
    for prompt in ("Once upon a time", "The history of", "In 1990 the"):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        said = [model.generate(ids, max_new_tokens=64, do_sample=False) for model in (packed, expected)]
        assert torch.equal(*said), prompt


def test_drawing_depends_on_the_seed_alone(demo4: Path) -> None:
    def draw(seed: int) -> str:
        return llmshrink.generate(
            demo4, "Once upon a time", temperature=1.5, seed=seed, device="cpu", max_new_tokens=24
        ).text

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) > 1


def test_the_pieces_make_up_the_text(demo4: Path) -> None:
    pieces: list[str] = []
    said = llmshrink.generate(demo4, "Once upon a time", device="cpu", on_text=pieces.append)
    assert "".join(pieces).strip() == said.text.strip() and len(pieces) > 2


def test_a_chat_template_is_used_where_there_is_one(demo4: Path, tmp_path: Path) -> None:
    import shutil

    chatty = tmp_path / "chatty"
    shutil.copytree(demo4, chatty)
    (chatty / "chat_template.jinja").write_text("{% for m in messages %}Q {{ m.content }} A{% endfor %}")
    asked = llmshrink.generate(chatty, "a cat", device="cpu", max_new_tokens=2)
    raw = llmshrink.generate(chatty, "a cat", device="cpu", max_new_tokens=2, chat=False)
    assert asked.chat and not raw.chat and asked.prompt_tokens > raw.prompt_tokens
    with pytest.raises(llmshrink.LlmshrinkError, match="--chat, but its tokenizer has no chat template"):
        llmshrink.generate(demo4, "a cat", device="cpu", chat=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("demo", ""), "the prompt is empty"),
        (("demo", "  "), "the prompt is empty"),
        (("no-such/model/there", "a"), "no-such/model/there: no such folder"),
        (("demo", "a", "--max-new-tokens", "0"), "--max-new-tokens 0: must be at least 1"),
        (("demo", "a", "--max-new-tokens", "256"), "ask for 255 at most"),
        (("demo", "a cat " * 300), "tokens, the model reads 256 at most"),
        (("demo", "a", "--device", "tpu"), "--device tpu: not a device here"),
        (("demo", "a", "--dtype", "int4"), "--dtype int4: choose one of"),
        (("demo", "a", "--temperature", "-1"), "--temperature -1.0: must be 0"),
        (("demo", "a", "--temperature", "nan"), "--temperature nan: must be 0"),
        (("demo", "a", "--top-p", "0.5"), "--top-p 0.5: nothing is drawn at temperature 0"),
        (("demo", "a", "--top-p", "1.5", "--temperature", "1"), "--top-p 1.5: must be above 0"),
        (("demo", "a", "--seed", "-1"), "--seed -1: must be at least 0"),
        (("demo", "a \udcff"), "the prompt isn't UTF-8 text (surrogates not allowed); give text"),
        (("demo",), "missing argument 'PROMPT'"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], said: str) -> None:
    done = generate(*arguments, code=2)
    lines = done.stderr.strip().splitlines()
    assert said in lines[-1] and not done.stdout
    assert [line for line in lines if "error" in line] == lines[-1:] and "Traceback" not in done.stderr
