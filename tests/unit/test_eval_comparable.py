"""Models that don't read the same tokens are no pair, and a task that nobody knows is answered with its neighbours."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from eval_oracle import a_text
from llmshrink_eval.comparable import refuse_other_tokenizers, refuse_other_vocabularies
from llmshrink_eval.errors import EvalError
from llmshrink_eval.options import ModelSpec
from llmshrink_eval.protocol import build_windows
from llmshrink_eval.taskset import TaskOptions, check_tasks

from llmshrink.demo.tasks import write_tasks
from llmshrink.demo.tokenizer import build

SPECS = [ModelSpec(name, Path(name)) for name in ("first", "second", "third")]


class Config:
    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def get_text_config(self) -> Config:
        return self


def test_the_same_tokenizer_under_any_name_is_fine() -> None:
    tokenizer: Any = build(128)
    refuse_other_tokenizers(SPECS, [tokenizer, copy.deepcopy(tokenizer), build(64)])


def test_one_more_token_is_another_tokenizer_and_both_models_are_named() -> None:
    first: Any = build(128)
    third = copy.deepcopy(first)
    third.add_tokens(["zebra"])
    size = len(first.get_vocab())
    with pytest.raises(
        EvalError,
        match=rf"^first and third have different tokenizers \({size:,} tokens against {size + 1:,}, first different:"
        r" 'zebra'\); only models that read the same tokens can be compared$",
    ):
        refuse_other_tokenizers(SPECS, [first, copy.deepcopy(first), third])


def test_the_same_tokens_cut_in_another_way_are_another_tokenizer() -> None:
    from tokenizers.normalizers import Lowercase

    first: Any = build(128)
    second = copy.deepcopy(first)
    second.backend_tokenizer.normalizer = Lowercase()
    with pytest.raises(EvalError, match=r"first and second .*the same tokens, but .* is cut into them in another way"):
        refuse_other_tokenizers(SPECS[:2], [first, second])


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ((512, 512), None),
        ((512, 576), r"^first and second have vocabularies of 512 and 576 in their config\.json; only models with the"),
        (
            (512, 7),
            r"^second: its tokenizer gives token \d+, and its config\.json has a vocabulary of 7; the two",
        ),
    ],
)
def test_a_vocabulary_must_hold_every_token_and_be_the_originals(sizes: tuple[int, ...], says: str | None) -> None:
    windows = build_windows(a_text(["Eva took the red key to the baker. " * 20]), build(128), protocol="gptq", limit=32)
    configs = [Config(size) for size in sizes]
    if says is None:
        refuse_other_vocabularies(SPECS[:2], configs, windows)
        return
    with pytest.raises(EvalError, match=says):
        refuse_other_vocabularies(SPECS[:2], configs, windows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("tasks")
    write_tasks(made)
    return made


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("demo_fcats",), r"^task demo_fcats: unknown; did you mean demo_facts(, \w+){0,2}\?$"),
        (("hellaswog",), r"^task hellaswog: unknown; did you mean hellaswag"),
        (("arc_esy", "demo_facts"), r"^task arc_esy: unknown; did you mean arc_easy"),
        (("demo_habit", "piqaa"), r"task demo_habit: .*demo_habits.*; task piqaa: unknown; did you mean piqa"),
        (("qqqqqqqqqqqq",), r"^task qqqqqqqqqqqq: unknown; `lm-eval ls tasks` lists them$"),
        (("nothing_like_this_*",), r"^task nothing_like_this_\*: unknown"),
    ],
)
def test_an_unknown_task_is_answered_with_the_nearest_names(names: tuple[str, ...], says: str, folder: Path) -> None:
    with pytest.raises(EvalError, match=says) as caught:
        check_tasks(TaskOptions(names, folder))
    assert "\n" not in str(caught.value)


def test_a_pattern_names_all_that_it_matches(folder: Path) -> None:
    check_tasks(TaskOptions(("demo_*",), folder))
