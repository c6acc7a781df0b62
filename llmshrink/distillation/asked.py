"""What a user asked of a distillation, checked as far as that needs no model."""

from __future__ import annotations

import math
import re
from difflib import get_close_matches
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from llmshrink_eval.errors import one_line

from llmshrink.distillation.objective import Objective
from llmshrink.distillation.state import described
from llmshrink.errors import LlmshrinkError
from llmshrink.limits import check_numbers
from llmshrink.methods.bnb import require
from llmshrink.paths import expanded
from llmshrink.run.asked import check_apart
from llmshrink.run.output import partial_folder

if TYPE_CHECKING:
    from llmshrink.distillation.job import Options

REBUILDING = ("galore", "apollo", "lomo")
"""In the names of optimizers that step by something else than a weight's own gradient, or before the step."""
LARGEST_SEED = 2**32 - 1
"""NumPy's, which the Trainer seeds too."""
PROBE = (64, 128)
"""Of the parameter that an optimizer is tried on: more numbers than those of which bitsandbytes keeps 32 bits."""


def check_places(options: Options) -> None:
    """Raise LlmshrinkError where the output would be, hold or lie in a model that is read, or take in the cache.

    An output of an earlier run is replaced as a whole under --overwrite, with whatever lies in it.
    """
    output = options.output.resolve()
    for what, name in (("STUDENT", options.student), ("TEACHER", options.teacher)):
        if name is None or not expanded(name).is_dir():
            continue  # of the Hub, or the demo
        folder = expanded(name).resolve()
        if output == folder or output in folder.parents or folder in output.parents:
            how = "is" if output == folder else "holds" if output in folder.parents else "lies in"
            raise LlmshrinkError(f"-o {options.output}: {how} the {what} {name}, which is read; name a folder apart")
    check_apart(options.output, (("--data", options.data),))
    if options.teacher_cache is not None:
        cache = options.teacher_cache.resolve()
        there = next(folder for folder in (cache, *cache.parents) if folder.exists())
        if not there.is_dir():
            raise LlmshrinkError(f"--teacher-cache {options.teacher_cache}: {there} is a file; name a folder")
        for folder in (output, partial_folder(output)):
            if folder == cache or folder in cache.parents:
                raise LlmshrinkError(
                    f"--teacher-cache {options.teacher_cache}: is in {folder}, which the run replaces; name a folder "
                    "apart"
                )


def objective_of(options: Options) -> Objective:
    """The loss that was asked for. Raises LlmshrinkError for a number out of its range, of the training too."""
    check_numbers(vars(options))
    if options.seed > LARGEST_SEED:
        raise LlmshrinkError(f"--seed {options.seed}: must be at most {LARGEST_SEED}")
    if options.divergence != "jsd" and options.beta != type(options).beta:
        raise LlmshrinkError(f"--beta {options.beta}: is of --divergence jsd; give that, or leave it out")
    for name, rate in (("lr", options.lr), ("scale-lr", options.scale_lr)):
        if rate is not None and not 0.0 < rate < 1.0:
            raise LlmshrinkError(f"--{name} {rate}: must be above 0 and below 1")
    weight = options.hidden_weight
    if not 0.0 <= weight < math.inf:
        raise LlmshrinkError(f"--hidden-weight {weight}: must be 0 (none) or a number above it")
    if weight and options.teacher_cache is not None:
        raise LlmshrinkError(
            f"--hidden-weight {weight}: a --teacher-cache has no hidden states; leave one of the two out"
        )
    try:
        return Objective(options.alpha, options.temperature, options.divergence, options.beta)
    except ValueError as error:
        raise LlmshrinkError(f"--{error}") from error


def check_cache(options: Options, vocabulary: int) -> None:
    """Raise LlmshrinkError for a --teacher-cache-tokens that can't be. vocabulary: of the teacher."""
    count = options.teacher_cache_tokens
    if count is None:
        return
    if options.teacher_cache is None:
        raise LlmshrinkError(f"--teacher-cache-tokens {count}: is of a --teacher-cache; give one, or leave it out")
    if not 1 <= count <= vocabulary:
        raise LlmshrinkError(f"--teacher-cache-tokens {count}: must be 1 to {vocabulary}, which is the vocabulary")


def check_optimizer(name: str, device: torch.device) -> None:
    """Raise LlmshrinkError for an optimizer that isn't there, doesn't run here, or doesn't keep to what is held.

    It makes two steps on a small parameter: some need packages or a device that only that tells.
    """
    from transformers import Trainer
    from transformers.training_args import OptimizerNames

    known = [each.value for each in OptimizerNames]
    if name not in known:
        near = get_close_matches(name, known, 3) or ["adamw_torch", "adamw_bnb_8bit"]
        raise LlmshrinkError(f"--optim {name}: transformers has no such optimizer; it has {', '.join(near)} and others")
    if any(word in name for word in REBUILDING):
        raise LlmshrinkError(
            f"--optim {name}: projects gradients or steps inside the backward, so what is zero wouldn't be held; take "
            "adamw_torch"
        )
    if re.search("bnb|paged|lion|ademamix", name) or name == "adamw_8bit":
        require(f"--optim {name}", "take adamw_torch")
    asked = SimpleNamespace(
        optim=name, optim_args=None, learning_rate=0.1, adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8,
        weight_decay=0.0, warmup_steps=0,
    )  # fmt: skip
    weight = torch.nn.Parameter(torch.ones(PROBE, device=device))
    try:
        kind, keywords = Trainer.get_optimizer_cls_and_kwargs(cast(Any, asked))
        optimizer = kind([{"params": [weight], "lr": 0.1}], **keywords)
        for _ in range(2):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
    except Exception as error:  # each package and device has its own ways
        raise LlmshrinkError(f"--optim {name}: doesn't run here ({one_line(error)}); take adamw_torch") from error
    try:
        described(optimizer.state_dict(), [])
    except TypeError as error:
        raise LlmshrinkError(
            f"--optim {name}: what it remembers can't be kept for a run that goes on ({error}); take adamw_torch"
        ) from error
