"""Let a checkpoint of the demo model tell a story: `python -m llmshrink.demo.say FOLDER [--seed N]`.

The beginning of a story, drawn from the seed, is continued with transformers (a compressed checkpoint through the
compressed-tensors library), each word drawn from the likely ones by the same seed, then what was told is held against
the facts of the language's world.
"""

from __future__ import annotations

import argparse
import random
import sys
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

from llmshrink.demo import language

PROMPT_SEED = 30_000_000
NEW_TOKENS = 96
TOP_P = 0.8
"""Drawing among the likeliest words of this probability keeps a story going where greedy choice would tell one sentence
again and again, and never picks what an undamaged model holds for unlikely."""


def continue_story(folder: Path, seed: int) -> tuple[str, str]:
    """Returns (the drawn beginning, the model's continuation up to the story's end or NEW_TOKENS words)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    beginning = language.beginning(random.Random(PROMPT_SEED + seed))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
    ids = tokenizer(beginning, add_special_tokens=False, return_tensors="pt")["input_ids"]
    torch.manual_seed(seed)
    with torch.inference_mode():
        grown = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=True, top_p=TOP_P, top_k=0
        )
    told = str(tokenizer.decode(grown[0, ids.shape[1] :], skip_special_tokens=True))
    return beginning, told.split("\n")[0]


def verdict(beginning: str, told: str) -> str:
    """One line: how far the continuation is true to the facts."""
    right, words = language.words_until_false(beginning, told)
    if right == words:
        return f"all {words} words told are true to the facts"
    return f"true to the facts for {right} of {words} words"


def main() -> int:
    """Print the beginning, the continuation and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a checkpoint of the demo model, compressed or not")
    parser.add_argument("--seed", type=int, default=0, help="which story")
    arguments = parser.parse_args()
    try:
        with redirect_stderr(StringIO()):  # progress bars of three libraries; what goes wrong is raised
            beginning, told = continue_story(arguments.folder, arguments.seed)
    except ImportError as error:
        print(f"say: error: {str(error).splitlines()[0]} (pip install compressed-tensors)", file=sys.stderr)
        return 2
    except (OSError, ValueError, RuntimeError) as error:
        # What an older library makes of 3-bit weights is a shape that fits nowhere.
        hint = " (3-bit weights need compressed-tensors >= 0.18)" if isinstance(error, RuntimeError) else ""
        print(f"say: error: {arguments.folder}: {str(error).strip().splitlines()[0]}{hint}", file=sys.stderr)
        return 2
    print(f"{beginning}\n ...{told}\n({verdict(beginning, told)})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
