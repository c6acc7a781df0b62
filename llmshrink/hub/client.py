"""The Hub's client as a push needs it: names and tokens checked before any work, and every failure as one line.

Of what the Hub or its client say themselves only a refusal's own words are passed on, without tokens: the rest can
carry addresses and headers. What may have been a passing fault (no connection, 408, 429, 5xx) is asked again after 1,
2, 4 and 8 seconds; the client does so itself while it uploads.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import TypeVar

from llmshrink_eval.refused import UNREAD, refused

from llmshrink.checkpoint.source import unreachable
from llmshrink.errors import LlmshrinkError

TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
"""What a token of the Hub looks like."""
LOGIN = "log in with `hf auth login` (or set HF_TOKEN) with a token of the write role, from the Hub's Settings"
WAITS = (1.0, 2.0, 4.0, 8.0)
PASSING = (408, 429, 500, 502, 503, 504)

Found = TypeVar("Found")


class HubError(LlmshrinkError):
    """The Hub doesn't take what is pushed, or can't be reached."""


def check_name(name: str) -> str:
    """`name`, when it can be a repository's ("owner/name"). Raises HubError."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
        if name.count("/") == 1:
            return name
        why = "it has no owner"
    except HFValidationError as error:
        why = " ".join(str(error).split()).rstrip(".")
    raise HubError(f"{name or repr(name)}: not a repository's name on the Hub ({why}); give owner/name")


def check_branch(revision: str) -> str:
    """`revision`, when a push can go there. Raises HubError."""
    bad = not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", revision, re.ASCII) or revision.startswith(("refs/", "-"))
    if bad or ".." in revision or re.fullmatch(r"[0-9a-f]{40}", revision):
        raise HubError(
            f"--revision {revision or repr(revision)}: not a branch's name; a push makes a commit on a branch"
        )
    return revision


def check_token() -> str:
    """The user's token. Raises HubError when there is none, or the client was told to stay offline."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise HubError("HF_HUB_OFFLINE is set, and a push goes to the Hub: unset it (--dry-run needs no network)")
    token = get_token()
    if token is None:
        raise HubError(f"no token for the Hub is at hand: {LOGIN}")
    return token


def patiently(ask: Callable[[], Found], again: Callable[[], Found | None] = lambda: None) -> Found:
    """What `ask` returns, asked anew after a passing fault; the last fault is raised.

    again: what to look at after each fault; what that returns, if anything, is the answer.
    """
    for wait in (*WAITS, None):
        try:
            return ask()
        except Exception as error:
            if not passing(error):
                raise
            if wait is not None:
                time.sleep(wait)
            found = again()
            if found is not None:
                return found
            if wait is None:
                raise
    raise AssertionError("the last try returns or raises")


def passing(error: Exception) -> bool:
    """Whether the same question may have another answer soon."""
    # The client reads the answer of its card check as JSON before it looks at the status.
    if isinstance(error, OSError) and error.filename is not None:
        return False  # a file of ours
    return status_of(error) in PASSING or unreachable(error) or type(error).__name__ == "JSONDecodeError"


def status_of(error: Exception) -> int | None:
    """The HTTP status that an error of the client's stands for."""
    response = getattr(error, "response", None)
    found = getattr(response, "status_code", None)
    return found if isinstance(found, int) else None


def cause(error: Exception) -> Exception:
    """What befell an upload, under what the client's threads wrapped it in."""
    inner = error.__cause__
    return inner if isinstance(error, RuntimeError) and isinstance(inner, Exception) else error


def explain(error: Exception, name: str) -> str:
    """Why the Hub didn't take a push to `name`, and the next step."""
    owner, status = name.partition("/")[0], status_of(error)
    if status == 401:
        return f"the Hub doesn't know the token (wrong, or expired): {LOGIN}, and run again"
    if status == 403:
        return (
            f"the Hub refuses to let this token write as {owner}: use a token with the write role of {owner} or of a "
            f"member of it (`hf auth whoami` says whose it is; {LOGIN}), or push to a name of your own"
        )
    if status == 404:
        return f"the Hub has no {name} that this token may see; check the name and the token (`hf auth whoami`)"
    if status in (409, 412):
        return f"{name} was changed by somebody else meanwhile; look at it, and run the same command again"
    if status in PASSING:
        return f"the Hub answered with HTTP {status} to {len(WAITS) + 1} tries and more; run the same command later"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename} can't be read: {refused(error, UNREAD)}"
    if unreachable(error):
        return "the connection to the Hub broke, and again each time; check the network, and run the same command again"
    said = getattr(error, "server_message", None)
    said = f": {TOKEN.sub('hf_...', ' '.join(str(said).split()))}" if said else ""
    return f"the Hub refused it ({f'HTTP {status}' if status else type(error).__name__}{said})"
