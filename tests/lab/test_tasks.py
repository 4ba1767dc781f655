"""The lab's tasks: seeded, split for good, and right. No torch needed."""

import subprocess
import sys
from itertools import islice

import pytest

from rlmerge.lab.tasks import DOMAINS, HELD_OUT_SHARE, Problem, held_out_problems, problems


def first(domain: str, stream: str, count: int = 300, held_out: bool = False) -> list[Problem]:
    return list(islice(problems(domain, stream, held_out), count))


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("stream", ["rlvr/1", "rlvr/2"])
def test_a_stream_is_the_same_every_time(domain: str, stream: str) -> None:
    assert first(domain, stream) == first(domain, stream)


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_stream_does_not_depend_on_the_hash_seed(domain: str) -> None:
    code = (
        "from itertools import islice; from rlmerge.lab.tasks import problems; "
        f"print(list(islice(problems({domain!r}, 'rlvr/1'), 20)))"
    )
    path = [entry for entry in sys.path if entry]
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}; {code}"],
        env={"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == str(first(domain, "rlvr/1", 20))


@pytest.mark.parametrize("domain", DOMAINS)
def test_stages_and_seeds_have_their_own_streams(domain: str) -> None:
    names = ["cold-start/0", "cold-start/1", "rlvr/0", "rlvr/1", "rlvr/2", "measure"]
    runs = [tuple(problem.prompt for problem in first(domain, name, 50)) for name in names]
    assert len(set(runs)) == len(names)
    # Nor is one stream another one delayed: a pilot's second stage replayed the first.
    windows = [{run[i : i + 4] for i in range(len(run) - 3)} for run in runs]
    assert all(not (a & b) for i, a in enumerate(windows) for b in windows[:i])


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_stream_trains_on_a_held_out_problem(domain: str) -> None:
    held_out = {problem.prompt for problem in held_out_problems(domain, 500)}
    for stream in ("rlvr/1", "cold-start/0", "measure"):
        assert held_out.isdisjoint(problem.prompt for problem in first(domain, stream, 3000))


@pytest.mark.parametrize("domain", DOMAINS)
def test_held_out_problems_are_different_and_of_every_kind(domain: str) -> None:
    found = held_out_problems(domain, 300)
    assert len({problem.prompt for problem in found}) == 300
    assert {problem.kind for problem in found} == {problem.kind for problem in first(domain, "rlvr/1")}


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_split_holds_out_the_stated_share(domain: str) -> None:
    seen = {p.prompt: p for side in (False, True) for p in first(domain, "size", 5000 if side else 20000, side)}
    share = sum(problem.held_out for problem in seen.values()) / len(seen)
    assert share == pytest.approx(1 / HELD_OUT_SHARE, abs=0.05)


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("stream", ["rlvr/1", "rlvr/2"])
def test_answers_are_what_python_says(domain: str, stream: str) -> None:
    for problem in first(domain, stream, 1000) + first(domain, stream, 1000, held_out=True):
        if domain == "math":
            expression = problem.prompt.removesuffix(" =")
            assert problem.completion == f" {eval(expression)}\n"
        else:
            expression = problem.prompt.removeprefix(">>> ")
            assert problem.completion == f"{eval(expression)!r}\n"


def test_only_the_exact_completion_is_rewarded() -> None:
    problem = Problem("math", "add", "2 + 3 =", " 5\n")
    assert problem.reward(" 5\n") == 1.0
    assert [problem.reward(text) for text in (" 5", "5\n", " 5\n\n", " 55\n", "")] == [0.0] * 5


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="unknown domain 'chess'"):
        next(problems("chess", "rlvr/1"))
    with pytest.raises(ValueError, match="ask for fewer"):
        held_out_problems("math", 2000)
