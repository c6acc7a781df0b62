"""What the user called the model, made a folder on disk: a Hub id, a folder, or the embedded `demo`.

A Hub model is pinned to a commit before anything is downloaded, so that a run that is resumed tomorrow reads what
today's run read. Only what a run needs comes down: safetensors, configuration, tokenizer and side files; never
pickles, and Python only when the user trusts it.

`demo` always means the embedded model; a folder of that name is `./demo`. Any other name that exists as a folder is
that folder, as in transformers; what doesn't exist and doesn't look like a path is a Hub id.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmshrink.errors import LlmshrinkError, SourceError

_HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)
_WANTED = (
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.md",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)
# Second copies of the same weights in their authors' own layout, as large as the model itself.
_UNWANTED = ("original/*", "consolidated*", "onnx/*", "*.bin.index.json")
_OTHER_WAYS = "name a local folder, or try the embedded model `demo`"


@dataclass(frozen=True)
class Source:
    """A model that is on disk.

    name: what the model is called in reports (the Hub id, or the folder as the user wrote it, or `demo`).
    revision: the commit, for a Hub model; None otherwise.
    """

    name: str
    folder: Path
    revision: str | None
    kind: Literal["hub", "folder", "demo"]


def resolve(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Source:
    """Find `model`, downloading it when it's a Hub id (`id` or `id@revision`).

    Raises SourceError when there is no such model or revision, when it's gated or can't be reached, or when it has
    no safetensors.
    """
    if model == "demo":
        from llmshrink.demo import model_folder

        return Source("demo", Path(model_folder()), None, "demo")
    path = Path(model).expanduser()
    if model and path.is_dir():
        return Source(model, path.resolve(), None, "folder")
    if model and path.exists():
        raise SourceError(f"{model}: a file, not a model's folder; name the folder that holds config.json")
    name, _, pinned = model.partition("@")
    if _looks_like_a_path(model) or not _HUB_ID.fullmatch(name) or "--" in name or ".." in name:
        raise SourceError(
            f"{model or repr(model)}: no such folder, and not a Hub id (owner/name, owner/name@revision); {_OTHER_WAYS}"
        )
    if pinned and revision and pinned != revision:
        raise SourceError(f"{model}: names revision {pinned}, and revision={revision} was given too; give one")
    return _from_hub(name, pinned or revision, trust_remote_code=trust_remote_code)


def _looks_like_a_path(model: str) -> bool:
    return model.startswith((".", "/", "~")) or model.endswith("/") or "\\" in model or model.count("/") > 1


def _from_hub(name: str, revision: str | None, *, trust_remote_code: bool) -> Source:
    import huggingface_hub
    from huggingface_hub import constants

    wanted = [*_WANTED, "*.py"] if trust_remote_code else list(_WANTED)
    try:
        commit = None if constants.HF_HUB_OFFLINE else _pin(name, revision)
        folder = huggingface_hub.snapshot_download(
            name,
            revision=commit or revision,
            allow_patterns=wanted,
            ignore_patterns=list(_UNWANTED),
            local_files_only=commit is None,
        )
    except LlmshrinkError:
        raise
    except Exception as error:  # every failure of a download ends in one line; none of them is ours to debug
        raise SourceError(_explain(name, revision, error)) from error
    # A snapshot's folder is named by its commit.
    return Source(name, Path(folder), commit or Path(folder).name, "hub")


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


def _explain(name: str, revision: str | None, error: Exception) -> str:
    """One line for what the Hub's client raised; never its own text, which can carry addresses and headers."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    which = f"{name}@{revision}" if revision else name
    if isinstance(error, GatedRepoError):
        return (
            f"{which}: gated: accept its terms on the model's page on the Hub, then log in with `hf auth login` "
            "(or set HF_TOKEN) and run again"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{which}: the model has no revision {revision}; name a branch, a tag or a commit"
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
    if isinstance(error, OSError) and error.errno is not None:
        return f"{which}: the download stopped: {error.strerror}; free space or check the network, and run again"
    return f"{which}: the download failed ({type(error).__name__}); run again to go on, or {_OTHER_WAYS}"
