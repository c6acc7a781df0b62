"""What formats of a checkpoint have in common: tensors held to their scheme, and config groups by the names in them."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from llmshrink.errors import CheckpointError

S = TypeVar("S", bound=Hashable)
LINEAR = "Linear"
"""The class that compressed-tensors' own tools name instead of modules."""


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
            if not isinstance(target, str) or target.startswith("re:") or ("." not in target and target[:1].isupper()):
                raise CheckpointError(
                    f"quantization_config {label} targets {target!r}; only literal module paths can be read here"
                )
            found[target] = scheme
    return found


def spelled_out(config: Mapping[str, object], quantized: Iterable[str]) -> Mapping[str, object]:
    """The `quantization_config` with literal names where its groups say `re:PATTERN` or the class `Linear`.

    quantized: module paths of the linears that the checkpoint stores quantized; those that `ignore` names are left out.
    Each goes to the group that `group_of` says. A config of literal names, or without groups, stays as it is.
    """
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        return config
    named = {target for group in groups.values() for target in listed(group.get("targets"))}
    if not any(target == LINEAR or target.startswith("re:") for target in named):
        return config
    found: dict[str, list[str]] = {
        label: [each for each in listed(group.get("targets")) if each != LINEAR and not each.startswith("re:")]
        for label, group in groups.items()
    }
    for name in quantized:
        if name not in named and matches(name, LINEAR, config.get("ignore") or ()) is None:
            label = group_of(name, LINEAR, groups)
            if label is not None:
                found[label].append(name)
    spelled = {label: {**group, "targets": found[label]} for label, group in groups.items()}
    return {**config, "config_groups": spelled}


def group_of(name: str, kind: str, groups: Mapping[str, Mapping[str, object]]) -> str | None:
    """The label of the config group that a linear belongs to: of one that has its name or a pattern of it, before one
    that has its class, as in compressed-tensors; of two such, the first. kind: the module's class."""
    found = [
        (how, label)
        for label, group in groups.items()
        if (how := matches(name, kind, group.get("targets") or ())) is not None
    ]
    return min(found, key=lambda match: match[0])[1] if found else None


def matches(name: str, kind: str, targets: object) -> int | None:
    """0 where a target is the module's name or a pattern of it (from its beginning), 1 where it's its class, None where
    none is. Raises CheckpointError where they aren't a list, or a pattern is none."""
    best = None
    for target in listed(targets):
        try:
            found = target == name or (target.startswith("re:") and re.match(target[3:], name))
        except re.error as error:
            raise CheckpointError(f"quantization_config: {target!r} is no pattern ({error}); it is damaged") from error
        if found:
            return 0
        if target == kind:
            best = 1
    return best


def listed(targets: object) -> list[str]:
    """The texts among targets. Raises CheckpointError where they aren't a list."""
    if isinstance(targets, str) or not isinstance(targets, Iterable):
        raise CheckpointError(f"quantization_config lists its linears as {targets!r}, not as a list; it is damaged")
    return [target for target in targets if isinstance(target, str)]
