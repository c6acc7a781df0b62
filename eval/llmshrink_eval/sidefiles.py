"""A tokenizer's files and generation_config.json before transformers sees them, as `configfile` holds config.json.

transformers takes most fields as they are, and what follows of a wrong one comes later and elsewhere: a comparison of
a list with a number, where the first text is read. So the files are read within limits, and the fields that decide how
text is read or written are held to what they can be. What is in tokenizer.json is the tokenizers library's to check,
but for how long it may make a text (`tokenizerfile`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmshrink_eval.bounded import Unreadable, read_json, shown
from llmshrink_eval.configfile import WAY_OUT
from llmshrink_eval.errors import EvalError, one_line
from llmshrink_eval.refused import UNREAD, refused
from llmshrink_eval.tokenizerfile import check_growth

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
GENERATION_FILE = "generation_config.json"

MOST_STOPS, LONGEST_STOP = 64, 1000
"""Texts that end what is generated, and characters of one."""

Check = Callable[[Any], bool]


def _whole(least: int, most: float) -> Check:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _number(least: float, most: float) -> Check:
    """NaN is neither above nor below."""
    return lambda value: isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _token(value: Any) -> bool:
    return _text(value) or (isinstance(value, dict) and _text(value.get("content")))


def _templates(value: Any) -> bool:
    """One, or several by name, in either of the ways in which transformers has written them."""
    if isinstance(value, dict):
        return all(map(_text, value.values()))
    if isinstance(value, list):
        return all(isinstance(each, dict) and _text(each.get("name")) and _text(each.get("template")) for each in value)
    return _text(value)


def _ids(value: Any) -> bool:
    one = _whole(-1, 2**31)
    return one(value) or (isinstance(value, list) and all(map(one, value)))


def _stops(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    return _texts(texts) and len(texts) <= MOST_STOPS and all(1 <= len(each) <= LONGEST_STOP for each in texts)


_FLAG: tuple[Check, str] = (lambda value: isinstance(value, bool), "true or false")
_COUNT: tuple[Check, str] = (_whole(0, 2**31), f"a whole number from 0 to {2**31:,}")
_SHARE: tuple[Check, str] = (_number(0, 1), "a number from 0 to 1")
_FACTOR: tuple[Check, str] = (_number(0, 1e6), "a number from 0 to 1,000,000")
_TOKEN: tuple[Check, str] = (_token, "text, or an object with content")
_IDS: tuple[Check, str] = (_ids, f"a whole number from -1 to {2**31:,}, or a list of such")
_SIDE: tuple[Check, str] = (lambda value: value in ("left", "right"), "left or right")

_OF_TOKENIZER: dict[str, tuple[Check, str]] = {
    "model_max_length": (_number(0, 1e31), "a number from 0 to 1e31"),
    "model_input_names": (_texts, "a list of texts"),
    "chat_template": (_templates, "text, or templates by name"),
    "tokenizer_class": (_text, "text"),
    **dict.fromkeys([f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")], _TOKEN),
    **dict.fromkeys(("padding_side", "truncation_side"), _SIDE),
    **dict.fromkeys(("auto_map", "added_tokens_decoder"), (lambda value: isinstance(value, dict), "an object")),
    **dict.fromkeys(("add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces"), _FLAG),
}
_OF_GENERATION: dict[str, tuple[Check, str]] = {
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), _IDS),
    **dict.fromkeys(("max_length", "max_new_tokens", "min_length", "min_new_tokens", "top_k", "num_beams"), _COUNT),
    "no_repeat_ngram_size": _COUNT,
    "stop_strings": (_stops, f"text, or up to {MOST_STOPS} texts, of 1 to {LONGEST_STOP:,} characters"),
    **dict.fromkeys(("top_p", "min_p", "typical_p"), _SHARE),
    **dict.fromkeys(("temperature", "repetition_penalty"), _FACTOR),
    **dict.fromkeys(("do_sample", "use_cache"), _FLAG),
}
_NOT_NULL = ("model_input_names",)
"""Fields of which null isn't as absent."""


def check_tokenizer(folder: Path) -> None:
    """Raise EvalError, in one line, where a file of the tokenizer can't be read, or a field isn't what one of its name
    can be, or tokenizer.json makes texts too long. A file that isn't there is none of ours to miss."""
    for name in TOKENIZER_FILES:
        found = _check(folder / name, _OF_TOKENIZER if name == "tokenizer_config.json" else {})
        if name == "tokenizer.json":
            check_growth(folder / name, found)


def check_generation(folder: Path) -> None:
    """The same of generation_config.json, and where transformers can't make its settings of it."""
    found = _check(folder / GENERATION_FILE, _OF_GENERATION)
    if not found:
        return
    from transformers import GenerationConfig

    try:
        GenerationConfig(**found).to_json_string()
    except Exception as error:  # of any type: a field may be named as a method is
        raise EvalError(
            f"{folder / GENERATION_FILE}: transformers can't use it ({one_line(error)}); {WAY_OUT}"
        ) from error


def _check(file: Path, fields: Mapping[str, tuple[Check, str]]) -> dict[str, Any]:
    """What the file holds, once it is checked; nothing where it isn't there."""
    if not file.is_file():
        return {}
    try:
        found = read_json(file)
    except OSError as error:
        raise EvalError(f"{file}: can't be read: {refused(error, UNREAD)}") from error
    except Unreadable as error:
        raise EvalError(f"{file}: can't be read as JSON: it {error}; download or copy it again") from error
    if not isinstance(found, dict):
        raise EvalError(f"{file}: not a JSON object; download or copy it again")
    fault = _fault(found, fields)
    if fault is not None:
        raise EvalError(f"{file}: {fault}; {WAY_OUT}")
    return found


def generation_fault(settings: Mapping[str, Any]) -> str | None:
    """What is wrong with settings of generation_config.json, or with such as config.json has in its place; or None."""
    return _fault(settings, _OF_GENERATION)


def _fault(found: Mapping[str, Any], fields: Mapping[str, tuple[Check, str]]) -> str | None:
    for name, (fits, wanted) in fields.items():
        value = found.get(name)
        absent = name not in found or (value is None and name not in _NOT_NULL)
        if not absent and not fits(value):
            return f"{name} is {shown(value)}, and has to be {wanted}"
    return None
