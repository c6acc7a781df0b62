"""What the user called the model, made a folder on disk: a Hub id, a folder, or the embedded `demo`.

A Hub model is pinned to a commit before anything is downloaded, so that a run that is resumed tomorrow reads what
today's run read. Only what a run needs comes down: configuration, tokenizer and side files, then the safetensors that
the index names; never pickles, and Python only when the user trusts it. Weights come at once, or as they are read
(`checkpoint.arrival`). Without the network, what an earlier run left in the cache is the model, when it's whole.

`demo` always means the embedded model; a folder of that name is `./demo`. Any other name that exists as a folder is
that folder, as in transformers; what doesn't exist and doesn't look like a path is a Hub id.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llmshrink_eval.refused import refused

from llmshrink.checkpoint.files import INDEX_FILE, SINGLE_FILE, read_weight_map
from llmshrink.checkpoint.recognise import adapter, is_adapter, refuse_unready
from llmshrink.errors import LlmshrinkError, SourceError
from llmshrink.paths import as_text, expanded

if TYPE_CHECKING:
    from llmshrink.checkpoint.arrival import Arriving

_HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)
_WANTED = (
    "*.json",
    "*.txt",
    "*.md",
    "*.jinja",
    "*.model",
    "*.spm",
    "*.bpe",
    "*.codes",
    "*.tiktoken",
    "*.model.v*",
    "*LICENSE*",
    "*LICENCE*",
    "LICENSES/*",
    "[Ll]icen[cs]e*",
    "COPYRIGHT*",
    "*NOTICES*",
    "TERMS*",
    "NOTICE*",
    "COPYING*",
    "USE_POLICY*",
)
# What is beside second copies of the same weights, in their authors' own layout.
_UNWANTED = ("original/*", "consolidated*", "onnx/*", "*.bin.index.json")
_OTHER_WAYS = "name a local folder, or try the embedded model `demo`"


@dataclass(frozen=True)
class Source:
    """A model that is on disk.

    name: what the model is called in reports (the Hub id, or the folder as the user wrote it, or `demo`).
    revision: the commit, for a Hub model; None otherwise. arriving: weights that are still to come.
    """

    name: str
    folder: Path
    revision: str | None
    kind: Literal["hub", "folder", "demo"]
    arriving: Arriving | None = field(default=None, compare=False, repr=False)


def resolve(
    model: str, *, revision: str | None = None, trust_remote_code: bool = False, stream: bool = False
) -> Source:
    """Find `model`, downloading it when it's a Hub id (`id` or `id@revision`).

    stream: all but the weights, which come as a CheckpointIndex that is given the source's `arriving` reads them.
    Raises SourceError when there is no such model or revision, when it's gated or can't be reached, or when it has
    no safetensors.
    """
    if model == "demo":
        from llmshrink.demo import model_folder

        return Source("demo", Path(model_folder()), None, "demo")
    path = expanded(model)
    if model and path.is_dir():
        refuse_unready(path.resolve(), model)
        return Source(as_text(model), path.resolve(), None, "folder")
    if model and path.exists():
        raise SourceError(f"{model}: a file, not a model's folder; name the folder that holds config.json")
    name, _, pinned = model.partition("@")
    if _looks_like_a_path(model) or not _HUB_ID.fullmatch(name) or "--" in name or ".." in name:
        raise SourceError(
            f"{model or repr(model)}: no such folder, and not a Hub id (owner/name, owner/name@revision); {_OTHER_WAYS}"
        )
    if pinned and revision and pinned != revision:
        raise SourceError(f"{model}: names revision {pinned}, and revision={revision} was given too; give one")
    return _from_hub(name, pinned or revision, trust_remote_code=trust_remote_code, stream=stream)


def _looks_like_a_path(model: str) -> bool:
    return model.startswith((".", "/", "~")) or model.endswith("/") or "\\" in model or model.count("/") > 1


def _from_hub(name: str, revision: str | None, *, trust_remote_code: bool, stream: bool) -> Source:
    import huggingface_hub
    from huggingface_hub import constants

    from llmshrink.checkpoint.arrival import Arriving

    wanted = [*_WANTED, "*.py"] if trust_remote_code else list(_WANTED)
    try:
        commit = None if constants.HF_HUB_OFFLINE else _pin(name, revision)
        offline = commit is None
        found = huggingface_hub.snapshot_download(
            name,
            revision=commit or revision,
            allow_patterns=wanted,
            ignore_patterns=list(_UNWANTED),
            local_files_only=offline,
        )
        # A snapshot's folder is named by its commit.
        folder, commit = Path(found), commit or Path(found).name
        if not offline:
            _remember(folder, revision, commit)
        refuse_unready(folder, name)
        weights = _weights(folder)
        arriving = None
        if offline:
            _check_whole(name, folder, weights)
        elif stream:
            arriving = Arriving.of(name, commit, folder, weights)
        else:
            huggingface_hub.snapshot_download(name, revision=commit, allow_patterns=weights, local_files_only=False)
    except LlmshrinkError:
        raise
    except Exception as error:  # every failure of a download ends in one line; none of them is ours to debug
        raise SourceError(explain(name, revision, error)) from error
    return Source(name, folder, commit, "hub", arriving)


def _remember(folder: Path, revision: str | None, commit: str) -> None:
    """Note in the cache what `revision` meant, as the client does where it resolves one itself: for offline runs."""
    if revision == commit or folder.parent.name != "snapshots":
        return
    ref = folder.parents[1] / "refs" / (revision or "main")
    ref.parent.mkdir(parents=True, exist_ok=True)
    unfinished = ref.with_name(f"{ref.name}.{os.getpid()}")
    unfinished.write_text(commit)
    os.replace(unfinished, ref)


def _weights(folder: Path) -> list[str]:
    """The files of weights that a snapshot's index names, or the one that a model without an index has."""
    index = folder / INDEX_FILE
    return sorted(set(read_weight_map(index).values())) if index.is_file() else [SINGLE_FILE]


