"""The demo's tokenizer: byte-level, every word of the demo language one token, anything else its bytes.

A BPE without merges whose `ignore_merges` takes a word that is in the vocabulary whole, so any text has tokens and
`decode(encode(text)) == text`. Ids: 0 the end mark, 1 to 256 the bytes, then the words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmshrink.demo.lexicon import COLOURS, FUNCTION_WORDS, MANNERS, MOODS, NAMES, OPENINGS, PLACES, THINGS, TRADES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END = "<|end|>"
END_ID = 0
VOCABULARY_SIZE = 512
"""Rows of the embedding, a multiple of 128; the last ones have no token."""


def vocabulary() -> dict[str, int]:
    """Token to id; tokens in the byte-level alphabet, where `Ġ` is the space."""
    from tokenizers.pre_tokenizers import ByteLevel

    lists = (FUNCTION_WORDS, NAMES, TRADES, PLACES, THINGS, COLOURS, MOODS, MANNERS)
    words = [opening.split()[0] for opening in OPENINGS] + [f"Ġ{word}" for words in lists for word in words]
    tokens = [END, *sorted(ByteLevel.alphabet()), *words]
    return {token: index for index, token in enumerate(tokens)}


def build(model_max_length: int) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers loads and saves it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab=vocabulary(), merges=[], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, pad_token=END, model_max_length=model_max_length
    )
