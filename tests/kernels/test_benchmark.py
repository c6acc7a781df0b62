"""The benchmark's promises that need no GPU: the floor, correctness before time, and what a result file says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from llmshrink_kernels import stopwatch, tune
from llmshrink_kernels.benchmark import contenders, plot, problem, run, solver
from llmshrink_kernels.benchmark.contenders import Contender, Matmul
from llmshrink_kernels.benchmark.problem import Ceilings, Problem, Shape
from llmshrink_kernels.sparse24 import dispatch as sparse24_dispatch
from llmshrink_kernels.sparse24 import search as sparse24_search
from llmshrink_kernels.wna16 import dispatch
from llmshrink_kernels.wna16.dispatch import Limits
from torch import Tensor

H200 = Ceilings(4.3e12, 790e12)
SMALL = Shape("small", 256, 96)
CPU = torch.device("cpu")
KNOWN = {contender.name: contender for contender in contenders.contenders(torch.bfloat16)}


def bench(*who: Contender, rows: Sequence[int] = (1, 5)) -> run.Bench:
    """The benchmark on the CPU, by a stopwatch that always says a millisecond."""
    return run.Bench(rows, torch.bfloat16, 128, CPU, H200, who, lambda made, x: 1e-3, lambda size, device: 2)


@pytest.mark.parametrize(
    ("inputs", "outputs", "rows", "microseconds"),
    [
        (4096, 6144, 1, 3.0),
        (4096, 28672, 64, 19.0),
        (14336, 4096, 16, 7.2),
        (8192, 57344, 256, 304),
        (28672, 8192, 4096, 2436),
    ],
)
def test_the_floor_is_bytes_over_bandwidth_or_work_over_peak(
    inputs: int, outputs: int, rows: int, microseconds: float
) -> None:
    found = 1e6 * problem.floor(Shape("", inputs, outputs), rows, 4, 128, H200)
    assert found == pytest.approx(microseconds, rel=0.02)


def test_sixteen_bits_need_nearly_four_times_the_floor_of_four_at_one_row() -> None:
    shape = Shape("", 8192, 8192)
    ratio = problem.floor(shape, 1, 16, 0, H200) / problem.floor(shape, 1, 4, 128, H200)
    assert ratio == pytest.approx(3.88, abs=0.01)


def test_shapes_are_models_or_numbers() -> None:
    assert len(problem.named(["llama3-8b", "llama3-70b"])) == 8
    assert problem.named(["512x96", "512x96"]) == [Shape("512x96", 512, 96)]
    for bad in ("llama4", "512", "0x5", "5x", "-1x4"):
        with pytest.raises(ValueError, match=f"--shapes {bad}: one of llama3-8b"):
            problem.named([bad])


def test_a_problem_is_the_same_every_time_and_of_outputs_like_its_inputs() -> None:
    one, two = (problem.problem(SMALL, 4, 128, torch.bfloat16, CPU, 7) for _ in range(2))
    assert torch.equal(one.codes, two.codes) and torch.equal(one.scale, two.scale)
    y = torch.randn(64, 256).double() @ one.weight().T
    assert 0.3 < y.std() < 3


def test_pruning_keeps_the_two_largest_of_every_four() -> None:
    codes = torch.tensor([[3, -7, 1, 2, 0, 0, -1, 5]], dtype=torch.int8)
    assert problem.prune(codes).tolist() == [[3, -7, 0, 0, 0, 0, -1, 5]]


@pytest.mark.parametrize("name", ["cuBLAS", "llmshrink W4", "llmshrink W8", "llmshrink W3", "llmshrink W2"])
def test_right_results_get_a_time(name: str) -> None:
    measured = [row for rows in run.measure(bench(KNOWN[name]), SMALL) for row in rows]
    assert [row.rows for row in measured] == [1, 5]
    assert all(row.microseconds == 1000 and not row.refused for row in measured)
    assert all(row.share_of_floor == pytest.approx(row.floor_microseconds / 1000, abs=1e-4) for row in measured)


def test_the_sparse_kernel_multiplies_by_the_pruned_weight() -> None:
    measured = [row for rows in run.measure(bench(KNOWN["llmshrink 2:4 W4"]), SMALL) for row in rows]
    assert all(row.microseconds == 1000 for row in measured), measured


def test_a_wrong_result_is_never_timed() -> None:
    def almost(problem: Problem) -> Matmul:
        right = contenders.ours(problem)

        def multiply(x: Tensor) -> Tensor:
            y = right(x)
            y[-1, -1] += 0.5
            return y

        return multiply

    def refuse(made: Sequence[Matmul], x: Tensor) -> float:
        raise AssertionError("timed")

    asked = bench(Contender("broken", 4, 4.0, almost))
    rows = [row for rows in run.measure(replace(asked, seconds=refuse), SMALL) for row in rows]
    assert [row.microseconds for row in rows] == [None, None]
    assert all(row.refused.startswith("wrong result: ") for row in rows)


def test_who_is_not_installed_or_refuses_says_so_and_the_others_are_timed() -> None:
    def broken(problem: Problem) -> Matmul:
        raise RuntimeError("no such\nkernel")

    who = (
        Contender("absent", 4, 4.0, contenders.ours, package="no-such-package-here", peer=True),
        Contender("broken", 4, 4.0, broken, peer=True),
        KNOWN["llmshrink W4"],
    )
    [rows] = run.measure(bench(*who, rows=(3,)), SMALL)
    assert [row.refused for row in rows] == [
        "no-such-package-here is not installed",
        "RuntimeError: no such kernel",
        "",
    ]
    assert rows[2].microseconds == 1000 and rows[2].over == {}


def test_ratios_say_how_many_times_as_long_a_peer_took() -> None:
    row = run.Row("s", 1, 1, 1, "ours", 2.0, "", 1.0, 0.5)
    peer = replace(row, contender="peer", microseconds=5.0)
    ours, theirs = run.compared([row, peer], ["peer"])
    assert ours.over == {"peer": 2.5} and theirs.over == {}


def test_a_result_file_is_whole_and_draws_a_roofline(tmp_path: Path) -> None:
    asked = bench(KNOWN["cuBLAS"], KNOWN["llmshrink W4"])
    content = run.header(asked, {"torch": torch.__version__}, "abc", "a device")
    content["rows"] = [vars(row) for rows in run.measure(asked, SMALL) for row in rows]
    run.write(content, tmp_path / "new" / "result.json")
    assert json.loads((tmp_path / "new" / "result.json").read_text()) == content
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["result.json"]
    plot.plot(content, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 20_000


def test_the_solver_is_timed_against_the_eager_loop_on_the_same_codes() -> None:
    sweep, trial = solver.measure(24, CPU, lambda call: 0.5 if call() is None else 0.25)
    assert (sweep.operator, trial.operator) == ("sweep_block", "trial_block")
    for found in (sweep, trial):
        assert found.different <= solver.MOST_DIFFERENT and found.error_ratio == pytest.approx(1, abs=1e-3)
        assert (found.rows, found.columns, found.over_eager) == (24, 128, 1.0)


def test_the_solver_is_not_timed_where_rows_differ_or_the_error_does() -> None:
    """One row in a thousand may be another solution; no more, and none that is worse."""

    def held(rows: int, wrong_rows: int, scale: float) -> solver.Solved:
        codes = torch.zeros(128, rows, dtype=torch.int8)
        other, errors = codes.clone(), torch.ones(128, rows)
        other[5, :wrong_rows] = 1
        timed: list[int] = []

        def replayed(call: Callable[[], object]) -> float:
            timed.append(1)
            call()
            return 1e-3

        found = solver._held("sweep_block", 1, lambda: (other, errors * scale), lambda: (codes, errors), replayed)
        assert (len(timed) == 2) == (found.over_eager is not None) == (found.microseconds is not None)
        assert found.different == wrong_rows / rows and found.error_ratio == pytest.approx(scale**2)
        return found

    assert held(2000, 0, 1.0).over_eager == 1.0
    assert held(2000, 2, 1.0004).over_eager == 1.0
    assert held(2000, 3, 1.0).over_eager is None
    assert held(2000, 0, 1.0006).over_eager is None
    assert held(2000, 0, 0.9994).over_eager is None


@pytest.mark.parametrize("name", ["llmshrink W4", "llmshrink W3", "llmshrink 2:4 W4"])
def test_a_contenders_search_files_what_its_product_then_runs(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`--tune` searches the weight that is timed: the plan is found under the product's own key."""
    here = Limits("a device", 232448, 132)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(dispatch, "limits", lambda device: here)
    monkeypatch.setattr(sparse24_search, "limits", lambda device: here)
    monkeypatch.setattr(sparse24_dispatch, "limits", lambda device: here)
    monkeypatch.setattr(stopwatch, "seconds", lambda calls: float(len(calls)))
    who, place = KNOWN[name], dispatch if "2:4" not in name else sparse24_dispatch
    asked = who.adapt(problem.problem(Shape("tiny", 512, 128), who.bits, 128, torch.float16, CPU, 0))
    monkeypatch.setattr(place, "candidates", lambda *asked: [place.default(*asked)])
    assert who.search is not None
    (trial,) = who.search(asked, 16)
    assert trial.seconds == 1.0 and trial.refused == ""
    packed = contenders._packed_sparse(asked) if "2:4" in name else contenders._packed(asked)
    for rows in (1, 16):
        assert tune.lookup(place.key(packed, rows, torch.float16, here.name)) == trial.plan


