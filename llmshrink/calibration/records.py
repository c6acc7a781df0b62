"""What a record of a data set says: a text, a conversation with its tools, or a prompt and its completion.

Real files differ from the plain form, and these differences mean nothing: parquet writes null for a key that is absent
(so null is absent, at any depth), and content may come as a list of typed parts (the texts of them are joined, with
nothing between). A record that can't be used says why, with the place where it stands; whoever reads the records counts
those.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeGuard

from llmshrink_eval.bounded import Unreadable, parse_json
from llmshrink_eval.leftout import Tally, Unusable, check_characters, present

from llmshrink.errors import CalibrationError

Messages: TypeAlias = Sequence[Mapping[str, Any]]

TEXT_KEYS = ("text", "content")
PAIR_KEYS = ("prompt", "completion")
TOOLS_KEY = "tools"
KEYS = (*TEXT_KEYS, "messages", *PAIR_KEYS, TOOLS_KEY)
TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of a part of a message's content that hold text."""


@dataclass(frozen=True)
class Completion:
    """What was asked and what is to be answered: both texts, or both the messages of one conversation."""

    prompt: str | Messages
    completion: str | Messages


Document: TypeAlias = str | Messages | Completion


@dataclass(frozen=True)
class Record:
    """document: None for one that can't be used; `fault` says why then. place: where it stands in its source.

    tools: descriptions of functions that a conversation may call, as the chat template takes them.
    """

    document: Document | None
    place: str = ""
    fault: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()


def read_record(record: Any, place: str) -> Record:
    """A record of a data set, as parsed; or an Unusable in its place."""
    try:
        if isinstance(record, Unusable):
            raise record
        if not isinstance(record, dict):
            raise Unusable(_nothing(record))
        kept = {key: record[key] for key in KEYS if key in record}
        document = _document(present(kept), record)
        tools = () if isinstance(document, str) else _tools(kept.get(TOOLS_KEY))
    except Unusable as error:
        return Record(None, place, str(error))
    return Record(document, place, tools=tools)


def usable(stream: Iterator[Record], tally: Tally, name: str) -> Iterator[Record]:
    """Those that can be used; the others are counted."""
    for record in stream:
        tally.read += 1
        if record.document is None:
            leave_out(tally, record, record.fault, name)
        else:
            yield record


def leave_out(tally: Tally, record: Record, why: str, name: str) -> None:
    """Count a record that isn't used. Raises CalibrationError where none of the first many is."""
    tally.leave_out(record.place, why)
    if tally.hopeless:
        raise CalibrationError(
            f"calibration data {name}: {tally.result().words()}; no more were read: give records that can be used"
        )


def _document(record: dict[str, Any], given: Mapping[str, Any]) -> Document:
    """The conversation or the text of a record; a record with both is a conversation. given: the same with nulls."""
    messages = record.get("messages")
    if _is_conversation(messages):
        return _conversation(messages, "messages")
    for key in TEXT_KEYS:
        if isinstance(record.get(key), str):
            check_characters(record[key], key)
            return str(record[key])
    prompt, completion = (record.get(key) for key in PAIR_KEYS)
    if isinstance(prompt, str) and isinstance(completion, str):
        for key in PAIR_KEYS:
            check_characters(record[key], key)
        return Completion(prompt, completion)
    if _is_conversation(prompt) and _is_conversation(completion):
        return Completion(_conversation(prompt, PAIR_KEYS[0]), _conversation(completion, PAIR_KEYS[1]))
    raise Unusable(_nothing(given))


def _nothing(record: Any) -> str:
    """Why there is nothing to read in a record."""
    if not isinstance(record, Mapping):
        return f"is a {type(record).__name__}, not an object with a text or messages"
    known = ("messages", *TEXT_KEYS, *PAIR_KEYS)
    null = next((key for key in known if key in record and record[key] is None), None)
    if null is not None:
        return f"has {null} that is null"
    if record.get("messages") == []:
        return "has messages that are none"
    if "messages" in record:
        return f"has messages that aren't a list of objects ({_sort(record['messages'])})"
    wrong = next((key for key in known if key in record and not isinstance(record[key], (str, list))), None)
    if wrong is not None:
        return f"has {wrong} that is {_sort(record[wrong])}, not a string"
    return (
        f"has {sorted(map(str, record))}; read are a string under text, a list of messages under messages, or both of "
        "prompt and completion: rename the key"
    )


def _sort(value: Any) -> str:
    """What a value is, as JSON calls it."""
    if isinstance(value, list):
        return "a list with something else in it"
    names = {bool: "true or false", int: "a number", float: "a number", str: "a string", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def _is_conversation(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)


def _conversation(messages: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Messages as a chat template takes them. Raises Unusable."""
    found = []
    for number, message in enumerate(messages):
        place = f"{key}[{number}]"
        if isinstance(message.get("content"), list):
            message = {**message, "content": _joined(message["content"], place)}
        _check_message(message, place)
        check_characters(message, place)
        found.append(message)
    return found


def _joined(parts: Sequence[Any], place: str) -> str:
    """The text of content that comes in parts."""
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else part
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind not in TEXT_PARTS or not isinstance(text, str):
            said = kind if isinstance(kind, str) and kind not in TEXT_PARTS else "no known type"
            raise Unusable(f"has a part of {said} in {place}, which is no text")
        texts.append(text)
    return "".join(texts)


def _check_message(message: Mapping[str, Any], place: str) -> None:
    """A template makes an empty string of what isn't there, so it would go unnoticed.

    content: a text; a message that calls tools may do without.
    """
    if not isinstance(message.get("role"), str):
        missing = "role"
    elif not (isinstance(message.get("content"), str) or message.get("tool_calls")):
        missing = "content"
    else:
        return
    raise Unusable(
        f"has a message without {missing} ({place} has {sorted(message)}); "
        'a message is {"role": "user", "content": "..."}'
    )


def _tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    """The tools of a record: a list, or, as some files keep it, the JSON of one. Raises Unusable."""
    if isinstance(value, str) and value.strip():
        try:
            value = parse_json(value)
        except Unreadable as error:
            raise Unusable("has tools that are neither a list nor the JSON of one") from error
    if not value:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise Unusable("has tools that aren't a list of objects")
    tools = present(value)
    check_characters(tools, TOOLS_KEY)
    return tuple(tools)
