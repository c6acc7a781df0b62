"""A distillation, ready to start: everything named, checked and read, and nothing written yet."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from llmshrink_eval.beginning import Bos
from llmshrink_eval.bounded import Unreadable, read_json

from llmshrink.calibration.activations import Batch, batches_of
from llmshrink.calibration.text import load_documents
from llmshrink.calibration.tokens import TokenWindows, build_windows, tokenizer_hash
from llmshrink.checkpoint.beside import check_side_files
from llmshrink.checkpoint.preflight import load_tokenizer, model_limit
from llmshrink.checkpoint.source import Source, resolve
from llmshrink.checkpoint.unchanged import Watched
from llmshrink.distillation.asked import check_cache, check_optimizer, check_places, objective_of
from llmshrink.distillation.cache import LIKELIEST, CacheKey
from llmshrink.distillation.made import check_room_for, student_folder
from llmshrink.distillation.match import matched_blocks
from llmshrink.distillation.narrow import TeacherQuant, check_narrow, load_narrow
from llmshrink.distillation.objective import Divergence, Objective
from llmshrink.distillation.processes import Processes
from llmshrink.distillation.quiet import quiet
from llmshrink.distillation.room import check_memory
from llmshrink.distillation.smaller import Smaller, make_student
from llmshrink.distillation.student import Student, Train, open_student, schemes_of
from llmshrink.distillation.teacher import SplitModel
from llmshrink.errors import CalibrationError, LlmshrinkError, SourceError
from llmshrink.limits import check_tokens
from llmshrink.model.blocks import find_blocks
from llmshrink.paths import as_text
from llmshrink.run.arithmetic import Arithmetic, automatic_training
from llmshrink.run.asked import DTYPES, check_vocabulary, pick_device
from llmshrink.run.job import here
from llmshrink.run.output import RECORD
from llmshrink.run.progress import Progress
from llmshrink.run.rehearse import config_bytes
from llmshrink.runtime.load import config_of, load

HELD_OUT_TOKENS = 8192
DEFAULT_LENGTH = 1024


@dataclass(frozen=True)
class Options:
    """What a user asked for; the names are those of `llmshrink.distill`. recipe: what the result is called by."""

    teacher: str
    student: str | None
    output: Path
    student_from: str | None = None
    recipe: str | None = None
    data: str | None = None
    generated_tokens: int = 0
    teacher_cache: Path | None = None
    teacher_cache_tokens: int | None = None
    mask_prompts: bool | None = None
    teacher_quant: TeacherQuant | None = None
    steps: int = 600
    batch_size: int = 8
    accumulate: int = 1
    bos: Bos = "auto"
    seq_len: int | None = None
    alpha: float = 0.0
    temperature: float = 1.0
    divergence: Divergence = "forward_kl"
    beta: float = 0.5
    hidden_weight: float = 0.0
    train: Train | None = None
    lr: float | None = None
    scale_lr: float = 1e-2
    optim: str = "adamw_torch"
    warmup: int = 20
    eval_steps: int | None = None
    device: str | None = None
    dtype: str | None = None
    seed: int = 0
    overwrite: bool = False
    trust_remote_code: bool = False
    gradient_checkpointing: bool = False


@dataclass(frozen=True, eq=False)
class Job:
    """objective: the loss. config_json: the student's, as it was read. split: the student, in two steps.

    real: windows of the text; held_out: others, as `batches`.

    arithmetic: what forwards and backwards compute in, and why. processes: how many share a step.
    """

    options: Options
    objective: Objective
    teacher_source: Source
    config_json: bytes
    student: Student
    split: SplitModel
    real: TokenWindows
    held_out: TokenWindows
    batches: list[Batch]
    device: torch.device
    arithmetic: Arithmetic
    processes: Processes

    @property
    def dtype(self) -> torch.dtype:
        """What forwards and backwards compute in; a live teacher's output layer too."""
        return DTYPES[self.arithmetic.dtype]

    @cached_property
    def teacher(self) -> SplitModel:
        """The teacher in memory, read when it's first asked for: a whole cache needs none."""
        if self.processes.first:
            # From the disk to the system's memory once: what transformers reads next comes from there.
            self.teacher_index.sum_rest()
            self.teacher_index.close()
        trusted = self.options.trust_remote_code
        if self.options.teacher_quant is not None:
            model = load_narrow(self.teacher_source, self.options.teacher_quant, self.device, trusted)
        else:
            dtype = "float32" if self.device.type == "cpu" else None
            with quiet():
                model = load(
                    self.teacher_source, device=str(self.device), dtype=dtype, trust_remote_code=trusted, plain_too=True
                )
        return SplitModel(model, self.teacher_source.name)

    @property
    def student_name(self) -> str:
        """For reports: as the user named it, or how it was made."""
        if self.options.student_from is not None:
            return f"{self.options.student_from} of the teacher"
        return self.options.recipe or self.student.source.name

    @property
    def teacher_name(self) -> str:
        """For reports and records: of a folder its own name alone, and what was made of it in memory."""
        source, quant = self.teacher_source, self.options.teacher_quant
        name = as_text(source.folder.name) if source.kind == "folder" else source.name
        return name if quant is None else f"{name} in {quant}"

    @cached_property
    def matched_blocks(self) -> list[int]:
        """The teacher's block that each of the student's is held to, where their hidden states are."""
        blocks = [len(find_blocks(model)[1]) for model in (self.student.model, self.teacher.model)]
        record = self.student.source.folder / RECORD
        try:
            structure = read_json(record).get("structure") if record.is_file() else None
        except (Unreadable, AttributeError) as error:
            raise SourceError(f"{record}: is damaged, and says what the student was cut from; copy it again") from error
        return matched_blocks(blocks[0], blocks[1], structure)

    @cached_property
    def teacher_index(self) -> Watched:
        """Of the teacher's weights, to see whether they change; it is transformers that loads them."""
        return Watched.open(self.teacher_source.folder)

    @cached_property
    def teacher_fingerprint(self) -> str:
        """Of the teacher's weights."""
        return self.teacher_index.fingerprint()

    @property
    def likeliest(self) -> int:
        """Tokens that a cache of the teacher's outputs keeps of every position."""
        return min(self.options.teacher_cache_tokens or LIKELIEST, self.split.weight.shape[0])

    def cache_key(self, training: TokenWindows) -> CacheKey:
        """What a teacher's outputs on these windows depend on."""
        return CacheKey(
            teacher=self.teacher_fingerprint,
            data=training.fingerprint,
            held_out=self.held_out.fingerprint,
            temperature=self.objective.temperature,
            quant=self.options.teacher_quant,
            likeliest=self.likeliest,
            batch_size=self.options.batch_size,
        )

    def identity(self) -> dict[str, Any]:
        """Everything that the result depends on, in words that a person can compare."""
        elsewhere = (
            "output", "overwrite", "teacher", "student", "data", "device", "teacher_cache", "teacher_cache_tokens",
            "bos",
        )  # fmt: skip
        cached = self.options.teacher_cache is not None
        asked = {name: value for name, value in asdict(self.options).items() if name not in elsewhere}
        return {
            "distill": {**asked, "dtype": str(self.dtype), "cached": self.likeliest if cached else None},
            "teacher": self.teacher_fingerprint,
            "student": self.student.index.fingerprint(),
            "config": hashlib.sha256(self.config_json).hexdigest(),
            "teacher_config": hashlib.sha256((self.teacher_source.folder / "config.json").read_bytes()).hexdigest(),
            "data": self.real.fingerprint,
            "held_out": self.held_out.fingerprint,
            "bos": self.real.reading.bos,
            "template_date": self.real.reading.date,
            "processes": self.processes.count,
            **here(self.device),
        }


