"""What is as it should be, changed by a seed: JSON, text and bytes with values that hardly anybody expects."""

from __future__ import annotations

import json
import random
from typing import Any

DEEP = 3000
"""Levels of a JSON value that no reader should follow."""
MORE_KEYS = ("x", "quantization_config", "text_config", "auto_map", "layer_types", "")
MORE_BYTES = (b"\0", b"\xff\xfe", b"[" * DEEP, b"9" * 5000, b'{"a":1}', b"&a [*a,*a]", b"\n- ")
MORE_LINES = ("a: &a [1, 2]", "b: *a", "2020-01-01: 1", "? [a]", "- " * 400, "\t", "!!python/x y")
STEPS: tuple[dict[str, Any], ...] = (
    *({"type": "Replace", "pattern": {kind: "a"}, "content": "a" * count} for kind in ("String", "Regex", "x")
      for count in (0, 1, 40)),
    *({"type": "Replace", "pattern": {"Regex": each}, "content": "bb"} for each in ("", "x*", "(", "(a+)+$", "\\p{L}")),
    *({"type": "Prepend", "prepend": each} for each in ("", "\u2581", "x" * 50)),
    *({"type": each} for each in ("NFKC", "NFD", "Lowercase", "Nmt", "StripAccents", "Fuse", "ByteFallback", "Digits")),
    {"type": "Precompiled", "precompiled_charsmap": "AAAAAHgA"},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
    {"type": "Split", "pattern": {"Regex": "a|"}, "behavior": "Isolated", "invert": False},
    {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 3, "pair": [],
     "special_tokens": {}},
    {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}], "pair": [],
     "special_tokens": {"x": {"id": "x", "ids": [10**9] * 2000, "tokens": ["x"] * 2000}}},
)  # fmt: skip
"""Of a tokenizer: those that it has in real files, and those that make much of little."""
LISTS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders",
         "post_processor": "processors"}  # fmt: skip
PIECES = (
    *("{{ messages[0].content }}", "{{ messages }}", "{{ '\\ud800' }}", "\ud800", "{{ '\\x00' }}", "\u2028", "\0"),
    *("{{ 'x' * 5000 }}", "{{ 1 / 0 }}", "{{ x.y }}", "{{ raise_exception('\\udfff\n') }}", "{{ ''.__class__ }}"),
    *("{% generation %}{{ messages[0].content }}{% endgeneration %}", "{% for m in messages %}", "{% endfor %}", "{{"),
    *("{{ strftime_now('%Y') }}", "{{ bos_token }}", "{{ messages | tojson }}", "{{ ['a'] * 3 }}", "<|end|>"),
)
"""Of a chat template."""
SETTINGS = ([10**8], [[10**8]], [[[1], 2.0]], -1, 1, 2, True, 0.5, "x", ["x"], {"bias": 2.0}, {"x": 1}, "low", [0], 1e9)
"""That one field or another of generation_config.json may have."""


def changed_tokenizer(text: str, rng: random.Random) -> bytes:
    """tokenizer.json with other steps, or changed as any JSON."""
    if rng.random() < 0.3:
        return changed_json(text, rng)
    tree = json.loads(text)
    for part in rng.sample(sorted(LISTS), rng.randint(1, 2)):
        steps = rng.choices(STEPS, k=rng.randint(1, 8))
        tree[part] = steps[0] if rng.random() < 0.3 else {"type": "Sequence", LISTS[part]: steps}
    return json.dumps(tree).encode()


def changed_template(text: str, rng: random.Random) -> bytes:
    """tokenizer_config.json with a chat template of pieces, or changed as any JSON."""
    if rng.random() < 0.3:
        return changed_json(text, rng)
    template = "".join(rng.choices(PIECES, k=rng.randint(1, 4)))
    return json.dumps({**json.loads(text), "chat_template": template}).encode()


