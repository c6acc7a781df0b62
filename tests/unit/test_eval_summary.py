"""The sentences claim what the intervals allow, and no more."""

from __future__ import annotations

import math
from typing import Any

import pytest
from eval_example import example
from llmshrink_eval.report import inference
from llmshrink_eval.report.summary import sentences
from llmshrink_eval.results import ModelResult, Paired, Results, Task


def binary(lost: int, won: int, items: int, *, before: float = 0.7, **changes: Any) -> Task:
    """A task of right and wrong items, with the interval that so many flips have."""
    difference = (won - lost) / items
    reach = 1.96 * math.sqrt((lost + won) / items - difference**2) / math.sqrt(items)
    fields: dict[str, Any] = {
        "metric": "acc",
        "higher_is_better": True,
        "score": before + difference,
        "stderr": 0.01,
        "items": items,
        "versus_original": Paired(
            difference=difference,
            low=difference - reach,
            high=difference + reach,
            mcnemar_p=mcnemar(lost, won),
            lost=lost,
            won=won,
            flipped=tuple(range(lost + won)),
            recovery=1 + difference / before,
            recovery_low=1 + (difference - reach) / before,
            recovery_high=1 + (difference + reach) / before,
        ),
    }
    return Task(**{**fields, **changes})


def mcnemar(lost: int, won: int) -> float:
    total = lost + won
    return min(1.0, 2 * sum(math.comb(total, k) for k in range(min(lost, won) + 1)) / 2**total)


def held(tasks: dict[str, Task], **changes: Any) -> Results:
    """One original and one compressed model with these tasks, and nothing else of the latter."""
    original, model = example(models=1).models
    bare = {"perplexity": None, "divergence": None, "cost": None, "recovery": None, "site_errors": ()}
    fields = {**bare, "tasks": tasks, **changes}
    models = (original.model_copy(update={"perplexity": None, "tasks": {}}), model.model_copy(update=fields))
    return example(models=1).model_copy(update={"models": models, "requirements": ()})


def with_model(**changes: Any) -> Results:
    """The example's first compressed model, changed, and without tasks."""
    results = example(models=1, tasks=0)
    original, model = results.models
    models = (original, model.model_copy(update={"tasks": {}, "recovery": None, **changes}))
    return results.model_copy(update={"models": models, "requirements": ()})


def starting(results: Results, start: str) -> str:
    found = [sentence for sentence in sentences(results) if sentence.startswith(start)]
    assert len(found) == 1, sentences(results)
    return found[0]


def compressed(results: Results) -> ModelResult:
    return results.models[1]


def perplexity_with(excess: float, stderr: float | None, units: int = 400) -> Results:
    perplexity = compressed(example(models=1)).perplexity
    assert perplexity is not None
    changes = {"excess_nats": excess, "excess_stderr": stderr, "units": units}
    return with_model(perplexity=perplexity.model_copy(update=changes))


def test_tasks_are_counted_and_a_real_loss_is_told_with_its_interval() -> None:
    tasks = {f"task{index}": binary(20, 21, 2000) for index in range(5)} | {"hurt": binary(140, 60, 2000)}
    results = held(tasks)
    same = starting(results, "Indistinguishable")
    assert "on 5 of 6 tasks at 95 %, Holm-corrected for 6: task0, task1, task2, task3 and task4" in same
    assert "hurt" not in same
    assert starting(results, "Worse") == "Worse on hurt by 4.0 points (2.6 to 5.4)."
    assert not [sentence for sentence in sentences(results) if sentence.startswith("Taken alone")]


def test_a_gain_is_a_gain() -> None:
    assert starting(held({"up": binary(60, 140, 2000)}), "Better") == "Better on up by 4.0 points (2.6 to 5.4)."


def test_one_of_many_tasks_that_is_only_significant_alone_is_not_claimed() -> None:
    tasks = {f"task{index}": binary(20, 20, 2000) for index in range(9)} | {"odd": binary(35, 17, 2000)}
    assert mcnemar(35, 17) < 0.05
    results = held(tasks)
    assert "on all 10 tasks" in starting(results, "Indistinguishable")
    assert not [sentence for sentence in sentences(results) if sentence.startswith("Worse")]
    alone = starting(results, "Taken alone it would count as worse on odd by 0.9 points")
    assert alone.endswith("over 10 comparisons chance can bring that about.")
    assert starting(held({"odd": tasks["odd"]}), "Worse on odd")


