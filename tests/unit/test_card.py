"""The card says what was said to it: no name, note or licence is Markdown, HTML, YAML or a link in it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from eval_hostile import EVIL
from hypothesis import example, given, settings
from hypothesis import strategies as st
from llmshrink_eval.inert import code, escaped, fenced, plain
from markdown_it import MarkdownIt
from markdown_it.token import Token

import llmshrink
from llmshrink.errors import CheckpointError
from llmshrink.run.card import Subject, card, compose
from llmshrink.run.licence import Licence, front_matter, licence_of
from llmshrink.run.original import Original, original_of
from llmshrink.run.seal import read_seal

POISON = [
    EVIL, "</details><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "[here](javascript:alert(1))",
    "![x](https://evil.example/x.png)", "[x]: https://evil.example", "<https://evil.example>", "`code` ``` ~~~",
    "\n```\n# heading\n```\n", "\n---\nlicense: mit\n---\n", "a | b | c", "**bold** __bold__ _x_ *y*", "$\\frac{1}{0}$",
    "{{ 7*7 }} {% include x %} {raw}`<b>`", "&lt;script&gt; &#60;", "\\", "\\`", "ends in \\", "# heading", "> quote",
    "- item", "1. item", "2) item", "+ item", "---", "===", "    indented", "\tx", "- [x] done", ": deflist",
    "a\r\n\r\nb", "\x00\x07\x1b[31m", "\u202egpj.exe", "\ud800", "\udcff", "x\u2028y\x85z\x0cw", "~~strike~~",
    "!important", "%YAML 1.2", "&anchor *alias", "? key : value", "'\"", "null", "", " ", "@user #1", "<!-- comment",
    "<![CDATA[", "<?php",
]  # fmt: skip
TEXTS = st.one_of(
    st.sampled_from(POISON),
    st.lists(st.sampled_from(POISON), min_size=2, max_size=3).map("".join),
    st.text(st.sampled_from("`*_[]()<>|\\$~#&{}!-+=.\n\r\t 1ax:'\"@\x00\u2028"), max_size=20),
)


@pytest.fixture(scope="module")
def made(model_of: Callable[..., Path], story: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("card") / "out"
    llmshrink.quantize(model_of("llama"), output=out, calibration=story, samples=4, seq_len=32, group_size=32)
    return out


def poisoned(about: Subject, text: str) -> Subject:
    """With a text in every place that isn't ours to write."""
    record = json.loads(json.dumps(about.record))
    record |= {"model": f"a {text}", "recipe": text, "held_out": text, "notes": [text, f"x {text}"]}
    record |= {"revision": text or "x"}
    record["calibration"] |= {"name": text}
    record["identity"] |= {"device": text, "instructions": text, "versions": {"llmshrink": text, text or "x": text}}
    quality = record["quality"]
    record["distill"] = {"teacher": text, "data": text, "steps": 3, "before": quality}
    rows = tuple(replace(row, name=text, pruned=text) for row in about.made.sites)
    document = {
        "summary": f"x{text}",
        "steps": [{"quantize": {"method": text, "bits": 4}}],
        "overrides": [{"match": text}],
    }
    recipe = f"{yaml.safe_dump(document)}# ```\n# {plain(text)}"
    made = replace(about.made, sites=rows, structure=f"x{text}", kv_cache=f"x{text}")
    return Subject(record, made, Licence("other", plain(text) or "x", None, "README.md"), recipe, about.weights)


def structure(text: str) -> list[tuple[str, str, str]]:
    """What Markdown makes of a card below its metadata, but for the words: tokens by type, tag and link."""

    def flat(tokens: list[Token]) -> Iterator[tuple[str, str, str]]:
        for token in tokens:
            link = str(token.attrs.get("href") or token.attrs.get("src") or "")
            content = token.content if token.type.startswith("html") else ""
            if token.type not in ("text", "inline", "softbreak"):
                yield token.type, token.tag, link + content
            yield from flat(token.children or [])

    body = text.partition("\n---\n")[2]
    return list(flat(MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(body)))


def metadata(text: str) -> dict[str, Any]:
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert match
    found = yaml.safe_load(match[1])
    assert isinstance(found, dict)
    return found