def changed_generation(text: str, rng: random.Random) -> bytes:
    """generation_config.json with fields that transformers knows, each with a value that one of them may have."""
    from transformers import GenerationConfig

    if rng.random() < 0.2:
        return changed_json(text, rng)
    fields = rng.sample(sorted(vars(GenerationConfig())), rng.randint(1, 3))
    drawn = {name: rng.choice(SETTINGS) if rng.random() < 0.8 else strange(rng) for name in fields}
    return json.dumps({**json.loads(text), **drawn}).encode("utf-8", "surrogatepass")


def nested(levels: int) -> list[Any]:
    """A list in a list, so deep."""
    found: list[Any] = []
    for _ in range(levels):
        found = [found]
    return found


def strange(rng: random.Random) -> Any:
    """A value that hardly anybody expects."""
    return rng.choice(
        (
            *(0, -1, 1, 2, 7, 2**31, 2**63, -(2**63), 10**12, 10**30, 10**400, 0.0, -0.5, 1e308, 1e-320),
            *(float("nan"), float("inf"), float("-inf"), True, False, None, "", "x", "0", "-1", "auto", "float16"),
            *("\0", "\ud800", "\u202e", "../../etc/passwd", "a" * 10_000, "\n\n", "{{ 1 }}", "http://x", "~nobody/x"),
            *([], {}, [0], [None], ["x", 1], {"": 0}, {"x": {"x": 1}}, [1e400], [[[[[[]]]]]]),
        )
    )


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, as the keys that lead to it."""
    found = [path] if path else []
    if isinstance(tree, dict | list):
        for key, each in tree.items() if isinstance(tree, dict) else enumerate(tree):
            found += places(each, (*path, key))
    return found


def changed_json(text: str, rng: random.Random) -> bytes:
    """JSON with one to three changes of its values or keys."""
    tree = json.loads(text)
    raw = ""
    for _ in range(rng.randint(1, 3)):
        known = places(tree)
        if not known:
            break
        *way, last = rng.choice(known)
        holder = tree
        for key in way:
            holder = holder[key]
        match rng.randrange(8):
            case 0:
                del holder[last]
            case 1 if isinstance(holder, dict):
                holder[rng.choice(MORE_KEYS)] = strange(rng)
            case 2:
                holder[last] = "@deep@"
                raw = "[" * DEEP + "]" * DEEP
            case 3 if isinstance(holder[last], int | float):
                holder[last] = holder[last] * rng.choice((-1, 0, 2, 1000, 10**9))
            case _:
                holder[last] = strange(rng)
    if rng.random() < 0.03:
        tree = strange(rng)
    written = json.dumps(tree)
    return written.replace('"@deep@"', raw or "[]").encode("utf-8", "surrogatepass")


def changed_bytes(data: bytes, rng: random.Random, first: int = 4096) -> bytes:
    """Bytes flipped, cut, put in or taken out, near the beginning as a rule."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(max(1, min(len(found), first if rng.random() < 0.9 else len(found))))
        match rng.randrange(5):
            case 0 if found:
                found[at % len(found)] ^= 1 << rng.randrange(8)
            case 1:
                del found[at:]
            case 2:
                found[at:at] = rng.choice(MORE_BYTES)
            case 3:
                del found[at : at + rng.randrange(1, 64)]
            case _:
                found[at : at + 8] = rng.randbytes(8)
    return bytes(found)


def changed_text(text: str, rng: random.Random) -> bytes:
    """Lines of YAML or JSON Lines twice, gone, in another order or with another value."""
    lines = text.splitlines()
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(lines)) if lines else 0
        match rng.randrange(5):
            case 0 if lines:
                lines.insert(at, lines[at])
            case 1 if lines:
                del lines[at]
            case 2:
                lines.insert(
                    at,
                    rng.choice(("a: &a [1, 2]", "b: *a", "2020-01-01: 1", "? [a]", "- " * 400, "\t", "!!python/x y")),
                )
            case _ if lines:
                key, colon, _ = lines[at].partition(":")
                value = json.dumps(strange(rng))
                lines[at] = f"{key}{colon} {value}" if colon else value
    return "\n".join([*lines, ""]).encode("utf-8", "surrogatepass")
