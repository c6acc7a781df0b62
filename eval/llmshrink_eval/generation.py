"""generation_config.json as it is followed here: which tokens end a text, how long it is, how it is drawn.

transformers has eighty settings there, many for a tokenizer, a second model or a package that its `generate` isn't
given here. Those that say what a text is are followed; the others are put back to what they are where nothing is said.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

from llmshrink_eval.configfile import WAY_OUT
from llmshrink_eval.errors import EvalError
from llmshrink_eval.sidefiles import generation_fault

logger = logging.getLogger("llmshrink")

FOLLOWED = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p", "min_p"),
    *("typical_p", "repetition_penalty", "no_repeat_ngram_size", "use_cache"),
    *("max_length", "max_new_tokens", "min_length", "min_new_tokens"),
)
NO_MATTER = (
    *("num_beams", "early_stopping", "length_penalty", "num_return_sequences", "return_dict_in_generate"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "renormalize_logits"),
    *("cache_implementation", "cache_config", "max_cache_len", "compile_config", "disable_compile"),
    *("prefill_chunk_size", "decoder_start_token_id", "transformers_version", "low_memory", "stop_strings"),
)
"""Not followed, and nothing is lost by it: how a text is computed, and what comes back beside it."""


def follow(model: Any) -> tuple[str, ...]:
    """Change what a model's `generate` goes by to what is followed here, and log a line for settings that aren't; the
    texts that end what it says, which whoever generates looks for.

    model: transformers', whose settings are generation_config.json's, or without one config.json's. Fields that
    transformers doesn't know stay: a repository's own code may read them. Raises EvalError for one of another type.
    """
    from transformers import GenerationConfig

    given = getattr(model, "generation_config", None)
    if given is None:
        return ()
    fault = generation_fault(vars(given))
    if fault is not None:
        raise EvalError(f"{model.config.name_or_path}: of its settings for generation {fault}; {WAY_OUT}")
    stops = given.stop_strings or ()
    settings, unset = copy.copy(given), vars(GenerationConfig())
    otherwise = []
    for name, value in unset.items():
        found = getattr(settings, name, None)
        if name in FOLLOWED or name.startswith("_") or found is value:
            continue
        setattr(settings, name, value)
        if name not in NO_MATTER and found is not None and found is not False:
            otherwise.append(name)
    model.generation_config = settings
    if otherwise:
        logger.warning(
            "%s: generation_config.json sets %s, which isn't followed here",
            model.config.name_or_path,
            ", ".join(sorted(otherwise)),
        )
    return (stops,) if isinstance(stops, str) else tuple(stops)