@settings(max_examples=50, deadline=None, derandomize=True)
@given(text=TEXTS)
@example(text="\n".join(POISON))
def test_whatever_a_name_is_the_card_is_built_alike(made: Path, text: str) -> None:
    about, seal = Subject.of(made), read_seal(made)
    assert seal is not None
    spoiled = {**seal, "by": text, "against": text}
    plainly = compose(poisoned(about, "a name"), seal=seal)
    found = compose(poisoned(about, text), seal=spoiled)
    assert "\n".join(found.splitlines()) == found.removesuffix("\n")  # no other ends of lines
    assert structure(found.encode().decode()) == structure(plainly)
    head, usual = metadata(found), metadata(plainly)
    assert head.keys() - {"license_name"} == usual.keys() - {"license_name"}
    assert head["tags"] == usual["tags"] and head["license"] == "other" and "base_model" not in head
    (index,) = head["model-index"]
    assert len(index["results"]) == 1 and len(index["results"][0]["metrics"]) == 2


@settings(max_examples=50, deadline=None, derandomize=True)
@given(text=TEXTS)
def test_inert_text_is_shown_as_it_is(text: str) -> None:
    reader = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    for sentence in (escaped(text), f"- {escaped(text)}.", f"# {escaped(text)}"):
        inline = [token for token in reader.parse(sentence) if token.type == "inline"]
        assert all(child.type in ("text", "text_special") for token in inline for child in token.children or [])
    shown = reader.renderInline(f"x{escaped(f'y{text}')}x")
    assert shown == reader.renderInline("x").replace("x", "x" + _as_html(plain(f"y{text}")) + "x")
    (span,) = reader.parseInline(code(text))[0].children or []
    assert span.type == "code_inline" and span.content.strip() == plain(text).strip()
    (block,) = reader.parse("\n".join(fenced(text, "yaml")))
    assert block.type == "fence" and block.info == "yaml"


def _as_html(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")


@settings(max_examples=50, deadline=None, derandomize=True)
@given(licence=TEXTS, name=TEXTS, link=TEXTS, raw=st.booleans())
def test_a_licence_is_text(
    tmp_path_factory: pytest.TempPathFactory, licence: str, name: str, link: str, raw: bool
) -> None:
    folder = tmp_path_factory.mktemp("source")
    stated = {"license": licence, "license_name": name, "license_link": link, "language": [name], "tags": [link]}
    text = "\n".join(f"{key}: {value}" for key, value in stated.items()) if raw else yaml.safe_dump(stated)
    (folder / "README.md").write_bytes(f"---\n{text}\n---\n# {name}\n".encode(errors="surrogatepass")[:5000])
    found = licence_of(folder)
    for said in (found.id, found.name):
        assert said is None or (said == plain(said) and len(said) <= 200)
    assert found.id is None or re.fullmatch(r"[a-z0-9][a-z0-9.+_-]*", found.id)
    assert found.link is None or found.link.startswith(("http://", "https://"))
    assert set(found.front_matter()) <= {"license", "license_name", "license_link"}
    str(found).encode()


@pytest.mark.parametrize(
    "value",
    [
        "!!bool maybe", "!!int ''", "!!timestamp x", "!!float x", "2001-99-99", "1" * 5000, "0b9", "!!binary x",
        "!!python/name:os.system", "=", "{[a]: b}", "? [a]", "[" * 600, "*missing",
        "&a [*a]", "'\\ud800", '"\\ud800"', "!<x> y", "\x07",
    ],
)  # fmt: skip
def test_front_matter_that_yaml_chokes_on_stops_nothing(value: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\nother: {value}\n---\n")
    assert licence_of(tmp_path).id in ("mit", None)
    (tmp_path / "README.md").write_text(f"---\nlicense: {value}\nlicense_name: {value}\n---\n")
    str(licence_of(tmp_path)).encode()
    assert licence_of(tmp_path).bound is not None or licence_of(tmp_path).warning is not None


def test_languages_tags_and_bases_of_the_original_are_data(made: Path, tmp_path: Path) -> None:
    about = Subject.of(made)
    stated = {
        "language": ["en", "no", "zh-Hans", "<b>", "e\nn", 5, "en"],
        "tags": ["text-generation", "chat model", "license:mit", "base_model:x/y", "arxiv:2210.17323", "a: b"],
        "base_model": ["owner/name", "../../etc", "owner/name/x", "owner"],
    }
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump(stated)}---\n# x\n")
    found = original_of(tmp_path)
    assert found == Original(
        ("en", "no", "zh-Hans"), ("text-generation", "chat model", "arxiv:2210.17323"), ("owner/name",)
    )
    head = metadata(compose(replace(about, original=found)))
    usual = metadata(compose(about))["tags"]
    assert head["language"] == ["en", "no", "zh-Hans"]  # no: not false
    assert head["tags"] == [*usual, "text-generation", "chat model", "arxiv:2210.17323"]
    assert head["base_model"] == ["owner/name"] and "base_model_relation" not in head
    on_the_hub = {**about.record, "model": "them/theirs", "revision": "abc"}
    assert metadata(compose(replace(about, original=found, record=on_the_hub)))["base_model"] == "them/theirs"
    (tmp_path / "README.md").write_text("---\nlanguage: de\ntags: one\nbase_model: a/b\n---\n")
    assert original_of(tmp_path) == Original(("de",), ("one",), ("a/b",))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(words=st.lists(TEXTS, max_size=80), raw=TEXTS)
def test_whatever_an_original_says_of_itself_only_few_plain_words_go_on(
    made: Path, tmp_path_factory: pytest.TempPathFactory, words: list[str], raw: str
) -> None:
    about = Subject.of(made)
    usual = metadata(compose(about))["tags"]
    folder = tmp_path_factory.mktemp("original")
    many = [f"tag{number}" for number in range(60)]
    text = yaml.safe_dump({"language": [*words, *["en"] * 60], "tags": [*words, *many], "base_model": words})
    for head in (text, f"language: {raw}\ntags: [{raw}]\n"):
        (folder / "README.md").write_bytes(f"---\n{head}---\n".encode(errors="surrogatepass"))
        found = original_of(folder)
        for each in (found.languages, found.tags, found.bases):
            assert len(each) <= 50 and all(re.fullmatch(r"[\w .:/+-]{1,64}", word, re.ASCII) for word in each)
        assert metadata(compose(replace(about, original=found)))["tags"][: len(usual)] == usual


def test_references_that_grow_are_not_written_out(tmp_path: Path) -> None:
    """Each line ten times the one before: as text, a licence longer than any memory."""
    lines = ["a0: &a0 x", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12))]
    (tmp_path / "README.md").write_text("\n".join(["---", *lines, "license: *a11", "license_name: *a11", "---", ""]))
    assert licence_of(tmp_path) == Licence()
    merged = ["a0: &a0 {x: y}", *(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 12))]
    (tmp_path / "README.md").write_text("\n".join(["---", *merged, "license: mit", "---", ""]))
    assert licence_of(tmp_path) == Licence()  # a head that stands for more than it may is none


