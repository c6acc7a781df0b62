"""How many things stay, what that means for who serves them, and which models can't be cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llmshrink
from llmshrink.errors import UnsupportedModelError
from llmshrink.model.cuts import attention_cut, ffn_cut
from llmshrink.model.families import FAMILIES
from llmshrink.model.sites import Site, Stage
from llmshrink.run.depth import shallower
from llmshrink.run.structure import multiple_of

SHAPES = {
    "self_attn.q_proj": (64, 48), "self_attn.k_proj": (32, 48), "self_attn.v_proj": (32, 48),
    "self_attn.o_proj": (48, 64), "mlp.gate_proj": (96, 48), "mlp.up_proj": (96, 48), "mlp.down_proj": (48, 96),
}  # fmt: skip


def stages(shapes: dict[str, tuple[int, int]]) -> list[Stage]:
    prefix = "model.layers.5"
    return [
        Stage((Site(f"{prefix}.{local}", local, f"{prefix}.{local}.weight", 5, *shape),))
        for local, shape in shapes.items()
    ]


def test_a_unit_is_a_channel_or_a_group_with_its_query_heads() -> None:
    family, block = FAMILIES["llama"], stages(SHAPES)
    ffn, attention = ffn_cut(block, family), attention_cut(block, family, heads=4, kv_heads=2)
    assert (ffn.consumer.local, ffn.units, ffn.width) == ("mlp.down_proj", 96, 1)
    assert [(site.local, width) for site, width in ffn.producers] == [("mlp.gate_proj", (1,)), ("mlp.up_proj", (1,))]
    assert (attention.consumer.local, attention.units, attention.width) == ("self_attn.o_proj", 2, 32)
    assert [width for _, width in attention.producers] == [(32,), (16,), (16,)]


def test_a_unit_of_a_merged_parameter_has_rows_in_each_of_its_parts() -> None:
    block = stages({
        "self_attn.qkv_proj": (128, 48), "self_attn.o_proj": (48, 64),
        "mlp.gate_up_proj": (192, 48), "mlp.down_proj": (48, 96),
    })  # fmt: skip
    ffn, attention = (
        ffn_cut(block, FAMILIES["phi3"]),
        attention_cut(block, FAMILIES["phi3"], heads=4, kv_heads=2),
    )
    assert ffn.rows(0, torch.tensor([3, 95])).tolist() == [3, 95, 99, 191]
    assert attention.producers[0][1] == (32, 16, 16)
    assert attention.rows(0, torch.tensor([1])).tolist() == [*range(32, 64), *range(80, 96), *range(112, 128)]
    with pytest.raises(UnsupportedModelError, match=r"qkv_proj: its 128 outputs aren't 6 heads of queries, 3 of keys"):
        attention_cut(block, FAMILIES["phi3"], heads=6, kv_heads=3)


def test_heads_that_a_family_can_have_no_fewer_of_are_refused_with_the_reason() -> None:
    with pytest.raises(UnsupportedModelError, match=r"layers\.5: q_norm and k_norm take the mean over all heads"):
        attention_cut(stages(SHAPES), FAMILIES["olmo2"], heads=4, kv_heads=2)


def test_linears_that_arent_the_familys_are_named() -> None:
    fused = {name: shape for name, shape in SHAPES.items() if not name.startswith(("mlp.gate", "mlp.up"))}
    with pytest.raises(UnsupportedModelError) as caught:
        ffn_cut(stages({**fused, "mlp.gate_up_proj": (192, 48)}), FAMILIES["llama"])
    assert str(caught.value) == (
        "model.layers.5: has no gate_proj, up_proj to take FFN channels from (its linears are q_proj, k_proj, v_proj, "
        "o_proj, down_proj, gate_up_proj); width pruning doesn't cut other layers yet: depth-prune drops whole blocks "
        "of it"
    )


def test_heads_that_are_no_equal_groups_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"o_proj: its 64 inputs aren't 3 equal KV groups"):
        attention_cut(stages(SHAPES), FAMILIES["llama"], heads=4, kv_heads=3)
    with pytest.raises(UnsupportedModelError, match=r"o_proj: its 64 inputs aren't 2 equal KV groups"):
        attention_cut(stages(SHAPES), FAMILIES["llama"], heads=3, kv_heads=2)


@pytest.mark.parametrize(
    ("count", "multiple"), [(14336, 64), (11008, 64), (768, 64), (384, 32), (96, 8), (97, 1), (8, 1), (50, 2)]
)
def test_a_share_keeps_the_originals_factor_of_two(count: int, multiple: int) -> None:
    assert multiple_of(count) == multiple


def test_lists_with_an_entry_for_each_block_are_cut_with_them() -> None:
    config = {
        "num_hidden_layers": 4, "layer_types": list("abca"), "no_rope_layers": [1, 0, 1, 1],
        "eos_token_id": [1, 2, 3, 4], "max_window_layers": 3,
    }  # fmt: skip
    assert shallower(config, 4, [1, 3], config) == {
        "num_hidden_layers": 2, "layer_types": ["a", "c"], "no_rope_layers": [1, 1], "eos_token_id": [1, 2, 3, 4],
        "max_window_layers": 2,
    }  # fmt: skip


def test_kinds_that_only_follow_from_other_fields_are_written_out() -> None:
    kinds = ["full_attention", "full_attention", "sliding_attention", "sliding_attention"]
    config = {"num_hidden_layers": 4, "max_window_layers": 2}
    found = shallower(config, 4, [0, 3], {**config, "layer_types": kinds, "no_rope_layers": [1, 1, 1, 0]})
    assert found == {
        "num_hidden_layers": 2,
        "max_window_layers": 1,
        "layer_types": ["full_attention", "sliding_attention"],
        "no_rope_layers": [1, 1],
    }
    same = shallower({"num_hidden_layers": 4}, 4, [0, 3], {"layer_types": ["full_attention"] * 4})
    assert same == {"num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("family", "sets", "tp", "said"),
    [
        ("llama", ["channels=90"], 1, ["90 FFN channels can't be split over 4 devices when served (tensor "
         "parallel), as the original's 96 can"]),
        ("llama", ["channels=95"], 1, ["95 FFN channels can't be split over 2 devices when served (tensor "
         "parallel), as the original's 96 can"]),
        ("llama", ["channels=64"], 2, []),
        ("llama", ["channels=95"], 2, ["vllm-cpu won't serve this checkpoint: 95 FFN channels can't be split over 2 "
         "ranks", "vllm-cuda won't serve this checkpoint: 95 FFN channels can't be split over 2 ranks"]),
        ("qwen2", ["kv_groups=1"], 1, ["vllm-cpu won't serve this checkpoint: its code for this architecture takes "
         "hidden_size / heads for the width of a head"]),
        ("qwen3", ["kv_groups=1"], 4, ["vllm-cpu won't serve this checkpoint: 2 attention heads can't be split over 4 "
         "ranks"]),
    ],
)  # fmt: skip
def test_who_wont_serve_the_result_is_said_before_the_work(
    family: str, sets: list[str], tp: int, said: list[str], model_of: Callable[..., Path], story: Path, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"samples": 2, "seq_len": 32, "verify": False, "serve_tp": tp}
    # Heads that vLLM's CPU build can serve, so that only the structure is spoken of.
    source = model_of(family, head_dim=32, hidden_size=128)
    report = llmshrink.prune(
        source, output=tmp_path / "out", recipe="width-prune", calibration=story,
        set=[f"steps.0.width.{each}" for each in sets], **given,
    )  # fmt: skip
    about = [note for note in report.notes if "split" in note or "won't serve" in note]
    assert set(said) <= set(about) and bool(said) == bool(about) and len(set(about)) == len(about)
    if sum("won't serve" in note for note in about) > 1:
        assert report.serve == "no vLLM serves this checkpoint as it is, see the notes"
