"""compressed-tensors: the library reads bit by bit what we write, and we read what it writes."""

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from llmshrink.errors import CheckpointError
from llmshrink.formats.compressed_tensors import (
    GroupedIntScheme,
    quantization_config,
    read,
    schemes,
    tensors,
)
from llmshrink.weights import GroupedInt

GOLDEN = Path(__file__).with_name("golden")
SHAPES = [(32, 64, 32), (21, 60, 20), (8, 172, 172), (5, 34, 2), (16, 128, 64), (24, 256, 128), (8, 512, 256)]


def random_weight(
    bits: int, symmetric: bool, shape: tuple[int, int, int], dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> GroupedInt:
    """Codes and zero-points take every value; half the scales are negative."""
    out_features, in_features, group_size = shape
    generator = torch.Generator().manual_seed(seed)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    groups = (out_features, in_features // group_size)
    codes = torch.randint(low, high, (out_features, in_features), dtype=torch.int8, generator=generator)
    sign = torch.randint(0, 2, groups, generator=generator) * 2 - 1
    scale = ((torch.rand(groups, generator=generator) + 0.01) * sign).to(dtype)
    zero_point = None if symmetric else torch.randint(low, high, groups, dtype=torch.int8, generator=generator)
    return GroupedInt(codes, scale, zero_point, bits, group_size)


def library_scheme(weight: GroupedInt) -> QuantizationScheme:
    """The library's view of a weight's scheme, by way of the config that we write."""
    config = quantization_config({"a.b": GroupedIntScheme.of(weight)}, [])
    return QuantizationConfig.model_validate(config).config_groups["group_0"]


def same(left: GroupedInt, right: GroupedInt) -> bool:
    zeros = [weight.zero_point for weight in (left, right)]
    same_zeros = zeros[0] is zeros[1] is None or (
        zeros[0] is not None and zeros[1] is not None and torch.equal(zeros[0], zeros[1])
    )
    return (
        same_zeros
        and torch.equal(left.codes, right.codes)
        and torch.equal(left.scale, right.scale)
        and left.scale.dtype == right.scale.dtype
        and (left.bits, left.group_size) == (right.bits, right.group_size)
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_library_decompresses_to_our_weight_bit_by_bit(
    bits: int, symmetric: bool, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    weight = random_weight(bits, symmetric, shape, dtype)
    state = {key.removeprefix("a.b."): value for key, value in tensors("a.b", weight).items()}
    theirs = PackedQuantizationCompressor.decompress(state, library_scheme(weight))["weight"]
    assert theirs.dtype == dtype
    assert torch.equal(theirs, weight.dequantize(dtype))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_the_library_compresses_reads_back(bits: int, symmetric: bool, shape: tuple[int, int, int]) -> None:
    weight = random_weight(bits, symmetric, shape, torch.float32)
    state = {"weight": weight.dequantize(), "weight_scale": weight.scale}
    if weight.zero_point is not None:
        state["weight_zero_point"] = weight.zero_point
    theirs = PackedQuantizationCompressor.compress(state, library_scheme(weight))
    ours = {key.removeprefix("a.b."): value for key, value in tensors("a.b", weight).items()}
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)
    assert same(read("a.b", lambda key: theirs[key.removeprefix("a.b.")], GroupedIntScheme.of(weight)), weight)


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_bits_that_do_not_divide_32_are_stored_as_newer_libraries_store_them(bits: int, kind: str) -> None:
    golden = load_file(GOLDEN / f"pack_{bits}bit.safetensors")
    weight = read(kind, golden.__getitem__, GroupedIntScheme(bits, 20, kind == "symmetric"))
    assert torch.equal(weight.codes, golden[f"{kind}.codes"])
    assert torch.equal(weight.dequantize(torch.bfloat16), golden[f"{kind}.weight"])
    ours = tensors(kind, weight)
    assert all(torch.equal(golden[key], value) for key, value in ours.items())
    assert (f"{kind}.weight_zero_point" in ours) == (kind == "asymmetric")


@settings(deadline=None)
@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    out_features=st.integers(1, 40),
    groups=st.integers(1, 5),
    group_size=st.integers(1, 40),
    seed=st.integers(0, 2**31),
)
def test_every_weight_reads_back_as_it_was(
    bits: int, symmetric: bool, out_features: int, groups: int, group_size: int, seed: int
) -> None:
    weight = random_weight(bits, symmetric, (out_features, groups * group_size, group_size), seed=seed)
    stored = tensors("model.layers.0.mlp.up_proj", weight)
    assert all(value.is_contiguous() for value in stored.values())
    back = read("model.layers.0.mlp.up_proj", stored.__getitem__, GroupedIntScheme.of(weight))
    assert same(back, weight)


def test_the_config_names_every_linear_once_and_the_library_accepts_it() -> None:
    four = GroupedIntScheme(4, 64, True)
    eight = GroupedIntScheme(8, -1, False)
    sites = {"l.0.q": four, "l.0.k": four, "l.0.o": eight, "l.0.down": None}
    config = json.loads(json.dumps(quantization_config(sites, ["lm_head"])))
    assert schemes(config) == {"l.0.q": four, "l.0.k": four, "l.0.o": eight}
    assert config["ignore"] == ["lm_head", "l.0.down"]
    parsed = QuantizationConfig.model_validate(config)
    assert [group.targets for group in parsed.config_groups.values()] == [["l.0.q", "l.0.k"], ["l.0.o"]]
    weights = parsed.config_groups["group_1"].weights
    assert (weights.num_bits, weights.symmetric, weights.strategy, weights.group_size) == (8, False, "channel", None)


def test_one_group_a_row_is_a_channel_scheme() -> None:
    assert GroupedIntScheme.of(random_weight(4, True, (8, 64, 64))) == GroupedIntScheme(4, -1, True)


def damaged(key: str, tensor: torch.Tensor) -> str:
    """The line with which `read` refuses a linear one of whose tensors was replaced."""
    weight = random_weight(4, False, (32, 64, 32))
    stored = {**tensors("a.b", weight), f"a.b.{key}": tensor}
    with pytest.raises(CheckpointError) as refused:
        read("a.b", stored.__getitem__, GroupedIntScheme.of(weight))
    return str(refused.value)


@pytest.mark.parametrize(
    ("key", "tensor"),
    [
        ("weight_packed", torch.zeros(32, 7, dtype=torch.int32)),
        ("weight_packed", torch.zeros(32, 8, dtype=torch.int64)),
        ("weight_scale", torch.ones(32, 2, dtype=torch.float64)),
        ("weight_zero_point", torch.zeros(32, 2, dtype=torch.int32)),
        ("weight_shape", torch.tensor([32.0, 64.0])),
        ("weight_shape", torch.tensor([32, 65])),
        ("weight_shape", torch.tensor([-1, 64])),
    ],
)
def test_a_damaged_tensor_is_named(key: str, tensor: torch.Tensor) -> None:
    line = damaged(key, tensor)
    assert f"a.b.{key}" in line
    assert "damaged" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"quant_method": "gptq"}, "'gptq'"),
        ({"format": "nvfp4-pack-quantized"}, "'nvfp4-pack-quantized'"),
        ({"config_groups": {}}, "config_groups"),
        ({"config_groups": {"group_0": {"targets": ["a.b"]}}}, "group_0"),
        ({"config_groups": {"group_0": {"targets": ["Linear"], "weights": None}}}, "group_0"),
    ],
)
def test_a_config_of_another_kind_is_refused(change: dict[str, object], named: str) -> None:
    config = quantization_config({"a.b": GroupedIntScheme(4, 32, True)}, [])
    with pytest.raises(CheckpointError, match=named):
        schemes({**config, **change})


@pytest.mark.parametrize(
    "change",
    [{"type": "float"}, {"num_bits": 9}, {"strategy": "tensor"}, {"group_size": None}, {"group_size": 0}],
)
def test_a_scheme_of_another_kind_is_refused(change: dict[str, object]) -> None:
    config = json.loads(json.dumps(quantization_config({"a.b": GroupedIntScheme(4, 32, True)}, [])))
    config["config_groups"]["group_0"]["weights"].update(change)
    with pytest.raises(CheckpointError, match="group_0"):
        schemes(config)


def test_patterns_as_targets_are_refused() -> None:
    config = json.loads(json.dumps(quantization_config({"a.b": GroupedIntScheme(4, 32, True)}, [])))
    config["config_groups"]["group_0"]["targets"] = ["re:.*q_proj"]
    with pytest.raises(CheckpointError, match="literal"):
        schemes(config)