def test_no_difference_on_few_items_says_how_much_could_be_lost() -> None:
    few = starting(held({"small": binary(3, 2, 40)}), "Indistinguishable from the original on small at 95 %")
    assert "a loss of up to 13.4 points (on small, 40 items) can't be excluded" in few
    many = starting(held({"large": binary(300, 290, 40_000)}), "Indistinguishable")
    assert "a loss of up to 0.1 points" in many


def test_not_one_flip_is_no_proof_of_equality_either() -> None:
    sentence = starting(held({"small": binary(0, 0, 40)}), "Indistinguishable")
    assert "a loss of up to 8.8 points (on small, 40 items) can't be excluded" in sentence


@pytest.mark.parametrize("flips", [(0, 0), (2, 0), (0, 2), (1, 1)])
def test_of_two_items_nothing_is_claimed(flips: tuple[int, int]) -> None:
    results = held({"tiny": binary(*flips, 2)})
    assert starting(results, "Too few") == (
        "Too few items to say on tiny (2 items): no outcome of fewer than 6 could tell two models apart."
    )
    for claim in ("Indistinguishable", "Worse", "Better", "Taken alone"):
        assert not [sentence for sentence in sentences(results) if sentence.startswith(claim)]


def test_six_items_are_the_fewest_that_could_show_anything() -> None:
    assert mcnemar(5, 0) > inference.LEVEL > mcnemar(6, 0)
    assert starting(held({"five": binary(5, 0, 5)}), "Too few")
    assert starting(held({"six": binary(6, 0, 6)}), "Worse on six")


def test_tasks_of_too_few_items_do_not_weigh_on_the_others() -> None:
    tasks = {"large": binary(35, 17, 2000)} | {f"tiny{index}": binary(0, 0, 2) for index in range(9)}
    assert starting(held(tasks), "Worse on large")
    same = starting(held({**tasks, "large": binary(20, 20, 2000), "other": binary(20, 20, 2000)}), "Indistinguishable")
    assert "on 2 of 11 tasks at 95 %, Holm-corrected for 2: large and other" in same


def test_two_right_answers_of_two_are_not_more_than_guessing() -> None:
    lucky = binary(0, 0, 2, score=1.0, stderr=0.0, chance=0.5)
    assert inference.at_chance(lucky)
    assert not inference.at_chance(lucky.model_copy(update={"items": 6}))  # 1 in 64
    assert not inference.at_chance(lucky.model_copy(update={"chance": None}))
    assert inference.at_chance(binary(0, 0, 400, score=0.27, stderr=0.022, chance=0.25))
    assert not inference.at_chance(binary(0, 0, 400, score=0.32, stderr=0.023, chance=0.25))


def test_a_requirement_met_by_less_than_its_interval_is_said_to_be() -> None:
    narrow = starting(example(models=2), "Met as measured, though the interval reaches past the bound: ")
    assert "bound: recovery>=0.98 by wiki7m-gptq-w4 (95 % interval 0.97" in narrow
    assert "kl<=0.06" not in narrow


def test_where_lower_is_better_more_is_worse() -> None:
    task = binary(0, 0, 500, metric="word_perplexity", higher_is_better=False, score=21.0)
    versus = task.versus_original
    assert versus is not None
    paired = versus.model_copy(update={"difference": 1.2, "low": 0.9, "high": 1.5, "mcnemar_p": None})
    results = held({"wiki": task.model_copy(update={"versus_original": paired})})
    assert starting(results, "Worse") == "Worse on wiki by 1.20 word_perplexity (0.90 to 1.50)."


def test_perplexity_is_told_apart_only_outside_its_interval() -> None:
    assert starting(perplexity_with(0.0286, 0.002), "Perplexity") == (
        "Perplexity 2.9 % higher than the original's (95 % interval 2.5 to 3.3 %)."
    )
    assert "not told apart from the original's at 95 %" in starting(perplexity_with(0.001, 0.002), "Perplexity")
    assert "3.0 % lower" in starting(perplexity_with(-0.03, 0.002), "Perplexity")
    assert "identical" in starting(perplexity_with(0.0, 0.0), "Perplexity")


def test_few_windows_widen_the_interval_and_one_window_has_none() -> None:
    wide = starting(perplexity_with(0.0286, 0.01, units=3), "Perplexity")
    assert "not told apart" in wide  # t with two degrees of freedom: 4.3 standard errors
    assert "from too few windows for an interval" in starting(perplexity_with(0.0286, 0.01, units=1), "Perplexity")
    assert "too few windows" in starting(perplexity_with(0.0286, None), "Perplexity")


