"""What a recipe's steps may say: one frozen model for each thing that is done, and its patch for overrides."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveInt,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from llmshrink.recipe.fields import (
    BITSANDBYTES,
    Activations,
    Amount,
    Divergence,
    DropBy,
    Frozen,
    Importance,
    Ratios,
    ScaleSearch,
    Strength,
    Train,
    known_bits,
    known_group,
    known_method,
    known_pattern,
    known_pruner,
)


class Quantize(Frozen):
    """How a weight becomes grouped integers.

    method: `gptq` (uses calibration data) or `rtn` (rounds to nearest; needs none); or bitsandbytes' own, without data:
        `bnb-nf4`, `bnb-nf4-double` (its absmax in 8 bits too), `bnb-int8`, to whose fields there is no choice.
    bits: 2, 3, 4 or 8 per weight.
    group_size: consecutive inputs that share a scale; -1 is one group a row.
    symmetric: no zero-points.
    scale_search: how a group's scale is chosen: `minmax`, `mse`, `hessian` (squared error weighted by the Hessian's
        diagonal), `trial` (the sweep itself is tried with each candidate). rtn has no Hessian: minmax or mse.
    signed: scales may be negative, which gives the extra code to the heavier tail (symmetric only).
    act_order: the sweep goes from the loudest input to the quietest; nothing extra is stored.
    corrected: share of the earlier layers' error that is corrected here, 0 (none: one activation stream) to 1.
    corrected_damp: share of the mean of the Hessian's diagonal that is added to it in that correction.
    damp: the same in the sweep.
    block_size: columns that the sweep solves before it updates the rest.
    descent: times that every code is chosen again afterwards, with all others in place (coordinate descent).
    activations: what a linear's inputs are rounded to, token by token, where the result is computed: `none`, or `int8`
        (weights are 8-bit integers, one scale a row), or `fp8` (weights are FP8 E4M3 too; by rtn).
    smooth: with 8-bit activations, how much of what is loud in some channels of them moves into the weights first, from
        0 to 1 (SmoothQuant's alpha), where a norm feeds the linear; `none`: nothing moves.
    """

    method: Annotated[str, Field(validate_default=True)] = "gptq"
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    scale_search: ScaleSearch = "trial"
    signed: bool = True
    act_order: bool = True
    corrected: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    corrected_damp: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    damp: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    block_size: PositiveInt = 128
    descent: NonNegativeInt = 0
    activations: Activations = "none"
    smooth: Strength = "none"

    _bits = field_validator("bits")(known_bits)
    _group = field_validator("group_size")(known_group)
    _method = field_validator("method")(known_method)

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_method(cls, data: object) -> object:
        """rtn has neither a Hessian nor a sweep, and 8-bit products have one grid, so their defaults differ."""
        if isinstance(data, dict) and data.get("activations", "none") in ("int8", "fp8"):
            data = {**_of_eight_bits(data["activations"]), **data}
        if isinstance(data, dict) and data.get("method") == "rtn":
            return {"scale_search": "mse", "act_order": False, "corrected": 0.0, **data}
        if isinstance(data, dict) and data.get("method") in BITSANDBYTES:
            return {**_of_bitsandbytes(data["method"]), **data}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.smooth != "none" and self.activations == "none":
            raise PydanticCustomError(
                "smoothing",
                "smooth {smooth} is for products of 8 bits, and activations are none: nothing of them is rounded; set "
                "activations: int8 or fp8, or leave smooth out",
                {"smooth": self.smooth},
            )
        if self.method in BITSANDBYTES:
            fixed = _of_bitsandbytes(self.method)
            other = [f"{name}: {_said(getattr(self, name))}" for name in fixed if getattr(self, name) != fixed[name]]
            if other:
                raise PydanticCustomError(
                    "bitsandbytes",
                    "method {method} is {fixed}, so it can't follow {other}; leave these out, or take method gptq",
                    {
                        "method": self.method,
                        "fixed": ", ".join(f"{name} {_said(value)}" for name, value in list(fixed.items())[:2]),
                        "other": ", ".join(other),
                    },
                )
            return self
        if self.activations != "none":
            self._check_eight_bits()
        if self.method != "rtn":
            return self
        unread = [
            f"{name}: {value}"
            for name, value, idle in (
                ("scale_search", self.scale_search, self.scale_search in ("minmax", "mse")),
                ("act_order", str(self.act_order).lower(), not self.act_order),
                ("corrected", self.corrected, self.corrected == 0.0),
                ("descent", self.descent, self.descent == 0),
            )
            if not idle
        ]
        if unread:
            raise PydanticCustomError(
                "rtn",
                "method rtn reads no statistics, so it can't follow {unread}; use scale_search mse or minmax, "
                "act_order false, corrected 0, descent 0, or method gptq",
                {"unread": ", ".join(unread)},
            )
        return self

    def _check_eight_bits(self) -> None:
        fixed = _of_eight_bits(self.activations)
        other = [f"{name}: {_said(getattr(self, name))}" for name in fixed if getattr(self, name) != fixed[name]]
        if other:
            raise PydanticCustomError(
                "activations",
                "activations {kind} takes {fixed}, so it can't follow {other}; leave these out, or activations",
                {
                    "kind": self.activations,
                    "fixed": ", ".join(f"{name} {_said(value)}" for name, value in fixed.items()),
                    "other": ", ".join(other),
                },
            )


def _of_eight_bits(activations: object) -> dict[str, object]:
    """The fields that products of 8 bits fix."""
    grid: dict[str, object] = {"bits": 8, "group_size": -1, "symmetric": True, "signed": False}
    return grid if activations == "int8" else {**grid, "method": "rtn", "scale_search": "minmax"}


def _of_bitsandbytes(method: str) -> dict[str, object]:
    """The fields that one of its methods fixes."""
    bits, group_size = (8, -1) if method == "bnb-int8" else (4, 64)
    grid = {"bits": bits, "group_size": group_size, "symmetric": True, "signed": False, "scale_search": "minmax"}
    return {**grid, "act_order": False, "corrected": 0.0, "descent": 0, "activations": "none"}


def _said(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


class QuantizePatch(Frozen):
    """The fields of Quantize that an override changes; the others stay as the step says."""

    method: str | None = None
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    scale_search: ScaleSearch | None = None
    signed: bool | None = None
    act_order: bool | None = None
    corrected: Annotated[float | None, Field(ge=0.0, le=1.0)] = None
    corrected_damp: Annotated[float | None, Field(gt=0.0, lt=1.0)] = None
    damp: Annotated[float | None, Field(gt=0.0, lt=1.0)] = None
    block_size: PositiveInt | None = None
    descent: NonNegativeInt | None = None
    activations: Activations | None = None
    smooth: Strength | None = None

    _bits = field_validator("bits")(known_bits)
    _group = field_validator("group_size")(known_group)
    _method = field_validator("method")(known_method)

    def onto(self, base: Quantize) -> Quantize:
        """`base` with this patch's fields; a change of method brings the new method's defaults with it."""
        patch = self.model_dump(exclude_none=True)
        kind = patch.get("activations", base.activations)
        method = patch.get("method", "rtn" if kind == "fp8" else None)
        fields = switch_method(base.model_dump(), method)
        if method is not None:
            fields = {**fields, "method": method}
        if kind != base.activations:
            # Products of 8 bits have a grid of their own; weights alone keep it, unless the patch has another.
            idle = ("smooth",) if kind == "none" else (*GRID_FIELDS, "scale_search")
            fields = {name: value for name, value in fields.items() if name not in idle}
        return Quantize.model_validate(fields | patch)


class Prune(Frozen):
    """Which weights become zero, and what the others become.

    method: `alps` (ADMM), `sparsegpt` (a sweep), `wanda` or `magnitude` (scores); all use calibration data.
    pattern: "n:m", n of every m consecutive inputs are kept (with quotes: YAML takes 2:4 for a time of day).
    ratio: instead of a pattern, the share of weights that goes, anywhere.
    ratios: with a ratio, whether every matrix has it (`uniform`), or each its own, by what pruning it does to its
        block's output (`by-error`, which takes a pass over the original first); of all together that share goes. An
        override's ratio is uniform unless it says otherwise.
    repair: least squares on what is kept, to within half a percent of the least error.
    corrected: share of the earlier layers' error that is corrected here, 0 (none: one activation stream) to 1.
    corrected_damp: share of the mean of the Hessian's diagonal that is added to it in that correction.
    damp: the same in the method and the repair.
    """

    method: Annotated[str, Field(validate_default=True)] = "alps"
    pattern: str | None = None
    ratio: Annotated[float | None, Field(gt=0.0, lt=1.0)] = None
    ratios: Ratios | None = None
    repair: bool = True
    corrected: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    corrected_damp: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    damp: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.01

    _method = field_validator("method")(known_pruner)
    _pattern = field_validator("pattern")(known_pattern)

    @model_validator(mode="before")
    @classmethod
    def _ratios_of_a_ratio(cls, data: object) -> object:
        """A pattern has none."""
        if isinstance(data, dict) and data.get("ratio") is not None:
            return {"ratios": "uniform", **data}
        return data

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.pattern is None) == (self.ratio is None):
            raise PydanticCustomError(
                "prune", 'says neither or both of pattern and ratio; give pattern: "2:4", or ratio: 0.5'
            )
        if self.ratio is None and self.ratios is not None:
            raise PydanticCustomError("ratios", "has ratios and a pattern; give ratio: 0.5, or leave ratios out")
        return self


class PrunePatch(Frozen):
    """The fields of Prune that an override changes; a pattern takes the place of a ratio, and the other way round."""

    method: str | None = None
    pattern: str | None = None
    ratio: Annotated[float | None, Field(gt=0.0, lt=1.0)] = None
    ratios: Ratios | None = None
    repair: bool | None = None
    corrected: Annotated[float | None, Field(ge=0.0, le=1.0)] = None
    corrected_damp: Annotated[float | None, Field(gt=0.0, lt=1.0)] = None
    damp: Annotated[float | None, Field(gt=0.0, lt=1.0)] = None

    _method = field_validator("method")(known_pruner)
    _pattern = field_validator("pattern")(known_pattern)

    def onto(self, base: Prune) -> Prune:
        """`base` with this patch's fields."""
        patch = self.model_dump(exclude_none=True)
        fields = base.model_dump(exclude_none=True)
        if patch.keys() & {"pattern", "ratio"}:
            # A site's own ratio is what it gets, unless the override says that it is to be found.
            fields = {name: value for name, value in fields.items() if name not in ("pattern", "ratio", "ratios")}
        return Prune.model_validate(fields | patch)


class Depth(Frozen):
    """Which blocks go, whole.

    drop: how many: a number, or a share of them.
    by: `angular`, the angle between what a block gets and what it puts out; or `loss`, how far the model is from the
        original without it.
    """

    drop: Amount = 0.25
    by: DropBy = "angular"


class Width(Frozen):
    """How many FFN channels and KV groups stay, the same in every block.

    channels: of the FFN: a number, or a share of them; left out: all.
    kv_groups: heads of keys and values, with the query heads that read them: a number, or a share; left out: all.
    importance: by which they are chosen: `activations` or `magnitude`.
    repair: least squares on what stays of down_proj and o_proj.
    corrected: share of the earlier layers' error that is corrected by it, 0 (none: one activation stream) to 1.
    damp: share of the mean of the Hessian's diagonal that is added to it.
    """

    channels: Amount | None = None
    kv_groups: Amount | None = None
    importance: Importance = "activations"
    repair: bool = True
    corrected: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    damp: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.001

    @model_validator(mode="after")
    def _takes_something(self) -> Self:
        if self.channels is None and self.kv_groups is None:
            raise PydanticCustomError("width", "takes nothing away; give channels: 0.75, kv_groups: 0.5, or both")
        return self


class Tune(Frozen):
    """How each quantized block is trained towards the original's output, in the same visit: codes and scales both.

    steps: of Adam, for each block; windows: of the calibration text in one.
    lr: learning rate of what codes are rounded from, in units of a code. scale_lr: of scales, relative to each.
    """

    steps: PositiveInt = 60
    windows: PositiveInt = 4
    lr: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.002
    scale_lr: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.0005


class Distill(Frozen):
    """How the result is taught by the model that it was made of: always the last step.

    steps: of the optimizer; batch_size: windows in one. generated_tokens: text that the model writes, beside the
        calibration text.
    mask_prompts: learn only what the assistant says; left out: where the text has conversations or completions.
    alpha, temperature, divergence, beta: the loss; hidden_weight: of hidden states in it (docs/distillation.md).
    train: `scales` or `weights`; left out: the scales of a quantized result, the weights of any other.
    lr: learning rate of weights; left out: 0.77 over the width of the hidden states. scale_lr: of scales, relative.
    """

    steps: PositiveInt = 600
    batch_size: PositiveInt = 8
    generated_tokens: NonNegativeInt = 0
    alpha: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    divergence: Divergence = "forward_kl"
    beta: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    hidden_weight: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    mask_prompts: bool | None = None
    train: Train | None = None
    lr: Annotated[float | None, Field(gt=0.0, lt=1.0)] = None
    scale_lr: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.01


class Step(Frozen):
    """One thing that is done to the model: weights are pruned, or quantized; quantized blocks are tuned; blocks or
    widths are taken away; or the result is taught by the original."""

    quantize: Quantize | None = None
    prune: Prune | None = None
    tune: Tune | None = None
    depth: Depth | None = None
    width: Width | None = None
    distill: Distill | None = None

    @model_validator(mode="after")
    def _is_one_thing(self) -> Self:
        if len(self.kinds) != 1:
            raise PydanticCustomError(
                "step",
                "is nothing or two things; give one of quantize: {...}, prune: {...}, tune: {...}, depth: {...}, "
                "width: {...}, distill: {...}",
            )
        return self

    @property
    def kinds(self) -> list[str]:
        """What it does, by the name of its field."""
        return [name for name in type(self).model_fields if getattr(self, name) is not None]


METHOD_FIELDS = ("scale_search", "act_order", "corrected", "corrected_damp", "damp", "block_size", "descent")
GRID_FIELDS = ("bits", "group_size", "symmetric", "signed")


def switch_method(fields: dict[str, object], method: object) -> dict[str, object]:
    """`fields` for another method: what only the old method reads is left out, so that the new one's defaults hold."""
    if method is None or method == fields.get("method", "gptq"):
        return fields
    # bitsandbytes has one grid a method, which is nothing that the next method should keep, nor the other way round.
    own_grid = method in BITSANDBYTES or fields.get("method") in BITSANDBYTES
    idle = (*METHOD_FIELDS, *GRID_FIELDS) if own_grid else METHOD_FIELDS
    return {name: value for name, value in fields.items() if name not in idle}
