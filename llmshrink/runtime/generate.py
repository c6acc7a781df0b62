"""What a model says to one prompt, as it says it, and what that took.

Prefill (the prompt, and the first token it leads to) and decode (each further token) are timed apart: the first is
bound by arithmetic, the second by reading the weights. A forward runs before the clock does, as first calls allocate,
and on CUDA compile.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from llmshrink_eval.beginning import LACKING, Bos, beginning_of
from llmshrink_eval.errors import EvalError
from llmshrink_eval.generation import follow
from llmshrink_eval.templates import Refused, TemplateFault, chat_text
from torch import Tensor

from llmshrink.checkpoint.preflight import load_tokenizer, model_limit
from llmshrink.checkpoint.source import Source
from llmshrink.errors import LlmshrinkError
from llmshrink.limits import check_numbers
from llmshrink.run import progress
from llmshrink.run.asked import pick_device
from llmshrink.run.report import size
from llmshrink.runtime.load import PACKED, config_of, load

logger = logging.getLogger("llmshrink")


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature: 0 takes the likeliest. seed: for what is drawn otherwise."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Raise LlmshrinkError naming the option that is out of its range."""
        check_numbers(vars(self))
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise LlmshrinkError(f"--temperature {self.temperature}: must be 0 (the likeliest token) or above")
        if not 0 < self.top_p <= 1:
            raise LlmshrinkError(f"--top-p {self.top_p}: must be above 0 and at most 1")
        if self.top_p < 1 and self.temperature == 0:
            raise LlmshrinkError(f"--top-p {self.top_p}: nothing is drawn at temperature 0; add --temperature 0.7")

    def options(self) -> dict[str, Any]:
        """As transformers' `generate` takes them, in place of what the checkpoint's generation_config says."""
        common = {"max_new_tokens": self.max_new_tokens, "num_beams": 1, "do_sample": self.temperature > 0}
        common |= {"use_cache": True, "return_dict_in_generate": False}
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return common | (drawn if self.temperature > 0 else dict.fromkeys(drawn))


@dataclass(frozen=True)
class Generation:
    """What was said. prefill_seconds: to the first new token; decode_seconds: for all others. Sizes in bytes.

    packed_bytes: of weight_bytes, what the packed linears take. chat: the prompt went through the chat template.
    """

    model: str
    prompt: str
    chat: bool
    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    weight_bytes: int
    packed_bytes: int
    peak_memory_bytes: int
    device: str
    dtype: str

    @property
    def prefill_rate(self) -> float:
        """Tokens of the prompt a second."""
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_rate(self) -> float | None:
        """New tokens a second after the first; None where there was one, or no clock tells them apart."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 and self.decode_seconds > 0 else None

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {**asdict(self), "prefill_tokens_per_second": self.prefill_rate,
                "decode_tokens_per_second": self.decode_rate}  # fmt: skip

    def lines(self) -> list[str]:
        """What it took, in one line."""
        rate = "-" if self.decode_rate is None else f"{self.decode_rate:.1f} tokens/s"
        return [
            f"{self.new_tokens} tokens, decode {rate}, prefill {self.prefill_rate:.1f} tokens/s of"
            f" {self.prompt_tokens}; weights {size(self.weight_bytes)} ({size(self.packed_bytes)} packed),"
            f" peak memory {size(self.peak_memory_bytes)}; {self.device}, {self.dtype}"
        ]


def generate(
    source: Source,
    prompt: str,
    sampling: Sampling,
    *,
    device: str | None,
    dtype: str | None,
    chat: bool | None,
    bos: Bos,
    trust_remote_code: bool,
    on_text: Callable[[str], None] | None,
) -> Generation:
    """See `llmshrink.generate`. All that can be refused is, before a weight is read."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise LlmshrinkError(f"the prompt isn't UTF-8 text ({error.reason}); give text") from error
    if not prompt.strip():
        raise LlmshrinkError("the prompt is empty; give the text that the model is to go on from")
    pick_device(device)
    config = config_of(source, trust_remote_code)
    limit = model_limit(config)
    tokenizer: Any = load_tokenizer(source, trust_remote_code)
    templated = bool(tokenizer.chat_template) if chat is None else chat
    ids = encode(tokenizer, prompt, chat=templated, name=source.name, model_type=config.model_type, bos=bos)
    check_length(ids.shape[1], sampling.max_new_tokens, limit)
    loaded = load(source, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    try:
        stops = follow(loaded)
    except EvalError as error:
        raise LlmshrinkError(str(error)) from error
    ids = ids.to(loaded.device)
    heard = _listener(tokenizer, on_text)
    with torch.inference_mode():
        loaded(ids if loaded.device.type == "cuda" else ids[:, :1])
        torch.manual_seed(sampling.seed)
        heard.started = time.perf_counter()
        output = loaded.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            streamer=heard,
            stopping_criteria=_stopping(tokenizer, stops, ids.shape[1]),
            **_padding(loaded),
            **sampling.options(),
        )
    new = output[0, ids.shape[1] :]
    packed = [module for module in loaded.modules() if isinstance(module, PACKED)]
    return Generation(
        model=source.name,
        prompt=prompt,
        chat=templated,
        text=tokenizer.decode(new, skip_special_tokens=True),
        prompt_tokens=ids.shape[1],
        new_tokens=len(new),
        prefill_seconds=heard.times[0] - heard.started,
        decode_seconds=heard.times[-1] - heard.times[0],
        weight_bytes=weight_bytes(loaded),
        packed_bytes=sum(module.nbytes for module in packed),
        peak_memory_bytes=_peak_memory(loaded.device),
        device=str(loaded.device),
        dtype=str(loaded.dtype).removeprefix("torch."),
    )


