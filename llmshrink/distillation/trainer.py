"""transformers' Trainer around the chunked loss: its loop, precision, accumulation and processes are used as they are;
what is ours is the loss, which parameters learn at which rate, the files of its checkpoints (`state`: no pickles), and
what is said while it runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llmshrink.calibration.tokens import TokenWindows
from llmshrink.distillation import state
from llmshrink.distillation.chunked import Losses, Teacher, chunked_loss
from llmshrink.distillation.match import HiddenMatch
from llmshrink.distillation.objective import IGNORED, Objective
from llmshrink.distillation.teacher import SplitModel
from llmshrink.distillation.train import last_whole
from llmshrink.errors import LlmshrinkError


class Windows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Windows of tokens as training examples. labels: the tokens, IGNORED where one's prediction doesn't count."""

    def __init__(self, windows: TokenWindows) -> None:
        self._windows = windows
        self._labels = windows.input_ids.masked_fill(~windows.labels, IGNORED)

    def __len__(self) -> int:
        return len(self._windows.input_ids)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        ids, mask = self._windows.input_ids[number], self._windows.mask[number]
        return {
            "input_ids": ids,
            "attention_mask": mask.long(),
            "labels": self._labels[number],
            "window": torch.tensor(number),
        }


class Says(Protocol):
    """Any teacher: of the windows of a batch, what it says at the positions `where`, a few rows at a time."""

    def of(self, input_ids: Tensor, mask: Tensor | None, where: Tensor, window: Tensor) -> Teacher:
        """input_ids: int64 [batch, length]; where: bool, the same; window: int64 [batch], numbers of the windows."""
        ...


class Distiller(nn.Module):
    """The student with its loss, as one module: whatever wraps it (DDP, FSDP, autocast) wraps both.

    A position's loss is of the prediction of the next token; those whose next label is IGNORED don't count. match: of
    hidden states, beside the objective, or None.
    """

    accepts_loss_kwargs = True

    def __init__(
        self,
        student: SplitModel,
        teacher: Says,
        objective: Objective,
        dtype: torch.dtype,
        match: HiddenMatch | None = None,
    ) -> None:
        super().__init__()
        self.match = match
        self.student = student.model
        self._parts = (student, teacher)  # in a tuple: the teacher is no submodule, and isn't trained or saved
        self._objective, self._dtype = objective, dtype

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        window: Tensor,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """loss: the mean over the positions that count (of num_items_in_batch, where given). Parts for the log."""
        found, count = self.losses(input_ids, attention_mask, labels, window)
        loss = found.total / (count if num_items_in_batch is None else num_items_in_batch)
        return {"loss": loss, "logits": torch.stack([found.entropy, found.divergence, count.to(found.entropy.dtype)])}

    def state_dict(self, *_: Any, prefix: str = "", **__: Any) -> dict[str, Any]:  # type: ignore[override]
        """What is trained, alone: everything else is in the student's checkpoint."""
        trained = ((name, each) for name, each in self.named_parameters() if each.requires_grad)
        return {prefix + name: each.detach() for name, each in trained}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """The inverse: what is trained, all of it; what is frozen isn't missing."""
        trained = {name for name, each in self.named_parameters() if each.requires_grad}
        if trained != state_dict.keys():
            raise RuntimeError(f"not this student's parameters: {min(trained ^ state_dict.keys())}")
        super().load_state_dict(state_dict, strict=False, assign=assign)
        return _IncompatibleKeys([], [])

    def losses(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, window: Tensor
    ) -> tuple[Losses, Tensor]:
        """The sums of a batch, and over how many positions."""
        student, teacher = self._parts
        mask = None if bool(attention_mask.all()) else attention_mask
        following = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)
        where = following != IGNORED
        with nullcontext([]) if self.match is None else self.match.watch_teacher() as theirs:
            said = teacher.of(input_ids, mask, where, window)
        with nullcontext([]) if self.match is None else self.match.watch_student() as ours:
            hidden = student.hidden(input_ids, mask)[where].to(self._dtype)
        weight, bias = student.weight, student.bias
        with torch.autocast(hidden.device.type, enabled=False):
            found = chunked_loss(
                hidden, weight, bias, said, self._objective, labels=following[where], tail=student.tail
            )
            if self.match is not None:
                found = replace(found, total=found.total + self.match.weight * self.match(ours, theirs, where))
        return found, where.sum()


