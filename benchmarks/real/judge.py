"""One row's damage: `python -m benchmarks.real.judge ORIGINAL FOLDER TEXT --cache CACHE`, one line of JSON.

By llmshrink's own evaluation, in float32: the original's pass over the text is kept in CACHE as its final hidden states
and its output layer, so that it runs once for all rows; logits over the whole vocabulary are made a few rows at a time.
The KL is over every position of consecutive windows, the perplexity over the predicted tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

WINDOW = 256
TOKENS = 25_500
"""As many whole windows as fit are read: 99, 25,344 tokens."""
VERSION = 1
"""Counted up when what is measured changes: results are filed under it."""


def judge(original: Path, folder: Path, text: Path, cache: Path) -> dict[str, float | int | str]:
    """KL(original || folder's model) in nats a token with its standard error, and both perplexities."""
    from llmshrink_eval.evaluate import evaluate

    from llmshrink.evaluation.settings import Settings
    from llmshrink.evaluation.verbs import options_of, spec_of

    settings = Settings(
        text=str(text), window=WINDOW, max_tokens=TOKENS, speed="none", device="cpu", dtype="float32", cache=cache
    )
    with tempfile.TemporaryDirectory() as scratch:
        options = dataclasses.replace(options_of(settings, Path(scratch), command=None), prompts=())
        specs = [dataclasses.replace(spec_of(str(each), settings), site_errors=()) for each in (original, folder)]
        first, second = evaluate(specs[0], specs[1:], options).results.models
    assert first.perplexity is not None and second.perplexity is not None and second.divergence is not None
    return {
        "kl": second.divergence.kl_mean,
        "kl_stderr": second.divergence.kl_stderr,
        "perplexity": second.perplexity.token,
        "original_perplexity": first.perplexity.token,
        "top1": second.divergence.top1_agreement,
        "positions": second.divergence.positions,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("original", "folder", "text"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--cache", type=Path, required=True)
    arguments = parser.parse_args()
    print(json.dumps(judge(arguments.original, arguments.folder, arguments.text, arguments.cache)))


if __name__ == "__main__":
    main()
