"""Numbers on the command line: each has a range, and what is out of it is refused before anything is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llmshrink
from llmshrink.api.runs import parse_size
from llmshrink.calibration.tokens import window_shape
from llmshrink.cli import run
from llmshrink.errors import LlmshrinkError
from llmshrink.limits import LIMITS, MOST_TOKENS, check_numbers, check_tokens
from llmshrink.runtime.generate import Sampling

OF_RUNS = ("samples", "seq_len", "batch_size", "seed", "serve_tp")
OF_DISTILL = ("steps", "batch_size", "accumulate", "warmup", "eval_steps", "generated_tokens")
OF_EVAL = ("window", "stride", "max_tokens", "limit", "sample", "num_fewshot", "batch_size", "seed")
HUGE = (10**15, 10**30, 10**6000)


@pytest.mark.parametrize("value", HUGE, ids=["1e15", "1e30", "1e6000"])
@pytest.mark.parametrize("name", sorted(LIMITS))
def test_a_number_above_its_limit_is_refused(name: str, value: int) -> None:
    if value <= LIMITS[name][1]:
        check_numbers({name: value})
        return
    with pytest.raises(LlmshrinkError, match=rf"^--{name.replace('_', '-')} .*: must be at most [\d,]+$") as caught:
        check_numbers({name: value})
    assert len(str(caught.value)) < 200
    with pytest.raises(LlmshrinkError, match="must be at least"):
        check_numbers({name: -value})


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.sampled_from(sorted(LIMITS)), st.integers())
def test_a_limit_is_where_it_says(name: str, value: int) -> None:
    least, most = LIMITS[name]
    if least <= value <= most:
        check_numbers({name: value})
    else:
        with pytest.raises(LlmshrinkError, match=str(least) if value < least else f"{most:,}"):
            check_numbers({name: value})


@pytest.mark.parametrize("name", OF_RUNS)
def test_runs_and_plans_are_held_to_it(name: str, tmp_path: Path) -> None:
    asked: dict[str, Any] = {name: 10**30}
    for call in (
        lambda: llmshrink.quantize("demo", output=tmp_path / "out", **asked),
        lambda: llmshrink.prune("demo", output=tmp_path / "out", **asked),
        lambda: llmshrink.plan("demo", **asked),
    ):
        with pytest.raises(LlmshrinkError, match=rf"--{name.replace('_', '-')} 1000000\d+: must be at most"):
            call()


@pytest.mark.parametrize("name", OF_DISTILL)
def test_distillation_is_held_to_it(name: str, tmp_path: Path) -> None:
    asked: dict[str, Any] = {name: 10**15}
    with pytest.raises(LlmshrinkError, match=rf"--{name.replace('_', '-')} 1000000\d+: must be at most"):
        llmshrink.distill("demo", "demo", output=tmp_path / "out", **asked)


@pytest.mark.parametrize("name", OF_EVAL)
def test_evaluation_is_held_to_it(name: str, tmp_path: Path) -> None:
    asked: dict[str, Any] = {name: 10**30}
    with pytest.raises(LlmshrinkError, match=rf"--{name.replace('_', '-')} 1000000\d+: must be at most"):
        llmshrink.eval("demo", text="demo", output=tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


def test_tokens_that_no_memory_holds_are_refused() -> None:
    assert window_shape(1000, 2048, limit=None) == (1000, 2048)
    with pytest.raises(LlmshrinkError, match=r"--samples 10000000: asks for 10,000,000 windows of 2,048 tokens"):
        window_shape(10**7, 2048, limit=None)
    check_tokens(MOST_TOKENS // 1024, 1024, "--steps 1")
    with pytest.raises(LlmshrinkError, match="--steps 1: asks for"):
        check_tokens(MOST_TOKENS // 1024 + 1, 1024, "--steps 1")


def test_what_is_said_is_no_novel() -> None:
    with pytest.raises(LlmshrinkError, match=r"--max-new-tokens .* must be at most 1,000,000"):
        Sampling(max_new_tokens=10**9).check()


@pytest.mark.parametrize("size", ["9" * 400, "1" + "0" * 30 + "TB", "9" * 5000])
def test_a_shard_that_no_disk_holds_is_refused(size: str) -> None:
    with pytest.raises(LlmshrinkError, match="no file is as large"):
        parse_size(size)
    assert parse_size("2GiB") == 2**31


def test_the_command_line_says_it_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "demo", "--samples", "1" + "0" * 30]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"llmshrink: error: --samples {10**30}: must be at most 10,000,000"
    assert run(["eval", "demo", "--text", "demo", "-o", "out", "--speed", "²"]) == 2
    assert "--speed ²: batch sizes as 1,8, or none" in capsys.readouterr().err
