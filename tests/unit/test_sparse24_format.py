"""sparse24: bit by bit what docs/formats-sparse24.md says, and back."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmshrink.errors import CheckpointError
from llmshrink.formats import compressed_tensors, stored
from llmshrink.formats.compressed_tensors import GroupedIntScheme
from llmshrink.formats.sparse24 import Sparse24Scheme, layout, names, quantization_config, read, schemes, tensors
from llmshrink.run.shards import layout_of
from llmshrink.weights import Dense, GroupedInt, Sparse24

PAGE = Path(__file__).parents[2] / "docs" / "formats-sparse24.md"


def pruned(rows: int, inputs: int, bits: int, group_size: int | None, seed: int = 0) -> Dense | GroupedInt:
    """A weight of which every four inputs hold no, one or two that aren't zero; half the scales are negative."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(rows, inputs // 4, 4, generator=generator).argsort(-1)
    kept = (order < torch.randint(0, 3, (rows, inputs // 4, 1), generator=generator)).view(rows, inputs)
    if group_size is None:
        return Dense((torch.randn(rows, inputs, generator=generator) * kept + 0.0).to(torch.bfloat16))
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    codes = torch.randint(low, high, (rows, inputs), dtype=torch.int8, generator=generator) * kept
    scale = torch.randn(rows, inputs // group_size, generator=generator).to(torch.bfloat16)
    return GroupedInt(codes, scale, None, bits, group_size)


def same(left: Dense | GroupedInt, right: Dense | GroupedInt) -> bool:
    if isinstance(left, Dense) and isinstance(right, Dense):
        return torch.equal(left.weight.view(torch.int16), right.weight.view(torch.int16))
    assert isinstance(left, GroupedInt) and isinstance(right, GroupedInt)
    return (
        torch.equal(left.codes, right.codes)
        and torch.equal(left.scale, right.scale)
        and (left.bits, left.group_size) == (right.bits, right.group_size)
    )


def slow_bytes(codes: list[int]) -> tuple[list[int], list[int]]:
    """(bytes of 4-bit values, bytes of positions) of one row, one code at a time, as the page words it."""
    values: list[int] = []
    places: list[int] = []
    for start in range(0, len(codes), 4):
        group = codes[start : start + 4]
        chosen = [i for i in range(4) if group[i] != 0]
        chosen += [i for i in range(4) if group[i] == 0][: 2 - len(chosen)]
        for place in sorted(chosen):
            values.append(group[place] % 16)
            places.append(place)
    places += [0] * (-len(places) % 4)
    packed = [values[i] + 16 * values[i + 1] for i in range(0, len(values), 2)]
    return packed, [sum(places[i + n] << 2 * n for n in range(4)) for i in range(0, len(places), 4)]


def test_the_page_s_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert code.count("assert ") == 5
    exec(compile(code, str(PAGE), "exec"), {})


@pytest.mark.parametrize("inputs", [4, 8, 12, 64])
def test_every_bit_is_where_the_page_puts_it(inputs: int) -> None:
    weight = pruned(9, inputs, 4, inputs)
    assert isinstance(weight, GroupedInt)
    found = tensors("a.b", Sparse24.of(weight))
    expected = [slow_bytes(row) for row in weight.codes.tolist()]
    assert found["a.b.weight_values"].dtype == found["a.b.weight_positions"].dtype == torch.uint8
    assert found["a.b.weight_values"].tolist() == [values for values, _ in expected]
    assert found["a.b.weight_positions"].tolist() == [places for _, places in expected]
    assert found["a.b.weight_shape"].tolist() == [9, inputs]


@settings(deadline=None)
@given(
    bits=st.sampled_from([4, 8, 16]),
    rows=st.integers(1, 20),
    fours=st.integers(1, 9),
    groups=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_every_weight_reads_back_as_it_was(bits: int, rows: int, fours: int, groups: int, seed: int) -> None:
    size = None if bits == 16 else 4 * fours
    weight = pruned(rows, 4 * fours * groups, bits, size, seed)
    sparse = Sparse24.of(weight)
    scheme = Sparse24Scheme.of(sparse)
    found = tensors("a.b", sparse)
    assert sorted(found) == sorted(names("a.b", scheme))
    assert all(tensor.is_contiguous() for tensor in found.values())
    kind = torch.bfloat16 if sparse.scale is None else sparse.scale.dtype
    assert layout_of(found) == layout("a.b", scheme, sparse.shape, kind)
    back = read("a.b", found.__getitem__, scheme)
    assert same(back.whole(), weight)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert torch.equal(back.dequantize(dtype), weight.dequantize(dtype))
    assert torch.equal(back.rows(0, 2).dequantize(), weight.dequantize()[:2])


def test_minus_zero_is_zero_and_a_group_of_zeros_has_one_form() -> None:
    one, other = torch.tensor([[0.0, -0.0, 0.0, -0.0]]).bfloat16(), torch.zeros(1, 4).bfloat16()
    left, right = (Sparse24.of(Dense(weight)) for weight in (one + 0.0, other))
    assert torch.equal(left.values.view(torch.int16), right.values.view(torch.int16))
    assert left.positions.tolist() == right.positions.tolist() == [[0, 1]]


def test_what_is_not_2_of_4_is_named_by_row_and_inputs() -> None:
    weight = torch.zeros(5, 16).bfloat16()
    weight[3, 8:11] = 1.0
    with pytest.raises(ValueError, match="row 3 holds more than two weights at inputs 8 to 11"):
        Sparse24.of(Dense(weight))


def test_three_bits_a_weight_and_the_scales() -> None:
    shape = (4096, 4096)
    per_weight = {
        scheme: 8 * stored.nbytes(layout("a", scheme, shape, torch.bfloat16)) / (4096 * 4096)
        for scheme in (Sparse24Scheme(4, 128), Sparse24Scheme(4, -1), Sparse24Scheme(8, 128), Sparse24Scheme(16, None))
    }
    assert [round(bits, 3) for bits in per_weight.values()] == [3.125, 3.004, 5.125, 9.0]


def damaged(key: str, tensor: Tensor, bits: int = 4) -> str:
    """The line with which `read` refuses a linear one of whose tensors was replaced."""
    sparse = Sparse24.of(pruned(32, 64, bits, None if bits == 16 else 32))
    found = {**tensors("a.b", sparse), f"a.b.{key}": tensor}
    with pytest.raises(CheckpointError) as refused:
        read("a.b", found.__getitem__, Sparse24Scheme.of(sparse))
    return str(refused.value)


@pytest.mark.parametrize(
    ("key", "tensor"),
    [
        ("weight_values", torch.zeros(32, 15, dtype=torch.uint8)),
        ("weight_values", torch.zeros(32, 16, dtype=torch.int8)),
        ("weight_positions", torch.full((32, 8), 0b01_00_01_00, dtype=torch.int8)),
        ("weight_positions", torch.zeros(32, 8, dtype=torch.uint8)),
        ("weight_positions", torch.full((32, 8), 0b00_01_01_00, dtype=torch.uint8)),
        ("weight_scale", torch.ones(32, 1)),
        ("weight_shape", torch.tensor([32, 66])),
        ("weight_shape", torch.tensor([32, 32])),
        ("weight_shape", torch.tensor([-1, 64])),
        ("weight_shape", torch.tensor([32.0, 64.0])),
    ],
)
def test_a_damaged_tensor_is_named(key: str, tensor: Tensor) -> None:
    line = damaged(key, tensor)
    assert "a.b." in line and "damaged" in line and "\n" not in line


def test_positions_beyond_the_last_group_are_damage() -> None:
    sparse = Sparse24.of(pruned(3, 12, 4, 12))
    found = tensors("a.b", sparse)
    found["a.b.weight_positions"] |= torch.tensor([0, 0x40], dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="weight_positions"):
        read("a.b", found.__getitem__, Sparse24Scheme.of(sparse))


def test_sixteen_bits_are_bf16_or_fp16() -> None:
    assert "torch.float32" in damaged("weight_values", torch.zeros(32, 32), bits=16)


def test_the_config_names_every_linear_once_and_reads_back() -> None:
    sites = {
        "l.0.q": Sparse24Scheme(4, 64),
        "l.0.k": Sparse24Scheme(4, 64),
        "l.0.o": Sparse24Scheme(8, -1),
        "l.0.up": Sparse24Scheme(16, None),
        "l.0.down": None,
    }
    config = json.loads(json.dumps(quantization_config(sites, ["lm_head"])))
    assert schemes(config) == {name: scheme for name, scheme in sites.items() if scheme is not None}
    assert config["ignore"] == ["lm_head", "l.0.down"]
    assert (config["quant_method"], config["format"], config["version"]) == ("llmshrink", "sparse24", 1)
    written = [group["weights"] for group in config["config_groups"].values()]
    assert written == [
        {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64, "pattern": "2:4"},
        {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None, "pattern": "2:4"},
        {"num_bits": 16, "type": "float", "symmetric": True, "strategy": None, "group_size": None, "pattern": "2:4"},
    ]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"quant_method": "gptq"}, "'gptq'"),
        ({"format": "sparse48"}, "'sparse48'"),
        ({"version": 2}, "version 2.*update llmshrink"),
        ({"config_groups": {}}, "config_groups"),
        ({"config_groups": {"group_0": {"targets": ["a.b"]}}}, "group_0"),
    ],
)
def test_a_config_of_another_kind_is_refused(change: dict[str, object], named: str) -> None:
    config = quantization_config({"a.b": Sparse24Scheme(4, 32)}, [])
    with pytest.raises(CheckpointError, match=named):
        schemes({**config, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"type": "float"},
        {"num_bits": 3},
        {"strategy": "tensor"},
        {"group_size": None},
        {"group_size": 0},
        {"symmetric": False},
        {"pattern": "4:8"},
        {"num_bits": 16},
    ],
)
def test_a_scheme_of_another_kind_is_refused(change: dict[str, object]) -> None:
    config = json.loads(json.dumps(quantization_config({"a.b": Sparse24Scheme(4, 32)}, [])))
    config["config_groups"]["group_0"]["weights"].update(change)
    with pytest.raises(CheckpointError, match="group_0"):
        schemes(config)


