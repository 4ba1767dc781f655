"""Verifiers: 30 notations right and wrong, what is missing or cut off, and answers that would hang a parser."""

from __future__ import annotations

import threading
import time

import pytest

from rlmerge.errors import MissingExtraError
from rlmerge.evaluate import math_verifier, verifiers
from rlmerge.evaluate.killable import WorkerDied, Workers
from rlmerge.evaluate.problem import Problem, Verdict, Verifier
from rlmerge.evaluate.verifiers import NoAnswer, VerifierError, answer_of, completed, get_verifier, verify

NOTATIONS = [
    ("integer", "42", "42", "43"),
    ("negative, with a real minus sign", "-3", "−3", "3"),
    ("decimal", "0.5", ".50", "0.05"),
    ("plain fraction", "0.5", "1/2", "2/1"),
    (r"\frac", "1/2", r"$\frac{1}{2}$", r"$\frac{2}{1}$"),
    (r"\frac without braces", "1/2", r"$\frac12$", r"$\frac13$"),
    ("fraction in other terms", "2/3", "4/6", "4/7"),
    ("mixed number", "3/2", "1 1/2", "1 1/3"),
    (r"mixed number with \frac", "3/2", r"$1\frac{1}{2}$", r"$2\frac{1}{2}$"),
    ("repeating decimal", "1/3", r"$0.\overline{3}$", r"$0.\overline{4}$"),
    ("percent", "0.5", "50%", "5%"),
    (r"percent with \%", "50%", r"$50\%$", r"$55\%$"),
    (r"\boxed", "42", r"so it is \boxed{42}", r"so it is \boxed{24}"),
    (r"\boxed \frac", "1/2", r"\boxed{\frac{1}{2}}", r"\boxed{\frac{1}{4}}"),
    ("scientific, e", "1200", "1.2e3", "1.2e4"),
    (r"scientific, \times", "1200", r"$1.2 \times 10^3$", r"$1.2 \times 10^2$"),
    ("scientific, small", "0.0012", "1.2E-3", "1.2E3"),
    ("thousands with commas", "1234567", "1,234,567", "1,234,576"),
    ("thousands with spaces", "1234567", "1 234 567", "1 234 576"),
    ("unit", "5", "5 cm", "6 cm"),
    (r"unit in \text", "5", r"\boxed{5\text{ cm}}", r"\boxed{50\text{ cm}}"),
    ("currency", "5", "$5", "$6"),
    ("degrees", "90", r"$90^\circ$", r"$60^\circ$"),
    ("half-open interval", "[1, 2)", "$[1,2)$", "$[1,2]$"),
    ("open interval", "(1,2)", "(1, 2)", "[1, 2]"),
    ("union of intervals", r"$(1,2)\cup(3,4)$", r"$(3,4)\cup(1,2)$", r"$(1,2)\cup(3,5)$"),
    ("set in any order", "{1, 2, 3}", r"$\{3,1,2\}$", r"$\{1,2\}$"),
    ("list of solutions", "1, 2", r"\boxed{2, 1}", r"\boxed{2, 3}"),
    ("ordered pair in order", "(2, 1)", "$(2,1)$", "$(1,2)$"),
    ("square root", "sqrt(8)", r"$2\sqrt{2}$", r"$2\sqrt{3}$"),
    ("rationalised root", r"$\frac{\sqrt{2}}{2}$", r"$\frac{1}{\sqrt{2}}$", r"$\frac{1}{\sqrt{3}}$"),
    ("pi", r"$2\pi$", "2π", "3π"),
    ("power", "1024", "$2^{10}$", "$2^9$"),
    ("equation", "5", "x = 5", "x = 6"),
    ("expression", "$x^2+2x+1$", "$(x+1)^2$", "$(x+2)^2$"),
    ("logarithm", "3", r"$\log_2 8$", r"$\log_2 9$"),
    ("two solutions in words", "1, 2", "x = 1 or x = 2", "1 or 3"),
    ("prose", "42", "The answer is 42.", "The answer is 42.5."),
    ("last line of working", "42", "6 * 7 = 42\nAnswer: 42\n", "6 * 7 = 42\nAnswer: 41\n"),
    ("GSM8K's mark", "42", "6 * 7 = 42\n#### 42", "6 * 7 = 42\n#### 41"),
]


@pytest.fixture(scope="module")
def math() -> Verifier:
    pytest.importorskip("math_verify")
    return get_verifier("math", deadline=10.0)


def answering(answer: str | None, **meta: object) -> Problem:
    return Problem("p", answer=answer, verifier="exact", meta=meta)


def test_known_right_and_wrong_answers_in_30_notations(math: Verifier) -> None:
    assert len(NOTATIONS) >= 30
    problems = [answering(answer) for _, answer, _, _ in NOTATIONS]
    rights = math([right for _, _, right, _ in NOTATIONS], problems)
    wrongs = math([wrong for _, _, _, wrong in NOTATIONS], problems)
    assert [case for case, verdict in zip(NOTATIONS, rights) if not verdict.correct] == []
    assert [case for case, verdict in zip(NOTATIONS, wrongs) if verdict.correct] == []
    assert all(verdict.reason for verdict in [*rights, *wrongs])


def test_guessing_everything_is_wrong(math: Verifier) -> None:
    texts = [
        r"\boxed{1} \boxed{2} \boxed{3}",
        "1 2 3",
        "1, 2, 3",
        "Answer: 1 or 2 or 3",
        "Answer: 1, no 2, no 3",
        "Answer: 1\nAnswer: 3\n",
        "",
    ]
    assert not any(verdict.correct for verdict in math(texts, [answering("3")] * len(texts)))


