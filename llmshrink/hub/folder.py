"""What of a folder goes to the Hub, and whether it is what was made and verified.

What goes are the files that the run left and its seal knows; anything that was put beside them stays here. The
weights must be what the run wrote, to the byte. Other files that were changed since the checkpoint was verified (a
template corrected, say) may go, once it has been verified anew and the user says so. Nothing is written here before
all of it is on the Hub: what was refused once is refused again, in the same words.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmshrink.checkpoint.index import INDEX_FILE
from llmshrink.checkpoint.links import check_link
from llmshrink.errors import CheckpointError
from llmshrink.hub.client import HubError
from llmshrink.hub.guard import leaks, paths_here
from llmshrink.hub.upload import Item
from llmshrink.run import disk
from llmshrink.run.card import CARD, beyond, write_card
from llmshrink.run.finish import published
from llmshrink.run.output import RECORD
from llmshrink.run.seal import FREE, SEAL, files_of, known_files, read_seal, seal_of, write_seal
from llmshrink.run.verify import REFERENCE, verify_reload


@dataclass(frozen=True)
class Contents:
    """items: what goes. notes: what a user should know. ask: what needs a --yes.

    seal: of what was verified anew, which isn't in the folder yet; None where the one there holds.
    """

    items: tuple[Item, ...]
    notes: tuple[str, ...]
    ask: tuple[str, ...]
    seal: dict[str, Any] | None


def contents(folder: Path, record: Mapping[str, Any]) -> Contents:
    """What would go of `folder`, whose llmshrink.json is `record`; it is verified anew where it changed.

    Raises CheckpointError when the weights aren't what the run wrote or don't read back, and for a link to elsewhere.
    """
    files, seal, anew = files_of(folder), read_seal(folder), None
    known = known_files(record, seal)
    for path in files:
        if known is None or path in {*known, *FREE, RECORD} or path.endswith(".safetensors"):
            check_link(folder / path, folder)
    sums = {path: disk.sha256_of(folder / path) for path in files}
    notes, ask = [], []
    _check_weights(folder, record, sums)
    if known is None:
        known = frozenset(filter(published, sums)) - {RECORD, *FREE, *record.get("shards", {})}
        ask.append(
            "nothing says which files are the run's, so that all go that are a model's by their names "
            f"({', '.join(sorted(known))})"
        )
    strange = frozenset(name for name in known if not published(name))
    known -= strange
    other = [] if seal is None else _changed(seal["files"], sums)
    if (
        seal is None
        or other
        or known - seal["files"].keys() & sums.keys()
        or strange & seal["files"].keys()
        or "shards" not in record
    ):
        report = verify_reload(folder)
        if not report.ok:
            raise CheckpointError(f"{folder}: doesn't verify: {'; '.join(report.lines())}; make it again")
        anew = seal_of(folder, report, known)
        notes.append("verified anew: " + " ".join(report.lines()[0].split()).removeprefix("verified: "))
        if other:
            ask.append(f"{_some(other)} changed since it was made (verified anew, and reads back as computed)")
    weights = record.get("shards") or [path for path in sums if path.endswith(".safetensors") and "/" not in path]
    goes = {*known, *FREE, RECORD, *weights} & sums.keys()
    items = [Item(path, folder / path, (folder / path).stat().st_size, sums[path]) for path in goes]
    if anew is not None:
        items = [_made(SEAL.as_posix(), disk.json_text(anew)), *(i for i in items if i.path != SEAL.as_posix())]
    apart = sorted(sums.keys() - goes)
    if apart:
        notes.append(f"{_some(apart)} stays here: it isn't part of what was made")
    if REFERENCE.as_posix() in goes:
        notes.append(f"{REFERENCE} holds {record['quality']['tokens']} tokens of {record['held_out']}, open to be read")
    return Contents(tuple(sorted(items, key=lambda item: item.path)), tuple(notes), tuple(ask), anew)


def settle(folder: Path, found: Contents) -> None:
    """Seal what was verified anew, now that it is published; the card says so, unless somebody edited it."""
    if found.seal is not None:
        more = beyond(folder)
        write_seal(folder, found.seal)
        if more is not None:
            write_card(folder, more)


def with_card(found: Contents, text: str) -> Contents:
    """The same, with `text` as the card."""
    items = [_made(CARD, text), *(item for item in found.items if item.path != CARD)]
    return replace(found, items=tuple(sorted(items, key=lambda item: item.path)))


def _made(path: str, text: str) -> Item:
    """A file that goes without lying in the folder."""
    data = text.encode()
    return Item(path, data, len(data), hashlib.sha256(data).hexdigest())


def check_card(folder: Path, found: Contents) -> None:
    """Raise HubError when the card's metadata can't be what the Hub reads."""
    from huggingface_hub import ModelCard

    text = next((item.data().decode(errors="replace") for item in found.items if item.path == CARD), "")
    try:
        ModelCard(text)
    except Exception as error:  # YAML's own errors, and what a field of another type leads to
        why = " ".join(str(error).split()).rstrip(".")
        raise HubError(
            f"{folder / CARD}: its metadata can't be read ({why}); correct the lines between the ---"
        ) from error


def check_leaks(folder: Path, found: Contents, places: Iterable[str]) -> None:
    """Raise HubError naming each file and line with a token, a key or a path of this machine, `places` among them."""
    from huggingface_hub import get_token

    here, token = paths_here(folder, places), get_token()
    texts = [item for item in found.items if not item.path.endswith(".safetensors")]
    faults = [fault for item in texts for fault in leaks(item.path, item.data(), here, token)]
    if faults:
        more = f" (and {len(faults) - 3} more lines)" if len(faults) > 3 else ""
        raise HubError(f"{folder}: nothing was sent: {'; '.join(faults[:3])}{more}; take that out and push again")


def _check_weights(folder: Path, record: Mapping[str, Any], sums: Mapping[str, str]) -> None:
    shards = record.get("shards")
    weights = {path for path in sums if path.endswith(".safetensors") and "/" not in path}
    if shards is None:
        return
    wrong = _changed(shards, sums)
    if wrong:
        raise CheckpointError(
            f"{folder / wrong[0]}: isn't what its run wrote (sha256 {sums.get(wrong[0], 'missing')[:12]}, the record "
            f"says {shards[wrong[0]][:12]}); copy the folder again, or make it again"
        )
    if weights - shards.keys():
        raise CheckpointError(
            f"{folder / min(weights - shards.keys())}: isn't in {INDEX_FILE}, and engines read every safetensors of a "
            "folder; take it away"
        )


def _changed(promised: Mapping[str, str], sums: Mapping[str, str]) -> list[str]:
    return [path for path, sha in promised.items() if sums.get(path) != sha]


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
