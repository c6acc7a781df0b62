"""The benchmark on a real model: how rows are filed, found again and shown. The model itself is in tests/e2e."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.real import __main__ as command
from benchmarks.real import kept, measuring, process, source, store, table, tasks
from benchmarks.real.measuring import Inputs, Missing
from benchmarks.real.rows import GROUPS, OUR_ROWS, PEER_ROWS, PEERS, Row

ROW = Row("a row, of one", GROUPS[1], "groups of 64", ("quantize", "{model}", "--output", "{out}"), 1)


@pytest.fixture
def given(tmp_path: Path) -> Inputs:
    text = tmp_path / "text.txt"
    text.write_text("some text")
    return Inputs(tmp_path / "model", text, text, tmp_path / "cache")


@pytest.fixture(autouse=True)
def nothing_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "FOLDER", tmp_path / "kept")


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"kl": 0.1, "kl_stderr": 0.01, "perplexity": 33.0, "original_perplexity": 30.0}
    monkeypatch.setattr(measuring, "_judged", lambda *_: figures)


def made(row: Row, given: Inputs, place: store.Place, student: Path | None, say: Any) -> None:
    """Stands for a run of ours that needs no model."""
    attempt = len(place.attempts())
    place.note({"attempt": attempt, "started": "then"})
    place.note({"attempt": attempt, "cpu_seconds": 2.0, "wall_seconds": 3.0, "peak_bytes": 10, "load": [1.0, 2.0]})
    place.out.mkdir(exist_ok=True)
    (place.out / "config.json").write_text("{}")


def test_a_row_is_measured_once_and_again_by_other_code(
    given: Inputs, judged: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(measuring, "_make", lambda *all: (calls.append(all[0].name), made(*all)))
    told: list[str] = []
    for _ in range(2):
        found = measuring.measure(ROW, given, checkpoint=False, say=told.append)
        assert found is not None and (found["kl"], found["cpu_seconds"], found["cpu_whole"]) == (0.1, 2.0, True)
    assert calls == [ROW.name] and not given.place(ROW).out.exists()
    measuring.measure(ROW, given, checkpoint=True, say=told.append)
    assert len(calls) == 2 and given.place(ROW).out.is_dir(), "the checkpoint is wanted, and was let go"

    monkeypatch.setattr(store, "code_state", lambda *_: "another")
    (line,) = table.lines([ROW], given, keep=False)
    assert line.figures is None and line.reason is not None and "--keep shows it" in line.reason
    (line,) = table.lines([ROW], given, keep=True)
    assert line.figures is not None and line.older and line.marks() == f"at {line.figures['commit']}"
    measuring.measure(ROW, given, checkpoint=False, say=told.append)
    assert len(calls) == 3


def test_the_commit_of_most_of_our_rows_is_said_once() -> None:
    def line(tool: str, commit: str, older: bool) -> table.Line:
        figures = {
            "commit": commit, "cpu_whole": True, "kl": 1.0, "perplexity": 9.0, "original_perplexity": 8.0,
            "cpu_seconds": 1.0, "peak_bytes": 1, "date": "2020-01-02", "machine": "one",
        }  # fmt: skip
        return table.Line(dataclasses.replace(ROW, name=f"row of {commit}", tool=tool), figures, older)

    most = [line("llmshrink", "aaa", True), line("llmshrink", "aaa", True)]
    others = [line("llmshrink", "bbb", True), line("llmshrink", "ccc", False), line(PEERS[0], "ddd", False)]
    assert table.usual_commit(most) == table.usual_commit([*most, others[0]]) == "aaa"
    assert table.usual_commit(others) is None and table.usual_commit([*most, *others, *others]) is None
    made = table.markdown([*most, others[0]])
    assert "commit aaa, unless" in made and "at aaa" not in made and "(at bbb)" in made
    assert [each.marks("aaa") for each in others] == ["at bbb", "at ccc", ""]
    assert [each.marks() for each in others] == ["at bbb", "", ""]
    elsewhere = dataclasses.replace(most[0], figures={**(most[0].figures or {}), "machine": "another"})
    assert table.usual_machine([*most, elsewhere]) == "one"
    assert "(on another)" in table.markdown([*most, elsewhere]) and "on one, unless" in table.markdown(most)


def test_a_killed_rows_seconds_are_marked(given: Inputs, judged: None, monkeypatch: pytest.MonkeyPatch) -> None:
    given.place(ROW).note({"attempt": 0, "started": "then"})
    monkeypatch.setattr(measuring, "_make", made)
    measuring.measure(ROW, given, checkpoint=False, say=lambda _: None)
    (line,) = table.lines([ROW], given, keep=False)
    assert line.figures is not None and line.figures["cpu_seconds"] == 2.0
    assert line.marks() == "killed once: more CPU seconds than these"


def test_what_fails_is_filed_with_its_reason_and_tried_again(
    given: Inputs, judged: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> None:
        raise Missing("no room")

    monkeypatch.setattr(measuring, "_make", failing)
    assert measuring.measure(ROW, given, checkpoint=False, say=lambda _: None) is None
    (line,) = table.lines([ROW], given, keep=False)
    assert (line.figures, line.reason) == (None, "no room")
    assert "Not measured: a row, of one: no room." in table.markdown([line])
    monkeypatch.setattr(measuring, "_make", made)
    assert measuring.measure(ROW, given, checkpoint=False, say=lambda _: None) is not None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_row_that_was_broken_off_is_no_failure(
    given: Inputs, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    code = f"import os, signal; signal.signal({int(number)}, signal.SIG_DFL); os.kill(os.getpid(), {int(number)})"
    ended = process.run([sys.executable, "-c", code], given.cache / "log.txt")
    monkeypatch.setattr(measuring, "run", lambda *_, **__: ended)
    told: list[str] = []
    assert measuring.measure(ROW, given, checkpoint=False, say=told.append) is None
    assert told[-1] == "a row, of one: broken off; it goes on the next time"
    assert given.place(ROW).failure() is None and "Not measured" not in table.markdown(
        table.lines([ROW], given, keep=False)
    )


def test_a_row_that_was_killed_is_a_failure_with_its_code(given: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = process.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], given.cache / "log.txt")
    monkeypatch.setattr(measuring, "run", lambda *_, **__: killed)
    assert measuring.measure(ROW, given, checkpoint=False, say=lambda _: None) is None
    failure = given.place(ROW).failure()
    assert failure is not None and "its run ended with -9" in failure["reason"]


def test_a_rows_commit_is_that_of_its_start(given: Inputs, judged: None, monkeypatch: pytest.MonkeyPatch) -> None:
    at = ["start"]
    monkeypatch.setattr(store, "commit", lambda: at[0])
    monkeypatch.setattr(measuring, "_make", lambda *all: (made(*all), at.__setitem__(0, "end")))
    figures = measuring.measure(ROW, given, checkpoint=False, say=lambda _: None)
    assert figures is not None and figures["commit"] == "start"


def test_the_place_depends_on_all_that_figures_depend_on(
    given: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = given.place(ROW).folder
    other = tmp_path / "other.txt"
    other.write_text("other text")
    changed = [
        given.place(dataclasses.replace(ROW, command=(*ROW.command, "--bits", "3"))),
        dataclasses.replace(given, calibration=other).place(ROW),
        dataclasses.replace(given, text=other).place(ROW),
        given.place(dataclasses.replace(ROW, packages=("pydantic",))),
        given.place(dataclasses.replace(ROW, student=ROW)),
    ]
    assert len({here, *(place.folder for place in changed)}) == 1 + len(changed)
    assert given.place(dataclasses.replace(ROW, minutes=9, what="other words")).folder == here
    monkeypatch.setattr(measuring, "cpu", lambda: "another processor")
    assert given.place(ROW).folder != here


def test_a_rows_code_has_its_own_recipe_in_it_and_no_other(given: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(store, "code_state", lambda *places: asked.append(places) or str(len(asked)))
    rows = {row.name: row for row in (*OUR_ROWS, *PEER_ROWS)}
    taught = next(row for row in OUR_ROWS if row.student is not None)
    for name in ("gptq-w4a16, one stream", taught.name, "GPTQModel, W4"):
        given.code(rows[name])
    ours, student, peers = asked
    assert ours == (*store.NUMERIC_ROOMS, "recipes/gptq-w4a16.yaml")
    assert student[-1] == "recipes/sparsegpt-2of4.yaml" and peers == ("benchmarks/peer_gptqmodel.py",)


def test_comments_and_docstrings_are_no_other_state_of_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "ROOT", tmp_path)
    states = []
    for text in ('"""One."""\nx = 1\n', '"""Other."""\nx = 1  # why\n', "x = 2\n"):
        (tmp_path / "a.py").write_text(text)
        store.code_state.cache_clear()
        states.append(store.code_state("a.py"))
    store.code_state.cache_clear()
    assert states[0] == states[1] != states[2]


def test_figures_that_the_repository_keeps_are_shown_until_the_row_is_measured_here(
    given: Inputs, judged: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "_make", made)
    monkeypatch.setattr(kept, "FOLDER", tmp_path / "results")
    figures = measuring.measure(ROW, given, checkpoint=False, say=lambda _: None)
    assert figures is not None
    file = kept.write(ROW, {**figures, "kl": 0.2, "date": "2020-01-02T03:04Z"})
    assert file == tmp_path / "results" / "a-row-of-one.json"
    shown = table.lines([ROW], given, keep=False)
    assert shown[0].figures == figures, "what is measured here comes first"

    elsewhere = dataclasses.replace(given, cache=tmp_path / "another machine")
    (line,) = table.lines([ROW], elsewhere, keep=False)
    assert line.figures is not None and (line.figures["kl"], line.older) == (0.2, False)
    assert "2020-01-02" in table.markdown([line])
    monkeypatch.setattr(store, "code_state", lambda *_: "another")
    (line,) = table.lines([ROW], elsewhere, keep=False)
    assert line.older and line.marks() == f"at {figures['commit']}"
    (line,) = table.lines([dataclasses.replace(ROW, command=("quantize",))], elsewhere, keep=False)
    assert line.figures is None, "another command's figures say nothing of it"


def test_what_the_repository_keeps_belongs_to_rows_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {row.name: row for row in (*OUR_ROWS, *PEER_ROWS)}
    monkeypatch.undo()
    files = [file for file in kept.FOLDER.glob("*.json") if not file.name.startswith("tasks")]
    assert files
    for file in files:
        figures = json.loads(file.read_text())
        assert kept.find(rows[figures["name"]]) == figures, f"{file.name}: its row has another command now"


def test_a_childs_cpu_seconds_and_peak_are_its_own(tmp_path: Path) -> None:
    burn = "import time\nkept = bytearray(b'x') * 80_000_000\nwhile time.process_time() < 0.3: pass\nprint('done')"
    # From a small process, as it is used: a child's peak has in it what its parent held when it was started.
    measuring = (
        "import json, sys; from pathlib import Path; from benchmarks.real import process; "
        "used = process.run([sys.executable, '-c', sys.argv[1]], Path(sys.argv[2])); "
        "print(json.dumps([used.code, used.cpu_seconds, used.peak_bytes]))"
    )
    command = [sys.executable, "-c", measuring, burn, str(tmp_path / "log.txt")]
    said = subprocess.run(command, cwd=process.ROOT, capture_output=True, text=True, check=True).stdout
    code, cpu_seconds, peak_bytes = json.loads(said)
    assert code == 0 and 0.3 <= cpu_seconds < 3 and 80e6 < peak_bytes < 200e6
    assert process.last_line(tmp_path / "log.txt") == "done"
    assert process.run([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log.txt").code == 3


def test_an_interrupted_run_ends_its_children(given: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sleeping, codes = tmp_path / "sleeping", []

    def make(*_: Any) -> None:
        code = f"open({str(sleeping)!r}, 'w').close(); import time; time.sleep(60)"
        codes.append(process.run([sys.executable, "-c", code], tmp_path / "log.txt").code)
        raise Missing("ended")

    def waiting(row: Row, *_: Any, **__: Any) -> None:
        if row is ROW:
            return make()
        while not sleeping.exists():
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(measuring, "measure", waiting)
    with pytest.raises(KeyboardInterrupt):
        measuring.measure_all([dataclasses.replace(ROW, name="second"), ROW], given, jobs=2, say=lambda _: None)
    while not codes:
        time.sleep(0.01)
    assert codes == [-15]


def test_the_list_of_rows_is_whole() -> None:
    rows = [*OUR_ROWS, *PEER_ROWS]
    assert len({row.name for row in rows}) == len(rows)
    assert {row.group for row in rows} <= set(GROUPS) and {row.tool for row in PEER_ROWS} == set(PEERS)
    assert sum(row.minutes for row in OUR_ROWS if row.usual) <= 180, "make real promises 90 minutes on two cores"
    for row in PEER_ROWS:
        assert measuring.constraints(row.tool).is_file() and (source.ROOT / measuring.SCRIPTS[row.tool]).is_file()
    assert [row.name for row in OUR_ROWS if row.source_grid] == ["gptq-w4a16-asym, groups of 32"]


@pytest.mark.parametrize("row", [row for row in OUR_ROWS if row.student is None], ids=lambda row: row.name)
def test_our_command_lines_are_accepted(row: Row, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Up to the model, which isn't there: what the verb doesn't know would be refused before it."""
    from llmshrink.cli import run

    text = tmp_path / "text.txt"
    text.write_text("Some text.")
    paths = {"model": tmp_path / "nowhere", "calibration": text, "out": tmp_path / "out"}
    assert run([word.format(**paths) for word in row.command]) == 2
    said = capsys.readouterr().err
    assert "nowhere" in said and "option" not in said, said


