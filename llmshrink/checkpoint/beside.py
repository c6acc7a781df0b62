"""What lies beside the weights and belongs to the model: the one list of it, for what is fetched, copied and published.

A model's folder is often a training run's too, with its checkpoints, logs, data and keys. So what goes on is what is
known by name to belong to a model: the tokenizer's files, chat templates, generation and processor settings, licences
and the card. The repository's own Python goes on where the user trusts it, and of that what its configs name (auto_map)
with what those modules import from beside them: a folder's train.py isn't the model's. Everything else stays behind,
and is counted.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from llmshrink_eval.bounded import read_json
from llmshrink_eval.refused import refused

from llmshrink.checkpoint.files import INDEX_FILE, SINGLE_FILE
from llmshrink.checkpoint.links import check_link, real
from llmshrink.errors import CheckpointError
from llmshrink.paths import as_text

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "vocab-src.json",
    "vocab-tgt.json",
    "encoder.json",
    "merges.txt",
    "bpe.codes",
    "normalizer.json",
    "tekken.json",
    "tokenizer.model",
    "tokenizer.model.v*",
    "*spiece.model",
    "sentencepiece*.model",
    "spm.model",
    "ice_text.model",
    "source.spm",
    "target.spm",
    "*.tiktoken",
)
TEMPLATES = (
    "chat_template.json",
    "chat_template*.jinja",
    "*.chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
SETTINGS = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "feature_extractor_config.json",
)
_LICENCE = (
    r"(?:apache|mit|0?bsd|[al]?gpl|gfdl|cc|mpl|epl|eupl|bsl|isc|zlib|unlicen[cs]e|ofl|artistic|afl|cddl|odbl|odc|pddl|"
    r"wtfpl|psf|python|ms|ncsa|cdla|open|rail|openrail|openrail[+]?m|llama|gemma|qwen|deepseek|mistral|falcon|bigscience|"
    r"bigcode|nvidia|code|models?|weights|data|docs|community|research|commercial|non|noncommercial|permissive|sharing|"
    r"license|licence|agreement|clause|only|or|and|later|new|revised|with|exception|llvm|by|nc|sa|nd|igo|m|x11|en|zh|cn)"
)
_VERSION = r"v?\d+"
_LICENCES = rf"{_LICENCE}(?:{_VERSION})?(?:[-_.](?:{_LICENCE}(?:{_VERSION})?|{_VERSION}))*"
"""A licence's name as files have it: Apache-2.0, llama3.1, CC-BY-NC-4.0, GPL-3.0-or-later. Known words and versions
alone, since any other word (key, token, server) says that the file may be anything. Each name can be read in one way
only, so that none takes long."""
_ENDING = r"(?:\.(?:md|txt|rst|html|pdf))?"
_TERMS = (
    r"(?:model[-_])?(?:licen[cs]e|copying|copyright|notices?|use[-_]policy|terms[-_]of[-_]use|third[-_]party[-_]notices?)"
    rf"(?:[-_.]{_LICENCES})?{_ENDING}"
)
TERMS = re.compile(
    rf"{_TERMS}|licenses/(?:{_TERMS}|{_LICENCES}\.(?:txt|md)|licenseref-{_LICENCES}\.(?:txt|md))|readme\.md",
    re.IGNORECASE | re.ASCII,
)
"""Licences and the card: a file whose name merely begins so, as license.key, may be anything. In LICENSES/ a file has
the name of its licence, as REUSE has it."""
SOURCE_CARD = "SOURCE_README.md"
"""What the source's README.md is called in an output, whose own card is README.md."""
WANTED = (*TOKENIZER, *TEMPLATES, *SETTINGS, "LICENSES/*.txt")
"""As patterns, the licences at the top apart."""
CODE_CONFIGS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
UNSEEN = (".git", ".gitattributes", ".gitignore", ".cache", ".DS_Store", "__pycache__")
"""Of the repository or the system, and not worth a word."""
SHOWN, LISTED = 4, 20
_PICKLE = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_IMPORT = re.compile(r"^\s*from\s+\.(?:(\w+)\s+import|\s*import\s+\(?\s*(\w+(?:\s*,\s*\w+)*))", re.MULTILINE)


@dataclass(frozen=True)
class LeftBehind:
    """What of a model's folder isn't the model's. names: the first of them, a folder with a slash; count: of all."""

    names: tuple[str, ...] = ()
    count: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """In one line for a person; none where nothing was."""
        if not self.count:
            return []
        more = f" and {self.count - SHOWN} more" if self.count > SHOWN else ""
        return [f"left behind {', '.join(self.names[:SHOWN])}{more}: not part of the model"]


NOTHING = LeftBehind()


def belongs(name: str) -> bool:
    """Whether a file of this name, a path within the folder, belongs to a model; weights, config.json, code apart.

    A name that isn't text is none that a record could have.
    """
    if as_text(name) != name:
        return False
    if name == SOURCE_CARD:
        return True
    return TERMS.fullmatch(name) is not None or any(
        _matches(name, pattern) for pattern in (*TOKENIZER, *TEMPLATES, *SETTINGS)
    )


