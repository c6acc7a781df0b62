"""The calibration windows that ours would take, in a file, for those that don't tokenize themselves.

    python -m benchmarks.tokens MODEL CALIBRATION OUT.safetensors [--samples 128 --seq-len 256]

OUT holds `input_ids`, int64 [samples, seq_len].
"""

from __future__ import annotations

import argparse
from pathlib import Path


def write_tokens(model: Path, calibration: Path, path: Path, *, samples: int, seq_len: int) -> None:
    """Tokenize the first of a text by a model's tokenizer, as a run of llmshrink with seed 0 does."""
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoTokenizer

    from llmshrink.calibration.text import load_documents
    from llmshrink.calibration.tokens import build_windows

    windows, _ = build_windows(
        load_documents(str(calibration)),
        AutoTokenizer.from_pretrained(model),
        samples=samples,
        seq_len=seq_len,
        held_out=0,
        seed=0,
        model_type=AutoConfig.from_pretrained(model).model_type,
    )
    save_file({"input_ids": windows.input_ids}, path)


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "calibration", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    asked = parser.parse_args()
    write_tokens(asked.model, asked.calibration, asked.output, samples=asked.samples, seq_len=asked.seq_len)


if __name__ == "__main__":
    main()