def test_a_solver_that_differs_is_said_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from llmshrink.api import bench as api

    asked = bench(KNOWN["llmshrink W4"], rows=(1,))
    solved = solver.Solved("sweep_block", 96, 128, 1, 0.5, 2.0, None, None, None)
    monkeypatch.setattr(solver, "measure", lambda rows, device: [solved, replace(solved, over_eager=20.5)])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a device")
    said: list[str] = []
    content = api._measure(asked, [SMALL], tmp_path, said.append)
    assert [line for line in said if "sweep_block" in line] == [
        "small  sweep_block: not the eager result",
        "small  sweep_block: 20.5 times as fast as the eager loop",
    ]
    assert json.loads(Path(content["path"]).read_text())["solver"][0]["over_eager"] is None


def test_without_cuda_the_verb_says_so_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from llmshrink.cli import run as cli

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    cases = {
        (): "this machine has none",
        ("--shapes", "llama9"): "--shapes llama9: one of llama3-8b, llama3-70b",
        ("--rows", "1,x"): "--rows 1,x: comma-separated whole numbers",
        ("--rows", "0"): "--rows 0: numbers of rows from 1 on",
        ("--group-size", "48"): "--group-size 48: 32, 64, 128 or 256",
    }
    for more, says in cases.items():
        assert cli(["bench", "kernels", "-o", str(tmp_path / "out"), *more]) == 2
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_triton_it_is_one_line_too(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
if sys.argv[1] == "cuda":
    torch.cuda.is_available = lambda: True
from llmshrink.cli import run
sys.exit(run(["bench", "kernels", "-o", sys.argv[2]]))
"""
    for device, says in (("cpu", "this machine has none"), ("cuda", "bench kernels needs Triton: pip install triton")):
        if device == "cpu" and torch.cuda.is_available():
            continue
        done = subprocess.run([sys.executable, "-c", code, device, tmp_path], capture_output=True, text=True)
        assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1, done.stderr
