"""The process that runs chat templates: what is sent and comes back, and whatever ends it, or whoever started it."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from llmshrink_eval import template_process, templates
from llmshrink_eval.engines import child
from llmshrink_eval.engines.child import Answering, ours, python
from llmshrink_eval.errors import EvalFailed
from llmshrink_eval.template_process import PROCESS, Question, TemplateFailed, TemplateProcess
from llmshrink_eval.templates import DATE, Refused, TemplateFault, chat_marks, chat_text

from llmshrink.demo import tokenizer

PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a %}{% endfor %}{% endfor %}"
CRASHES = (  # generators in generators: Python releases them by as many calls of C
    "{% set ns = namespace(a=['x']) %}{% for i in range(99999) %}{% set ns.a = ns.a | batch(2) %}{% endfor %}"
    "{{ ns.a | first }}"
)
TALK = [{"role": "user", "content": "Once"}, {"role": "assistant", "content": " there\n"}]
STARTS = 60
"""Seconds, at most, that a process takes to begin or to end on a busy machine."""


def asked(template: str = PLAIN, **more: Any) -> Question:
    given: dict[str, Any] = {"tools": None, "special": {}, "seconds": 10.0, "characters": 10**6, **more}
    return Question(template, given.pop("messages", TALK), **given)


@pytest.fixture
def process() -> Iterator[TemplateProcess]:
    made = TemplateProcess()
    yield made
    made.close()


@pytest.fixture
def words() -> Any:
    return tokenizer.build(512)


@pytest.mark.parametrize(
    "how", [{}, {"add_generation_prompt": True}, {"continue_final_message": True}, {"enable_thinking": False}]
)
@pytest.mark.parametrize(
    "template",
    [
        PLAIN + "{% if add_generation_prompt %}assistant:{% endif %}{{ enable_thinking }}{{ bos_token }}\u2028\x00",
        "{{ tools | tojson }}{{ messages | tojson(indent=1) }} content",
        "{% for m in messages %}{{ m.content | trim }}\r\n{% endfor %}",
    ],
)
def test_the_text_is_what_transformers_writes(template: str, how: dict[str, Any], words: Any) -> None:
    words.chat_template = template
    tools = [{"type": "function", "function": {"name": "look", "of": [1, 2.5, None, "\U0001f600 ü"]}}]
    assert chat_text(words, TALK, tools=tools, **how) == words.apply_chat_template(
        TALK, tools=tools, tokenize=False, **how
    )


def test_marks_are_where_the_template_puts_them(words: Any) -> None:
    words.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}[\U0001f600]{{ m.content }}{% endif %}{% endfor %}{{ strftime_now('%Y-%m-%d') }}"
    )
    text, marks = chat_marks(words, TALK)
    assert text == f"[\U0001f600]Once there\n{DATE}" and [text[start:end] for start, end in marks] == [" there\n"]
    # What a library writes to the standard output is no answer: here a template is told to have no marks.
    words.chat_template = PLAIN
    assert chat_marks(words, TALK) == (chat_text(words, TALK), [])


def test_values_of_parquet_are_written_as_they_are_and_others_refused(words: Any) -> None:
    words.chat_template = "{% for m in messages %}{{ m.extra }}|{% endfor %}"
    values = [
        *(datetime.datetime(2026, 1, 2, 3), datetime.date(2026, 1, 2), datetime.timedelta(1), datetime.time(3)),
        *(decimal.Decimal("1.10"), b"\xff", 1.5, None, True, 2**100, ["a", {"b": 1}], "\U0001f600"),
    ]
    text = chat_text(words, [{"role": "user", "extra": value} for value in values])
    assert text == "".join(f"{value}|" for value in values)
    around: list[Any] = []
    around.append(around)
    for value in ({1, 2}, {(1, 2): 3}, object(), 10**5000, around):
        with pytest.raises(Refused, match=r"^it holds what no chat template is given \(.+\)$") as caught:
            chat_text(words, [{"role": "user", "extra": value}])
        with pytest.raises(Refused, match="it holds what"):
            chat_text(words, TALK, tools=[{"extra": value}])
        assert "\n" not in str(caught.value)


def test_a_tokenizer_with_code_of_its_own_is_asked_here(words: Any) -> None:
    class Own(type(words)):  # type: ignore[misc]
        def apply_chat_template(self, conversation: Any, **how: Any) -> str:
            if conversation[0]["content"] == "fail":
                raise TypeError("not\nthis")
            return f"{os.getpid()} {conversation[0]['content']} {sorted(how)}"

    words.__class__ = Own
    words.chat_template = PLAIN
    assert chat_text(words, TALK) == f"{os.getpid()} Once ['tokenize', 'tools']"
    words.chat_template = "{{ strftime_now('%Y') }}"
    assert chat_text(words, TALK).endswith("['strftime_now', 'tokenize', 'tools']")
    with pytest.raises(Refused, match=r"refuses it \(TypeError: not this\)"):
        chat_text(words, [{"role": "user", "content": "fail"}])


def test_a_template_that_crashes_python_is_one_line(words: Any) -> None:
    words.chat_template = "{% if messages[0].content == 'Twice' %}" + CRASHES + "{% endif %}" + PLAIN
    # Another Python may find it too deep, and say so.
    with pytest.raises(Refused, match=r"refuses it \((SIG[A-Z]+ ended the process that ran it|Recursion.*)\)$"):
        chat_text(words, [{"role": "user", "content": "Twice"}])
    assert chat_text(words, TALK[:1]) == "user: Once<|end|>"


def test_a_process_that_somebody_killed_is_started_again(process: TemplateProcess) -> None:
    assert process.ask(asked())[0] == "user: Once<|end|>assistant:  there\n<|end|>"
    os.kill(process._started().pid, signal.SIGKILL)
    assert process.ask(asked("{{ messages | length }}")) == ("2", [])
    # While it works too: the one that takes its place is asked the same, and ends for another reason.
    first = process._started().pid
    killing = threading.Timer(0.3, os.kill, (first, signal.SIGKILL))
    killing.start()
    with pytest.raises(TemplateFailed, match="TimeoutError: it didn't end within 1 s"):
        process.ask(asked(ENDLESS, seconds=1.0))
    killing.join()
    assert not psutil.pid_exists(first) and process.ask(asked("a")) == ("a", [])


def test_only_what_the_processor_did_counts_until_nothing_comes_at_all(
    process: TemplateProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    process.ask(asked())
    stopped = process._started().pid
    os.kill(stopped, signal.SIGSTOP)
    going_on = threading.Timer(1.5, os.kill, (stopped, signal.SIGCONT))
    going_on.start()
    assert process.ask(asked("late", seconds=0.5)) == ("late", [])
    going_on.join()
    os.kill(stopped, signal.SIGSTOP)
    monkeypatch.setattr(template_process, "PATIENCE", 1.0)
    with pytest.raises(TemplateFailed, match="TimeoutError"):
        process.ask(asked("never"))
    monkeypatch.undo()
    assert not psutil.pid_exists(stopped) and process.ask(asked("again")) == ("again", [])


def test_a_process_that_cant_start_is_no_fault_of_a_template(
    process: TemplateProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "Answering", lambda module: Answering("llmshrink_eval.not_there"))
    with pytest.raises(EvalFailed, match=r"runs chat templates ended with status 1: .*No module named llmshrink_eval"):
        process.ask(asked())


def test_an_interrupted_question_isnt_answered_to_the_next(process: TemplateProcess) -> None:
    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    process.ask(asked())
    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            process.ask(asked(ENDLESS))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert process.ask(asked("next")) == ("next", [])


def test_threads_get_their_own_answers(process: TemplateProcess) -> None:
    def ask(number: int) -> str:
        long = "x" * (number % 7 * 50_000)
        return process.ask(asked("{{ messages[0].content }}", messages=[{"content": f"{number}{long}"}]))[0][:3]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(100, 200))) == [str(number) for number in range(100, 200)]


SCRIPT = """
import os, sys, time
from llmshrink_eval.template_process import PROCESS, Question