def encode(
    tokenizer: Any, prompt: str, *, chat: bool, name: str, model_type: str | None = None, bos: Bos = "auto"
) -> Tensor:
    """The prompt's tokens, int64 [1, tokens]; in the chat template where `chat`. A plain prompt's begin with BOS where
    the family (of `model_type`) or the tokenizer needs it, or as `bos` says, and never with two; a template's as it
    writes them. Raises LlmshrinkError."""
    try:
        beginning = beginning_of(tokenizer, model_type, bos)
    except ValueError as error:
        raise LlmshrinkError(str(error)) from error
    if beginning.lacking and not chat:
        logger.warning("%s: the prompt is %s", name, LACKING)
    if chat:
        if not tokenizer.chat_template:
            raise LlmshrinkError(f"{name}: --chat, but its tokenizer has no chat template; leave --chat out")
        message = [{"role": "user", "content": prompt}]
        try:
            # Somebody talks with the model now: the date is today's.
            text = chat_text(tokenizer, message, today=True, add_generation_prompt=True)
        except (TemplateFault, Refused) as error:
            raise LlmshrinkError(f"{name}: {error}; or give --no-chat") from error
        read = tokenizer(text, add_special_tokens=False).input_ids
        # As the template writes it: that is what the model learned conversations from.
        ids = torch.tensor([read])
    else:
        ids = torch.tensor([beginning.of(tokenizer(prompt).input_ids)])
    if ids.numel() == 0:
        raise LlmshrinkError(f"the prompt {prompt!r} has no tokens in {name}'s vocabulary; give another")
    found: Tensor = ids.long()
    return found


def check_length(prompt_tokens: int, new_tokens: int, limit: int | None) -> None:
    """Raise LlmshrinkError when prompt and answer can't both fit into the model's context."""
    if limit is None or prompt_tokens + new_tokens <= limit:
        return
    if prompt_tokens >= limit:
        raise LlmshrinkError(f"the prompt has {prompt_tokens} tokens, the model reads {limit} at most; shorten it")
    raise LlmshrinkError(
        f"--max-new-tokens {new_tokens}: with the prompt's {prompt_tokens} that is more than the {limit} tokens that"
        f" the model reads; ask for {limit - prompt_tokens} at most"
    )


def weight_bytes(model: Any) -> int:
    """What parameters and buffers take in memory, shared ones once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def _peak_memory(device: torch.device) -> int:
    """On CUDA what torch held of the device at most, else what the process held."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else progress.peak_memory()


def _padding(model: Any) -> dict[str, int]:
    """transformers wants a padding token; one sequence is never padded, so the end's will do."""
    config = model.generation_config
    end = config.eos_token_id
    end = end[0] if isinstance(end, list) else end
    return {"pad_token_id": end} if config.pad_token_id is None and end is not None else {}


def _stopping(tokenizer: Any, stops: Sequence[str], prompt_tokens: int) -> Any:
    """What ends a text that holds one of `stops`. transformers' own goes through the vocabulary first, which it can't
    for every tokenizer."""
    from transformers import StoppingCriteriaList

    # A character is four tokens at most, and a token that isn't a whole one is read with those around it.
    tail = 4 * max(map(len, stops), default=0) + 8

    def over(ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        text = tokenizer.decode(ids[0, prompt_tokens:][-tail:], skip_special_tokens=False)
        return torch.tensor([any(stop in text for stop in stops)], device=ids.device)

    return StoppingCriteriaList([over] if stops else [])


def _listener(tokenizer: Any, on_text: Callable[[str], None] | None) -> Any:
    """A streamer of transformers that notes when each token came and hands on whole words."""
    from transformers import TextStreamer

    class Listener(TextStreamer):
        """times: of each new token. started: set by the caller."""

        started = 0.0

        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.times: list[float] = []
            self._prompt = True

        def put(self, value: Tensor) -> None:
            """Called with the prompt first, then with each token."""
            if not self._prompt:
                self.times.append(time.perf_counter())
            self._prompt = False
            super().put(value)  # type: ignore[no-untyped-call]

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            """Called with text that no later token changes."""
            if on_text is not None and text:
                on_text(text)

    return Listener()
