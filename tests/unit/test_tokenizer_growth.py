"""How much longer a tokenizer may make a text: reckoned from tokenizer.json, and never tried."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from llmshrink_eval.sidefiles import check_tokenizer
from llmshrink_eval.tokenizerfile import check_growth
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors

from llmshrink.checkpoint.preflight import load_tokenizer
from llmshrink.checkpoint.source import resolve
from llmshrink.cli import run
from llmshrink.errors import SourceError

DEMO = Path(__file__).parents[2] / "llmshrink" / "demo" / "model"
FILE = Path("tokenizer.json")


def replace(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def sequence(*steps: Any) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


def charsmap(longest: str) -> dict[str, Any]:
    table = (8).to_bytes(4, "little") + bytes(8) + b"x\0" + longest.encode() + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}


def template(*pieces: Any, ids: int = 1) -> dict[str, Any]:
    special = {"<s>": {"id": "<s>", "ids": [1] * ids, "tokens": ["<s>"] * ids}}
    return {"type": "TemplateProcessing", "single": list(pieces), "pair": [], "special_tokens": special}


A, BOS = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<s>", "type_id": 0}}
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
NFKD = {"type": "NFKD"}


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (("normalizer", sequence(*[replace("a", "a" * 40)] * 6)), "makes a text up to 4,096,000,000 times as long"),
        (("normalizer", replace("a", "b" * 65)), "makes a text up to 65 times as long, and 64 times is the most"),
        (("normalizer", sequence(*[{"type": "Prepend", "prepend": "ab"}] * 4)), "up to 81 times"),
        (("normalizer", sequence(sequence(replace("a", "b" * 9)), sequence(replace("b", "c" * 9)))), "up to 81 times"),
        (("normalizer", {"normalizers": [{"pattern": {"String": "a"}, "content": "b" * 99}]}), "up to 99 times"),
        (("normalizer", sequence(*[replace("", "b", "Regex")] * 7)), "up to 128 times"),
        (("normalizer", sequence(*[replace("x*", "b", "Regex")] * 7)), "up to 128 times"),
        (("normalizer", sequence(*[NFKD, replace("l", "\ufdfa")] * 3)), "up to 324 times"),
        (("normalizer", charsmap("é" * 70)), "up to 70 times"),
        (("normalizer", sequence(charsmap("y" * 30), charsmap("z" * 30), charsmap("a" * 30))), "up to 900 times"),
        (("pre_tokenizer", {"type": "Sequence", "pretokenizers": [BYTES] * 30}), "up to 1,073,741,824 times"),
        (("decoder", {"type": "Sequence", "decoders": [replace("ab", "c" * 20)] * 2}), "up to 100 times"),
        (("post_processor", template(*[A] * 100)), "up to 100 times"),
        (("post_processor", template(BOS, A, BOS, ids=501)), "puts 1,002 tokens around a text, and 1,000 are the most"),
        (("normalizer", sequence(*[replace("a", "a" * 1000)] * 5000)), "more than a million billion times"),
    ],
    ids=lambda part: None if isinstance(part, str) else part[0],
)  # fmt: skip
def test_a_tokenizer_that_makes_texts_too_long_is_refused(part: tuple[str, Any], says: str, tmp_path: Path) -> None:
    shutil.copytree(DEMO, folder := tmp_path / "model")
    written = {**json.loads((DEMO / FILE).read_text()), part[0]: part[1]}
    (folder / FILE).write_text(json.dumps(written))
    with pytest.raises(SourceError) as caught:
        load_tokenizer(resolve(str(folder)))
    said = str(caught.value)
    assert said.startswith(f"{folder / FILE}: its {part[0]} ") and says in said and "\n" not in said and len(said) < 400


def test_what_real_tokenizers_do_is_taken() -> None:
    found: list[tuple[str, Any]] = [
        # Llama 2, Gemma, ALBERT, T5, BERT, GPT-2 and CLIP, as their files have them.
        ("normalizer", normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])),
        ("normalizer", normalizers.Replace(" ", "▁")),
        ("decoder", decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])),
        ("normalizer", normalizers.Sequence([
            normalizers.Replace("``", '"'), normalizers.Replace("''", '"'), normalizers.NFKD(),
            normalizers.StripAccents(), normalizers.Lowercase(), normalizers.Replace(Regex(" {2,}"), " ")])),
        ("normalizer", normalizers.Sequence([normalizers.Replace(Regex(f"[{a}“]\\s+"), "▁") for a in "abcdefghij"])),
        ("normalizer", normalizers.BertNormalizer()),
        ("pre_tokenizer", pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex("a|b"), "isolated"), pre_tokenizers.ByteLevel()])),
        ("pre_tokenizer", pre_tokenizers.Metaspace()),
        ("decoder", decoders.ByteLevel()),
        ("post_processor", processors.Sequence([
            processors.ByteLevel(), processors.TemplateProcessing(
                single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 1)])])),
        ("post_processor", processors.RobertaProcessing(("</s>", 1), ("<s>", 0))),
    ]  # fmt: skip
    for part, made in found:
        check_growth(FILE, {part: json.loads(made.__getstate__())})
    check_growth(FILE, {"normalizer": sequence(charsmap("y" * 18), replace(" {2,}", "▁", "Regex"))})
    check_growth(FILE, json.loads((DEMO / FILE).read_text()))


def test_the_figure_is_what_the_library_makes_of_a_text() -> None:
    steps = [normalizers.Replace("a", "b" * 5), normalizers.Replace(Regex("c*"), "de"), normalizers.Prepend("xyz")]
    made = normalizers.Sequence(steps)
    assert len(made.normalize_str("a")) <= 5 * 3 * 4
    assert len(normalizers.Sequence(steps[:2]).normalize_str("aaaa")) == 4 * 5 * 3 + 2  # and once at its end


def test_a_panic_of_the_library_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(DEMO, folder := tmp_path / "model")
    written = {**json.loads((DEMO / FILE).read_text()), "normalizer": {"type": "Prepend", "prepend": ""}}
    (folder / FILE).write_text(json.dumps(written))
    with pytest.raises(SourceError, match=f"^{folder}: the tokenizers library can't go on with .*; correct it, or"):
        load_tokenizer(resolve(str(folder)))
    # Of a text that comes later.
    with pytest.raises(BaseException) as caught:
        Tokenizer.from_file(str(folder / FILE)).encode("Once there was")
    assert not isinstance(caught.value, Exception)

    def late(_: object) -> int:
        raise caught.value

    monkeypatch.setattr("llmshrink.cli._carry_out", late)
    capsys.readouterr()
    assert run(["plan", "model"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("llmshrink: error: the tokenizers library can't go on") and said.count("\n") == 1


@pytest.mark.parametrize("value", [5, [], "x", {"type": 7}, sequence(5, None, []), {"normalizers": 5}, replace("a", 7),
                                   {"type": ["x"]}, {"single": [5, {"Sequence": 7}, {"SpecialToken": []}]},
                                   {"precompiled_charsmap": "é"}, {"precompiled_charsmap": 5}, {"prepend": []},
                                   {"single": [BOS], "special_tokens": {"<s>": 5}}], ids=str)  # fmt: skip
def test_a_part_of_another_form_is_left_to_the_library(value: Any, tmp_path: Path) -> None:
    for part in ("normalizer", "pre_tokenizer", "decoder", "post_processor"):
        check_growth(FILE, {part: value})
    (tmp_path / FILE).write_text(json.dumps({"normalizer": value}))
    check_tokenizer(tmp_path)