def belonging(source: Path) -> list[Path]:
    """What of a folder, and of the subfolders that a model may have, belongs to a model by its name."""
    return [path for path in _candidates(source) if belongs(path.relative_to(source).as_posix())]


def side_files(
    source: Path, *, trust_remote_code: bool = False, besides: Sequence[Path] = ()
) -> Iterator[tuple[Path, str]]:
    """Each file beside the weights that goes on, and its name in an output; never a pickle, whatever it is called.

    README.md becomes SOURCE_README.md, unless there is one already (the source is then an output of ours, and its card
    is about itself). besides: folders that aren't part of the model though they lie in it. Raises CheckpointError for a
    link that `check_link` doesn't follow, a name that isn't text, and a file that can't be read.
    """
    code = own_code(source) if trust_remote_code else frozenset()
    for path in _candidates(source):
        name = path.relative_to(source).as_posix()
        told = as_text(name)
        if (
            not (belongs(told if told == name else _guessed(told)) or name in code)
            or not path.is_file()
            or _within(path, besides)
            or _is_pickle(path)
        ):
            continue
        if told != name:
            raise CheckpointError(
                f"{as_text(str(path))}: its name isn't UTF-8, so that no record could have it; rename the file if it "
                "is the model's, else remove it"
            )
        check_link(path, source, lambda other: belongs(other) or other in code)
        if name.lower() == "readme.md":
            if not (source / SOURCE_CARD).is_file():
                yield path, SOURCE_CARD
            continue
        yield path, name


def check_side_files(source: Path, *, trust_remote_code: bool = False, besides: Sequence[Path] = ()) -> None:
    """Raise what copying them at the end would raise."""
    for _ in side_files(source, trust_remote_code=trust_remote_code, besides=besides):
        pass


def left_behind(
    source: Path, *, trust_remote_code: bool = False, besides: Sequence[Path] = (), known: Collection[str] = ()
) -> LeftBehind:
    """What `side_files` leaves, by its name at the top of the folder.

    besides: as there. known: other names that are accounted for (the weights that were read, files of an earlier run).
    """
    taken = {path for path, _ in side_files(source, trust_remote_code=trust_remote_code, besides=besides)}
    apart = {"config.json", SINGLE_FILE, INDEX_FILE, "README.md", *UNSEEN, *known}
    names = []
    for path in sorted(source.iterdir()):
        if path in taken or path.name in apart or _within(path, besides):
            continue
        if path.is_dir():
            inside = [each for each in path.iterdir() if each.name not in UNSEEN] if _readable(path) else [path]
            if not inside or all(each in taken for each in inside):
                continue
            names.append(f"{as_text(path.name)}/")
        else:
            names.append(as_text(path.name))
    return LeftBehind(tuple(names[:LISTED]), len(names))


def own_code(source: Path) -> frozenset[str]:
    """The Python files that the folder's configs name, with those that they import from beside them."""
    waiting = [f"{module}.py" for config in CODE_CONFIGS for module in _modules(source / config)]
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in found or not (source / name).is_file():
            continue
        found.add(name)
        text = (source / name).read_text(encoding="utf-8", errors="replace")
        for match in _IMPORT.finditer(text):
            waiting += [f"{each.strip()}.py" for group in match.groups() if group for each in group.split(",")]
    return frozenset(found)


def _modules(config: Path) -> Iterator[str]:
    """The modules of a config's auto_map; those of another repository (`owner/name--module.Class`) aren't here."""
    try:
        auto_map = read_json(config).get("auto_map")
    except (OSError, ValueError, AttributeError):
        return
    for value in auto_map.values() if isinstance(auto_map, dict) else ():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, str) and "--" not in each and re.fullmatch(r"\w+\.\w+", each):
                yield each.partition(".")[0]


def _matches(name: str, pattern: str) -> bool:
    """Whether a path matches, folder by folder: a star doesn't reach into one."""
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)


def _candidates(source: Path) -> list[Path]:
    """The folder's own entries, and those of the subfolders that a model may have."""
    inside = {pattern.rpartition("/")[0] for pattern in WANTED if "/" in pattern}
    folders = [source, *(source / name for name in sorted(inside) if (source / name).is_dir())]
    return sorted(path for folder in folders for path in folder.iterdir())


def _guessed(told: str) -> str:
    """A name of which a part can't be read, as it could be: with a word in that part's place that belongs anywhere."""
    return re.sub("\ufffd+", "mit", told)


def _within(path: Path, folders: Sequence[Path]) -> bool:
    apart = {each for folder in folders for each in (folder.absolute(), real(folder))}
    own = {path.absolute(), real(path), *path.absolute().parents, *real(path).parents}
    return not apart.isdisjoint(own)


def _is_pickle(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4).startswith(_PICKLE)
    except OSError as error:
        way = "let this user read it, or remove it if it isn't the model's"
        raise CheckpointError(f"{as_text(str(path))}: can't be read: {refused(error, way)}") from error


def _readable(path: Path) -> bool:
    try:
        next(path.iterdir(), None)
    except OSError:
        return False
    return True
