"""Run as a script in a process of its own: what holds of the plugin inside vLLM, as JSON on the last line.

Tensor parallelism is played by hand: the layers of each of two ranks are built and loaded one after the other with
vLLM's own classes, which are told their rank, and the ranks' products put together as vLLM's collectives would.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

HIDDEN, HEAD, HEADS, KV_HEADS, WIDE = 128, 32, 4, 2, 192
Stored = dict[str, tuple[dict[str, Tensor], Tensor]]


def registration() -> dict[str, Any]:
    import vllm.engine.arg_utils  # noqa: F401  (what every process of vLLM has by then)

    from llmshrink.serving.vllm import compat, plugin

    loaded, start = compat.KERNELS in sys.modules, time.process_time()
    plugin.register()
    seconds = time.process_time() - start
    plugin.register()
    from vllm.model_executor.kernels.linear import _POSSIBLE_KERNELS
    from vllm.model_executor.layers.quantization import get_quantization_config

    names = {platform.name: [kernel.__name__ for kernel in kernels] for platform, kernels in _POSSIBLE_KERNELS.items()}
    return {
        "kernels_loaded_before": loaded,
        "seconds": seconds,
        "config": get_quantization_config("llmshrink").__name__,
        "kernels": names,
    }


def ranks(bits: int, group_size: int | None) -> dict[str, float]:
    """The largest relative error of two ranks' products put together, for each kind of layer."""
    from sparse24 import described, stored_linear, two_of_four

    from llmshrink.serving.vllm.config import LlmshrinkConfig

    shapes = {
        "self_attn.q_proj": (HEADS * HEAD, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
        "mlp.gate_proj": (WIDE, HIDDEN),
        "mlp.up_proj": (WIDE, HIDDEN),
        "mlp.down_proj": (HIDDEN, WIDE),
    }
    generator = torch.Generator().manual_seed(bits)
    stored: Stored = {}
    for name, shape in shapes.items():
        weight = two_of_four(torch.randn(shape, generator=generator))
        stored[f"model.layers.0.{name}"] = stored_linear(weight, bits, group_size, torch.bfloat16)
    config = LlmshrinkConfig.from_config(described(list(stored), bits, group_size, ["lm_head"]))
    config.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    x = torch.randn(5, HIDDEN, generator=generator).bfloat16()
    wide = torch.randn(5, WIDE, generator=generator).bfloat16()
    found: dict[str, list[Tensor]] = {"qkv": [], "gate_up": [], "o": [], "down": []}
    for rank in range(2):
        with as_rank(rank):
            layers = built(config)
            load(layers, stored)
            for name, layer in layers.items():
                part = wide if name == "down" else x
                if name in ("o", "down"):
                    part = part.chunk(2, dim=-1)[rank]
                found[name].append(layer.quant_method.apply(layer, part))
    return errors(found, stored, x, wide)


@contextmanager
def as_rank(rank: int, size: int = 2) -> Iterator[None]:
    from vllm.config import VllmConfig, set_current_vllm_config

    modules = ("vllm.model_executor.layers.linear", "vllm.model_executor.parameter")
    with set_current_vllm_config(VllmConfig()):
        for module in modules:
            patch(f"{module}.get_tensor_model_parallel_rank", lambda: rank).start()
            patch(f"{module}.get_tensor_model_parallel_world_size", lambda: size).start()
        try:
            yield
        finally:
            patch.stopall()


def built(config: Any) -> dict[str, Any]:
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear

    common: dict[str, Any] = {"bias": False, "params_dtype": torch.bfloat16, "quant_config": config}
    prefix = "model.layers.0"
    return {
        "qkv": QKVParallelLinear(HIDDEN, HEAD, HEADS, KV_HEADS, prefix=f"{prefix}.self_attn.qkv_proj", **common),
        "gate_up": MergedColumnParallelLinear(HIDDEN, [WIDE, WIDE], prefix=f"{prefix}.mlp.gate_up_proj", **common),
        "o": RowParallelLinear(HEADS * HEAD, HIDDEN, prefix=f"{prefix}.self_attn.o_proj", **common),
        "down": RowParallelLinear(WIDE, HIDDEN, prefix=f"{prefix}.mlp.down_proj", **common),
    }


def load(layers: dict[str, Any], stored: Stored) -> None:
    """As vLLM's Llama does: every part of a fused layer by its shard's name."""
    parts = [("qkv", f"self_attn.{shard}_proj", shard) for shard in ("q", "k", "v")]
    parts += [("gate_up", "mlp.gate_proj", 0), ("gate_up", "mlp.up_proj", 1)]
    parts += [("o", "self_attn.o_proj", None), ("down", "mlp.down_proj", None)]
    for name, site, shard in parts:
        for suffix, tensor in stored[f"model.layers.0.{site}"][0].items():
            parameter = getattr(layers[name], suffix)
            parameter.weight_loader(parameter, tensor, *([] if shard is None else [shard]))
    for layer in layers.values():
        layer.quant_method.process_weights_after_loading(layer)


def errors(found: dict[str, list[Tensor]], stored: Stored, x: Tensor, wide: Tensor) -> dict[str, float]:
    def dense(site: str) -> Tensor:
        return stored[f"model.layers.0.{site}"][1].double()

    def halves(*sites: str) -> list[Tensor]:
        return [torch.cat([dense(site).chunk(2)[rank] for site in sites]) for rank in range(2)]

    expected = {
        "qkv": torch.cat([x.double() @ half.T for half in halves(*(f"self_attn.{s}_proj" for s in "qkv"))], -1),
        "gate_up": torch.cat([x.double() @ half.T for half in halves("mlp.gate_proj", "mlp.up_proj")], -1),
        "o": x.double() @ dense("self_attn.o_proj").T,
        "down": wide.double() @ dense("mlp.down_proj").T,
    }
    whole = {name: torch.cat(parts, -1) if name in ("qkv", "gate_up") else sum(parts) for name, parts in found.items()}
    return {
        name: float((torch.as_tensor(whole[name]).double() - right).norm() / right.norm())
        for name, right in expected.items()
    }


def grouped(
    bits: int,
    *,
    symmetric: bool,
    layout: str,
    group: int = 64,
    dtype: torch.dtype = torch.bfloat16,
) -> float:
    """The largest error of our kernel for grouped integers, in units of the one that is allowed.

    layout: of the two in which vLLM has weights.
    """
    from llmshrink_kernels.wna16.naive import allowed_error
    from packed import rounded
    from vllm.scalar_type import scalar_types

    from llmshrink.formats.bitpack import pack
    from llmshrink.formats.compressed_tensors import GroupedIntScheme
    from llmshrink.serving.vllm.wna16 import LlmshrinkLinearKernel

    rows, columns = 96, 256
    weight = rounded(torch.randn(rows, columns).to(dtype), GroupedIntScheme(bits, group, symmetric))
    kind = f"uint{bits}b{1 << (bits - 1)}" if symmetric else f"uint{bits}"
    asked = SimpleNamespace(
        full_weight_shape=(columns, rows),
        partition_weight_shape=(columns, rows),
        weight_type=getattr(scalar_types, kind),
        act_type=dtype,
        group_size=group,
        zero_points=not symmetric,
        out_type=None,
    )
    assert LlmshrinkLinearKernel.can_implement(asked) == (True, None)
    layer = torch.nn.Module()
    turned = layout == "gptq"
    tensors = {"weight_packed": pack(weight.codes, bits), "weight_scale": weight.scale}
    if weight.zero_point is not None:
        tensors["weight_zero_point"] = pack(weight.zero_point.t().contiguous(), bits).t().contiguous()
    for name, tensor in tensors.items():
        parameter = torch.nn.Parameter(tensor.t().contiguous() if turned else tensor, requires_grad=False)
        parameter.input_dim, parameter.output_dim = (0, 1) if turned else (1, 0)  # type: ignore[attr-defined]
        layer.register_parameter(name, parameter)
    kernel = LlmshrinkLinearKernel(asked, "weight_packed", "weight_scale", "weight_zero_point")
    kernel.process_weights_after_loading(layer)
    dense, errors = weight.dequantize(torch.float32).double(), []
    for count in (1, 7, 300):
        x = torch.randn(count, columns).to(dtype)
        wrong = (kernel.apply_weights(layer, x).double() - x.double() @ dense.T).abs()
        errors.append((wrong / allowed_error(x, dense, dtype)).max())
    bias = torch.randn(rows).to(dtype)
    assert torch.equal(kernel.apply_weights(layer, x, bias), kernel.apply_weights(layer, x) + bias)
    return float(max(errors))


def chosen() -> dict[str, str]:
    """The kernels that vLLM picks, by the kind of layer."""
    from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel, init_int8_linear_kernel
    from vllm.scalar_type import scalar_types

    def of(bits: int, group: int, dtype: torch.dtype, *, symmetric: bool = True) -> str:
        kind = getattr(scalar_types, f"uint{bits}b{1 << (bits - 1)}" if symmetric else f"uint{bits}")
        shape = (256, 96)
        return choose_mp_linear_kernel(MPLinearLayerConfig(shape, shape, kind, dtype, group, not symmetric)).__name__

    found = {
        "int4": of(4, 128, torch.bfloat16),
        "int4 in float16": of(4, -1, torch.float16),
        "int4 with zero-points": of(4, 32, torch.bfloat16, symmetric=False),
        "int8 weights": of(8, 128, torch.bfloat16),
    }
    for name, static in (("int8 products", False), ("int8 products, static", True)):
        found[name] = type(init_int8_linear_kernel(True, static, True, "a.down_proj")).__name__
    return found


def int8_products() -> float:
    """The largest error of what vLLM picks for int8 products, of the largest codes, in units of the allowed."""
    from vllm.model_executor.kernels.linear import init_int8_linear_kernel

    from llmshrink.weights.eight_bit_product import tolerance

    kernel = init_int8_linear_kernel(True, False, True, "a.down_proj")
    layer = torch.nn.Module()
    layer.bias, layer.logical_widths = None, [48]  # type: ignore[assignment]
    scale = torch.full((48, 1), 2.0**-7)
    layer.register_parameter("weight", torch.nn.Parameter(torch.full((48, 128), 127, dtype=torch.int8), False))
    layer.register_parameter("weight_scale", torch.nn.Parameter(scale.clone(), False))
    layer.input_scale = layer.input_zero_point = layer.azp_adj = None  # type: ignore[assignment]
    torch.set_default_dtype(torch.bfloat16)
    kernel.process_weights_after_loading(layer)
    torch.set_default_dtype(torch.float32)
    x = torch.full((5, 128), 127.0).bfloat16()
    exact = torch.full((5, 48), 128 * 127.0 * 127 * 2**-7, dtype=torch.float64)
    dense = torch.full((48, 128), 127.0 * 2**-7, dtype=torch.float64)
    wrong = (kernel.apply_weights(layer, x).double() - exact).abs()
    # vLLM's own rounds its scales once more.
    return float((wrong / (2 * tolerance(x.double(), dense, torch.bfloat16))).max())


def to_amx(model: torch.dtype) -> list[int]:
    """Which int8 weights, by their outputs, vLLM takes to AMX on a CPU that has it, for a model of that dtype."""
    from vllm.model_executor.kernels.linear.scaled_mm import cpu

    own = torch.cpu._is_amx_tile_supported
    torch.cpu._is_amx_tile_supported = lambda: True
    torch.set_default_dtype(model)
    try:
        return [outputs for outputs in (16, 32, 40, 48, 96) if cpu.check_cpu_sgl_kernel(outputs, 128, torch.int8)]
    finally:
        torch.cpu._is_amx_tile_supported = own
        torch.set_default_dtype(torch.float32)


def on_this_cpu() -> dict[str, Any]:
    """What vLLM has here, and what ours makes of every kind of int4."""
    registration()
    from llmshrink.serving.processor import processor_here
    from llmshrink.serving.vllm import compat

    kinds = [
        (group, symmetric, dtype)
        for group in (32, 64, 128, -1)
        for symmetric in (True, False)
        for dtype in (torch.bfloat16, torch.float16)
    ]
    return {
        "own_int4": compat.has_own_int4(),
        "lacks": sorted(processor_here().lacks),
        "chosen": chosen(),
        "int8_products": int8_products(),
        "to_amx": {str(dtype): to_amx(dtype) for dtype in (torch.bfloat16, torch.float16)},
        "int4": {
            f"group {group}, symmetric {symmetric}, {dtype}": grouped(
                4, symmetric=symmetric, layout="ct", group=group, dtype=dtype
            )
            for group, symmetric, dtype in kinds
        },
    }


def refusals() -> dict[str, str]:
    """What the method says to a split that would cut inside a byte or a group."""
    from llmshrink.formats.sparse24 import Sparse24Scheme
    from llmshrink.serving.vllm.sparse24 import Sparse24LinearMethod

    said = {}
    for label, group_size, inputs in (("byte", None, 20), ("group", 64, 96)):
        method = Sparse24LinearMethod(Sparse24Scheme(16 if group_size is None else 4, group_size), "a.down_proj")
        try:
            method.create_weights(torch.nn.Module(), inputs, [32], 2 * inputs, 32, torch.bfloat16, weight_loader=None)
        except ValueError as error:
            said[label] = str(error)
    return said


def renamed() -> list[str]:
    """The targets of a model that vLLM wraps."""
    from sparse24 import described
    from vllm.model_executor.models.utils import WeightsMapper

    from llmshrink.serving.vllm.config import LlmshrinkConfig

    config = LlmshrinkConfig.from_config(described(["model.layers.0.mlp.down_proj"], 16, None, []))
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    return list(config.schemes)


def main() -> None:
    if sys.argv[1:] == ["cpu"]:
        print(json.dumps(on_this_cpu()))
        return
    facts: dict[str, Any] = {"registration": registration()}
    facts["ranks"] = {str(bits): ranks(bits, group) for bits, group in ((4, 32), (8, -1), (16, None))}
    facts["grouped"] = {
        f"{bits} bits, symmetric {symmetric}, {layout}": grouped(bits, symmetric=symmetric, layout=layout)
        for bits, layout in ((2, "ct"), (3, "ct"), (4, "ct"), (8, "ct"), (4, "gptq"), (8, "gptq"))
        for symmetric in (True, False)
    }
    facts["refusals"] = refusals()
    facts["renamed"] = renamed()
    facts["triton_files"] = sorted(
        name for name in sys.modules if name.startswith("llmshrink_kernels") and name.endswith((".kernel", ".launch"))
    )
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