def test_a_table_goes_between_its_markers_and_nowhere_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.BEGIN}\nold \\1\n{table.END}\nafter\n")
    for _ in range(2):
        table.fill(page, "| new | \\1 |")
        assert page.read_text() == f"before\n{table.BEGIN}\n| new | \\1 |\n{table.END}\nafter\n"
    page.write_text("no markers")
    with pytest.raises(ValueError, match="needs the line"):
        table.fill(page, "x")
    assert page.read_text() == "no markers"
    readme = (source.ROOT / "README.md").read_text()
    for marker in (table.BEGIN, table.END, tasks.BEGIN, tasks.END):
        assert readme.count(marker) == 1


def test_missing_texts_and_patterns_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measuring, "BESIDE", tmp_path)
    for words, says in (
        ([], f"no calibration.txt at {tmp_path}/calibration.txt; name a text file with --calibration"),
        (["--list", "--only", "nothing*"], "--only nothing*: no such row; --list names them"),
    ):
        monkeypatch.setattr(sys, "argv", ["real", *words])
        assert command.main() == 2
        assert capsys.readouterr().err.strip() == says


def test_a_wheel_that_cannot_be_had_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(source.Unavailable, match=r"gguf 0\.19\.0 can't be fetched .*; put its wheel into "):
        source.model(tmp_path)


