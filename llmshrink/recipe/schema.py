"""The recipe, as a frozen model: what its YAML may say, and nothing else.

A recipe says once what happens to every linear weight inside the model's blocks (`steps`: pruned, quantized, or pruned
and quantized in one visit; or, alone, blocks or widths are taken away; and at the end the original may teach what came
of it), which of them stay as they are (`ignore`), and
where a pattern asks for something else (`overrides`; a later one wins over an earlier one). A pattern is matched
against the site's full module name (`model.layers.0.mlp.down_proj`), case-sensitively, with `*`, `?` and `[...]`; a
bare name such as `down_proj` also means every module whose last part it is.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from llmshrink.recipe.fields import BITSANDBYTES, Frozen, KvCache, Text
from llmshrink.recipe.steps import Depth, Distill, Prune, PrunePatch, Quantize, QuantizePatch, Step, Tune, Width

WORKS = (
    ["quantize"],
    ["quantize", "tune"],
    ["prune"],
    ["prune", "quantize"],
    ["prune", "quantize", "tune"],
    ["depth"],
    ["width"],
)
"""What a recipe may do, before it may distill."""


class Override(Frozen):
    """What happens instead to the sites that `match` matches: other fields, or nothing at all (`ignore`)."""

    match: Text
    quantize: QuantizePatch | None = None
    prune: PrunePatch | None = None
    ignore: bool = False

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        if self.ignore == (self.quantize is not None or self.prune is not None):
            raise PydanticCustomError(
                "override",
                "says nothing or two things; give either `quantize: {...}` (or `prune: {...}`) or `ignore: true`",
            )
        return self


class Recipe(Frozen):
    """A whole recipe, resolved: every default is a value."""

    name: Text
    summary: str = ""
    steps: Annotated[tuple[Step, ...], Field(strict=False, max_length=16)]
    ignore: Annotated[tuple[Text, ...], Field(strict=False)] = ("lm_head",)
    overrides: Annotated[tuple[Override, ...], Field(strict=False)] = ()
    kv_cache: KvCache = "none"

    @field_validator("steps")
    @classmethod
    def _prune_then_quantize(cls, steps: tuple[Step, ...]) -> tuple[Step, ...]:
        kinds = [kind for step in steps for kind in step.kinds]
        work = kinds[:-1] if kinds[-1:] == ["distill"] else kinds
        if (work or not kinds) and work not in WORKS:
            smaller = {"depth", "width"}.intersection(kinds)
            raise PydanticCustomError(
                "steps",
                "{found}; a recipe quantizes, prunes, or prunes and then quantizes (overrides say what differs where), "
                "may tune what it quantizes, and may distill at the end{apart}",
                {
                    "found": f"are {', '.join(kinds)}" if kinds else "there are none",
                    "apart": ", and one that takes blocks or widths away does only that: its result is a plain model, "
                    "which takes the next recipe"
                    if smaller
                    else "",
                },
            )
        return steps

    @model_validator(mode="after")
    def _overrides_change_a_step(self) -> Self:
        if self.structured and (self.overrides or self.ignore != ("lm_head",)):
            raise PydanticCustomError(
                "structured",
                "a depth or width step is the same for the whole model, as its config.json is: leave out {fields}",
                {"fields": "overrides" if self.overrides else "what ignore lists besides lm_head"},
            )
        if self.tune is not None and self.quantize is not None and self.quantize.method in BITSANDBYTES:
            raise PydanticCustomError(
                "tune",
                "method {method} has a fixed grid, which can't be tuned; leave `tune` out, or take method gptq",
                {"method": self.quantize.method},
            )
        self._check_products()
        self._check_cache()
        for number, override in enumerate(self.overrides):
            for kind in ("quantize", "prune"):
                if getattr(override, kind) is not None and getattr(self, kind) is None:
                    raise PydanticCustomError(
                        "override_step",
                        "overrides[{number}] changes a {kind} step, and the recipe has none; add one, or leave it out",
                        {"number": number, "kind": kind},
                    )
        return self

    def _check_products(self) -> None:
        """8-bit products aren't trained: what trains multiplies by weights of 16 bits."""
        trains = "tune" if self.tune is not None else "distill" if self.distill is not None else None
        patches = [override.quantize for override in self.overrides if override.quantize is not None]
        kinds = [each.activations for each in (self.quantize, *patches) if each is not None]
        rounded = next((kind for kind in kinds if kind in ("int8", "fp8")), None)
        if trains is not None and rounded is not None:
            raise PydanticCustomError(
                "activations",
                "activations {kind} can't be trained by a {trains} step; leave one of the two out",
                {"kind": rounded, "trains": trains},
            )

    def _check_cache(self) -> None:
        """A cache of FP8 goes with quantized weights, in a checkpoint that says so, and isn't trained through."""
        if self.kv_cache == "none":
            return
        fault = None
        if self.quantize is None:
            fault = "needs a quantize step: a checkpoint of plain weights has no word for it; leave it out"
        elif self.distill is not None:
            fault = "can't be taught by a distill step; leave one of the two out"
        elif self.quantize.method in BITSANDBYTES:
            fault = "has no place in bitsandbytes' checkpoints; leave it out, or take method gptq or rtn"
        if fault is not None:
            raise PydanticCustomError("kv_cache", "kv_cache {kind} {fault}", {"kind": self.kv_cache, "fault": fault})

    @property
    def quantize(self) -> Quantize | None:
        """What the recipe's quantize step says, if it has one."""
        return next((step.quantize for step in self.steps if step.quantize is not None), None)

    @property
    def prune(self) -> Prune | None:
        """What the recipe's prune step says, if it has one."""
        return next((step.prune for step in self.steps if step.prune is not None), None)

    @property
    def tune(self) -> Tune | None:
        """What the recipe's tune step says, if it has one."""
        return next((step.tune for step in self.steps if step.tune is not None), None)

    @property
    def distill(self) -> Distill | None:
        """What the recipe's distill step says, if it has one."""
        return self.steps[-1].distill

    @property
    def teaches_codes(self) -> bool:
        """Whether codes that it finds are trained on at the end, so that what they were rounded from has to be kept."""
        return self.quantize is not None and self.distill is not None and self.distill.train == "weights"

    @property
    def depth(self) -> Depth | None:
        """What the recipe's depth step says, if it has one."""
        return self.steps[0].depth

    @property
    def width(self) -> Width | None:
        """What the recipe's width step says, if it has one."""
        return self.steps[0].width

    @property
    def structured(self) -> bool:
        """Whether the result is a model of another shape."""
        return self.depth is not None or self.width is not None
