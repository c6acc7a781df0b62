"""A model whose parameters are on the meta device until a block is visited.

The modules are transformers' own, built from the config without allocating a parameter; buffers (rotary tables) are
real, since no file holds them. `load` gives one module its parameters straight from the checkpoint's files, `release`
takes them away. Nothing else in llmshrink ever holds more than one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, Protocol

import torch
from llmshrink_eval.configfile import check_fits
from llmshrink_eval.errors import EvalError, one_line
from torch import Tensor, nn

from llmshrink.checkpoint.names import map_names
from llmshrink.errors import CheckpointError
from llmshrink.model.ahead import Ahead


class TensorReader(Protocol):
    """What a skeleton needs of a checkpoint: its keys, and a tensor by key (own memory, the stored dtype)."""

    def keys(self) -> Any: ...

    def read(self, key: str) -> Tensor: ...


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside keep their buffers but get parameters without storage.

    Linears and embeddings, which own no buffers, never allocate: memory that was given back would leave a hole in the
    heap for each of them, and weights that are loaded later would touch one hole after another, as if all were held.
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        register(module, name, param)

    def unallocated(init: Any) -> Any:
        return wraps(init)(lambda *args, **kwargs: init(*args, **{"device": "meta", **kwargs}))

    with ExitStack() as stack:
        stack.enter_context(_replaced(nn.Module, "register_parameter", on_meta))
        for module in (nn.Linear, nn.Embedding):
            stack.enter_context(_replaced(module, "__init__", unallocated(module.__init__)))
        yield


@contextmanager
def _replaced(owner: type, name: str, value: Any) -> Iterator[None]:
    """While open, a class has another method."""
    own = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, own)


class Skeleton:
    """model: the transformers model, parameters on meta. key_of: parameter name -> checkpoint key.

    tied: parameter name -> that of the parameter whose tensor it shares. ahead: reads what `expect` names while the
    device computes; None on the CPU.
    """

    def __init__(
        self,
        config: Any,
        reader: TensorReader,
        *,
        device: torch.device,
        dtype: torch.dtype,
        trust_remote_code: bool = False,
    ) -> None:
        from transformers import AutoModelForCausalLM

        keys = list(reader.keys())
        try:
            check_fits(config, tensors=len(keys))
            with _parameters_on_meta():
                model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        except EvalError as error:
            raise CheckpointError(str(error)) from error
        except Exception as error:  # of whatever type the model's own code raises
            raise CheckpointError(
                f"config.json: no model can be built from it ({type(error).__name__}: {one_line(error)}); correct it, "
                "or download it again"
            ) from error
        self.model: Any = model.eval()
        self.model.config.use_cache = False
        self.reader = reader
        self.device = device
        self.dtype = dtype
        self.ahead = Ahead(device) if device.type == "cuda" else None
        for module in self.model.modules():
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)
        self.tied: dict[str, str] = dict(getattr(self.model, "all_tied_weights_keys", None) or {})
        self.key_of = map_names(
            [name for name, _ in self.model.named_parameters(remove_duplicate=False)],
            keys,
            base_prefix=self.model.base_model_prefix,
            tied=self.tied,
            why_not=getattr(reader, "why_not", None),
        )

    def load(
        self, *prefixes: str, check: Callable[[str, Tensor], None] | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """Make the parameters under the modules `prefixes` real; returns them by checkpoint key, in the stored dtype.

        The returned tensors share memory with the parameters where no cast was needed: they are not to be written to.
        check: called with (key, tensor) for each tensor read. dtype: of the parameters, in place of the skeleton's.
        Raises CheckpointError when a tensor's shape isn't the config's.
        """
        shared: dict[str, nn.Parameter] = {}
        stored: dict[str, Tensor] = {}
        for owner, name, full in self._slots(prefixes):
            key = self.key_of[full]
            if key in shared:
                owner._parameters[name] = shared[key]
                continue
            stored[key], there = self._take(key)
            if check is not None:
                check(key, stored[key])
            real = there.to(device=self.device, dtype=dtype or self.dtype)
            expected = owner._parameters[name]
            assert expected is not None
            if real.shape != expected.shape:
                raise CheckpointError(
                    f"{key}: has shape {list(real.shape)}, config.json makes it {list(expected.shape)}; "
                    "the two don't belong together: download the model again"
                )
            # One Parameter a key: tied modules stay tied, and a tied tensor is read once.
            owner._parameters[name] = shared[key] = nn.Parameter(real, requires_grad=False)
        return stored

    def expect(self, prefix: str) -> None:
        """Say that the module `prefix` is loaded next, from the reader of now."""
        if self.ahead is not None:
            self.ahead.expect([self.key_of[full] for _, _, full in self._slots((prefix,))], self.reader.read)

    def _take(self, key: str) -> tuple[Tensor, Tensor]:
        """A tensor as stored, and the one that a parameter is made of: the same, or its copy on the device."""
        taken = None if self.ahead is None else self.ahead.take(key)
        if taken is not None:
            return taken
        read = self.reader.read(key)
        return read, read

    def release(self, *prefixes: str) -> None:
        """Let the parameters under the modules `prefixes` go."""
        for owner, name, _ in self._slots(prefixes):
            parameter = owner._parameters[name]
            assert parameter is not None
            owner._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    def outside(self, block_prefix: str) -> list[str]:
        """Modules outside the blocks that own parameters directly (embedding, final norm, head), by name."""
        return [
            name
            for name, module in self.model.named_modules()
            if any(p is not None for p in module._parameters.values()) and not name.startswith(block_prefix + ".")
        ]

    def _slots(self, prefixes: tuple[str, ...]) -> Iterator[tuple[nn.Module, str, str]]:
        """(module, parameter's name in it, full name) of every parameter under the prefixes."""
        for prefix in prefixes:
            for child_name, child in self.model.get_submodule(prefix).named_modules(remove_duplicate=False):
                for name, parameter in child._parameters.items():
                    if parameter is not None:
                        yield child, name, ".".join(part for part in (prefix, child_name, name) if part)
