"""Which linear is quantized how: configs of other tools, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from llmshrink.errors import CheckpointError
from llmshrink.formats.compressed_tensors import GroupedIntScheme, quantization_config
from llmshrink.formats.eight_bit import EightBitScheme
from llmshrink.formats.eight_bit import group as rounding
from llmshrink.runtime.scheme import schemes
from llmshrink.weights import Activations

LINEARS = dict.fromkeys(
    ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"], "Linear"
)


def config(**changes: Any) -> dict[str, Any]:
    """As llm-compressor writes it."""
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group()},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        **changes,
    }


def group(targets: tuple[str, ...] = ("Linear",), **weights: Any) -> dict[str, Any]:
    common = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, "actorder": None}
    return {"targets": list(targets), "weights": common | weights, "input_activations": None}


def test_a_class_is_a_target() -> None:
    assert set(schemes(config(), LINEARS).values()) == {GroupedIntScheme(4, 128, True)}
    assert list(schemes(config(), LINEARS)) == list(LINEARS)


def test_a_name_or_a_pattern_comes_before_a_class() -> None:
    groups = {
        "group_0": group(),
        "group_1": group(("re:.*down_proj",), num_bits=8, strategy="channel", group_size=None),
        "group_2": group(("model.layers.0.self_attn.q_proj",), symmetric=False, group_size=32, actorder="static"),
    }
    found = schemes(config(config_groups=groups), LINEARS)
    assert list(found.values()) == [
        GroupedIntScheme(4, 32, False),
        GroupedIntScheme(8, -1, True),
        GroupedIntScheme(8, -1, True),
    ]


def test_what_llmshrink_writes_is_read() -> None:
    written = {name: GroupedIntScheme(bits, 64, True) for name, bits in zip(LINEARS, (2, 3, 8), strict=True)}
    assert schemes(quantization_config(dict(written), ["lm_head"]), LINEARS) == written


def test_a_head_may_be_packed() -> None:
    assert schemes(config(ignore=[]), {"lm_head": "Linear"}) == {"lm_head": GroupedIntScheme(4, 128, True)}


def test_mixed_precision_of_packed_groups_is_read() -> None:
    groups = {"group_0": group() | {"format": "pack-quantized"}}
    assert len(schemes(config(format="mixed-precision", config_groups=groups), LINEARS)) == len(LINEARS)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_groups_that_round_inputs_are_read_beside_packed_ones(kind: Activations) -> None:
    eight = EightBitScheme(kind)
    written = dict(zip(LINEARS, (eight, GroupedIntScheme(4, 32, True), eight), strict=True))
    assert schemes(quantization_config(dict(written), ["lm_head"]), LINEARS) == written
    # Other tools name a class, and the format on top alone.
    other = config(format=eight.format, config_groups={"group_0": {"targets": ["Linear"], **rounding(eight)}})
    assert set(schemes(other, LINEARS).values()) == {eight}


@pytest.mark.parametrize("order", [None, False, "weight", "static"])
def test_orders_that_leave_columns_in_place(order: object) -> None:
    assert schemes(config(config_groups={"g": group(actorder=order)}), LINEARS)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quant_method": "gptq"}, "quantized by gptq"),
        ({"format": "marlin-24"}, "format marlin-24"),
        ({"format": "mixed-precision", "config_groups": {"g": group() | {"format": "float-quantized"}}}, "float-quan"),
        ({"format": "mixed-precision"}, "group_0 has format None; only pack-quantized, int-quantized, float-quantized"),
        ({"format": "int-quantized"}, "group_0 has format int-quantized and no input activations"),
        ({"config_groups": {"g": group() | rounding(EightBitScheme("int8"))}}, "pack-quantized and 8-bit input"),
        ({"format": "naive-quantized"}, "format naive-quantized"),
        ({"config_groups": {"g": group(actorder="group")}}, "activation order 'group'"),
        ({"config_groups": {"g": group(actorder=True)}}, "activation order True"),
        ({"config_groups": {"g": group(type="float")}}, "float of 4 bits"),
        ({"config_groups": {"g": group(strategy="tensor", group_size=None)}}, "strategy tensor"),
        ({"config_groups": {"g": group(num_bits=5)}}, "5 bits in groups of 128; only bits 2, 3, 4, 8"),
        ({"config_groups": {"g": group(group_size=16)}}, "groups of 16; only bits 2, 3, 4, 8 in groups of -1, 32"),
        ({"config_groups": {"g": group() | {"input_activations": {"num_bits": 8}}}}, "rounds activations in another"),
        ({"config_groups": {"g": group() | {"output_activations": {"num_bits": 8}}}}, "output activations"),
        ({"config_groups": {}}, "no config group"),
        ({"config_groups": None}, "no config_groups"),
        ({"config_groups": {"g": group(("re:.*q_proj",))}}, "down_proj is packed, but no config group targets it"),
        ({"ignore": ["re:.*down_proj"]}, "down_proj is packed, but quantization_config ignores it"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ({"config_groups": {"g": group(("re:(.*q_proj",))}}, "'re:(.*q_proj' is no pattern (missing ), unterminated"),
        ({"ignore": ["re:*"]}, "'re:*' is no pattern (nothing to repeat"),
        ({"config_groups": {"g": group() | {"targets": "Linear"}}}, "lists its linears as 'Linear', not as a list"),
        ({"config_groups": {"g": group() | {"targets": 7}}}, "lists its linears as 7, not as a list"),
        ({"ignore": "lm_head"}, "lists its linears as 'lm_head', not as a list"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        schemes(config(**changes), LINEARS)
    assert said in str(refused.value) and "\n" not in str(refused.value)
