"""Servable: what engines take and refuse, shape by shape, fused and split."""

import pytest

from llmshrink.formats.servable import Verdict, attention, eight_bit, plugin_eight_bit, servable
from llmshrink.serving.processor import Processor, of_flags

QWEN3_8B_QKV = [(4096, 4096), (1024, 4096), (1024, 4096)]


def served_by(verdict: Verdict) -> list[str]:
    return [engine for engine, why in verdict.engines.items() if why is None]


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "shards", "engines"),
    [
        (4, 128, True, [(256, 256)], ["vllm-cpu", "vllm-cuda"]),
        (4, 128, False, [(256, 256)], ["vllm-cpu", "vllm-cuda"]),
        (4, -1, True, [(256, 256)], ["vllm-cpu", "vllm-cuda"]),
        (4, 32, True, [(256, 768)], ["vllm-cpu", "vllm-cuda"]),
        (4, 16, True, [(256, 256)], ["vllm-cpu"]),
        (4, 256, True, [(256, 512)], ["vllm-cpu", "vllm-cuda"]),
        (4, 128, True, QWEN3_8B_QKV, ["vllm-cpu", "vllm-cuda"]),
        (4, 32, True, [(200, 64)], ["vllm-cuda"]),
        (8, 128, True, [(256, 256)], ["vllm-cuda"]),
        (8, 128, False, [(256, 256)], ["vllm-cuda"]),
        (8, 32, False, [(256, 256)], []),
        (8, 16, True, [(256, 256)], []),
        (3, 64, True, [(256, 256)], ["vllm-cuda"]),
        (2, 43, True, [(64, 172)], ["vllm-cuda"]),
        (4, 43, True, [(64, 172)], []),
        (4, -1, True, [(64, 172)], []),
        (8, -1, True, [(64, 172)], ["vllm-cuda"]),
        (4, 64, True, [(172, 64)], ["vllm-cuda"]),
    ],
)
def test_each_engine_takes_what_its_kernels_take(
    bits: int, group_size: int, symmetric: bool, shards: list[tuple[int, int]], engines: list[str]
) -> None:
    verdict = servable(bits, group_size, symmetric, shards)
    assert served_by(verdict) == engines
    assert verdict.served == bool(engines)


def test_a_group_that_is_the_whole_row_is_one_group_a_row() -> None:
    assert servable(8, 172, True, [(64, 172)]) == servable(8, -1, True, [(64, 172)])


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7])
def test_bits_without_a_built_in_kernel_name_the_package_they_need(bits: int) -> None:
    assert "Humming" in str(servable(bits, 64, True, [(256, 256)]).needs)
    assert servable(4, 64, True, [(256, 256)]).needs is None


def test_a_group_must_divide_the_inputs_for_everyone() -> None:
    verdict = servable(3, 128, True, [(64, 172)])
    assert not verdict.served
    assert "128" in str(verdict.engines["vllm-cuda"])
    assert "172" in str(verdict.engines["vllm-cuda"])


def test_fused_sites_must_have_the_same_inputs() -> None:
    assert not servable(4, 32, True, [(64, 64), (64, 128)]).served


def test_zero_points_of_fused_shards_must_end_at_a_word() -> None:
    assert servable(3, 64, True, [(100, 64), (100, 64)]).served
    assert not servable(3, 64, False, [(100, 64), (100, 64)]).served
    assert servable(3, 64, False, [(100, 64)]).served


@pytest.mark.parametrize(
    ("tp", "parallel", "served"),
    [
        (2, "row", True),
        (4, "row", True),
        (8, "row", False),  # 768 / 8 = 96 inputs a rank: a group of 128 would straddle two
        (2, "column", True),
        (5, "column", False),
    ],
)
def test_a_split_layer_must_fit_rank_by_rank(tp: int, parallel: str, served: bool) -> None:
    assert servable(4, 64 if tp == 4 else 128, True, [(256, 768)], tp, parallel).served == served  # type: ignore[arg-type]


def test_a_single_site_split_nobody_knows_how_must_hold_both_ways() -> None:
    assert servable(4, 128, True, [(1024, 128)], 2, "column").served
    assert not servable(4, 128, True, [(1024, 192)], 2, "row").served
    assert not servable(4, 96, True, [(1024, 96)], 5).served


def test_one_group_a_row_survives_a_split_of_the_inputs() -> None:
    assert served_by(servable(4, -1, True, [(256, 768)], 2, "row")) == ["vllm-cpu", "vllm-cuda"]


def test_a_row_is_cut_between_ranks_at_a_word() -> None:
    assert servable(3, 32, True, [(64, 64)], 2, "row").served
    assert not servable(3, 16, True, [(64, 32)], 2, "row").served


def test_attention_takes_some_widths_and_splits_heads_evenly() -> None:
    assert attention(128, 32, 8) == {}
    assert list(attention(8, 8)) == ["vllm-cpu"] and "have 8" in attention(8, 8)["vllm-cpu"]
    assert list(attention(64, 4, 3)) == ["vllm-cpu", "vllm-cuda"]
    assert "4 attention heads can't be split over 3 ranks" in attention(64, 4, 3)["vllm-cuda"]


def test_a_verdict_names_the_instructions_without_which_the_cpu_build_has_no_kernel() -> None:
    shards = [(256, 256)]
    assert servable(4, 128, True, shards).cpu == servable(4, -1, False, shards).cpu == "AVX-512"
    assert servable(8, 128, True, shards).cpu is None and servable(4, 43, True, [(64, 172)]).cpu is None
    assert eight_bit("int8", shards).cpu == "VNNI" and eight_bit("fp8", shards).cpu is None
    assert plugin_eight_bit("int8", shards) is None and "FP8" in str(plugin_eight_bit("fp8", shards))
    assert "3 ranks" in str(plugin_eight_bit("int8", shards, 3, "row"))


@pytest.mark.parametrize(
    ("cpu", "flags", "lacks", "bfloat16"),
    [
        ("Haswell, Zen 3", "avx avx2 fma f16c", {"AVX-512", "VNNI"}, False),
        ("Alder Lake", "avx2 fma avx_vnni", {"AVX-512"}, False),
        ("Skylake-SP", "avx2 avx512f avx512bw avx512vl", {"VNNI"}, False),
        ("Ice Lake", "avx2 avx512f avx512_vnni", set(), False),
        ("Zen 4", "avx2 avx512f avx512_vnni avx512_bf16", set(), True),
        ("Sapphire Rapids", "avx2 avx512f avx512_vnni avx512_bf16 amx_tile amx_bf16", set(), True),
        ("as torch spells it", "avx2 avx512_f avx512_vnni avx512_bf16", set(), True),
    ],
)
def test_what_a_cpu_lacks_by_its_flags(cpu: str, flags: str, lacks: set[str], bfloat16: bool) -> None:
    assert of_flags(flags.split()) == Processor(frozenset(lacks), bfloat16), cpu  # type: ignore[arg-type]
