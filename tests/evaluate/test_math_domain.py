"""The domain `math`: right answers, true working, honest counts, one canonical form for one problem."""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import combinations_with_replacement, product
from random import Random

import pytest

from rlmerge.evaluate.problem import Problem
from rlmerge.evaluate.tasks import math_domain
from rlmerge.evaluate.tasks.math_domain import LEVELS, Level, canonical_of, count, draw, traces

EQUATION = re.compile(r"(\d+) ([+*/-]) (\d+) (?:=|is) (\d+)")
LOSSES = ("gives away", "loses", "sells", "uses", "drops", "trades away")
EVENT = re.compile(
    r"(has|gets|buys|finds|wins|earns|collects|gives away|loses|sells|uses|drops|trades away) "
    r"(?:one of (\d+) equal shares of (\d+)|(\d+) (?:bags|boxes|packs|jars|baskets) of (\d+)|(\d+)) "
)


def drawn(level: int, number: int = 300) -> list[Problem]:
    random = Random(f"test/{level}")
    return [draw(random, level).build(random) for _ in range(number)]


def read_prompt(problem: Problem) -> Fraction:
    """The answer, from the words of the prompt alone."""
    text = problem.prompt.removeprefix("Question: ").removesuffix("\nWorking:\n")
    if problem.meta["kind"] == "expression":
        found = re.fullmatch(r"(?:What is|Work out|Find) (.*)[?.]", text)
        assert found
        return Fraction(eval(found[1]))
    if problem.meta["kind"] == "names":
        lines, wanted = re.fullmatch(r"(.*)\. What is (\w)\?", text).groups()  # type: ignore[union-attr]
        names: dict[str, Fraction] = {}
        for line in lines.split(", "):
            name, value = line.split(" = ")
            names[name] = eval(value, {}, names)
        return Fraction(names[wanted])
    total = Fraction(0)
    for verb, parts, whole, many, each, number in EVENT.findall(text):
        amount = Fraction(int(whole), int(parts)) if whole else int(many) * int(each) if many else int(number)
        total += -amount if verb in LOSSES else amount
    return total


@pytest.mark.parametrize("level", LEVELS)
def test_answers_follow_from_the_prompt(level: int) -> None:
    problems = drawn(level)
    for problem in problems:
        assert read_prompt(problem) == int(problem.answer or ""), problem.prompt
        assert Fraction(eval(problem.canonical.removeprefix("math:"))) == int(problem.answer or "")
    assert {problem.meta["kind"] for problem in problems} == set(math_domain.KINDS)


@pytest.mark.parametrize("level", LEVELS)
def test_working_is_true_and_leads_to_the_answer(level: int) -> None:
    random = Random(1)
    for problem in drawn(level, 150):
        texts = {traces(problem, random) for _ in range(12)} | {problem.completion or ""}
        assert len(texts) >= 3
        for text in texts:
            equations = EQUATION.findall(text)
            assert len(equations) >= 2 or level == 1
            for left, operator, right, value in equations:
                assert Fraction(eval(f"{left} {operator} {right}")) == int(value), text
            assert text.endswith(f"\nAnswer: {problem.answer}\n\n")
            assert equations[-1][3] == problem.answer
            assert "-" not in text.replace(" - ", "")  # nothing negative on the way


def test_terms_and_factors_commute() -> None:
    one = canonical_of([("n", "12"), ("p", "3", "4")], [("n", "5"), ("n", "7")])
    assert one == canonical_of([("p", "3", "4"), ("n", "12")], [("n", "7"), ("n", "5")]) == "math:12+3*4-5-7"
    by_form: dict[str, set[str]] = {}
    for problem in drawn(1, 6000):
        by_form.setdefault(problem.canonical, set()).add(problem.prompt)
    assert max(map(len, by_form.values())) > 3  # one form, several wordings: one problem


def test_count_is_exact_for_a_space_that_can_be_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Level(5, 3, ("nn-n", "pn", "gn-p", "qn-n"))
    monkeypatch.setitem(LEVELS, 9, tiny)
    math_domain._values.cache_clear()
    numbers = [("n", str(a)) for a in range(1, 6)]
    products = [("p", str(a), str(b)) for a, b in combinations_with_replacement((2, 3), 2)]
    quotients = [("q", str(a * b), str(b)) for a, b in product((2, 3), (2, 3))]
    groups = [
        ("g", str(a), str(b), str(c)) for (a, b), c in product(combinations_with_replacement(range(1, 10), 2), (2, 3))
    ]
    listed = set()
    for plus, minus in [
        *product(product(numbers, numbers), ((n,) for n in numbers)),
        *product(product(products, numbers), [()]),
        *product(product(groups, numbers), ((p,) for p in products)),
        *product(product(quotients, numbers), ((n,) for n in numbers)),
    ]:
        if sum(map(math_domain.value, plus)) > sum(map(math_domain.value, minus)):
            listed.add(canonical_of(plus, minus))
    assert count(9) == len(listed)


def test_counts_are_what_the_docs_say() -> None:
    assert [count(level) for level in LEVELS] == [78_539, 2_621_434, 51_990_195, 33_911_108_503]
    assert count(0) == 13_693


def test_level_0_is_asked_and_worked_out_in_one_way() -> None:
    random = Random(0)
    forms = set()
    for _ in range(4000):
        draft = draw(random, 0)
        problem = draft.build(random)
        forms.add(draft.canonical)
        assert re.fullmatch(r"Question: What is [0-9 +*-]+\?\nWorking:\n", problem.prompt)
        expression = problem.prompt.removeprefix("Question: What is ").split("?")[0]
        assert str(eval(expression)) == problem.answer
        assert traces(problem, random) == problem.completion  # there is one
        for line in (problem.completion or "").split("\n")[:-3]:
            left, right = line.split(" = ")
            assert eval(left) == int(right)
    assert len(forms) > 2500


def test_draws_reach_every_form_of_a_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LEVELS, 8, Level(4, 3, ("nn-n", "pn", "qn", "g-n")))
    math_domain._values.cache_clear()
    random = Random(0)
    assert len({draw(random, 8).canonical for _ in range(8000)}) == count(8)


def test_few_draws_repeat() -> None:
    random = Random(0)
    assert len({draw(random, 1 + turn % 4).canonical for turn in range(40_000)}) > 36_000


@pytest.mark.long
def test_200_000_distinct_problems() -> None:
    random = Random(0)
    assert len({draw(random, 1 + turn % 4).canonical for turn in range(300_000)}) >= 200_000


def test_answer_only_has_no_working() -> None:
    for problem in drawn(2, 50):
        bare = math_domain.answer_only(problem)
        assert bare.prompt == problem.prompt.removesuffix("Working:\n") + "Answer:"
        assert bare.completion == f" {problem.answer}\n\n"
        assert (bare.canonical, bare.answer) == (problem.canonical, problem.answer)
        assert bare.id != problem.id
