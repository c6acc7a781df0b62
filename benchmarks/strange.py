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