def test_only_the_head_of_a_card_is_read(tmp_path: Path) -> None:
    with (tmp_path / "README.md").open("wb") as file:
        file.write(b"---\nlicense: mit\n---\n")
        file.truncate(1 << 33)
    assert front_matter(tmp_path / "README.md") == {"license": "mit"}


@pytest.mark.parametrize(
    ("link", "kept"),
    [
        ("https://example.org/licence?a=b#c", True),
        ("HTTP://example.org", True),
        ("LICENSE", True),
        ("LICENSE.txt", False),  # isn't there
        ("javascript:alert(1)", False),
        ("data:text/html,x", False),
        ("//evil.example", False),
        ("file:///etc/passwd", False),
        ("../../etc/passwd", False),
        ("https://x.example/<script>", False),
        ("https://x.example/ y", False),
        ("https://x.example/](y)", False),
        ("mailto:a@b.example", False),
    ],
)
def test_a_link_of_a_licence_is_the_web_s_or_a_file_beside_it(link: str, kept: bool, tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text("terms")
    head = yaml.safe_dump({"license": "other", "license_name": "own", "license_link": link})
    (tmp_path / "README.md").write_text(f"---\n{head}---\n")
    assert licence_of(tmp_path).link == (link if kept else None)


def test_a_page_is_linked_for_an_id_of_the_hub_alone(made: Path) -> None:
    about = Subject.of(made)
    for model, linked in (("owner/name", True), ("owner/na)me", False), ("javascript:alert(1)", False)):
        text = compose(replace(about, record={**about.record, "model": model, "revision": "0" * 40}))
        assert (f"](https://huggingface.co/{model})" in text) == linked == ("base_model" in metadata(text))


@pytest.mark.parametrize(
    "text", ["[", "steps: 3", "- x", "steps: [{quantize: 3}]", "overrides: [{}]", "x: !!int ''", "x"]
)
def test_a_recipe_that_is_none_is_a_line(text: str, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "out")
    (tmp_path / "out" / "recipe.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=r"recipe.yaml: isn't the recipe of a run"):
        card(tmp_path / "out")
