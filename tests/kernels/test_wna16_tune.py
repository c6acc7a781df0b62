"""Plans: where they are kept, who wins, what a search may choose, and what the default must fit."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from llmshrink_kernels import device as where
from llmshrink_kernels import stopwatch, tune
from llmshrink_kernels.tune import Config, Plan, Trial
from llmshrink_kernels.wna16 import dispatch, launch, ops, wna16_matmul
from llmshrink_kernels.wna16.dispatch import Limits
from llmshrink_kernels.wna16.prepack import PackedWeight, empty, prepack
from llmshrink_kernels.wna16.search import search
from torch import Tensor

CONFIG = Config(16, 64, 256, 4, 3, 2)
H100 = Limits("NVIDIA H100 80GB HBM3", 232448, 132)
B200 = Limits("NVIDIA B200", 232448, 148, 100)
SMALL = Limits("a small device", 101376, 28, 86)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tune, "SHIPPED", tmp_path / "shipped")
    tune._tables.cache_clear()
    tune._withdrawn.clear()
    where.notice.cache_clear()
    yield tmp_path / "llmshrink" / "kernels.json"
    tune._tables.cache_clear()
    tune._withdrawn.clear()


def weight(bits: int = 4, group_size: int = 128, shape: tuple[int, int] = (4096, 4096)) -> PackedWeight:
    """Of this shape, without memory."""
    kind = {"scale_dtype": torch.float16, "zero_points": False, "device": "meta"}
    return empty(*shape, bits=bits, group_size=group_size, **kind)


def test_what_is_remembered_is_found_again_and_kept(cache: Path) -> None:
    assert tune.lookup("one") is None
    tune.remember("one", CONFIG)
    tune.remember("two", "dequantize")
    tune._tables.cache_clear()
    assert tune.lookup("one") == CONFIG and tune.lookup("two") == "dequantize"
    assert [path.name for path in cache.parent.iterdir()] == ["kernels.json"]


def test_the_users_plan_goes_before_the_shipped_one(cache: Path) -> None:
    tune.SHIPPED.mkdir()
    shipped = {"version": 1, "plans": {"one": "dequantize", "two": "dequantize"}}
    (tune.SHIPPED / "h100.json").write_text(json.dumps(shipped))
    tune.remember("one", CONFIG)
    assert tune.lookup("one") == CONFIG and tune.lookup("two") == "dequantize"


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"version": 1}', '{"version": 1, "plans": 7}', '{"version": 1, "plans": {"one": {"block_m": 16}}}',
     '{"version": 1, "plans": {"one": "magic"}}', b"\xff\xfe",
     '{"version": 1, "plans": ' + 200_000 * "[" + 200_000 * "]" + "}"],
    ids=range(9),
)  # fmt: skip
def test_a_corrupt_cache_is_ignored_with_one_notice(
    content: str | bytes, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.mkdir()
    cache.write_bytes(content if isinstance(content, bytes) else content.encode())
    with caplog.at_level(logging.WARNING, logger="llmshrink_kernels"):
        assert tune.lookup("one") is None and tune.lookup("one") is None
    assert len(caplog.records) == 1 and str(cache) in caplog.text
    tune.remember("one", CONFIG)
    assert tune.lookup("one") == CONFIG


@pytest.mark.parametrize(
    "change",
    [{"block_m": 48}, {"block_m": 1 << 20}, {"block_n": 16}, {"block_n": 4096}, {"block_k": 1.5}, {"block_k": True},
     {"block_k": 1 << 40}, {"num_warps": 3}, {"num_warps": 64}, {"num_stages": 100}, {"num_stages": -1}, {"split_k": 0},
     {"split_k": 1 << 31}, {"split_k": None}, {"block_m": [16]}, {"colour": 1}],
)  # fmt: skip
def test_numbers_that_no_kernel_takes_are_ignored_with_one_notice(
    change: dict[str, object], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.mkdir()
    entry = {"block_m": 16, "block_n": 64, "block_k": 256, "num_warps": 4, "num_stages": 3, "split_k": 2}
    cache.write_text(json.dumps({"version": 1, "plans": {"one": entry | change, "two": entry}}))
    assert tune.lookup("one") is None and tune.lookup("one") is None
    assert tune.lookup("two") == CONFIG
    assert [record.getMessage().count("'one' is one") for record in caplog.records] == [1]


def test_another_format_is_passed_over(cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text(json.dumps({"version": 2, "plans": {"one": "dequantize"}}))
    assert tune.lookup("one") is None


def test_a_key_tells_devices_versions_and_shape_classes_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    half = torch.float16
    keys = [
        dispatch.key(weight(), 1, half, "a"),
        dispatch.key(weight(), 17, half, "a"),
        dispatch.key(weight(), 1, torch.bfloat16, "a"),
        dispatch.key(weight(), 1, half, "b"),
        dispatch.key(weight(3), 1, half, "a"),
        dispatch.key(weight(4, 64), 1, half, "a"),
        dispatch.key(weight(4, 128, (4096, 8192)), 1, half, "a"),
        dispatch.key(weight(4, 128, (8192, 4096)), 1, half, "a"),
    ]
    assert len(set(keys)) == len(keys)
    assert dispatch.key(weight(), 16, half, "a") == keys[0]
    assert dispatch.key(weight(), 5000, half, "a") == dispatch.key(weight(), 9999, half, "a")
    monkeypatch.setattr(tune, "version", lambda: "another")
    assert dispatch.key(weight(), 1, half, "a") not in keys


def test_a_wrong_result_is_never_the_fastest() -> None:
    seconds: dict[Plan, float] = {"quick and wrong": 1.0, "fails": 2.0, "right": 4.0, "right and slow": 8.0}

    def run(plan: Plan, copy: int) -> Tensor:
        if plan == "fails":
            raise MemoryError("registers")
        return torch.tensor(0 if plan == "quick and wrong" else 1)

    timed: list[float] = []

    def clock(calls: Sequence[Callable[[], object]]) -> float:
        (plan,) = {call.args[0] for call in calls}  # type: ignore[attr-defined]
        assert [call.args[1] for call in calls] == [0, 1, 2]  # type: ignore[attr-defined]
        timed.append(seconds[plan])
        return seconds[plan]

    trials = tune.search(list(seconds), run, lambda y: bool(y == 1), copies=3, clock=clock)
    assert [trial.plan for trial in trials] == ["right", "right and slow", "quick and wrong", "fails"]
    assert timed == [4.0, 8.0] and trials[2].refused == "wrong result" and "registers" in trials[3].refused
    with pytest.raises(RuntimeError, match="none of 1"):
        tune.search(["fails"], run, bool, clock=clock)


@pytest.mark.parametrize("here", [H100, B200, SMALL], ids=["H100", "B200", "small"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128, 256])
def test_the_default_fits_everywhere(bits: int, group_size: int, here: Limits) -> None:
    for shape in ((4096, 4096), (65, 300 if group_size == -1 else 256), (28672, 8192)):
        packed = weight(bits, group_size, shape)
        for rows in (1, 16, 17, 64, 65, 511):
            found = dispatch.default(packed, rows, here)
            assert isinstance(found, Config) and dispatch.fits(packed, found, here)
            launch.check(found, packed)
        assert dispatch.default(packed, 512, here) == "dequantize"
        found = dispatch.candidates(packed, 8, here)
        assert found[0] == dispatch.default(packed, 8, here) and len(found) == len(set(found))


def test_few_tiles_are_split_along_the_inputs() -> None:
    few, many = dispatch.default(weight(), 1, H100), dispatch.default(weight(4, 128, (28672, 8192)), 1, H100)
    assert isinstance(few, Config) and few.split_k == 2
    assert isinstance(many, Config) and many.split_k == 1


def test_a_filed_plan_overrides_the_default_unless_it_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dispatch, "limits", lambda device: H100)
    here, half = torch.device("cpu"), torch.float16
    filed = dispatch.key(weight(), 8, half, H100.name)
    assert dispatch.plan(weight(), 8, half, here) == dispatch.default(weight(), 8, H100)
    tune.remember(filed, CONFIG)
    assert dispatch.plan(weight(), 8, half, here) == CONFIG
    tune.remember(filed, "dequantize")
    assert dispatch.plan(weight(), 8, half, here) == "dequantize"
    tune.remember(filed, Config(16, 64, 192, 4, 3, 2))
    assert dispatch.plan(weight(), 8, half, here) == dispatch.default(weight(), 8, H100)
    assert "doesn't fit" in caplog.text


def test_a_search_files_the_fastest_right_plan(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    packed = prepack(
        torch.randint(-8, 8, (64, 512), dtype=torch.int8).to(device),
        torch.ones(64, 4).half().to(device),
        None,
        bits=4,
        group_size=128,
    )
    wrong, best = Config(16, 64, 256, 4, 2, 1), Config(16, 64, 256, 4, 3, 2)
    real = launch.matmul

    def broken(x: Tensor, packed: PackedWeight, config: Config) -> Tensor:
        return real(x, packed, config) + (config == wrong)

    def clock(calls: Sequence[Callable[[], object]]) -> float:
        return 1.0 if calls[0].args[0] == best else 2.0  # type: ignore[attr-defined]

    monkeypatch.setattr(launch, "matmul", broken)
    trials = search(packed, 20, torch.float16, here=H100, clock=clock)
    assert trials[0].plan == best and trials[-1] == Trial(wrong, None, "wrong result")
    assert any(trial.plan == "dequantize" and trial.seconds == 2.0 for trial in trials)
    assert tune.lookup(dispatch.key(packed, 20, torch.float16, H100.name)) == best


def test_a_filed_plan_that_cannot_be_launched_gives_way_with_one_notice(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What the driver refuses (shared memory, registers) is told once and not tried again; other errors are errors."""
    from triton.runtime.errors import OutOfResources

    codes = torch.randint(-8, 8, (64, 512), dtype=torch.int8).to(device)
    packed = prepack(codes, torch.ones(64, 4).half().to(device), None, bits=4, group_size=128)
    x = torch.randn(3, 512, device=device).half()
    launched: list[Config] = []
    real = launch.matmul

    def refused(x: Tensor, packed: PackedWeight, config: Config) -> Tensor:
        launched.append(config)
        if config == CONFIG:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return real(x, packed, config)

    monkeypatch.setattr(launch, "matmul", refused)
    monkeypatch.setattr(ops, "runs_triton", lambda device: True)
    monkeypatch.setattr(dispatch, "limits", lambda device: H100)
    tune.remember(dispatch.key(packed, 3, x.dtype, H100.name), CONFIG)
    exact = x.double() @ codes.double().T
    for _ in range(2):
        assert (wna16_matmul(x, packed).double() - exact).abs().max() < 1
    default = dispatch.default(packed, 3, H100)
    assert launched == [CONFIG, default, default]
    assert [("shared memory" in r.message, "the default is used" in r.message) for r in caplog.records] == [
        (True, True)
    ]
    monkeypatch.setattr(launch, "matmul", lambda *_: (_ for _ in ()).throw(OutOfResources(1, 0, "registers")))
    with pytest.raises(OutOfResources):
        wna16_matmul(x, packed)


@pytest.mark.parametrize("graphs", [True, False])
def test_calls_are_timed_in_one_graph_and_without_it_where_there_is_none(
    graphs: bool, caplog: pytest.LogCaptureFixture
) -> None:
    ran: list[int] = []
    calls = [functools.partial(ran.append, number) for number in range(4)]

    def capture(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
        if not graphs:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        return lambda: ran.append(99)

    def median(replay: Callable[[], object]) -> float:
        replay()
        return 8.0

    assert stopwatch.seconds(calls, capture=capture, median=median) == 2.0
    assert ran == ([99] if graphs else [0, 1, 2, 3])
    said = [] if graphs else ["not permitted when stream is capturing); they are timed with their launches"]
    assert [record.message.partition("operation ")[2] for record in caplog.records] == said
    if not graphs:
        with pytest.raises(RuntimeError):
            stopwatch.graph_seconds(calls, capture=capture, median=median)


def test_the_stopwatch_on_a_device(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("CUDA graphs need a CUDA device")
    a = torch.randn(2048, 2048, device=device)
    one, two = (stopwatch.seconds([functools.partial(torch.mm, a, a)] * count) for count in (1, 3))
    assert 0 < two < 2 * one and stopwatch.copies(1 << 20, device) >= 2
