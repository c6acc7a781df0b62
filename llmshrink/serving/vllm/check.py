"""Does the engine say what transformers says, on the same checkpoint?

The engine continues each prompt greedily and gives the likeliest next tokens of every step; transformers, in float32,
reads the same tokens and gives its own distribution at the same places. The two are compared by

    KL(transformers || engine) = sum_i p_i (log p_i - log q_i)      i over the engine's top tokens and the rest as one

in nats for each place, averaged over a prompt: a lower bound of the whole divergence, tight since the rest is the tail.
The engine computes in float16, so that logits of size 32 are rounded to steps of 1/32: differences of a hundredth of a
nat are its arithmetic, and cost 1e-5 to 1e-4 nats of KL at most. A weight that was unpacked wrongly costs tenths.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmshrink.checkpoint.decompressed import Decompressed
from llmshrink.checkpoint.files import read_config
from llmshrink.formats import kv_cache, sparse24
from llmshrink.formats.bitpack import WORD
from llmshrink.serving.launch import installed
from llmshrink.serving.preflight import plugin_here
from llmshrink.serving.vllm.engine import EngineError, EngineResult, Generation, engine_logprobs

TOLERANCE = 5e-4
"""nats/token of KL, averaged over a prompt. Measured on small Llamas in int4: an engine in float16 3e-6, in bfloat16
2e-4; the wrong weights 5e-2 and more."""
ROUNDED_TOLERANCE = 2e-3
"""The same where inputs, or keys and values, are rounded to 8 bits on their way: of numbers near the middle of two
codes, the engine's arithmetic in 16 bits decides. Measured on small Llamas 1e-6 to 3e-4 for an FP8 cache (all cut off
instead of rounded: 1e-2; the wrong scales: 2e-2 and more), 5e-5 to 1.2e-3 for int8 inputs. Those cost that much
themselves on such models (1.9e-3), so an engine that left them unrounded would pass; wrong weights don't."""

Reference = Callable[[Sequence[int]], Tensor]
"""Token ids -> logits [tokens, vocabulary] of the model that the engine is held to, in any float dtype."""


@dataclass(frozen=True)
class EngineReport:
    """The engine against the reference.

    ok: no prompt's KL is over the tolerance. worst_prompt: index of the one with the largest. kl: mean over all places;
    worst_kl: of the worst prompt; tolerance: on that. mean_abs_diff, max_abs_diff: of the log-probabilities of the
    engine's likeliest tokens. greedy_agreement: share of places where both have the same first choice. nats.
    """

    ok: bool
    engine: str
    positions: int
    worst_prompt: int
    worst_kl: float
    kl: float
    mean_abs_diff: float
    max_abs_diff: float
    greedy_agreement: float
    tolerance: float


def compare_with_transformers(
    checkpoint: Path,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int = 8,
    dtype: str | None = None,
    tolerance: float | None = None,
) -> EngineReport:
    """Run vLLM on a checkpoint and hold it to transformers on the same one.

    prompts: token ids, each not empty. dtype: as `engine_logprobs`'. tolerance: None is the checkpoint's. Needs the
    compressed-tensors library, which vLLM brings. Raises EngineError when the engine doesn't serve the checkpoint.
    """
    result = engine_logprobs(checkpoint, prompts, max_tokens=max_tokens, dtype=dtype)
    if tolerance is None:
        tolerance = tolerance_of(read_config(checkpoint))
    return compare(result, prompts, transformers_logits(checkpoint), tolerance=tolerance)


def tolerance_of(config: Mapping[str, Any]) -> float:
    """What an engine that serves a checkpoint with this config.json is held to."""
    quantization = config.get("quantization_config") or {}
    groups = (quantization.get("config_groups") or {}).values()
    rounded = kv_cache.rounds(quantization) or any(group.get("input_activations") for group in groups)
    return ROUNDED_TOLERANCE if rounded else TOLERANCE


def transformers_logits(checkpoint: Path) -> Reference:
    """The checkpoint in transformers, in float32, as a reference.

    Its weights come through llmshrink's own reader where transformers has none: llmshrink's own format, and bits that
    don't divide a word, which the compressed-tensors library that vLLM pins packs otherwise; and where inputs are
    rounded to 8-bit integers, which that library does with other scales than vLLM, or keys and values cut off to FP8.
    """
    from llmshrink_eval.configured import running_config
    from llmshrink_eval.whole import pretrained

    with redirect_stderr(StringIO()), torch.no_grad():  # progress bars of three libraries; what goes wrong is raised
        config = read_config(checkpoint)
        if only_we_read(config) or cut_cache(config):
            model = _decompressed(checkpoint, cut=cut_cache(config))
        else:
            model = pretrained(checkpoint, running_config(checkpoint), dtype=torch.float32)
        model(
            torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        )  # weights are decompressed at the first forward

    def logits(tokens: Sequence[int]) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(torch.tensor([list(tokens)], device=model.device)).logits[0]
        return found

    return logits


