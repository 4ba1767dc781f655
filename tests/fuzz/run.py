"""Fuzzing: spoiled files through check, merge and verify, each case in a process of its own, within bounds.

    python -m tests.fuzz.run [--minutes M | --cases N] [--seed S] [--jobs J] [--only SCENARIO] [--save FOLDER]

Allowed are an output that is finite and verifies, and an RlmergeError of a sensible length. Everything else is a
defect: another exception, a warning, more than 10 s, more memory than files of this size can need, a crash, a file
opened for writing outside, a program started. Its files are saved in tests/fuzz/cases, from where `test_fuzz.py` runs
them ever after.
"""

from __future__ import annotations

import argparse
import base64
import faulthandler
import json
import math
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fuzz.good import SCENARIOS, Scenario, write_good
from tests.fuzz.mutate import spoil

CASES = Path(__file__).parent / "cases"
SECONDS = 10
"""Of the processor, that a case may take."""
PATIENCE = 6
"""Times that, by the clock: other programs may be running."""
MEMORY = 400 * 2**20
"""What a case may take beyond what the process has: blocks, threads' stacks, Python's own objects of a 10 KB file."""
LONGEST = 20_000
"""Characters of a message."""
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "os.fork", "socket.connect",
             "socket.getaddrinfo", "pickle.find_class", "ctypes.dlopen", "pty.spawn", "webbrowser.open")  # fmt: skip


@dataclass(frozen=True)
class Result:
    """How a case ended: 'merged', 'refused', or a defect with its story."""

    kind: str
    story: str

    @property
    def is_defect(self) -> bool:
        """Whether rlmerge must be mended."""
        return self.kind not in ("merged", "refused")


def run_case(home: Path, scenario: Scenario, files: dict[str, bytes], seconds: float = SECONDS) -> Result:
    """Puts the spoiled files into a copy of the good ones and runs the scenario there, in a child process."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        copy = Path(place) / "home"
        shutil.copytree(home, copy)
        for name, data in files.items():
            (copy / name).write_bytes(data)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            _child(copy, Path(place) / "out", scenario, writer, seconds)
        os.close(writer)
        said = _read_all(reader, child, PATIENCE * seconds)
        os.close(reader)
        _, status = os.waitpid(child, 0)
        if said is None:
            return Result("hang", f"still there after {PATIENCE * seconds:g} s")
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
            return Result("hang", f"still running after {seconds:g} s of the processor")
        if not said:
            how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
            return Result("crash", how)
        return Result(*json.loads(said))


def _read_all(reader: int, child: int, seconds: float) -> bytes | None:
    """What the child writes until its end; None if it had to be killed."""
    end, found = time.monotonic() + seconds, b""
    while True:
        ready, _, _ = select.select([reader], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            os.kill(child, signal.SIGKILL)
            return None
        data = os.read(reader, 2**16)
        if not data:
            return found
        found += data


def _child(home: Path, out: Path, scenario: Scenario, writer: int, seconds: float) -> None:
    """Runs the scenario within its bounds, says how it ended, and is gone."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    faulthandler.disable()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), math.ceil(seconds) + 5))
    broken: list[str] = []
    sys.addaudithook(lambda event, arguments: _watch(event, arguments, str(home.parent), broken))
    os.chdir(home)
    result = _outcome(home, out, scenario)
    if broken:
        result = Result("outside", "; ".join(broken))
    os.write(writer, json.dumps([result.kind, result.story]).encode())
    os._exit(0)


def _outcome(home: Path, out: Path, scenario: Scenario) -> Result:
    from rlmerge.errors import RlmergeError

    warnings.simplefilter("error")
    try:
        scenario.run(home, out)
    except RlmergeError as error:
        text = str(error)
        if not text.strip() or len(text) > LONGEST:
            return Result("message", f"{len(text)} characters: {text[:300]}")
        try:
            text.encode()
        except UnicodeEncodeError:
            return Result("message", f"cannot be printed: {text[:300]!r}")
        return Result("refused", text)
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        story = "".join(traceback.format_exception(error)[-6:])[-2500:]
        return Result(f"{type(error).__name__} at {Path(where.filename).name}:{where.name}", story)
    return Result("merged", "")


def _watch(event: str, arguments: tuple[Any, ...], home: str, broken: list[str]) -> None:
    """An audit hook: notes programs that are started, and files that are written outside of the case's folder."""
    if event in FORBIDDEN:
        broken.append(f"{event} {arguments!r:.200}")
    elif event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        path = os.path.abspath(arguments[0])
        temporary = os.path.join(tempfile.gettempdir(), "rlmerge-")
        relative = not os.path.isabs(arguments[0])  # to a handle of a folder, see `safe_files`
        if not relative and not path.startswith((home, temporary, "/dev/null")) and "__pycache__" not in path:
            broken.append(f"writes {path}")
    elif event in ("os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree") and isinstance(arguments[0], str):
        path = os.path.abspath(arguments[0])
        if os.path.isabs(arguments[0]) and not path.startswith((home, os.path.join(tempfile.gettempdir(), "rlmerge-"))):
            broken.append(f"{event} {path}")


