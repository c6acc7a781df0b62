"""vLLM's model as `passes.run_pass` reads one: token ids in, final hidden states out, a head that makes logits of them.

vLLM hands out log-probabilities of a prompt, but only of the k likeliest tokens, and a KL made of those and the rest as
one is far too small: on a 7M model in 4 bits, where 23 % of the probability lies outside the 20 likeliest tokens, it is
0.62 of the whole, with 64 tokens 0.78. So the model's final hidden states are taken as they leave it (a forward hook
on the model that vLLM's own `apply_model` gives), and everything behind them is the same as for a model of
transformers: the same windows, batches, records, stored baseline and full-vocabulary KL, exactly 0 of a model with
itself.

The blocks, the attention and the cache are vLLM's, in the dtype that it computes in. The output layer is applied to its
hidden states here, on a CPU in float32 (in float16 vLLM itself rounds a logit of 32 to steps of 1/32). That this is the
model's own last step is proven at the start, by vLLM's own log-probabilities of a prompt.

Each request is one window, prefilled whole (no chunks, no prefix cache), with one token decoded that nobody looks at.
Several are scheduled together; a window's rows in the batch start where the position is 0, and are held to its ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from llmshrink_eval.errors import EvalFailed

PROOF_TOKENS = 64
PROOF_STEPS = 4
"""Steps of the dtype, at the size of the largest logit, by which a log-probability may differ from vLLM's own."""


