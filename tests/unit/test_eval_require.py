"""--require: what may be asked, what is refused before work, and that a gate fails closed."""

from __future__ import annotations

import math

import pytest
from eval_example import example
from llmshrink_eval.errors import EvalError
from llmshrink_eval.require import NAMES, Condition, check, parse, refuse_unmeasurable
from llmshrink_eval.results import Results


def changed(results: Results, index: int, **fields: object) -> Results:
    models = list(results.models)
    models[index] = models[index].model_copy(update=fields)
    return results.model_copy(update={"models": tuple(models)})


def test_conditions_are_read_with_and_without_blanks() -> None:
    assert parse(" recovery >= 0.98,kl<=2e-2 ") == [Condition("recovery", ">=", 0.98), Condition("kl", "<=", 0.02)]
    assert [condition.operator for condition in parse("token<1,token>1,token==1")] == ["<", ">", "=="]


def test_what_is_written_back_parses_to_the_same_condition() -> None:
    for condition in parse("recovery>=0.98,kl<=0.00012,token>100000,excess_nats<-0.5"):
        assert parse(condition.text) == [condition]


def test_names_are_the_keys_of_perplexity_and_divergence() -> None:
    promised = (
        "token word bits_per_byte nats_per_token stderr kl_mean kl_median kl_p99 kl_max top1_agreement top5_overlap"
    )
    assert {"recovery", "kl", *promised.split()} <= set(NAMES)
    assert not {"method", "worst", "stderr_over", "histogram_counts"} & set(NAMES)
    assert len(NAMES) == len(set(NAMES))


def test_every_fault_is_named_at_once_with_the_nearest_name() -> None:
    with pytest.raises(EvalError) as caught:
        parse("recovry>=0.98,kl=<0.02,token<=abc,,top1_agrement=>nan,zzz<1,kl")
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "did you mean 'recovery'?",
        "did you mean '<='?",
        "'abc' in 'token<=abc' is no finite number",
        "an empty condition",
        "did you mean 'top1_agreement'?",
        "did you mean '>='?",
        "'nan'",
        "names are recovery, kl,",
        "'kl' is no condition",
    ):
        assert part in message


@pytest.mark.parametrize("text", ["recovery<=", "kl <", "token>=", "kl<=1,recovery=="])
def test_a_condition_without_a_number_says_that_the_number_is_missing(text: str) -> None:
    last = text.split(",")[-1]
    with pytest.raises(EvalError, match=rf"^--require: '{last}' has no number after its operator: write one, as 'kl<="):
        parse(text)


@pytest.mark.parametrize("name", ["units", "tokens", "words", "bytes", "windows", "positions", "kl_units"])
def test_how_much_was_read_is_no_quality_to_be_held_to(name: str) -> None:
    assert name not in NAMES
    with pytest.raises(EvalError, match=rf"^--require: '{name}' in '{name}>=5' says how much was read, not how good"):
        parse(f"{name}>=5")
    for wrong in (f"{name}x>5", "qqq>1"):
        with pytest.raises(EvalError) as caught:
            parse(wrong)
        assert f"'{name}'" not in str(caught.value).replace(f"'{wrong}'", "") and f" {name}," not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "kl", "kl<=", "<=0.2", "kl<=98%", "kl<=inf", "kl<=0.1 0.2", "kl~0.1", "kl<=0.1;token<3"]
)
def test_what_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(EvalError):
        parse(text)


def test_recovery_without_tasks_and_kl_without_an_original_are_refused_up_front() -> None:
    conditions = parse("recovery>=0.98,kl<=0.02,token<=12,excess_nats<=0.1")
    refuse_unmeasurable(conditions, text=True, tasks=True, baseline=True)
    refuse_unmeasurable(parse("token<=12"), text=True, tasks=False, baseline=False)
    with pytest.raises(EvalError, match=r"'recovery>=0.98' needs tasks \(--tasks\)$"):
        refuse_unmeasurable(conditions, text=True, tasks=False, baseline=True)
    with pytest.raises(EvalError) as caught:
        refuse_unmeasurable(conditions, text=False, tasks=True, baseline=False)
    message = str(caught.value)
    assert "'recovery>=0.98' needs an original (--baseline)" in message
    assert "'kl<=0.02' needs a text (--text) and an original (--baseline)" in message
    assert "'token<=12' needs a text (--text)" in message
    assert "'excess_nats<=0.1' needs a text (--text) and an original (--baseline)" in message


def test_every_compressed_model_is_held_to_every_condition() -> None:
    results = example()
    held = check(parse("kl<=0.06,top1_agreement>=0.8"), results)
    assert [(one.model.rsplit("-", 2)[-2:], one.passed) for one in held] == [
        (["rtn", "w4"], True),
        (["rtn", "w4"], True),
        (["gptq", "w4"], True),
        (["gptq", "w4"], True),
        (["gptq", "w3"], False),
        (["gptq", "w3"], False),
    ]
    divergence = results.models[3].divergence
    assert divergence is not None
    assert held[4].value == divergence.kl_mean


def test_kl_is_kl_mean() -> None:
    results = example()
    assert [one.value for one in check(parse("kl<1"), results)] == [
        one.value for one in check(parse("kl_mean<1"), results)
    ]


@pytest.mark.parametrize("sign", ["<=", ">=", "<", ">", "=="])
@pytest.mark.parametrize("value", [None, math.nan])
def test_what_was_not_measured_or_is_nan_meets_no_condition(sign: str, value: float | None) -> None:
    results = changed(example(), 1, recovery=value)
    first = check(parse(f"recovery{sign}0.5"), results)[0]
    assert not first.passed
    unscored = changed(example(), 1, divergence=None, perplexity=None)
    assert not any(one.passed for one in check(parse(f"kl{sign}0,token{sign}0"), unscored)[:2])


def test_the_bound_itself_counts_only_where_the_operator_says_so() -> None:
    results = changed(example(models=1), 1, recovery=0.98)
    outcomes = {
        one.condition: one.passed for one in check(parse("recovery>=0.98,recovery>0.98,recovery==0.98"), results)
    }
    assert outcomes == {"recovery>=0.98": True, "recovery>0.98": False, "recovery==0.98": True}


def test_an_original_alone_is_held_to_the_conditions_itself() -> None:
    assert [one.passed for one in check(parse("token<=1"), example(models=0))] == [False]
