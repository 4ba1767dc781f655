"""How many trivial checks a second the sandbox does: `python tests/evaluate/throughput.py [checks] [workers …]`.

Not a test: what it prints depends on what else the machine does. Each line also says how much CPU time a check costs in
all processes together, which depends on that much less; two cores cannot do more than 2 / that many a second.
"""

from __future__ import annotations

import os
import resource
import sys
import time

from rlmerge.evaluate.problem import Problem
from rlmerge.evaluate.python_verifier import make_verifier

FUNCTION = "def f(x):\n    return x * 2\n"
FORMS = {
    "calls": (FUNCTION, {"entry": "f", "calls": [[[1], 2], [[2], 4], [[3], 6]]}),
    "program": ("print(int(input()) * 2)\n", {"cases": [{"stdin": "4\n", "stdout": "8\n"}]}),
    "asserts": (FUNCTION, {"entry": "f", "program": "def check(c):\n    assert c(1) == 2\n    assert c(2) == 4\n"}),
}


def _cpu() -> float:
    """Seconds of this process and of all its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def main() -> None:
    """Prints one line a form of tests and number of workers."""
    checks = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    for workers in [int(text) for text in sys.argv[2:]] or [1, 2]:
        for name, (code, tests) in FORMS.items():
            before = _cpu()
            verifier = make_verifier(workers=workers)
            verifier([code] * 20, [Problem("warm", tests=tests)] * 20)
            started = time.perf_counter()
            verdicts = verifier([code] * checks, [Problem("p", tests=tests)] * checks)
            seconds = time.perf_counter() - started
            verifier.close()
            cost = (_cpu() - before) / checks
            assert all(verdict.correct for verdict in verdicts), next(v for v in verdicts if not v.correct)
            rate = f"{checks / seconds:6.0f} checks/s"
            print(f"{name:8} {workers} worker(s): {rate}, {cost * 1000:.1f} ms CPU each, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