def test_patterns_as_targets_are_refused() -> None:
    config = json.loads(json.dumps(quantization_config({"a.b": Sparse24Scheme(4, 32)}, [])))
    config["config_groups"]["group_0"]["targets"] = ["Linear"]
    with pytest.raises(CheckpointError, match="only literal module paths"):
        schemes(config)


def test_one_place_knows_both_formats() -> None:
    sparse = {"a.b": Sparse24Scheme(4, 32), "a.c": None}
    grouped = {"a.b": GroupedIntScheme(4, 32, True), "a.c": None}
    for sites, format, module in (
        (sparse, "llmshrink", "llmshrink"),
        (grouped, "compressed-tensors", "compressed-tensors"),
    ):
        described = stored.quantization_config(sites, ["lm_head"], format)  # type: ignore[arg-type]
        assert described is not None and described["quant_method"] == module
        assert stored.schemes(described) == {"a.b": sites["a.b"]}  # type: ignore[index]
    assert stored.quantization_config({"a.b": None}, [], "llmshrink") is None
    assert stored.schemes(None) == {}
    weight = pruned(8, 64, 4, 32)
    for scheme in (sparse["a.b"], grouped["a.b"]):
        found = stored.tensors("a.b", stored.as_stored(weight, scheme))
        assert set(found) == set(stored.names("a.b", scheme))
        assert layout_of(found) == stored.layout("a.b", scheme, (8, 64), weight.scale.dtype)
        assert sum(tensor.nbytes for tensor in found.values()) == stored.nbytes(layout_of(found))
        assert same(stored.whole(stored.read("a.b", found.__getitem__, scheme)), weight)
    dense = pruned(8, 64, 16, None)
    assert set(stored.tensors("a.b", dense)) == set(stored.names("a.b", None)) == {"a.b.weight"}
    assert stored.layout("a.b", None, (8, 64), torch.bfloat16) == {"a.b.weight": (torch.bfloat16, (8, 64))}


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), [(3, 20, False), (4, -1, True), (5, 60, False)])
def test_bytes_of_grouped_integers_are_counted_exactly(bits: int, group_size: int, symmetric: bool) -> None:
    scheme = GroupedIntScheme(bits, group_size, symmetric)
    size = 60 if group_size == -1 else group_size
    zeros = None if symmetric else torch.zeros(21, 60 // size, dtype=torch.int8)
    weight = GroupedInt(torch.zeros(21, 60, dtype=torch.int8), torch.ones(21, 60 // size).half(), zeros, bits, size)
    found = compressed_tensors.tensors("a", weight)
    assert layout_of(found) == compressed_tensors.layout("a", scheme, (21, 60), torch.float16)
