"""JSON and YAML that anybody may have written, read within stated limits: bytes, depth, digits, values.

Their parsers take what no program of ours can hold: levels until the stack ends, and each error of theirs is of another
type. Here all of them are one, `Unreadable`, whose text is what follows the file's name in a line.
"""

from __future__ import annotations

import json
import re
import reprlib
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

JSON_LIMIT = 100_000_000
"""Bytes of a file of JSON: what the safetensors library allows a header, and ten times the largest index there is."""
OWN_LIMIT = 2_000_000_000
"""Bytes of what our own processes and caches write: a task's items, an engine's answer."""
DEEPEST = 100
"""Levels of nesting: no config and no conversation has as many, and code that goes down them ends at a thousand."""


MOST_VALUES = 5_000_000
"""Of JSON, each brace, bracket and comma counted for one: the largest tokenizer.json has two million, and so many empty
objects take half a gigabyte."""
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?+', re.DOTALL)


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 60

    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to write out a number of more than 4300 digits."""
        return repr(x) if x.bit_length() <= 256 else f"a number of {x.bit_length():,} bits"


class Unreadable(ValueError):
    """Why JSON can't be read."""


def shown(value: object) -> str:
    """A value for a message: as Python writes it, cut to a few words where it is long."""
    return _Short().repr(value)


def parse_json(
    text: bytes | str, *, hook: Callable[[list[tuple[str, Any]]], Any] | None = None, own: bool = False
) -> Any:
    """The value. hook: makes an object of its pairs (json.loads' object_pairs_hook), and may raise what it likes. own:
    a process of ours wrote it, so that its values aren't counted.

    Raises Unreadable for what isn't UTF-8 or JSON, is nested more than DEEPEST deep, has a number of more digits than
    Python takes (4300), or more than MOST_VALUES values.
    """
    try:
        # As json does, but for the encodings that it would guess.
        plain = text if isinstance(text, str) else text.decode("utf-8-sig", "surrogatepass")
        if not own and _values(plain) > MOST_VALUES:
            raise Unreadable(f"has more than {MOST_VALUES:,} values")
        found = json.loads(plain, object_pairs_hook=hook)
    except UnicodeDecodeError as error:
        raise Unreadable(f"isn't UTF-8 ({error.reason} at byte {error.start})") from error
    except RecursionError as error:
        raise Unreadable(f"is nested more than {DEEPEST} deep") from error
    except json.JSONDecodeError as error:
        raise Unreadable(f"isn't JSON ({_first_line(error)})") from error
    except ValueError as error:
        # The parser's own for a number; a hook's error is the caller's.
        if type(error) is not ValueError:
            raise
        raise Unreadable(f"isn't JSON ({_first_line(error).partition(':')[0]})") from error
    if too_deep(found):
        raise Unreadable(f"is nested more than {DEEPEST} deep")
    return found


def read_json(path: Path, *, limit: int = JSON_LIMIT) -> Any:
    """The value in a file. Raises OSError as opening it does, Unreadable as `parse_json` does, and for a file of more
    than `limit` bytes or one that isn't a regular file (a pipe never ends). limit: OWN_LIMIT for what a process of ours
    wrote, whose values aren't counted."""
    if "\0" in str(path) or not stat.S_ISREG(path.stat().st_mode):
        raise Unreadable("isn't a file")
    with path.open("rb") as file:
        text = file.read(limit + 1)
    if len(text) > limit:
        raise Unreadable(f"has more than {limit:,} bytes")
    return parse_json(text, own=limit == OWN_LIMIT)


def _values(text: str) -> int:
    """How many values JSON has, or more; what its strings hold is told apart only where it might make them too many."""
    count = _marks(text)
    return count if count <= MOST_VALUES else _marks(_STRING.sub("", text))


def _marks(text: str) -> int:
    return sum(map(text.count, "{[,"))


def too_deep(value: Any) -> bool:
    """Whether lists and mappings are nested more than DEEPEST deep. Nothing is called again for a level."""
    level = [value]
    for _ in range(DEEPEST + 1):
        below: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                below += each.values()
            elif isinstance(each, list):
                below += each
        if not below:
            return False
        level = below
    return True


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:160]


YAML_LIMIT = 100_000
"""Characters of a text of YAML: its parser takes a second for fifty thousand."""
MOST_NODES = 20_000
"""Values of a text of YAML, its aliases written out: nine lines of them can stand for a billion."""
MOST_DIGITS = 4300
"""Of a number, as Python's own limit is for those in decimal; YAML has others."""


def parse_yaml(text: str, loader: Any = None) -> Any:
    """The value of a text of YAML; None for an empty one. loader: a kind of yaml.SafeLoader, in that one's place.

    Raises Unreadable for what isn't YAML, is nested more than DEEPEST deep, holds more than MOST_NODES values or
    itself, or has more than YAML_LIMIT characters.
    """
    import yaml

    if len(text) > YAML_LIMIT:
        raise Unreadable(f"has more than {YAML_LIMIT:,} characters")
    try:
        reader = (loader or yaml.SafeLoader)(text)
        try:
            root = reader.get_single_node()
            if root is None:
                return None
            _check_nodes(root)
            found = reader.construct_document(root)
        finally:
            reader.dispose()
    except RecursionError as error:
        raise Unreadable(f"is nested more than {DEEPEST} deep") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise Unreadable(f"{where}{error.problem or 'not YAML'}") from error
    except Unreadable:
        raise
    # A date of the thirteenth month is a ValueError; of `!!bool x` and its like the parser says KeyError and others.
    except (yaml.YAMLError, ValueError, OverflowError, KeyError, AttributeError, IndexError, TypeError) as error:
        raise Unreadable(f"not YAML: {' '.join(str(error).split())[:160]}") from error
    if any(isinstance(each, int) and each.bit_length() > MOST_DIGITS * 3.33 for each in numbers_in(found)):
        raise Unreadable(f"has a number of more than {MOST_DIGITS} digits")
    return found


def numbers_in(value: Any) -> Iterator[int | float]:
    """Every number in a value of lists and mappings, at any depth."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each
        elif isinstance(each, int | float):
            yield each


def _check_nodes(root: Any) -> None:
    """Hold a document's nodes to MOST_NODES and DEEPEST, each counted as often as an alias stands for it."""
    sizes: dict[int, int] = {}

    def measured(node: Any, depth: int) -> int:
        known = sizes.get(id(node))
        if known == 0:
            raise Unreadable("has a value that holds itself")
        if depth > DEEPEST:
            raise Unreadable(f"is nested more than {DEEPEST} deep")
        if known is None:
            sizes[id(node)] = 0  # until it is left
            parts = node.value if isinstance(node.value, list) else []
            below = [each for part in parts for each in (part if isinstance(part, tuple) else (part,))]
            known = sizes[id(node)] = 1 + sum(measured(each, depth + 1) for each in below)
        if known > MOST_NODES:
            raise Unreadable(f"holds more than {MOST_NODES:,} values")
        return known

    measured(root, 0)
