"""Options that several verbs share, declared once: as the signature of a function that is never called."""

from __future__ import annotations

import inspect
from collections.abc import Callable

Verb = Callable[..., int]


def sharing(settings: Callable[..., None]) -> Callable[[Verb], Verb]:
    """Give a verb that takes `**settings` the options of `settings`, after its own, as the parser reads them."""

    def give(verb: Verb) -> Verb:
        own, shared = (inspect.signature(each, eval_str=True).parameters.values() for each in (verb, settings))
        together = [*(one for one in own if one.kind is not one.VAR_KEYWORD), *shared]
        verb.__signature__ = inspect.Signature(together, return_annotation=int)  # type: ignore[attr-defined]
        verb.__annotations__ = {one.name: one.annotation for one in together} | {"return": int}
        return verb

    return give