def ask(text, seconds=10.0):
    return PROCESS.ask(Question(text, [{"role": "user", "content": "a"}], None, {}, seconds, 1000))[0]

assert ask("before") == "before"
print(PROCESS._started().pid, flush=True)
"""
FORKS = """
child = os.fork()
assert ask(str(os.getpid())) == str(os.getpid())
print(PROCESS._started().pid, flush=True)
if child:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert ask("after") == "after"
"""
WAITS = "time.sleep(600)\n"
WORKS = f"ask({ENDLESS!r}, 1.5)\n"


def test_a_fork_has_a_process_of_its_own_and_each_ends_with_whoever_started_it(tmp_path: Path) -> None:
    (tmp_path / "forks.py").write_text(SCRIPT + FORKS)
    environment = ours({"PYTHONPATH": ""}) | {"PYTHONWARNINGS": "default::ResourceWarning"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environment["PYTHONPATH"]])
    done = subprocess.run(python("forks"), env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    pids = [int(line) for line in done.stdout.split()]
    assert len(pids) == 3 and len(set(pids)) == 2
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


@pytest.mark.parametrize("script", [WAITS, WORKS], ids=["waits", "works"])
def test_it_ends_when_whoever_started_it_is_killed(script: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT + script)
    environment = ours({})
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environment["PYTHONPATH"]])
    parent = subprocess.Popen(python("script"), env=environment, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = psutil.Process(int(parent.stdout.readline()))
    time.sleep(0.5)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    gone, alive = psutil.wait_procs([worker], timeout=STARTS)
    for each in alive:
        each.kill()
    assert gone == [worker]


def test_memory_is_bounded_and_the_process_goes_on(process: TemplateProcess) -> None:
    process.ask(asked())
    pid = process._started().pid
    with pytest.raises(TemplateFailed, match="MemoryError"):
        process.ask(asked("{{ 'a'.center(3000000000) }}"))
    assert process.ask(asked("after")) == ("after", []) and process._started().pid == pid


def test_a_long_text_comes_whole(words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words.chat_template = "{{ messages[0].content * 3 }}"
    long = "Ünd \U0001f600 \n" * 500_000
    assert chat_text(words, [{"role": "user", "content": long}]) == long * 3
    monkeypatch.setattr(templates, "MOST_CHARACTERS", len(long))
    with pytest.raises(Refused, match=r"OverflowError: it writes 10,500,000 characters, and 3,500,000 are the most"):
        chat_text(words, [{"role": "user", "content": long}])


def test_the_questions_limits_are_the_modules(words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Question] = []

    def answered(question: Question) -> tuple[str, list[tuple[int, int]]]:
        seen.append(question)
        raise TemplateFailed("everything fails")

    monkeypatch.setattr(PROCESS, "ask", answered)
    words.chat_template = PLAIN
    with pytest.raises(TemplateFault, match=r"fails on any conversation \(everything fails\)"):
        chat_text(words, TALK, today=True, add_generation_prompt=True)
    first, plainest = seen
    assert (first.seconds, first.characters, first.date) == (10.0, 64_000_000, None)
    assert dataclasses.replace(plainest, messages=TALK) == first and plainest.messages == templates.PLAINEST