def prepare(options: Options, progress: Progress) -> Job:
    """Resolve and check everything. Raises LlmshrinkError subclasses.

    Nothing is written, but for a student that has to be made first (`smaller.py`).
    """
    check_places(options)
    objective = objective_of(options)
    check_narrow(options.teacher_quant)
    for package in ("accelerate", "matplotlib"):
        if find_spec(package) is None:
            raise LlmshrinkError(f"distill needs {package}: pip install 'llmshrink[distill]'")
    device, trusted = pick_device(options.device), options.trust_remote_code
    check_optimizer(options.optim, device)
    if (options.student is None) == (options.student_from is None):
        raise LlmshrinkError("name a STUDENT, or give --student-from depth=N,width=N and none")
    smaller = None if options.student_from is None else Smaller.of(options.student_from)
    processes = Processes.here()
    processes.share(options.batch_size)
    teacher_source = resolve(options.teacher, trust_remote_code=trusted)
    source = teacher_source if options.student is None else resolve(options.student, trust_remote_code=trusted)
    if options.student is not None:
        schemes_of(source)
    check_side_files(source.folder, trust_remote_code=trusted, besides=(options.output,))
    config, teacher_config = (config_of(each, trusted) for each in (source, teacher_source))
    raw = config_bytes(source.folder)
    tokenizer, other = (load_tokenizer(each, trusted) for each in (source, teacher_source))
    sizes = [each.get_text_config().vocab_size for each in (config, teacher_config)]
    if tokenizer_hash(tokenizer) != tokenizer_hash(other) or sizes[0] != sizes[1]:
        raise SourceError(
            f"{source.name} ({sizes[0]} tokens) and {teacher_source.name} ({sizes[1]}) have other tokenizers, so one's "
            "probabilities say nothing of the other's tokens; distill from the model that the student was made from"
        )
    check_cache(options, sizes[1])
    limits = [limit for limit in (model_limit(config), model_limit(teacher_config)) if limit is not None]
    seq_len = _length(options.seq_len, min(limits, default=None))
    # The student of a run is a folder whatever it was made of: which text is the default, the teacher says.
    data = "demo" if options.data is None and teacher_source.kind == "demo" else options.data
    real, held_out = _windows(options, data, tokenizer, seq_len, config.model_type)
    check_vocabulary(real, sizes[0], source)
    if smaller is not None:
        _make_student(
            smaller, replace(options, data=data), teacher_config, len(real.input_ids), seq_len, processes, progress
        )
        processes.wait(device)
        source = resolve(str(student_folder(options.output)))
        config, raw = config_of(source, trusted), config_bytes(source.folder)
    if options.teacher_cache is None:
        check_memory(teacher_source, source, device=options.device, quant=options.teacher_quant)
    student = open_student(source, train=options.train, device=device, config=config)
    return Job(
        options=options,
        objective=objective,
        teacher_source=teacher_source,
        config_json=raw,
        student=student,
        split=SplitModel(student.model, source.name),
        real=real,
        held_out=held_out,
        batches=batches_of(held_out, options.batch_size, held_out=True),
        device=device,
        arithmetic=training_arithmetic(options.dtype, device),
        processes=processes,
    )