def _check_whole(name: str, folder: Path, weights: list[str]) -> None:
    missing = [file for file in weights if not (folder / file).is_file()]
    if missing:
        raise SourceError(
            f"{name}: the Hub can't be reached, and the local cache lacks {len(missing)} of its {len(weights)} files "
            f"of weights ({missing[0]}); connect to the network (unset HF_HUB_OFFLINE) and run again"
        )


def _pin(name: str, revision: str | None) -> str | None:
    """The commit that `revision` means now, or None when the Hub can't be reached; refuses a model of pickles."""
    import huggingface_hub

    try:
        info = huggingface_hub.HfApi().model_info(name, revision=revision, timeout=20)
    except Exception as error:
        if not unreachable(error):
            raise
        return None
    files = [file.rfilename for file in info.siblings or []]
    if is_adapter(files):
        raise SourceError(adapter(name, files, base=None, where=name))
    if not any(file.endswith(".safetensors") for file in files):
        pickles = [file for file in files if file.endswith((".bin", ".pt", ".pth"))]
        if pickles:
            raise SourceError(
                f"{name}: only pickle weights ({pickles[0]}), which are never loaded because a pickle can run code; "
                "convert them once, where you trust them: "
                'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
                f"[c.from_pretrained('{name}').save_pretrained('converted') for c in (M, T)]\" and quantize ./converted"
            )
        raise SourceError(f"{name}: the repository has no safetensors; name one that holds a model")
    return info.sha


def unreachable(error: Exception) -> bool:
    """Whether the Hub's client got no answer at all, for whatever reason."""
    from huggingface_hub.errors import HfHubHTTPError

    # Its bases are the HTTP client's own error, whichever client that is, and OSError.
    return isinstance(error, HfHubHTTPError.__bases__) and not isinstance(error, HfHubHTTPError)


def explain(name: str, revision: str | None, error: Exception) -> str:
    """One line for what the Hub's client raised; never its own text, which can carry addresses and headers."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    which = f"{name}@{revision}" if revision else name
    if isinstance(error, GatedRepoError):
        return f"{which}: gated: {_gate(name)}, and run again"
    if isinstance(error, RevisionNotFoundError):
        return f"{which}: the model has no revision {revision}; name a branch, a tag or a commit"
    if getattr(getattr(error, "response", None), "status_code", None) == 401 and not isinstance(
        error, RepositoryNotFoundError
    ):
        return (
            f"{which}: the Hub doesn't know the token at hand (wrong, or expired): log in anew with `hf auth login`, "
            "or correct HF_TOKEN, and run again"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{which}: no such model on the Hub (or a private one: log in with `hf auth login`), "
            f"and no such folder; check the spelling, or {_OTHER_WAYS}"
        )
    if isinstance(error, LocalEntryNotFoundError):
        return (
            f"{which}: no such folder, not whole in the local cache, and the Hub can't be reached; "
            f"connect to the network (unset HF_HUB_OFFLINE), {_OTHER_WAYS}"
        )
    if unreachable(error) and getattr(error, "errno", None) is None:
        return f"{which}: the connection to the Hub broke; check the network, and run again to go on"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{which}: the download stopped: {refused(error, 'check the network')}; then run again"
    return f"{which}: the download failed ({type(error).__name__}); run again to go on, or {_OTHER_WAYS}"


def _gate(name: str) -> str:
    """The next step of who wants a gated model."""
    from huggingface_hub import constants, get_token

    page = f"{constants.ENDPOINT.partition('://')[2]}/{name}"
    if get_token() is None:
        return f"no token is at hand: accept its terms at {page}, then log in with `hf auth login` (or set HF_TOKEN)"
    return (
        f"the token at hand has no access: accept its terms at {page} with that account (`hf auth whoami`), wait where "
        "its authors approve by hand (a fine-grained token must allow gated repositories)"
    )
