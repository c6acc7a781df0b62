"""What the demo model knows of its language's world, as tasks of lm-eval that need no network.

- `demo_facts`, multiple choice of 4: where somebody lives, what somebody loves, who has a trade and a home; what a
  person finds in a place or gives to another, against what the same person finds and gives elsewhere.
- `demo_cloze`: a story up to a fact; right if the fact's one or two words are the model's own first choice.
- `demo_habits`, multiple choice of 4: what is likeliest by the language's tables (where a person goes, how one feels,
  who comes next), against three that are less likely. Probabilities lie close together, so small damage shows here.

Chance is 1/4, close to 0, 1/4. The demo model, and its weights rounded to nearest (groups of 128, scales by the largest
weight), in float32:

    |              | demo_facts | demo_cloze | demo_habits |
    |--------------|------------|------------|-------------|
    | as shipped   | 1.000      | 1.000      | 0.745       |
    | 4 bits       | 1.000      | 0.998      | 0.735       |
    | 3 bits       | 0.998      | 0.965      | 0.618       |
    | 2 bits       | 0.853      | 0.640      | 0.455       |

`write_tasks` writes them as JSONL and lm-eval's YAML, the same bytes each time; `--tasks demo` runs all three.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from llmshrink.demo import language, records
from llmshrink.demo.language import OPTIONS, Question
from llmshrink.demo.lexicon import OPENINGS
from llmshrink.demo.world import CIRCLE_WEIGHTS, HAUNT_WEIGHTS, MANNERS_OF, MOOD_WEIGHTS, PEOPLE, Person

GROUP = "demo"
ITEMS = 400
SEED = 50_000_000
"""Far from the seeds of training (1 to 10 million), calibration, the scored text and the tests."""
CONTEXT_WORDS = 80
READER = "records.py"
FACT = re.compile(
    r" and found the( \w+ \w+)\.| gave \w+ the( \w+ \w+) \w+\.| loved the( \w+ \w+)\.| love\? The( \w+ \w+)\."
    r"| lived in the( \w+)\.| live\? In the( \w+)\.| visited \w+ in the( \w+) | went home to the( \w+) "
    r"| Who was the \w+ in the \w+\?( \w+)\."
)
"""Each alternative's group is words that follow from what was said before."""

COMMON = """\
task: {name}
custom_dataset: !function records.load
dataset_kwargs:
  file: {name}.jsonl
test_split: test
doc_to_text: "{{{{context}}}}"
target_delimiter: ""
fewshot_delimiter: ". The end.\\n"
fewshot_config:
  split: test
metadata:
  version: 1
"""
CHOICE = """\
output_type: multiple_choice
doc_to_choice: "{{options}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
CLOZE = """\
output_type: loglikelihood
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def write_tasks(folder: Path) -> tuple[str, ...]:
    """Write the tasks into a folder, which is made if need be, for lm-eval's `--include_path`. Returns their names.

    The group `demo` stands for all of them. What is there under the same names is replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for index, (name, (kind, draw)) in enumerate(_TASKS.items()):
        rows = _distinct(draw(random.Random(SEED + index)))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (folder / f"{name}.yaml").write_text(COMMON.format(name=name) + kind, encoding="utf-8")
    members = "".join(f"  - {name}\n" for name in _TASKS)
    (folder / f"{GROUP}.yaml").write_text(f"group: {GROUP}\ntask:\n{members}", encoding="utf-8")
    (folder / READER).write_bytes(Path(records.__file__).read_bytes())
    return tuple(_TASKS)


def _distinct(rows: Iterator[dict[str, object]]) -> list[dict[str, object]]:
    """The first ITEMS that differ in what is asked."""
    found: dict[object, dict[str, object]] = {}
    while len(found) < ITEMS:
        row = next(rows)
        found.setdefault(row["context"], row)
    return list(found.values())


def _row(question: Question) -> dict[str, object]:
    context = question.context + question.question
    return {"context": context, "options": list(question.options), "answer": question.answer}


def _facts(rng: random.Random) -> Iterator[dict[str, object]]:
    """By turns one of `language.facts` and one that hangs on two words."""
    while True:
        yield _row(language.facts(rng.randrange(1 << 30), 1)[0])
        yield _row(_fact_of_two(rng))


def _fact_of_two(rng: random.Random) -> Question:
    person = rng.choice(list(PEOPLE.values()))
    if rng.randrange(2):
        place = rng.randrange(len(person.haunts))
        manner = rng.choice(MANNERS_OF["walked"])
        told, right = f" walked to the {person.haunts[place]} {manner} and found the", person.finds[place]
        others = person.finds
    else:
        other = rng.randrange(1, len(person.circle))
        told, right = f" gave {person.circle[other]} the", person.gifts[other]
        others = person.gifts[1:]
    return _question(rng, person, told, right, [thing for thing in others if thing != right])


def _habits(rng: random.Random) -> Iterator[dict[str, object]]:
    while True:
        person = rng.choice(list(PEOPLE.values()))
        told, words, weights = (
            (" walked to the", person.haunts, HAUNT_WEIGHTS),
            (" felt", person.moods, MOOD_WEIGHTS),
            (" visited", person.circle[1:], CIRCLE_WEIGHTS[1:]),
            (" gave", person.circle[1:], CIRCLE_WEIGHTS[1:]),
        )[rng.randrange(4)]
        best = rng.randrange(len(words))
        lesser = [word for word, weight in zip(words, weights, strict=True) if weight < weights[best]]
        if len(lesser) >= OPTIONS - 1:
            yield _row(_question(rng, person, told, words[best], lesser))


def _question(rng: random.Random, person: Person, told: str, right: str, others: list[str]) -> Question:
    options = [right, *rng.sample(others, OPTIONS - 1)]
    rng.shuffle(options)
    beginning = f"{rng.choice(OPENINGS)} there was {person.name} the {person.trade}."
    choices = tuple(f" {option}" for option in options)
    return Question(beginning, f" {person.name}{told}", choices, options.index(right))


def _cloze(rng: random.Random) -> Iterator[dict[str, object]]:
    """A fact of each story, among those that come early enough."""
    while True:
        told = language.story(rng).text
        facts = [_place_and_words(found) for found in FACT.finditer(told)]
        early = [fact for fact in facts if len(language.WORD.findall(told[: fact[0]])) <= CONTEXT_WORDS]
        if early:
            place, answer = rng.choice(early)
            yield {"context": told[:place], "answer": answer}


def _place_and_words(found: re.Match[str]) -> tuple[int, str]:
    index = found.lastindex or 0
    return found.start(index), found[index]


_Draw = Callable[[random.Random], Iterator[dict[str, object]]]
_TASKS: dict[str, tuple[str, _Draw]] = {
    "demo_facts": (CHOICE, _facts),
    "demo_cloze": (CLOZE, _cloze),
    "demo_habits": (CHOICE, _habits),
}
