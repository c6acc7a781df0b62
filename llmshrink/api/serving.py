"""`llmshrink.serve`: the twin of `llmshrink serve`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from llmshrink.errors import PathLike
from llmshrink.paths import expanded


def serve(
    checkpoint: PathLike,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    options: Sequence[str] = (),
    allow_anonymous: bool = False,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> int:
    """Serve a checkpoint's folder over HTTP with the vLLM of this environment; blocks until the server ends.

    options: vLLM's own, as on its command line ("--max-model-len", "4096"). allow_anonymous: let other machines ask,
    by a host beyond this one, without a key; else that needs "--api-key" among the options, or VLLM_API_KEY. dry_run:
    check and say what would be started, and start nothing (the exit code is 0). say: gets every line that `llmshrink
    serve` prints. Returns the server's exit code. Raises LlmshrinkError, before anything is started, when there is no
    vLLM, when this one can't serve the checkpoint on this device, or when the port is taken: str(error) says why, and
    what to do. SIGINT and SIGTERM are passed on when this is called from the main thread.
    """
    from llmshrink.checkpoint.recognise import refuse_unready
    from llmshrink.serving import serve as serving

    folder = expanded(checkpoint)
    if folder.is_dir():
        refuse_unready(folder, os.fspath(checkpoint))

    return serving.serve(
        folder, host=host, port=port, options=options, allow_anonymous=allow_anonymous, dry_run=dry_run, say=say
    )
