"""Folders that look like a model's and aren't one: an adapter, or a clone without its large files.

Both are what people have at hand after a training and after a `git clone`; each is told by name, with the way out,
before any library's own message about a key that isn't there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from llmshrink_eval.bounded import read_json

from llmshrink.checkpoint.beside import belonging
from llmshrink.checkpoint.files import INDEX_FILE, SINGLE_FILE, is_lfs_pointer, read_weight_map
from llmshrink.errors import CheckpointError, SourceError
from llmshrink.paths import check_spelling

ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
POINTER_LIMIT = 1024
"""Bytes; the format's own limit (https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md)."""


def refuse_unready(folder: Path, name: str) -> None:
    """Raise SourceError where `folder` holds an adapter without its model, or pointers in the place of its files.

    name: what the user called it. Raises LlmshrinkError as `paths.check_spelling` does.
    """
    check_spelling(folder.absolute())
    files = {each.name for each in folder.iterdir()}
    if is_adapter(files):
        raise SourceError(adapter(name, files, base=_base(folder / ADAPTER), where=str(folder)))
    pointers = sorted(file.relative_to(folder).as_posix() for file in _needed(folder) if _is_pointer(file))
    if pointers:
        more = f" (and {len(pointers) - 1} more)" if len(pointers) > 1 else ""
        raise SourceError(
            f"{name}: {pointers[0]}{more} is a Git LFS pointer, which stands for the file: the repository was cloned "
            f"without its large files; run `git lfs pull` in {folder}, and then this again"
        )


def is_adapter(files: Collection[str]) -> bool:
    """Whether a folder or repository of these files holds an adapter and no model."""
    return bool({ADAPTER, *ADAPTER_WEIGHTS} & set(files)) and not {SINGLE_FILE, INDEX_FILE} & set(files)


def adapter(name: str, files: Collection[str], *, base: str | None, where: str) -> str:
    """What is said of a folder or repository that `is_adapter`. base: what it was trained on, where known."""
    found = next(each for each in (ADAPTER, *ADAPTER_WEIGHTS) if each in files)
    first = "" if found == ADAPTER else f"copy its {ADAPTER} there, which says of which model it is, and "
    return (
        f"{name}: an adapter (LoRA or alike, {found}) of {base or 'another model'}, not a whole model; {first}"
        'merge it into its base first: python -c "from peft import AutoPeftModelForCausalLM as M; '
        f"M.from_pretrained('{where}').merge_and_unload().save_pretrained('merged')\", copy the tokenizer's files "
        "there, and name ./merged"
    )


def _base(file: Path) -> str | None:
    try:
        found = read_json(file).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None
    return " ".join(found.split())[:200] if isinstance(found, str) and found.strip() else None


def _needed(folder: Path) -> Iterator[Path]:
    """The files of a model that reading it begins with, those that go on with it, and its weights."""
    yield folder / "config.json"
    yield from belonging(folder)
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.exists():
        yield single
    elif index.is_file():
        yield index
        if not _is_pointer(index):
            try:
                names = set(read_weight_map(index).values())
            except CheckpointError:  # who opens the weights says what is wrong with it
                return
            yield from (folder / name for name in names)


def _is_pointer(file: Path) -> bool:
    try:
        if not file.is_file() or file.stat().st_size > POINTER_LIMIT:
            return False
        with file.open("rb") as stream:
            return is_lfs_pointer(stream.read(64))
    except OSError:
        return False
