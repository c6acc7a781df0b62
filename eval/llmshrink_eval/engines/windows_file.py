"""Windows as a file, for another process: tensors in safetensors, everything else in its metadata."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from llmshrink_eval.protocol import Protocol, Windows
from llmshrink_eval.refused import save_tensors

_TENSORS = ("input_ids", "lengths", "scored", "document")


def save_windows(windows: Windows, path: Path) -> None:
    """Write them whole."""
    metadata = {
        name: str(getattr(windows, name))
        for name in ("name", "protocol", "window", "stride", "words", "bytes", "fingerprint", "bos")
    }
    save_tensors({name: getattr(windows, name).contiguous() for name in _TENSORS}, path, metadata)


def load_windows(path: Path) -> Windows:
    """What `save_windows` wrote."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        said = file.metadata()
        tensors = {name: file.get_tensor(name) for name in _TENSORS}
    return Windows(
        name=said["name"],
        protocol=cast(Protocol, said["protocol"]),
        window=int(said["window"]),
        stride=int(said["stride"]),
        words=int(said["words"]),
        bytes=int(said["bytes"]),
        fingerprint=said["fingerprint"],
        bos=said["bos"] == str(True),
        **tensors,
    )
