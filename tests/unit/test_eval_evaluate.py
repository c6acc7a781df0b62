"""The whole evaluation on tiny models: what it finds, in what order, what it does once, and how it stops."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from eval_oracle import a_text, kl64, logprobs64, nats64
from eval_small import ITEMS, WINDOW, Heard, Small, disturb, measured, small, spec, spoil, watched
from llmshrink_eval import answers
from llmshrink_eval.engines import transformers as engines
from llmshrink_eval.errors import EvalFailed
from llmshrink_eval.evaluate import evaluate
from llmshrink_eval.model import LoadOptions, load_model
from llmshrink_eval.protocol import build_windows
from llmshrink_eval.results import Results
from transformers import AutoTokenizer

PROMISED = {
    "perplexity": {"token", "word", "bits_per_byte", "nats_per_token", "stderr"},
    "divergence": {"kl_mean", "kl_median", "kl_p99", "kl_max", "top1_agreement", "top5_overlap"},
}


@pytest.fixture
def here(model_of: Callable[..., Path], story: Path, tmp_path: Path) -> Small:
    return small(model_of, story, tmp_path)


@pytest.fixture
def near(here: Small, tmp_path: Path) -> Path:
    return disturb(here.original, tmp_path / "near", 0.05)


@pytest.fixture
def far(here: Small, tmp_path: Path) -> Path:
    return disturb(here.original, tmp_path / "far", 0.4)


def test_results_hold_what_is_promised_with_the_original_first(here: Small, near: Path, far: Path) -> None:
    found = evaluate(spec(here.original), [spec(near), spec(far)], here.options(speed=(1,)))
    made = json.loads(found.results.to_json())
    assert [model["path"] for model in made["models"]] == [str(here.original), str(near), str(far)]
    assert [model["role"] for model in made["models"]] == ["original", "compressed", "compressed"]
    for index, model in enumerate(made["models"]):
        assert {"path", "perplexity", "divergence", "tasks", "cost"} <= model.keys()
        assert model["perplexity"].keys() >= PROMISED["perplexity"]
        assert model["tasks"].keys() == {"demo_facts"}
        assert model["cost"]["bytes_on_disk"] == (Path(model["path"]) / "model.safetensors").stat().st_size
        assert model["cost"]["speed"][0]["decode_tokens_per_second"] > 0
        if index:
            assert model["divergence"].keys() >= PROMISED["divergence"]
        else:
            assert model["divergence"] is None
    assert made["models"][1]["divergence"]["kl_mean"] < made["models"][2]["divergence"]["kl_mean"]


def test_numbers_are_those_of_a_float64_loop_over_the_same_folders(here: Small, far: Path) -> None:
    results = evaluate(spec(here.original), [spec(far)], here.options(tasks=())).results
    tokenizer: Any = AutoTokenizer.from_pretrained(here.original)
    windows = build_windows(a_text([here.text]), tokenizer, protocol="gptq", window=WINDOW, limit=128)
    tables = [logprobs64(load_model(folder, LoadOptions()), windows) for folder in (here.original, far)]
    for model, table in zip(results.models, tables, strict=True):
        assert model.perplexity is not None
        expected = math.fsum(nats64(table, windows)) / windows.tokens
        assert model.perplexity.nats_per_token == pytest.approx(expected, rel=1e-5)
    kl = [value for window in kl64(tables[0], tables[1], windows) for value in window.tolist()]
    divergence = results.models[1].divergence
    assert divergence is not None and divergence.positions == len(kl)
    assert divergence.kl_mean == pytest.approx(math.fsum(kl) / len(kl), rel=1e-4)
    assert divergence.kl_units == len(windows)


def test_a_model_beside_itself_is_the_same_in_everything_and_has_a_name_of_its_own(here: Small) -> None:
    results = evaluate(spec(here.original), [spec(here.original)] * 2, here.options()).results
    assert [model.name for model in results.models] == ["model", "model (2)", "model (3)"]
    for model in results.models[1:]:
        assert model.divergence is not None and model.perplexity is not None
        assert (model.divergence.kl_max, model.divergence.top1_agreement) == (0.0, 1.0)
        assert model.perplexity.excess_nats == 0.0
        paired = model.tasks["demo_facts"].versus_original
        assert paired is not None and (paired.lost, paired.won, paired.difference) == (0, 0, 0.0)


def test_two_folders_of_one_name_keep_their_numbers_apart(here: Small, tmp_path: Path) -> None:
    folders = [disturb(here.original, tmp_path / letter / "w4", 0.2, seed) for seed, letter in enumerate("ab")]
    specs = [spec(folder, f"{folder.parent.name}/w4") for folder in folders]
    found = evaluate(spec(here.original), specs, here.options())
    first, second = found.results.models[1:]
    assert first.divergence is not None and second.divergence is not None
    assert first.divergence.kl_mean != second.divergence.kl_mean
    assert (first.name, second.name) == ("a/w4", "b/w4")
    assert first.tasks["demo_facts"].samples != second.tasks["demo_facts"].samples
    for model in found.results.models:
        assert len(found.samples[model.tasks["demo_facts"].samples or ""]) == ITEMS
    assert all(any(said.startswith(f"{name}: ") for said in found.results.summary) for name in ("a/w4", "b/w4"))


def test_the_original_runs_once_for_all_and_not_again_for_another(
    here: Small, near: Path, far: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = watched(monkeypatch)
    evaluate(spec(here.original), [spec(near), spec(far)], here.options(speed=(1,)))
    assert all(work.of(kind) == ["model", "near", "far"] for kind in ("cost", "read", "tasks", "generations"))
    work.done.clear()
    third = disturb(here.original, tmp_path / "third", 0.1)
    heard = Heard()
    results = evaluate(spec(here.original), [spec(near), spec(third)], here.options(speed=(1,)), heard).results
    assert {name for _, name in work.done} == {"third"}
    assert heard.notes == [f"{name}: cost, text, tasks, generations from the cache" for name in ("model", "near")]
    assert [bool(model.cached) for model in results.models] == [True, True, False]


def test_a_second_run_loads_nothing_and_says_so(here: Small, near: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = evaluate(spec(here.original), [spec(near)], here.options(speed=(1,)))
    monkeypatch.setattr(engines, "load_model", None)
    heard = Heard()
    second = evaluate(spec(here.original), [spec(near)], here.options(speed=(1,)), heard)
    assert not [note for note in heard.notes if "goes on" in note]
    assert heard.parts == [] and all(note.endswith("from the cache") for note in heard.notes) and len(heard.notes) == 2
    same = {"created": first.results.created}
    drop = {"models": {"__all__": {"cached"}}}
    assert (
        second.results.model_copy(update=same).model_dump(exclude=drop) == first.results.model_dump(exclude=drop) | same
    )
    assert second.samples == first.samples


def test_one_model_is_in_memory_at_a_time(here: Small, near: Path, far: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []

    def load(*arguments: Any) -> Any:
        gc.collect()
        assert not any(reference() is not None for reference in alive)
        model = load_model(*arguments)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(engines, "load_model", load)
    evaluate(spec(here.original), [spec(near), spec(far)], here.options())
    assert len(alive) == 3


AT = {("model: text", 3): 9, ("near: text", 2): 6, ("model: tasks", 10): 5, ("near: tasks", 12): 10}
"""Label and step at which a run is stopped -> how many windows or answers are there by then."""


@pytest.mark.parametrize("stop", AT)
def test_an_interrupted_evaluation_goes_on_and_finds_the_same(
    stop: tuple[str, int], here: Small, near: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "STRETCH", 5)
    options = here.options(batch_size=3)
    whole = evaluate(spec(here.original), [spec(near)], options)
    again = Small(here.original, here.text, here.tasks_dir, tmp_path / "another cache").options(batch_size=3)
    with pytest.raises(KeyboardInterrupt):
        evaluate(spec(here.original), [spec(near)], again, Heard(stop=stop))
    work = watched(monkeypatch)
    heard = Heard()
    ended = evaluate(spec(here.original), [spec(near)], again, heard)
    assert measured(ended.results) == measured(whole.results)
    assert ended.samples == whole.samples
    # What was done before the interruption isn't done again, and what was in the middle is entered in the middle.
    kind = "read" if "text" in stop[0] else "tasks"
    name, _, part = stop[0].partition(": ")
    told = {"text": r"text a text: goes on after (\d+) of \d+ windows", "tasks": r"tasks: goes on after (\d+) answers"}
    (line,) = [note for note in heard.notes if "goes on" in note]
    match = re.fullmatch(rf"{name}: {told[part]}, where a run stopped", line)
    assert match is not None and int(match[1]) == AT[stop]
    assert stop[0].split(":")[0] in work.of(kind)
    assert stop[0].startswith("model") or "model" not in work.of("read") + work.of("tasks")
    assert not list((tmp_path / "another cache" / "tasks").glob("*/"))


def test_answers_that_are_there_are_not_asked_again(here: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setattr(answers, "STRETCH", 5)
    asked: list[int] = []
    method = HFLM.loglikelihood

    def counting(self: Any, requests: Any, *more: Any, **options: Any) -> Any:
        asked.append(len(requests))
        return method(self, requests, *more, **options)

    monkeypatch.setattr(HFLM, "loglikelihood", counting)
    with pytest.raises(KeyboardInterrupt):
        evaluate(None, [spec(here.original)], here.options(text=False), Heard(stop=("tasks", 12)))
    assert asked == [5, 5, 5]
    asked.clear()
    evaluate(None, [spec(here.original)], here.options(text=False))
    assert asked == [5, 5, 4]  # 24 requests, two stretches of which were finished


@pytest.mark.parametrize(("kind", "says"), [({"tasks": ()}, "in window 0 of"), ({"text": False}, "task demo_facts")])
def test_nan_names_the_model_and_the_place_and_keeps_nothing_of_it(
    kind: dict[str, Any], says: str, here: Small, tmp_path: Path
) -> None:
    broken = spoil(here.original, tmp_path / "broken")
    with pytest.raises(EvalFailed, match=rf"^broken: .*{says}"):
        evaluate(spec(here.original), [spec(broken)], here.options(**kind))
    with pytest.raises(EvalFailed, match=rf"^broken: .*{says}"):
        evaluate(spec(here.original), [spec(broken)], here.options(**kind))


@pytest.mark.parametrize(("kind", "part"), [({"tasks": ()}, "read"), ({"text": False}, "tasks")])
def test_a_model_that_changes_while_it_is_measured_has_no_figures(
    kind: dict[str, Any], part: str, here: Small, near: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = getattr(engines.TransformersEngine, part)
    weights = near / "model.safetensors"
    before = weights.read_bytes()

    def change(self: Any, *arguments: Any, **named: Any) -> Any:
        found = measure(self, *arguments, **named)
        weights.write_bytes(before[:-5000] + bytes([before[-5000] ^ 1]) + before[-4999:])
        return found

    monkeypatch.setattr(engines.TransformersEngine, part, change)
    with pytest.raises(EvalFailed, match=f"^near: {near} changed while it was measured, .*run again when"):
        evaluate(None, [spec(near)], here.options(**kind))
    monkeypatch.undo()
    weights.write_bytes(before)
    work = watched(monkeypatch)
    evaluate(None, [spec(near)], here.options(**kind))
    assert (part, "near") in work.done  # nothing of it was kept


def test_the_mean_recovery_is_not_that_of_the_tasks_that_have_one(here: Small, near: Path) -> None:
    options = here.options(text=False)
    results = evaluate(spec(here.original), [spec(near)], options).results
    (task,) = results.models[1].tasks.values()
    assert task.versus_original is not None and results.models[1].recovery == task.versus_original.recovery
    # A random model finds no word of a cloze: there is nothing to recover.
    both = dataclasses.replace(options, tasks=("demo_facts", "demo_cloze"))
    results = evaluate(spec(here.original), [spec(near)], both).results
    assert results.models[0].tasks["demo_cloze"].score == 0
    assert results.models[1].recovery is None


def test_all_that_is_needed_to_do_it_again_is_in_the_results(here: Small, near: Path) -> None:
    results = evaluate(spec(here.original), [spec(near)], here.options(num_fewshot=2)).results
    for model in results.models:
        task = model.tasks["demo_facts"]
        assert (task.num_fewshot, task.version) == (2, "1") and re.fullmatch(
            r"[0-9a-f]{64}", task.data_fingerprint or ""
        )
    assert len({model.tasks["demo_facts"].data_fingerprint for model in results.models}) == 1
    assert re.fullmatch(r"[0-9a-f]{64}", results.tasks_fingerprint or "")
    assert results.settings["running"]["dtype"] == {"model": "float32", "near": "float32"}  # type: ignore[index]
    assert evaluate(None, [spec(near)], here.options(tasks=())).results.tasks_fingerprint is None
    fewer = evaluate(None, [spec(near)], here.options(text=False, num_fewshot=2, limit=3)).results.models[0]
    plain = evaluate(None, [spec(near)], here.options(text=False)).results.models[0]
    of = {model.tasks["demo_facts"].data_fingerprint for model in (results.models[1], fewer, plain)}
    assert len(of) == 3  # other documents, and examples drawn from others or from none


@pytest.mark.parametrize("changes", [{}, {"offload": True}, {"speed": (1,)}])
def test_load_time_and_memory_are_measured_whatever_else_is(
    changes: dict[str, Any], here: Small, tmp_path: Path
) -> None:
    if changes.get("offload"):
        changes = {"offload": tmp_path / "offload"}
    (model,) = evaluate(None, [spec(here.original)], here.options(tasks=(), prompts=(), **changes)).results.models
    assert model.cost is not None and model.cost.load_seconds is not None and model.cost.peak_rss_bytes is not None
    assert model.cost.load_seconds > 0 and model.cost.peak_rss_bytes > 2**27
    assert len(model.cost.speed) == len(changes.get("speed", ()))


def test_a_gate_is_in_the_results(here: Small, near: Path, far: Path) -> None:
    models = [spec(near), spec(far)]
    found = evaluate(spec(here.original), models, here.options(tasks=())).results
    low, high = (model.divergence.kl_mean for model in found.models[1:] if model.divergence)
    options = here.options(tasks=(), require=f"kl<={(low + high) / 2}, token<1e9")
    results = evaluate(spec(here.original), models, options).results
    assert [(each.model, each.passed) for each in results.requirements] == [
        ("near", True), ("near", True), ("far", False), ("far", True),
    ]  # fmt: skip
    assert "1 of 4 requirements failed: kl<=" in results.summary[0] and " by far " in results.summary[0]


def test_a_report_takes_the_place_of_the_one_before_and_of_its_items(here: Small, near: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    evaluate(spec(here.original), [spec(near)], here.options()).write(out)
    assert (out / "samples" / "near" / "demo_facts.jsonl").is_file()
    found = evaluate(spec(here.original), [spec(near, "renamed")], here.options())
    found.write(out)
    assert Results.read(out / "results.json") == found.results
    files = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    assert files == {
        "results.json", "table.md", "report.html",
        "samples/model/demo_facts.jsonl", "samples/renamed/demo_facts.jsonl",
    }  # fmt: skip


def test_a_report_that_says_the_same_is_left_as_it_is(here: Small, near: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"

    def written(**changes: Any) -> set[str]:
        """Which files a further run writes anew."""
        before = {file: file.stat().st_ino for file in out.rglob("*") if file.is_file()}
        found = evaluate(spec(here.original), [spec(near)], here.options(**changes)).write(out)
        assert Results.read(out / "results.json") == found
        return {file.name for file in out.rglob("*") if file.is_file() and before.get(file) != file.stat().st_ino}

    everything = {"results.json", "table.md", "report.html", "demo_facts.jsonl"}
    assert written() == everything
    assert written() == set()
    assert written(require="token<1e9") == everything
    assert written(require="token<1e9") == set()
    for name in ("report.html", "samples/near/demo_facts.jsonl"):
        (out / name).unlink()
        assert written(require="token<1e9") == everything
    rows = (out / "samples/near/demo_facts.jsonl").read_text()
    (out / "samples/near/demo_facts.jsonl").write_text(rows.replace("0.0", "0.5"))
    assert written(require="token<1e9") == everything


def test_what_json_cannot_hold_is_written_all_the_same(here: Small, tmp_path: Path) -> None:
    results = evaluate(None, [spec(here.original)], here.options(tasks=())).results
    perplexity = results.models[0].perplexity
    assert perplexity is not None
    odd = results.models[0].model_copy(
        update={"name": "half \ud800", "perplexity": perplexity.model_copy(update={"token": math.inf})}
    )
    results.model_copy(update={"models": (odd,)}).write(tmp_path / "results.json")
    back = Results.read(tmp_path / "results.json").models[0]
    assert back.name == "half ?" and back.perplexity is not None and back.perplexity.token > 1e308
