"""What formats of a checkpoint have in common: tensors held to their scheme, and config groups of literal names."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from llmshrink.errors import CheckpointError

S = TypeVar("S", bound=Hashable)


def checked(
    get: Callable[[str], Tensor], key: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], scheme: object
) -> Tensor:
    """The tensor `key`. Raises CheckpointError, naming it, when its dtype or shape isn't what `scheme` makes it."""
    tensor = get(key)
    if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{key} is {tensor.dtype} {list(tensor.shape)}, expected {' or '.join(map(str, dtypes))} {list(shape)}"
            f" for {scheme}; the checkpoint is damaged or not of this format"
        )
    return tensor


def by_scheme(sites: Mapping[str, S | None], ignore: Iterable[str]) -> tuple[dict[S, list[str]], list[str]]:
    """(the linears of each distinct scheme, in the order met; those that stay as they are, `ignore` first)."""
    targets: dict[S, list[str]] = {}
    ignored = dict.fromkeys(ignore)
    for name, scheme in sites.items():
        if scheme is None:
            ignored[name] = None
        else:
            targets.setdefault(scheme, []).append(name)
    return targets, list(ignored)


def literal(config: Mapping[str, object], scheme_of: Callable[[str, object], S]) -> dict[str, S]:
    """Module path -> scheme, from a `quantization_config` whose groups name modules literally.

    scheme_of: (label, group) -> its scheme. Raises CheckpointError where groups are missing, or a target is a pattern
    or a class.
    """
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError("quantization_config has no config_groups; the checkpoint is damaged")
    found: dict[str, S] = {}
    for label, group in groups.items():
        scheme = scheme_of(label, group)
        for target in group.get("targets", ()):
            if not isinstance(target, str) or target.startswith("re:") or "." not in target:
                raise CheckpointError(
                    f"quantization_config {label} targets {target!r}; only literal module paths can be read here"
                )
            found[target] = scheme
    return found