def make_case(home: Path, names: list[str], seed: int) -> tuple[str, dict[str, bytes]]:
    """The scenario and the spoiled files of a seed: the same for ever, as long as good files and mutations stay."""
    chance = random.Random(seed)
    name = chance.choice(names)
    files = SCENARIOS[name].files
    chosen = chance.sample(files, min(len(files), chance.choice((1, 1, 1, 2))))
    return name, {file: spoil(file, (home / file).read_bytes(), chance) for file in chosen}


def save_case(folder: Path, seed: int, scenario: str, files: dict[str, bytes], result: Result) -> Path:
    """Writes a case as a file of its own: what was spoiled, and how it ended."""
    folder.mkdir(parents=True, exist_ok=True)
    word = "".join(c if c.isalnum() else "-" for c in f"{scenario}-{result.kind}".lower())[:60].strip("-")
    path = folder / f"{word}-{seed}.json"
    spoiled = {name: base64.b64encode(data).decode() for name, data in files.items()}
    said = {
        "scenario": scenario,
        "seed": seed,
        "found": result.kind,
        "story": (result.story.strip().splitlines() or [""])[-1][:200],
        "files": spoiled,
    }
    path.write_text(json.dumps(said, indent=1) + "\n")
    return path


def load_case(path: Path) -> tuple[Scenario, dict[str, bytes]]:
    """A saved case."""
    said = json.loads(path.read_text())
    return SCENARIOS[said["scenario"]], {name: base64.b64decode(data) for name, data in said["files"].items()}


def work(home: Path, names: list[str], seeds: Any, until: float, save: Path | None) -> Counter[str]:
    """Runs cases until time or seeds are out. Prints and saves every kind of defect once; returns what came."""
    count: Counter[str] = Counter()
    for seed in seeds:
        if time.monotonic() > until:
            break
        scenario, files = make_case(home, names, seed)
        result = run_case(home, SCENARIOS[scenario], files)
        count[f"{scenario} | {result.kind}" if result.is_defect else result.kind] += 1
        if result.is_defect and count[f"{scenario} | {result.kind}"] == 1:
            where = save_case(save, seed, scenario, files, result) if save else ""
            print(f"seed {seed}: {scenario}: {result.kind} {where}\n{result.story}\n", flush=True)
    return count


def replay(cases: dict[str, tuple[Scenario, dict[str, bytes]]]) -> None:
    """Runs cases by their names and says how each ended; exits with 1 for a defect."""
    with tempfile.TemporaryDirectory(prefix="fuzz-good-") as home:
        write_good(Path(home))
        ends = {name: run_case(Path(home), scenario, files) for name, (scenario, files) in cases.items()}
    for name, result in ends.items():
        print(f"{name}: {result.kind}: {result.story.strip()}")
    print(f"{len(ends)} cases replayed")
    sys.exit(1 if any(result.is_defect for result in ends.values()) else 0)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--cases", type=int, default=10**9)
    parser.add_argument("--seed", type=int, default=None, help="the first one; by default another every time")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", action="append", help="a scenario; repeatable")
    parser.add_argument("--save", type=Path, default=CASES, help="where the files of defects go")
    parser.add_argument("--replay", type=Path, nargs="+", metavar="CASE", help="saved cases, instead of new ones")
    parser.add_argument("--good", action="store_true", help="all scenarios with files that nobody spoiled")
    given = parser.parse_args()
    if given.replay or given.good:
        good = {name: (scenario, {}) for name, scenario in SCENARIOS.items()} if given.good else {}
        replay({path.name: load_case(path) for path in given.replay or ()} | good)
        return
    first = random.SystemRandom().randrange(2**32) if given.seed is None else given.seed
    names = given.only or list(SCENARIOS)
    with tempfile.TemporaryDirectory(prefix="fuzz-good-") as home:
        write_good(Path(home))
        until = time.monotonic() + 60 * given.minutes
        readers = []
        for job in range(given.jobs):
            reader, writer = os.pipe()
            if os.fork() == 0:
                try:
                    seeds = range(first + job, first + given.cases, given.jobs)
                    count = work(Path(home), names, seeds, until, given.save)
                    os.write(writer, json.dumps(count).encode())
                except Exception:
                    traceback.print_exc()
                finally:
                    os._exit(0)
            os.close(writer)
            readers.append(reader)
        total: Counter[str] = Counter()
        for reader in readers:
            with open(reader, "rb") as opened:
                total.update(json.loads(opened.read() or b"{}"))
        for _ in readers:
            os.wait()
    defects = sum(number for kind, number in total.items() if kind not in ("merged", "refused"))
    print(f"{sum(total.values())} cases from seed {first}: {total['merged']} merged, {total['refused']} refused, "
          f"{defects} defects")  # fmt: skip
    for kind, number in sorted(total.items()):
        if kind not in ("merged", "refused"):
            print(f"  {number:6d}  {kind}")
    sys.exit(1 if defects or not total else 0)


if __name__ == "__main__":
    main()