@dataclass(frozen=True)
class Rates:
    """Learning rates: of weights, latents and a projection, of scales (relative), of vectors (norms and biases)."""

    weights: float
    scales: float
    vectors: float

    def of(self, name: str, parameter: nn.Parameter) -> float:
        """Of one parameter."""
        if name.endswith(".gain"):
            return self.scales
        return self.vectors if parameter.dim() == 1 else self.weights


class DistillTrainer(Trainer):
    """A Trainer with a learning rate for each kind of parameter, that stops at the first loss that isn't a number.

    judged: () -> {"kl": ...}, the student now, on the held-out windows.
    """

    def __init__(
        self,
        model: Distiller,
        arguments: TrainingArguments,
        rates: Rates,
        judged: Callable[[], dict[str, float]],
        **more: Any,
    ) -> None:
        self._rates, self._judged = rates, judged
        super().__init__(model=model, args=arguments, **more)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that the arguments name, no weight decay: what is zero stays zero."""
        if self.optimizer is None:
            trained = self.model if model is None else model
            assert trained is not None
            kind, keywords = self.get_optimizer_cls_and_kwargs(self.args)
            groups: dict[float, list[nn.Parameter]] = {}
            for name, parameter in trained.named_parameters():
                if parameter.requires_grad:
                    groups.setdefault(self._rates.of(name, parameter), []).append(parameter)
            # AdamW of torch and others decay unless a group says otherwise; the arguments' own isn't handed to them.
            self.optimizer = kind(
                [{"params": each, "lr": rate, "weight_decay": 0.0} for rate, each in groups.items()], **keywords
            )
        return self.optimizer

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """The student against the teacher on the held-out windows, logged; what the best checkpoint is chosen by."""
        found = {f"{metric_key_prefix}_{name}": value for name, value in self._judged().items()}
        self.log(dict(found))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *rest: Any, **named: Any) -> Tensor:
        """One batch forward and backward. Raises LlmshrinkError naming a batch whose loss isn't a number."""
        windows = inputs["window"].tolist()
        loss = super().training_step(model, inputs, *rest, **named)
        if not bool(torch.isfinite(loss)):
            last = last_whole(Path(str(self.args.output_dir)), self.args.world_size)
            kept = (
                "no checkpoint is before it"
                if last is None
                else f"{last.name} is kept, from which this command goes on"
            )
            raise LlmshrinkError(
                f"step {self.state.global_step + 1}: the loss of windows {windows} is {float(loss)} ({kept}); look at "
                "the text there, or start anew with a lower --lr and --overwrite"
            )
        return loss

    # A checkpoint, without the pickles that transformers would write and read.

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        assert output_dir is not None and self.model is not None
        state.write(Path(output_dir), state.MODEL, dict(self.model.state_dict()))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        assert self.optimizer is not None and self.lr_scheduler is not None
        if self.args.should_save:
            state.write(Path(output_dir), state.OPTIMIZER, self.optimizer.state_dict())
            state.write(Path(output_dir), state.SCHEDULE, self.lr_scheduler.state_dict())

    def _save_scaler(self, output_dir: str) -> None:
        assert self.accelerator.scaler is None, "float16 is never trained in"

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            state.seal(Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")

    def _save_rng_state(self, output_dir: str) -> None:
        state.write(Path(output_dir), state.random_numbers(self.args.process_index), state.random_state())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        assert self.model is not None
        self.model.load_state_dict(state.read(Path(resume_from_checkpoint), state.MODEL))

    def _load_best_model(self) -> None:
        # Its name alone: the path that was written is of where the workspace was then.
        best = Path(str(self.state.best_model_checkpoint)).name
        self._load_from_checkpoint(str(Path(str(self.args.output_dir)) / best))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            assert self.optimizer is not None and self.lr_scheduler is not None
            self.optimizer.load_state_dict(state.read(Path(checkpoint), state.OPTIMIZER))
            self.lr_scheduler.load_state_dict(state.read(Path(checkpoint), state.SCHEDULE))

    def _load_scaler(self, checkpoint: str | None) -> None:
        assert self.accelerator.scaler is None, "float16 is never trained in"

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state.set_random_state(state.read(Path(checkpoint), state.random_numbers(self.args.process_index)))


class Held(TrainerCallback):
    """Puts back what is held, after each step of the optimizer."""

    def __init__(self, hold: Callable[[], None]) -> None:
        self._hold = hold

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._hold()


class Told(TrainerCallback):
    """Hands what the Trainer logs to a function: (step, values)."""

    def __init__(self, tell: Callable[[int, dict[str, float]], None]) -> None:
        self._tell = tell

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs:
            self._tell(state.global_step, logs)
