"""Downstream tasks, run by lm-eval on a model that is already loaded, and compared item by item.

lm-eval (Gao et al., github.com/EleutherAI/lm-evaluation-harness) builds the prompts, runs the model and scores; the
counts are its own. What is kept of a run, and by which metric items are compared, is told in `taskrun`.
"""

from __future__ import annotations

import copy
import logging
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmshrink_eval.answers import KeptAnswers
from llmshrink_eval.beginning import Bos, beginning_of
from llmshrink_eval.errors import EvalError
from llmshrink_eval.generation import follow
from llmshrink_eval.paired import compare_items
from llmshrink_eval.results import Paired, Task
from llmshrink_eval.taskrun import Item, TaskRun, collect
from llmshrink_eval.taskset import (
    TaskData,
    TaskOptions,
    TaskSet,
    check_tasks,
    drawn_items,
    load_tasks,
    quiet,
    survey_tasks,
)
from llmshrink_eval.templates import Refused, TemplateFault, chat_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Item",
    "TaskData",
    "TaskOptions",
    "TaskRun",
    "check_tasks",
    "compare_tasks",
    "run_lm_tasks",
    "run_tasks",
    "survey_tasks",
]

LOGITS_BYTES = 1 << 30
LENGTH_AT_HAND = 1024
LARGEST_BATCH = 32

Progress = Callable[[int, int], None]


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    options: TaskOptions,
    on_progress: Progress | None = None,
) -> dict[str, TaskRun]:
    """Run the tasks on a loaded model, as it stands: device and dtype are its own. See `run_lm_tasks`."""
    from llmshrink_eval.continuations import ContinuationLM

    loaded = load_tasks(options)
    follow(model)
    add_bos = bos_of_tasks(tokenizer, model.config.model_type, options.bos)
    with quiet():
        lm = ContinuationLM(
            pretrained=model,
            tokenizer=_tokenizer_of_tasks(tokenizer, model.config, add_bos),
            batch_size=options.batch_size or fitting_batch_size(model.config),
            add_bos_token=add_bos,
        )
        lm.most = options.batch_size
        if model.device.type == "meta":  # offloaded: the weights come to where the hooks run the model
            hooked: Any = model
            lm._device = hooked._hf_hook.execution_device
    return run_lm_tasks(lm, options, on_progress, loaded)


def run_lm_tasks(
    lm: Any, options: TaskOptions, on_progress: Progress | None = None, loaded: TaskSet | None = None
) -> dict[str, TaskRun]:
    """Run the tasks on any `lm_eval.api.model.LM`, in the order in which they were named.

    on_progress(done, total) counts requests. With `options.answers` what an interrupted run has answered isn't asked
    again. Raises EvalError where `load_tasks` does, EvalFailed where the model's log-probabilities are not numbers.
    """
    from lm_eval.evaluator import evaluate

    loaded = load_tasks(options) if loaded is None else loaded
    _seed(options.seed)
    heard = _Heard()
    if options.apply_chat_template:
        lm.apply_chat_template = partial(_chat_prompt, lm)
    hook, models = lm.cache_hook, logging.getLogger("lm_eval.models")
    with quiet():
        models.addHandler(heard)
        models.setLevel(logging.WARNING)
        propagate, models.propagate = models.propagate, False
        counting = _Counting(loaded, on_progress or _unheard)
        lm.cache_hook = counting
        asked = lm if options.answers is None else KeptAnswers(lm, Path(options.answers), counting.add, heard.messages)
        try:
            results = evaluate(
                asked,
                {"tasks": loaded.tasks, "groups": loaded.groups},
                limit=options.limit,
                samples=drawn_items(loaded, options),
                bootstrap_iters=0,
                apply_chat_template=options.apply_chat_template,
                fewshot_as_multiturn=options.apply_chat_template,
            )
        finally:
            lm.cache_hook, models.propagate = hook, propagate
            models.removeHandler(heard)
            models.setLevel(logging.NOTSET)
    return collect(results, loaded, options, heard.lines())


def bos_of_tasks(tokenizer: Any, model_type: str, asked: Bos) -> bool | None:
    """lm-eval's `add_bos_token`: None where the tokenizer itself does what is wanted. Raises EvalError."""
    try:
        beginning = beginning_of(tokenizer, model_type, asked)
    except ValueError as error:
        raise EvalError(str(error)) from error
    return None if beginning.put == beginning.added else beginning.put


def _tokenizer_of_tasks(tokenizer: Any, config: Any, add_bos: bool | None) -> Any:
    """One for lm-eval, which changes it: not the caller's.

    Prompts are padded with its padding token, which the model needn't have an embedding of. It puts BOS before prompts
    where that is wanted, or is refused.
    """
    made = copy.deepcopy(tokenizer)
    if (made.pad_token_id or 0) >= int(config.get_text_config().vocab_size):
        made.pad_token = made.eos_token or made.unk_token or made.convert_ids_to_tokens(0)
    if add_bos:
        made.add_bos_token = True
        if not beginning_of(made, None).added:
            raise EvalError(
                f"tasks: {type(made).__name__} can't be made to put BOS before prompts; give --bos never, or no tasks"
            )
    return made


