"""Whether models can be compared at all: the same tokens, and as many logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmshrink_eval.errors import EvalError
from llmshrink_eval.options import ModelSpec

if TYPE_CHECKING:
    from llmshrink_eval.protocol import Windows

PROBE = (
    "The quick brown fox jumps over 13 lazy dogs. Naïve café, 東京 2026!\n\n\tdef f(x): return x**2  # ...",
    "Once upon a time there was a baker in the village. <|endoftext|> [INST] </s> 🙂",
)


def refuse_other_tokenizers(specs: Sequence[ModelSpec], tokenizers: Sequence[Any]) -> None:
    """Every model must read the very same tokens, or neither KL nor nats per token compare."""
    first, vocabulary = tokenizers[0], tokenizers[0].get_vocab()
    for spec, tokenizer in zip(specs[1:], tokenizers[1:], strict=True):
        other = tokenizer.get_vocab()
        reason = None
        if other != vocabulary:
            different = min(set(vocabulary.items()) ^ set(other.items()), key=lambda item: (item[1], item[0]))
            reason = f"{len(vocabulary):,} tokens against {len(other):,}, first different: {different[0]!r}"
        else:
            for text in PROBE:
                if tokenizer(text)["input_ids"] != first(text)["input_ids"]:
                    reason = f"the same tokens, but {text[:24]!r}... is cut into them in another way"
                    break
        if reason is not None:
            raise EvalError(
                f"{specs[0].name} and {spec.name} have different tokenizers ({reason}); only models that read the same"
                " tokens can be compared"
            )


def refuse_other_vocabularies(specs: Sequence[ModelSpec], configs: Sequence[Any], windows: Windows) -> None:
    """A model must know every token of the text, and give as many logits as the one that it is compared with."""
    largest = int(windows.input_ids.max())
    sizes = [int(config.get_text_config().vocab_size) for config in configs]
    for spec, size in zip(specs, sizes, strict=True):
        if largest >= size:
            raise EvalError(
                f"{spec.name}: its tokenizer gives token {largest:,}, and its config.json has a vocabulary of {size:,};"
                " the two don't belong together"
            )
        if size != sizes[0]:
            raise EvalError(
                f"{specs[0].name} and {spec.name} have vocabularies of {sizes[0]:,} and {size:,} in their config.json;"
                " only models with the same one can be compared"
            )
