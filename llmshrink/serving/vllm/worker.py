"""The process in which vLLM runs: `python -m llmshrink.serving.vllm.worker QUESTION ANSWER`.

QUESTION is JSON: model, dtype, prompts (token ids), max_tokens, top. ANSWER becomes {"generations": [{"tokens": [...],
"top": [[[token, logprob], ...], ...]}, ...]}, or {"error": one line}. The tokenizer isn't loaded: tokens go in and out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from llmshrink_eval.bounded import OWN_LIMIT, read_json

LONGEST_ERROR = 600


def generate(question: dict[str, Any]) -> list[dict[str, object]]:
    """Greedy continuations of the prompts, with the likeliest tokens of each step, likeliest first."""
    from vllm import LLM, SamplingParams

    prompts: list[list[int]] = question["prompts"]
    max_tokens: int = question["max_tokens"]
    llm = LLM(
        model=question["model"],
        dtype=question["dtype"],
        enforce_eager=True,
        generation_config="vllm",
        max_logprobs=question["top"],
        max_model_len=max(map(len, prompts)) + max_tokens,
        seed=0,
        skip_tokenizer_init=True,
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=max_tokens, logprobs=question["top"], ignore_eos=True, detokenize=False
    )
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    return [_plain(output.outputs[0]) for output in outputs]


def _plain(completion: Any) -> dict[str, object]:
    """A completion as JSON. The chosen token comes along even where the engine's top list left it out."""
    return {
        "tokens": list(completion.token_ids),
        "top": [[[token, entry.logprob] for token, entry in step.items()] for step in completion.logprobs],
    }


def main(question: Path, answer: Path) -> None:
    """Answer the question; whatever the engine raises is the answer too, since no one else is there to hear it."""
    try:
        said: dict[str, object] = {"generations": generate(read_json(question, limit=OWN_LIMIT))}
    except Exception as error:
        line = " ".join(str(error).split())
        said = {"error": f"{type(error).__name__}: {line}"[:LONGEST_ERROR]}
    unfinished = answer.with_suffix(".part")
    unfinished.write_text(json.dumps(said))
    unfinished.rename(answer)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