def test_text_that_no_parser_expects() -> None:
    pytest.importorskip("math_verify")
    texts = [
        "\x00",
        "\ud800",
        "$" * 5000,
        "\\boxed{" * 3000,
        "(" * 5000,
        "\\frac" * 999,
        "🙂",
        "1" * 30_000,
        "\\",
        "{}",
    ]
    verdicts = get_verifier("math", deadline=2.0)(texts, [answering("3")] * len(texts))
    assert len(verdicts) == len(texts)
    assert not any(verdict.correct for verdict in verdicts)


def test_an_answer_that_hangs_is_lost_alone_in_any_thread() -> None:
    pytest.importorskip("math_verify")
    found: list[Verdict] = []
    texts = ["$7$", "$10000000000!$", "$10^{10^{10}}$", "$7$", "$8$"]

    def work() -> None:
        verifier = get_verifier("math", deadline=3)
        found.extend(verifier(texts, [answering("7")] * len(texts)))

    start = time.monotonic()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert time.monotonic() - start < 40
    assert [verdict.correct for verdict in found] == [True, False, False, True, False]
    assert found[1].reason == "timed out after 3 s"


def test_an_answer_key_that_is_no_mathematics_is_the_users_error(math: Verifier) -> None:
    with pytest.raises(VerifierError, match="use the verifier 'exact'"):
        math(["3"], [answering("five words that say nothing")])
    with pytest.raises(VerifierError, match="no 'answer'"):
        math(["3"], [answering(None)])


def test_a_worker_that_dies_is_replaced() -> None:
    workers = Workers("os:_exit", deadline=5.0, processes=1)
    results = workers([3, 4])
    assert [type(result) for result in results] == [WorkerDied, WorkerDied]
    assert Workers("builtins:abs", processes=2)(list(range(-50, 0))) == list(range(50, 0, -1))
    assert workers([]) == []


def test_a_worker_that_cannot_start_says_why() -> None:
    with pytest.raises(Exception, match="no_such_module"):
        Workers("no_such_module:f")([1])


@pytest.mark.parametrize(
    ("text", "correct", "reason"),
    [
        ("12 + 30 = 42\nAnswer: 42\n\n", True, "the same text"),
        ("Answer:42\n", True, "the same text"),
        ("Answer: 42\nAnswer: 43\n", True, "the same text"),
        ("Answer: 43\nAnswer: 42\n", False, "'43' is not '42'"),
        ("Answer: 42.\n", False, "'42.' is not '42'"),
        ("Answer: 42", False, "cut off: the line of the answer does not end"),
        ("Answer:\n42\n", False, "the answer is empty"),
        ("12 + 30 = 42\n", False, "no line begins with 'Answer:'"),
        ("So Answer: 42\n", False, "no line begins with 'Answer:'"),
        (" \n", False, "empty completion"),
        ("", False, "empty completion"),
    ],
)
def test_exact(text: str, correct: bool, reason: str) -> None:
    problem = answering("42", marker="Answer:", end="\n\n")
    assert get_verifier("exact")([text], [problem]) == [Verdict(correct, reason)]


def test_answers_without_a_marker_are_the_whole_text_or_the_marked_line() -> None:
    assert answer_of(" Paris \n", answering("Paris")) == "Paris"
    assert answer_of("thinking\nAnswer: Paris", answering("Paris")) == "Paris"
    assert answer_of(" 42\nmore", answering("42", form="answer-only", end="\n\n")) == "42"
    with pytest.raises(NoAnswer, match="cut off"):
        answer_of(" 42", answering("42", form="answer-only", end="\n\n"))


def test_the_end_that_a_sampler_cut_off_is_put_back() -> None:
    problem = answering("42", marker="Answer:", end="\n\n")
    assert completed("Answer: 42", "stop", problem) == "Answer: 42\n\n"
    assert completed("Answer: 42", "length", problem) == "Answer: 42"
    assert completed("42", "stop", answering("42")) == "42"


def test_verify_sends_each_problem_to_its_verifier() -> None:
    pytest.importorskip("math_verify")
    exact = Problem("a", answer="1/2", verifier="exact")
    meant = Problem("b", answer="1/2", verifier="math")
    verdicts = verify(["0.5", "0.5", "1/2"], [exact, meant, exact])
    assert [verdict.correct for verdict in verdicts] == [False, True, True]
    with pytest.raises(VerifierError, match="problem c: nothing says how"):
        verify(["x"], [Problem("c")])
    with pytest.raises(ValueError, match="1 completions for 2 problems"):
        verify(["x"], [exact, exact])


def test_unknown_and_missing_verifiers(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VerifierError, match="Did you mean 'math'"):
        get_verifier("maths")
    with pytest.raises(VerifierError, match=r"no option 'x'\. It takes none"):
        get_verifier("exact", x=1)
    with pytest.raises(VerifierError, match="Did you mean 'deadline'"):
        get_verifier("math", dedline=1)
    monkeypatch.setattr(math_verifier, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"^Verifier 'math' needs .*pip install -e '\.\[model\]'$"):
        get_verifier("math")
    with pytest.raises(MissingExtraError, match=r"pip install -e '\.\[lab\]'$"):
        get_verifier("gym")


def test_gym_gives_no_point_for_a_part() -> None:
    pytest.importorskip("reasoning_gym")
    from rlmerge.evaluate.tasks import load_task

    problem = load_task("gym:chain_sum", count=1).problems[0]
    verdict = get_verifier("gym")([f"Answer: {problem.answer} I think"], [problem])[0]
    assert (verdict.correct, verdict.reason.startswith("score 0.")) == (False, True)
    with pytest.raises(VerifierError, match="not from a task gym:"):
        get_verifier("gym")(["1"], [answering("1")])


def test_registry_names_agree() -> None:
    from rlmerge.evaluate import tasks

    assert tuple(verifiers.VERIFIERS) == tasks.VERIFIERS