def only_we_read(config: Mapping[str, Any]) -> bool:
    """Whether transformers, beside vLLM, can't read a checkpoint with this config.json, and llmshrink can."""
    quantization = config.get("quantization_config") or {}
    if quantization.get("quant_method") == sparse24.METHOD:
        return True
    if quantization.get("quant_method") != "compressed-tensors":
        return False
    groups = (quantization.get("config_groups") or {}).values()
    if any((group.get("input_activations") or {}).get("type") == "int" for group in groups):
        return True
    return any(WORD % int((group.get("weights") or {}).get("num_bits", WORD)) for group in groups)


def cut_cache(config: Mapping[str, Any]) -> bool:
    """Whether the vLLM at hand caches keys and values in FP8 and cuts them off: its CPU build, without the plugin."""
    engine = installed()
    cuts = engine is not None and engine.cpu and not plugin_here(os.environ).kernel
    return cuts and kv_cache.rounds(config.get("quantization_config"))


def _decompressed(checkpoint: Path, *, cut: bool = False) -> Any:
    """transformers' model of a checkpoint over dequantized weights, float32. EngineError where they don't fit it.

    cut: as `cut_cache` says.
    """
    from llmshrink_eval.configured import running_config
    from transformers import AutoModelForCausalLM

    raw = read_config(checkpoint)
    config = running_config(checkpoint)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()
    with Decompressed(checkpoint, raw, torch.float32) as reader:
        reader.round_too(model, {name: name for name, _ in model.named_parameters()}, cut=cut)
        weights = {key: reader.read(key) for key in list(reader.keys())}
    missing, unknown = model.load_state_dict(weights, strict=False)
    absent = set(missing) - set(model.all_tied_weights_keys)
    if absent or unknown:
        key = sorted([*absent, *unknown])[0]
        raise EngineError(f"{checkpoint}: its tensors aren't those of the model ({key}); copy it again")
    return model


def compare(
    result: EngineResult,
    prompts: Sequence[Sequence[int]],
    reference: Reference,
    *,
    tolerance: float = TOLERANCE,
) -> EngineReport:
    """Hold the engine's answers to a reference, prompt by prompt."""
    found = [
        _places(generation, prompt, reference) for prompt, generation in zip(prompts, result.generations, strict=True)
    ]
    # A NaN anywhere must count as the worst, and no comparison with a NaN is true.
    by_prompt = torch.stack([places.kl.mean() for places in found]).nan_to_num(nan=torch.inf)
    worst = int(by_prompt.argmax())
    kl = torch.cat([places.kl for places in found])
    differences = torch.cat([places.differences for places in found])
    same = torch.cat([places.same for places in found])
    return EngineReport(
        ok=bool(by_prompt[worst] <= tolerance),
        engine=result.engine,
        positions=kl.numel(),
        worst_prompt=worst,
        worst_kl=float(by_prompt[worst]),
        kl=float(kl.mean()),
        mean_abs_diff=float(differences.mean()),
        max_abs_diff=float(differences.max()),
        greedy_agreement=float(same.double().mean()),
        tolerance=tolerance,
    )


@dataclass(frozen=True)
class _Places:
    """One prompt's comparison. kl: float64 [places]; differences: float64 [places * top]; same: bool [places]."""

    kl: Tensor
    differences: Tensor
    same: Tensor


def _places(generation: Generation, prompt: Sequence[int], reference: Reference) -> _Places:
    """Compare at the place before each generated token."""
    tokens = [*prompt, *generation.tokens]
    logits = reference(tokens[:-1])[len(prompt) - 1 :]
    logprobs = logits.double().log_softmax(-1).cpu()
    kl, differences, same = [], [], []
    for ours, top, chosen in zip(logprobs, generation.top, generation.tokens, strict=True):
        log_p = ours[list(top)]
        log_q = torch.tensor(list(top.values()), dtype=torch.float64)
        kl.append((log_p.exp() * (log_p - log_q)).sum() + _rest(log_p, log_q))
        differences.append((log_p - log_q).abs())
        same.append(ours.argmax() == chosen)
    return _Places(torch.stack(kl), torch.cat(differences), torch.stack(same))


def _rest(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The KL term of everything outside the top tokens, taken as one."""
    smallest = torch.finfo(torch.float32).eps
    rest_p, rest_q = ((1 - logprobs.exp().sum()).clamp(min=smallest) for logprobs in (log_p, log_q))
    return rest_p * (rest_p / rest_q).log()
