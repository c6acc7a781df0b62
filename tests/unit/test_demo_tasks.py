from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import contents

from llmshrink.demo import language, model_folder
from llmshrink.demo.tasks import ITEMS, write_tasks
from llmshrink.demo.world import CIRCLE_WEIGHTS, HAUNT_WEIGHTS, MOOD_WEIGHTS, PEOPLE

NAMES = ("demo_facts", "demo_cloze", "demo_habits")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "tasks"
    assert write_tasks(folder) == NAMES
    return folder


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def follows(context: str, words: str) -> bool:
    right, number = language.words_until_false(context, words)
    return right == number > 0


def test_the_same_bytes_each_time_and_again_over_old_ones(folder: Path, tmp_path: Path) -> None:
    write_tasks(tmp_path)
    (tmp_path / "demo_facts.jsonl").write_text("{}\n")
    write_tasks(tmp_path)
    assert contents(tmp_path) == contents(folder)


@pytest.mark.parametrize("name", NAMES)
def test_no_item_is_asked_twice(folder: Path, name: str) -> None:
    assert len({row["context"] for row in rows(folder, name)}) == ITEMS


def test_one_option_of_a_fact_is_true(folder: Path) -> None:
    for row in rows(folder, "demo_facts"):
        assert len(set(row["options"])) == language.OPTIONS
        true = [follows(row["context"], option) for option in row["options"]]
        assert true == [index == row["answer"] for index in range(language.OPTIONS)], row


def test_the_words_of_a_cloze_are_certain(folder: Path) -> None:
    for row in rows(folder, "demo_cloze"):
        assert follows(row["context"], row["answer"])
        (told,) = language.follow(_to_its_end(row["context"] + row["answer"]))
        words = language.WORD.findall(row["context"])
        certain = told.surprisal[len(words) : len(words) + len(language.WORD.findall(row["answer"]))]
        # Who has a trade in a home is told by both; all else follows without a choice.
        assert set(certain) == {0.0}, row


def _to_its_end(told: str) -> str:
    """What was begun, with the shortest possible end: the first that the language accepts."""
    for manner in ("", *(f" {word}" for word in ("again", "alone", "bravely", "calmly", "early", "eagerly", "gladly"))):
        for mark in (".", "?"):
            story = f"{told}{manner}{mark} The end.\n"
            try:
                language.follow(story)
            except ValueError:
                continue
            return story
    raise AssertionError(told)


def test_the_answer_of_a_habit_is_the_likeliest(folder: Path) -> None:
    for row in rows(folder, "demo_habits"):
        name = re.findall(r"there was (\w+)", row["context"])[0]
        person = PEOPLE[name]
        words, weights = {
            "the": (person.haunts, HAUNT_WEIGHTS),
            "felt": (person.moods, MOOD_WEIGHTS),
            "visited": (person.circle, CIRCLE_WEIGHTS),
            "gave": (person.circle, CIRCLE_WEIGHTS),
        }[row["context"].split()[-1]]
        table = {f" {word}": weight for word, weight in zip(words, weights, strict=True)}
        asked = [table[option] for option in row["options"]]
        assert asked.count(max(asked)) == 1
        assert asked.index(max(asked)) == row["answer"]
        assert all(follows(row["context"], option) for option in row["options"])


def test_nothing_is_left_in_the_cache_of_datasets(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    from llmshrink_eval.taskset import TaskOptions, load_tasks

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    assert load_tasks(TaskOptions(("demo",), folder)).tasks.keys() == set(NAMES)
    assert not list(tmp_path.iterdir())


def test_edited_data_are_what_is_asked(tmp_path: Path) -> None:
    import os

    from llmshrink_eval.taskset import TaskOptions, load_tasks

    write_tasks(tmp_path)
    file = tmp_path / "demo_cloze.jsonl"
    options = TaskOptions(("demo_cloze",), tmp_path)
    assert len(load_tasks(options).tasks["demo_cloze"].eval_docs) == ITEMS
    status = file.stat()
    file.write_text('{"context": "Once there was", "answer": " Ada"}\n')
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert list(load_tasks(options).tasks["demo_cloze"].eval_docs) == [{"context": "Once there was", "answer": " Ada"}]


def _rounded(bits: int) -> Any:
    """The demo model in float32, its blocks' weights rounded to nearest as `llmshrink quantize --recipe rtn-w4a16`."""
    import torch
    from transformers import AutoModelForCausalLM

    from llmshrink.methods import QuantizeSpec, solver

    model = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32).eval()
    spec = QuantizeSpec(method="rtn", bits=bits, scale_search="mse")
    for name, module in model.named_modules():
        if bits < 16 and isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.data = solver("rtn").solve(module.weight.data, None, spec, torch.bfloat16).weight.dequantize()
    return model


@pytest.mark.slow
def test_the_demo_model_knows_its_world_and_two_bits_forget_it(folder: Path) -> None:
    from llmshrink_eval.tasks import TaskOptions, compare_tasks, run_tasks
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    options = TaskOptions(("demo",), folder, batch_size=32)
    original, damaged = (run_tasks(_rounded(bits), tokenizer, options) for bits in (16, 2))

    assert tuple(original) == NAMES
    assert [original[name].chance for name in NAMES] == [0.25, None, 0.25]
    assert original["demo_facts"].score > 0.95
    assert original["demo_cloze"].score > 0.95
    assert original["demo_habits"].score > 0.6
    # Seven of 400 facts, said one by one all over the training text, are lost; of what takes more, far more.
    limits = {"demo_facts": (0.0, 0.05), "demo_cloze": (-0.05, 1e-6), "demo_habits": (-0.1, 1e-6)}
    for name, task in compare_tasks(original, damaged, seed=0).items():
        assert task.items == ITEMS
        assert task.versus_original is not None and task.versus_original.mcnemar_p is not None
        high, chance = limits[name]
        assert task.versus_original.high < high, name
        assert task.versus_original.mcnemar_p < chance, name