class EngineModel:
    """What `run_pass` asks of a model. llm: vLLM's LLM, in this process, eager, without prefix cache and chunks."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self.config = llm.llm_engine.model_config.hf_config
        self._steps: list[tuple[Tensor | None, Tensor, Tensor]] = []
        # vLLM runs in this process, so what it hands its function is the model itself.
        [self._model] = llm.apply_model(lambda model: model)
        self._processor: Any = next(
            (module for module in self._model.modules() if type(module).__name__ == "LogitsProcessor"), None
        )
        self._layer, self._device = self._output_layer()

    def get_input_embeddings(self) -> nn.Module | None:
        """Only where they are matters, and that the parameters say."""
        return None

    def get_output_embeddings(self) -> nn.Module | None:
        """The output layer, sharing vLLM's weight or in float32; None where it isn't plain (quantized, say)."""
        return self._layer

    def parameters(self) -> Iterator[Tensor]:
        """One, where token ids go."""
        yield torch.empty(0, device=self._device)

    def __call__(
        self, *, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False
    ) -> SimpleNamespace:
        """input_ids: int64 [batch, length], padded on the right. logits: [batch, length, vocabulary]."""
        assert not use_cache
        lengths = [input_ids.shape[1]] * len(input_ids) if attention_mask is None else attention_mask.sum(1).tolist()
        windows = [ids[:length].tolist() for ids, length in zip(input_ids, lengths, strict=True)]
        rows = nn.utils.rnn.pad_sequence(self._hidden(windows), batch_first=True)
        if self._layer is not None:
            return SimpleNamespace(logits=self._after(self._layer(rows)))
        return SimpleNamespace(logits=torch.stack([self._model.compute_logits(one) for one in rows]))

    def prove(self, ids: Sequence[int]) -> None:
        """Hold what is made here to vLLM's own log-probabilities of these tokens. Raises EvalFailed if they differ."""
        from vllm import SamplingParams

        ids = list(ids[:PROOF_TOKENS])
        asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        [output] = self._llm.generate([{"prompt_token_ids": ids}], asked, use_tqdm=False)
        pairs = list(zip(ids, output.prompt_logprobs, strict=True))[1:]
        own = torch.tensor([places[token].logprob for token, places in pairs])
        logits = self(input_ids=torch.tensor([ids])).logits[0, :-1].float().cpu()
        made = logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
        step = torch.finfo(self._llm.llm_engine.model_config.dtype).eps
        worst = float((made - own).abs().nan_to_num(nan=0.0).max())  # the pass says where a NaN is
        tolerance = PROOF_STEPS * max(step, 1e-4) * max(1.0, float(logits.abs().nan_to_num().max()))
        if worst > tolerance:
            raise EvalFailed(
                f"vLLM's own log-probabilities differ by {worst:.2g} nats from those made of its hidden states"
                f" (at most {tolerance:.2g} is rounding): this model can't be read in vLLM; use --engine transformers"
            )

    def _keep(self, _model: nn.Module, _inputs: object, given: dict[str, Any], output: Any) -> None:
        """The forward hook: what a step read and made."""
        hidden = output[0] if isinstance(output, tuple) else output
        ids, positions = given.get("input_ids"), given["positions"]
        # vLLM's buffers are filled anew for the next step.
        self._steps.append((None if ids is None else ids.clone(), positions.clone(), hidden.clone()))

    def _output_layer(self) -> tuple[nn.Linear | None, torch.device]:
        """vLLM's output layer as a Linear, and the device of its model."""
        hidden = self._run([[0, 0]])[0]
        given: list[Any] = []

        def keep(_processor: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            names = ("lm_head", "hidden_states", "embedding_bias")
            arguments = {**dict(zip(names, inputs, strict=False)), **named}
            given[:] = (arguments.get(name) for name in names)

        if self._processor is not None:
            hook = self._processor.register_forward_pre_hook(keep, with_kwargs=True)
            self._model.compute_logits(hidden)
            hook.remove()
        weight = getattr(given[0], "weight", None) if given else None
        # What a model does to its hidden states before the output layer (MiniCPM divides) would be lost.
        plain = given and given[1] is hidden
        if not plain or not isinstance(weight, Tensor) or weight.ndim != 2 or weight.dtype != hidden.dtype:
            return None, hidden.device
        vocabulary = self._processor.org_vocab_size
        layer = nn.Linear(weight.shape[1], vocabulary, bias=given[2] is not None, device="meta")
        layer.weight = nn.Parameter(_exact(weight[:vocabulary]), requires_grad=False)
        if given[2] is not None:
            layer.bias = nn.Parameter(_exact(given[2][:vocabulary]), requires_grad=False)
        return layer, hidden.device

    def _after(self, logits: Tensor) -> Tensor:
        """What vLLM does behind the output layer."""
        cap, scale = self._processor.soft_cap, self._processor.scale
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits if scale == 1.0 else logits * scale

    def _hidden(self, windows: list[list[int]]) -> list[Tensor]:
        """What the output layer reads of each window: [length, width]."""
        return [_exact(rows) if self._layer is not None else rows for rows in self._run(windows)]

    def _run(self, windows: list[list[int]]) -> list[Tensor]:
        """Final hidden states of each window, [length, width], as vLLM has them."""
        from vllm import SamplingParams

        self._steps.clear()
        asked = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
        hook = self._model.register_forward_hook(self._keep, with_kwargs=True)
        try:
            self._llm.generate([{"prompt_token_ids": ids} for ids in windows], asked, use_tqdm=False)
        finally:
            hook.remove()
        wanted = {tuple(window) for window in windows}
        lengths = {len(window) for window in windows}
        found: dict[tuple[int, ...], Tensor] = {}
        for ids, positions, hidden in self._steps:
            # Several position tables (text, height, width) agree where there is only text.
            first = positions[0] if positions.ndim == 2 else positions
            read = windows[0] if ids is None and len(windows) == 1 else [] if ids is None else ids.tolist()
            for start in (first == 0).nonzero().squeeze(-1).tolist():
                for window in wanted.intersection(tuple(read[start : start + length]) for length in lengths):
                    found.setdefault(window, hidden[start : start + len(window)])
        self._steps.clear()
        if len(windows) > 1 and not found:
            # A model that is given embeddings instead of ids: told apart by being alone.
            return [self._run([window])[0] for window in windows]
        missing = [window for window in windows if tuple(window) not in found]
        if missing:
            raise EvalFailed(
                f"vLLM didn't read {len(missing)} of {len(windows)} windows whole; use --engine transformers"
            )
        return [found[tuple(window)] for window in windows]


def _exact(tensor: Tensor) -> Tensor:
    """On a CPU in float32: it computes faster in it than in float16, and adds no rounding to what it is given."""
    return tensor.detach().float() if tensor.device.type == "cpu" else tensor.detach()