def _windows(
    options: Options, data: str | None, tokenizer: Any, seq_len: int, model_type: str
) -> tuple[TokenWindows, TokenWindows]:
    """(the text's windows, those that are held out). Raises CalibrationError, which names the option of this verb."""
    samples = options.steps * options.batch_size * options.accumulate
    check_tokens(samples, seq_len, f"--steps {options.steps}")
    try:
        return build_windows(
            load_documents(data),
            tokenizer,
            samples=samples,
            seq_len=seq_len,
            held_out=max(1, HELD_OUT_TOKENS // seq_len),
            seed=options.seed,
            fewer=True,
            mask_prompts=options.mask_prompts,
            bos=options.bos,
            model_type=model_type,
        )
    except CalibrationError as error:
        # Who reads text serves verbs whose option is --calibration, and which can be told how many windows to take.
        said = str(error).replace("--calibration", "--data").replace("calibration data", "data")
        raise CalibrationError(said.replace("--samples 1 --seq-len", "--seq-len")) from error


def _make_student(
    smaller: Smaller,
    options: Options,
    config: Any,
    samples: int,
    seq_len: int,
    processes: Processes,
    progress: Progress,
) -> None:
    smaller.recipes(config)
    if not processes.first:
        return
    check_room_for(options.output, overwrite=options.overwrite)
    make_student(
        smaller, config, options.teacher, options.output, data=options.data, samples=samples, seq_len=seq_len,
        seed=options.seed, bos=options.bos, device=options.device, trust_remote_code=options.trust_remote_code,
        progress=progress,
    )  # fmt: skip


def _length(seq_len: int | None, limit: int | None) -> int:
    """Tokens in a window: as asked for, else DEFAULT_LENGTH or the shorter of both models' limits."""
    length = min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH) if seq_len is None else seq_len
    if length < 2:
        raise LlmshrinkError(f"--seq-len {length}: must be at least 2")
    if limit is not None and length > limit:
        raise LlmshrinkError(f"--seq-len {length}: teacher and student allow {limit} positions; give at most that")
    return length


def training_arithmetic(name: str | None, device: torch.device) -> Arithmetic:
    """What forwards and backwards compute in, weights and their optimizer being float32."""
    if name is None or name == "auto":
        return automatic_training(device.type)
    if name not in ("float32", "bfloat16"):
        raise LlmshrinkError(f"--dtype {name}: choose float32 or bfloat16, or auto")
    return Arithmetic(name, "as asked for")
