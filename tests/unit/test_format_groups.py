"""Config groups of other tools: classes and patterns spelled out as the linears that a checkpoint stores quantized."""

from __future__ import annotations

from typing import Any

import pytest

from llmshrink.errors import CheckpointError
from llmshrink.formats import stored
from llmshrink.formats.compressed_tensors import GroupedIntScheme

NAMES = [f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn.q_proj", "mlp.down_proj")]
KEYS = [f"{name}.{suffix}" for name in NAMES for suffix in ("weight_packed", "weight_scale", "weight_shape")]
KEYS += ["lm_head.weight_scale", "model.embed_tokens.weight"]


def config(*groups: tuple[int, list[str]], ignore: list[str] | None = None, **weights: object) -> dict[str, Any]:
    """groups: bits and targets of each."""
    grid = {"type": "int", "symmetric": True, "strategy": "group", "group_size": 64, "actorder": "static", **weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head"] if ignore is None else ignore,
        "config_groups": {
            f"group_{number}": {"targets": targets, "weights": {"num_bits": bits, **grid}, "format": "pack-quantized"}
            for number, (bits, targets) in enumerate(groups)
        },
    }


def bits(found: dict[str, Any]) -> dict[str, int]:
    schemes = stored.schemes(found, KEYS)
    assert all(isinstance(scheme, GroupedIntScheme) for scheme in schemes.values())
    return {name: scheme.bits for name, scheme in schemes.items()}  # type: ignore[union-attr]


def test_the_class_is_every_quantized_linear_but_those_ignored() -> None:
    assert bits(config((3, ["Linear"]))) == dict.fromkeys(NAMES, 3)
    assert bits(config((3, ["Linear"]), ignore=["lm_head", "re:.*down_proj"])) == dict.fromkeys(NAMES[::2], 3)
    assert "lm_head" in bits(config((3, ["Linear"]), ignore=[]))


def test_a_literal_name_goes_before_a_pattern_and_a_pattern_before_the_class() -> None:
    found = bits(config((2, ["Linear"]), (3, ["re:.*down_proj"]), (4, [NAMES[1]])))
    assert found == {NAMES[0]: 2, NAMES[1]: 4, NAMES[2]: 2, NAMES[3]: 3}


def test_a_pattern_fits_from_the_beginning() -> None:
    assert bits(config((4, ["re:model.layers.1"]))) == dict.fromkeys(NAMES[2:], 4)
    assert bits(config((4, ["re:layers.1"]))) == {}


def test_without_the_keys_a_class_is_refused() -> None:
    with pytest.raises(CheckpointError, match="group_0 targets 'Linear'; only literal module paths"):
        stored.schemes(config((4, ["Linear"])))


@pytest.mark.parametrize(
    ("groups", "more", "said"),
    [
        ([(4, ["Embedding"])], {}, "group_0 targets 'Embedding'; only literal module paths"),
        ([(4, ["re:("])], {}, r"'re:\(' is no pattern \(missing \)"),
        ([(4, ["Linear"])], {"actorder": "group"}, "has activation order 'group', whose columns are permuted"),
        ([(4, ["Linear"])], {"actorder": True}, "has activation order True, whose columns are permuted"),
    ],
)
def test_what_can_not_be_read_is_named(groups: list[Any], more: dict[str, object], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        stored.schemes(config(*groups, **more), KEYS)