def test_divergence_is_told_with_its_error_and_agreement() -> None:
    sentence = starting(example(models=1), "KL divergence")
    assert (
        sentence == "KL divergence from the original 0.052 ± 0.002 nats/token; the same first choice in 86 % of places."
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"kl_mean": 0.0, "top1_agreement": 1.0}, "is 0; the same first choice in 100.0 % of places"),
        ({"kl_mean": 1e-5, "baseline_error": 2e-5}, "below what the stored original resolves (2.0e−5 nats/token)"),
        ({"method": "top-k"}, "from the original at least 0.052"),
        ({"top1_agreement": 0.9999}, "in more than 99.9 % of places"),
    ],
)
def test_divergence_says_what_limits_it(changes: dict[str, Any], expected: str) -> None:
    divergence = compressed(example(models=1)).divergence
    assert divergence is not None
    assert expected in starting(with_model(divergence=divergence.model_copy(update=changes)), "KL divergence")


def test_a_task_on_which_the_original_only_guesses_is_called_out() -> None:
    results = example(models=1)
    original = results.models[0]
    guessing = original.tasks["arc_easy"].model_copy(update={"score": 0.26, "stderr": 0.02})
    tasks = {**original.tasks, "arc_easy": guessing}
    changed = results.model_copy(update={"models": (original.model_copy(update={"tasks": tasks}), results.models[1])})
    assert "The original itself is not told apart from guessing on arc_easy: it can't show damage." in sentences(
        changed
    )


def test_several_models_are_named_and_one_is_not() -> None:
    assert any(sentence.startswith("wiki7m-gptq-w4: perplexity 2.9 %") for sentence in sentences(example()))
    assert any(sentence.startswith("wiki7m-gptq-w4: KL divergence") for sentence in sentences(example()))
    assert not any(sentence.startswith("wiki7m-rtn-w4:") for sentence in sentences(example(models=1)))


def test_a_model_that_is_no_smaller_and_further_off_is_said_to_be() -> None:
    beaten = [sentence for sentence in sentences(example()) if "No smaller" in sentence or "no smaller" in sentence]
    assert beaten == ["wiki7m-rtn-w4: no smaller than wiki7m-gptq-w4, and further from the original."]


def test_failed_requirements_come_first() -> None:
    assert sentences(example())[0].startswith("3 of 6 requirements failed: recovery>=0.98 by wiki7m-rtn-w4 (0.97")


def test_without_an_original_scores_are_told_and_nothing_is_compared() -> None:
    model = example(models=1).models[1]
    alone = {name: task.model_copy(update={"versus_original": None}) for name, task in model.tasks.items()}
    single = model.model_copy(update={"tasks": alone, "divergence": None, "recovery": None})
    said = sentences(example(models=1).model_copy(update={"models": (single,), "requirements": ()}))
    assert any(sentence.startswith("Scores (± 95 %): arc_easy 63.8 ± 1.9 %") for sentence in said)
    assert not any("original" in sentence for sentence in said if not sentence.startswith("Perplexity"))


def test_holm_is_the_step_down_procedure() -> None:
    # Worked by hand: 0.01 * 4, 0.02 * 3, 0.03 * 2 raised to 0.06, 0.4 * 1.
    assert inference.holm([0.03, 0.01, 0.4, 0.02]) == pytest.approx([0.06, 0.04, 0.4, 0.06])
    assert inference.holm([]) == []
    assert inference.holm([0.9, 0.8]) == [1.0, 1.0]


def test_false_alarms_over_many_tasks_stay_under_five_percent() -> None:
    import numpy as np

    random = np.random.default_rng(1)
    alarms = sum(min(inference.holm(list(random.uniform(size=8)))) < inference.LEVEL for _ in range(2000))
    assert alarms / 2000 < 0.065  # 0.05 and three standard errors


def test_mean_recovery_has_the_interval_of_independent_tasks() -> None:
    results = held({f"task{index}": binary(40, 30, 1000) for index in range(4)}, recovery=0.9857)
    model = compressed(results)
    one = model.tasks["task0"].versus_original
    assert one is not None
    assert one.recovery_high is not None
    assert one.recovery_low is not None
    interval = inference.recovery_interval(model)
    assert interval is not None
    assert interval.half_width == pytest.approx((one.recovery_high - one.recovery_low) / 2 / 2)  # sqrt(4) narrower
