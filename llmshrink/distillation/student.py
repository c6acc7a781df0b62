"""A checkpoint as a model that can be trained without changing its form.

What a student is on disk decides what may change of it:

- a plain checkpoint: the weights of the linears inside the blocks, and everything that is a vector (norms, biases).
  A weight that is exactly zero in a linear stays so: its gradient is zero, and it is zeroed again after each step. That
  holds the mask of a pruned model, and costs a dense one nothing;
- a quantized one, trained by its scales: codes and zero-points are buffers, a factor on every scale is the parameter;
- a quantized one, trained whole: what is rounded to the codes is a parameter too, in units of the code, and the
  rounding passes gradients straight through (Bengio et al. 2013), for codes inside their range.

Embeddings and the output layer stay as they are: the text at hand shows a small part of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from llmshrink_eval.listing import named
from torch import Tensor, nn

from llmshrink.checkpoint.decompressed import Decompressed
from llmshrink.checkpoint.files import read_config
from llmshrink.checkpoint.source import Source
from llmshrink.checkpoint.unchanged import Watched
from llmshrink.errors import CheckpointError, SourceError
from llmshrink.formats import kv_cache, stored
from llmshrink.formats.compressed_tensors import GroupedIntScheme
from llmshrink.formats.stored import Scheme
from llmshrink.methods.learned import ScaledLinear
from llmshrink.model.skeleton import Skeleton
from llmshrink.run.work import OFFSETS
from llmshrink.weights import GroupedInt

Train = Literal["weights", "scales"]
TRAINS: tuple[Train, ...] = get_args(Train)


@dataclass(eq=False)
class Student:
    """model: transformers' own, float32, what isn't trained without gradient. schemes: how its linears are stored.

    masked: linears of a plain checkpoint whose zeros are held -> which weights are kept, bool.
    """

    source: Source
    index: Watched
    model: Any
    key_of: dict[str, str]
    schemes: dict[str, Scheme]
    masked: dict[str, Tensor] = field(default_factory=dict)

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and parameter of all that changes."""
        return ((name, each) for name, each in self.model.named_parameters() if each.requires_grad)

    def hold(self) -> None:
        """Zero what is held at zero, after a step: an optimizer with moments of 8 bits moves it a little."""
        with torch.no_grad():
            for name, kept in self.masked.items():
                self.model.get_submodule(name).weight.mul_(kept)

    def restore(self) -> None:
        """Everything as the checkpoint has it, again."""
        with torch.no_grad():
            for module in self.model.modules():
                if isinstance(module, ScaledLinear):
                    module.gain.fill_(1.0)
                    if module.latent is not None:
                        module.latent.copy_(module.codes)
            for name, parameter in self.trained():
                key = self.key_of.get(name)
                if key is not None:
                    parameter.copy_(self.index.read(key))

    def settle(self) -> None:
        """Round every trained parameter to what the checkpoint will hold, so that what is judged is what is written."""
        with torch.no_grad():
            for name, module in self.model.named_modules():
                if isinstance(module, ScaledLinear):
                    assert name in self.schemes
                    module.freeze()
            for name, parameter in self.trained():
                key = self.key_of.get(name)
                if key is not None:
                    parameter.copy_(parameter.to(self.index.entry(key).dtype).float())

    def changed(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """A linear's or a vector's name, and its tensors as the checkpoint stores them."""
        for name, module in self.model.named_modules():
            if isinstance(module, ScaledLinear):
                scheme = self.schemes[name]
                yield name, stored.tensors(name, stored.as_stored(module.stored(), scheme))
        for name, parameter in self.trained():
            key = self.key_of.get(name)
            if key is not None:
                yield key, {key: parameter.detach().to(self.index.entry(key).dtype)}


def schemes_of(source: Source) -> dict[str, Scheme]:
    """How the linears of a checkpoint are stored. Raises SourceError for a form that can't be trained."""
    config = read_config(source.folder)
    try:
        found = dict(stored.schemes(config.get("quantization_config")))
    except CheckpointError as error:
        raise SourceError(f"{source.name}: can't be a student: {error}") from error
    if kv_cache.rounds(config.get("quantization_config")):
        raise SourceError(
            f"{source.name}: can't be a student: its keys and values are cached in FP8, by scales that were found "
            "for its codes as they are; teach first, and quantize the taught model with kv_cache fp8 instead"
        )
    rounded = next((name for name, scheme in found.items() if stored.activations_of(scheme)), None)
    if rounded is not None:
        raise SourceError(
            f"{source.name}: can't be a student: {rounded} rounds its inputs to 8 bits, which nothing can be trained "
            "through; quantize the taught model instead"
        )
    return found


def open_student(source: Source, *, train: Train | None, device: torch.device, config: Any) -> Student:
    """Read the whole checkpoint into float32 and decide what is trained.

    config: transformers', without quantization, as `runtime.load.config_of` gives it: nothing is dropped at random, for
    a student is held to what it computes.

    train: None is `scales` for a quantized checkpoint, else `weights`. Raises SourceError for scales that aren't there.
    """
    raw = read_config(source.folder)
    index = Watched.open(source.folder)
    with Decompressed(source.folder, raw, torch.float32, index) as reader:
        skeleton = Skeleton(config, reader, device=device, dtype=torch.float32)
        skeleton.load("")
    schemes = schemes_of(source)
    quantized = {name: scheme for name, scheme in schemes.items() if getattr(scheme, "group_size", None) is not None}
    chosen: Train = train or ("scales" if quantized else "weights")
    if chosen == "scales" and not quantized:
        raise SourceError(
            f"{source.name}: isn't quantized, so it has no scales to train; leave --train out, or weights"
        )
    student = Student(source, index, skeleton.model, dict(skeleton.key_of), schemes)
    offsets = _offsets(source.folder / OFFSETS) if chosen == "weights" else {}
    for name, scheme in quantized.items():
        whole = stored.whole(stored.read(name, index.read, scheme))
        assert isinstance(whole, GroupedInt)
        module = skeleton.model.get_submodule(name)
        sparse = not isinstance(scheme, GroupedIntScheme) or _is_two_of_four(whole.codes)
        scaled = ScaledLinear(whole, module.bias, latent=chosen == "weights", sparse=sparse).to(device)
        if name in offsets:
            scaled.offset(offsets[name].to(device))
        skeleton.model.set_submodule(name, scaled)
    choose(student, quantized=bool(quantized))
    index.close()  # it is opened again where the student is written
    return student


def _offsets(folder: Path) -> dict[str, Tensor]:
    """Linear -> what its codes were rounded from, as the run that made the student kept it; else they start there."""
    from safetensors.torch import load_file

    return {name: each for file in named(folder, "*.safetensors") for name, each in load_file(file).items()}


def _is_two_of_four(codes: Tensor) -> bool:
    """Whether no four consecutive inputs have more than two codes that aren't zero."""
    return codes.shape[1] % 4 == 0 and bool(((codes.view(codes.shape[0], -1, 4) != 0).sum(-1) <= 2).all())


def choose(student: Student, *, quantized: bool) -> None:
    """Set what has a gradient: vectors, scales and latents, and (of a plain checkpoint) the blocks' linears."""
    model = student.model
    outside = {id(each) for each in (model.get_input_embeddings(), model.get_output_embeddings())}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, module in model.named_modules():
        if id(module) in outside:
            continue
        if isinstance(module, ScaledLinear):
            for parameter in module.parameters():
                parameter.requires_grad_(True)
        elif isinstance(module, nn.Linear) and not quantized:
            module.weight.requires_grad_(True)
            if module.bias is not None:
                module.bias.requires_grad_(True)
            _hold_zeros(student, name, module)
        else:
            for parameter in module._parameters.values():
                if parameter is not None and parameter.dim() == 1:
                    parameter.requires_grad_(True)


def _hold_zeros(student: Student, name: str, module: nn.Linear) -> None:
    kept = module.weight != 0
    if not bool(kept.all()):
        student.masked[name] = kept
        module.weight.register_hook(lambda gradient: gradient * kept)
