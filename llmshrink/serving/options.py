"""What vLLM's own options say that the launch depends on; everything else on the line is vLLM's business.

vLLM takes `--name value` and `--name=value`, and underscores for hyphens. The last mention counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmshrink.errors import LlmshrinkError
from llmshrink.limits import LIMITS

_NAMES = {
    "tensor_parallel_size": ("--tensor-parallel-size", "-tp"),
    "dtype": ("--dtype",),
    "kv_cache_dtype": ("--kv-cache-dtype",),
    "api_key": ("--api-key",),
    "ssl_certfile": ("--ssl-certfile",),
    "ssl_keyfile": ("--ssl-keyfile",),
}
_OURS = {
    "--model": "the folder comes first: llmshrink serve DIR",
    "--uds": "the server is reached by --host and --port here; a socket is for vLLM's own command",
    "--headless": "a headless server answers nobody; start it by vLLM's own command",
}


@dataclass(frozen=True)
class EngineOptions:
    """tp: tensor-parallel ranks. dtype, kv_cache_dtype: as given, None for vLLM's choice. api_key: what clients must
    send, or None. tls: whether the server speaks https.
    """

    tp: int = 1
    dtype: str | None = None
    api_key: str | None = None
    tls: bool = False
    kv_cache_dtype: str | None = None


def read(words: Sequence[str]) -> EngineOptions:
    """Read vLLM's options. Raises LlmshrinkError for a value that can't be right and for what can't go with `serve`."""
    found = {key: said for key, names in _NAMES.items() if (said := value(words, names)) is not None}
    for name, why in _OURS.items():
        if mentions(words, name):
            raise LlmshrinkError(f"{name}: {why}")
    ranks = found.get("tensor_parallel_size", "1")
    if not ranks.isdecimal() or not 1 <= int(ranks[:20]) <= LIMITS["serve_tp"][1]:
        raise LlmshrinkError(
            f"--tensor-parallel-size {ranks:.40}: a whole number from 1 to {LIMITS['serve_tp'][1]:,} is expected"
        )
    return EngineOptions(
        tp=int(ranks),
        dtype=found.get("dtype"),
        kv_cache_dtype=found.get("kv_cache_dtype"),
        api_key=found.get("api_key"),
        tls="ssl_certfile" in found or "ssl_keyfile" in found,
    )


def mentions(words: Sequence[str], name: str) -> bool:
    """Whether an option is on the line."""
    return any(_name(word) == name for word in words)


def value(words: Sequence[str], names: Sequence[str]) -> str | None:
    """What the last mention of an option says, by any of its names; None where it isn't mentioned."""
    found = None
    for place, word in enumerate(words):
        if _name(word) in names:
            _, equals, after = word.partition("=")
            following = words[place + 1] if place + 1 < len(words) else None
            found = after if equals else following
            # An unset variable of the shell leaves nothing, and the next option would be the key.
            if not found or (not equals and found.startswith("--")):
                behind = f" (what follows is {found:.40})" if found else ""
                raise LlmshrinkError(f"{word} has no value{behind}; give one, or leave the option out")
    return found


SECRET = ("--api-key", "--hf-token")
SHORTEST = len("--hf-t")
"""Characters of such a name that are enough for vLLM."""


def masked(words: Sequence[str]) -> list[str]:
    """The words with `...` in the place of every key and token, to be printed. Names may be cut, as vLLM takes them."""
    told, secret = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        if word.startswith("-"):
            given = _name(word)
            secret = len(given) >= SHORTEST and any(each.startswith(given) for each in SECRET)
            told.append(f"{name}=..." if secret and equals else word)
        else:
            told.append("..." if secret else word)  # vLLM takes several keys after one --api-key
    return told


def _name(word: str) -> str:
    """An option's name as vLLM spells it, or the word itself."""
    name = word.partition("=")[0]
    return name.replace("_", "-") if name.startswith("--") else name