def test_tasks_are_shown_with_their_paired_differences(tmp_path: Path) -> None:
    paired = {"difference": -0.04, "low": -0.07, "high": -0.01, "mcnemar_p": 0.02, "lost": 20, "won": 8}
    score = {"metric": "acc", "score": 0.5, "stderr": 0.03, "items": 300, "chance": 0.25, "more": 1}
    models = [
        {"tasks": {name: {**score, "versus_original": None} for name in tasks.TASKS}},
        {"tasks": {name: {**score, "score": 0.46, "versus_original": paired} for name in tasks.TASKS}},
    ]
    (tmp_path / "results.json").write_text(json.dumps({"models": models}))
    found = tasks.read(tmp_path, [ROW])
    assert "-0.040, -0.070 to -0.010; lost 20, won 8, p = 0.02" in tasks.text(found)
    shown = tasks.markdown(found, "2020-01-02", "one")
    assert "| a row, of one | 0.460 (-0.040, -0.070 to -0.010) |" in shown and source.GRID in shown


def test_tasks_that_are_not_there_are_one_line(given: Inputs, tmp_path: Path, say: Callable[[str], None]) -> None:
    with pytest.raises(Missing, match="name their folder with --tasks-dir"):
        tasks.compared([ROW], given, tasks.Asked(tmp_path, 300, 1), keep=False, say=say)


@pytest.fixture
def say() -> Callable[[str], None]:
    return lambda _: None