def _chat_prompt(lm: Any, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    """In the place of lm-eval's own: with a fixed date, and a template's fault in one line.

    As there, a conversation that the template refuses is written without its system message.
    """
    how: dict[str, Any] = {
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": not add_generation_prompt,
    }
    plain = [message for message in chat_history if message["role"] != "system"]
    try:
        try:
            return chat_text(lm.tokenizer, chat_history, **how)
        except Refused:
            if plain == chat_history:
                raise
            logging.getLogger("lm_eval.models").warning(
                "Failed to apply chat template. removing the system role in chat history."
            )
            return chat_text(lm.tokenizer, plain, **how)
    except (TemplateFault, Refused) as error:
        raise EvalError(f"--apply-chat-template: {error}; leave it out") from error


def compare_tasks(
    original: Mapping[str, TaskRun] | None, compressed: Mapping[str, TaskRun], *, seed: int
) -> dict[str, Task]:
    """As results have it; held to the original's items where there is an original.

    Items are matched by the hash of their document. Raises EvalError when the two runs are of other tasks, metrics or
    documents.
    """
    return {
        name: Task(
            metric=run.metric,
            higher_is_better=run.higher_is_better,
            score=run.score,
            stderr=run.stderr,
            items=run.documents,
            chance=run.chance,
            metrics=run.metrics,
            version=run.task_version,
            num_fewshot=run.num_fewshot,
            data_fingerprint=run.data_fingerprint,
            warnings=run.warnings,
            versus_original=None if original is None else _versus(name, original, run, seed),
        )
        for name, run in compressed.items()
    }


def fitting_batch_size(config: Any) -> int:
    """Of a model with this config: lm-eval keeps the logits of a whole batch, so as many prompts of usual length as
    leave them within 1 GiB."""
    config = config.get_text_config()
    length = min(LENGTH_AT_HAND, getattr(config, "max_position_embeddings", None) or LENGTH_AT_HAND)
    return max(1, min(LARGEST_BATCH, LOGITS_BYTES // (4 * length * int(config.vocab_size))))


class _Counting:
    """Stands where lm-eval's models report each finished request to a cache."""

    def __init__(self, loaded: TaskSet, on_progress: Progress) -> None:
        self._loaded, self._tell, self._done = loaded, on_progress, 0

    def add_partial(self, _kind: str, _request: object, _answer: object) -> None:
        self.add(1)

    def add(self, answers: int) -> None:
        """So many more are there."""
        self._done += answers
        total = sum(request.repeats for task in self._loaded.tasks.values() for request in task.instances)
        self._tell(self._done, total)


def _unheard(_done: int, _total: int) -> None: ...


class _Heard(logging.Handler):
    """Warnings of lm-eval's models, alike ones once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(" ".join(record.getMessage().split()))

    def lines(self) -> tuple[str, ...]:
        first: dict[str, str] = {}
        counts = Counter(re.sub(r"\d+", "#", message) for message in self.messages)
        for message in self.messages:
            first.setdefault(re.sub(r"\d+", "#", message), message)
        return tuple(f"{count} times: {first[kind]}" for kind, count in counts.items())


def _seed(seed: int) -> None:
    """As lm-eval does before a run: what samples when it generates is repeatable."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _versus(name: str, original: Mapping[str, TaskRun], run: TaskRun, seed: int) -> Paired | None:
    before = original.get(name)
    if before is None:
        raise EvalError(f"task {name}: the original wasn't run on it")
    if before.metric != run.metric:
        raise EvalError(f"task {name}: scored by {before.metric} for the original and by {run.metric} here")
    if not before.items and not run.items:
        return None
    first, second = _by_document(before), _by_document(run)
    if first.keys() != second.keys():
        other = len(first.keys() ^ second.keys())
        raise EvalError(
            f"task {name}: not the original's items ({other} documents differ): same data, same limit or sample?"
        )
    pairs = [(item, second[key]) for key, item in first.items()]
    values = [item.value for pair in pairs for item in pair]
    return compare_items(
        [item.value for item, _ in pairs],
        [item.value for _, item in pairs],
        ids=[item.doc_id for item, _ in pairs],
        seed=seed,
        binary=set(values) <= {0.0, 1.0},
        higher_is_better=run.higher_is_better,
    )


def _by_document(run: TaskRun) -> dict[tuple[str, int], Item]:
    """Items by the hash of their document; equal documents are told apart by their order."""
    seen: Counter[str] = Counter()
    found = {}
    for item in run.items:
        found[item.doc_hash, seen[item.doc_hash]] = item
        seen[item.doc_hash] += 1
    return found
