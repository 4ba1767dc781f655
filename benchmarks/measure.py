"""Runs one command and measures it whole: wall and CPU time, peak memory, bytes that came from the disk. Linux only.

Memory is sampled from /proc, summed over the process and its descendants: total (resident, so file pages mapped into
the process count) and anonymous (what the program allocated itself, which nothing can evict).
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

INTERVAL = 0.05
"""Seconds between two looks at the memory."""
NOT_PASSED_ON = ("PYTHONDONTWRITEBYTECODE", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""Every command caches its bytecode, and takes as many threads as it likes: mergekit would take one."""


@dataclass(frozen=True)
class Measurement:
    """One run of one command. Times in seconds, memory and traffic in MB of 10⁶ bytes.

    wall             from before the start of the process to its end
    user, system     CPU time of the process and of the descendants that it waited for
    rss, anonymous   peaks of the sums over the process tree, as seen every 50 ms (`samples` times)
    disk_read        fetched from storage and not from the page cache: about zero when the inputs were warm
    load             the machine's 1-minute load average at the start: > 0.5 says that something else was running
    """

    wall: float
    user: float
    system: float
    rss: float
    anonymous: float
    disk_read: float
    samples: int
    load: float

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return {key: round(value, 4) for key, value in asdict(self).items()}


class CommandError(RuntimeError):
    """A measured command failed; the message holds the end of what it printed."""


def descendants(pid: int) -> list[int]:
    """The process and all its descendants that are alive now."""
    found, queue = [], [pid]
    while queue:
        one = queue.pop()
        found.append(one)
        try:
            for task in os.listdir(f"/proc/{one}/task"):
                with open(f"/proc/{one}/task/{task}/children") as file:
                    queue += [int(child) for child in file.read().split()]
        except OSError:  # it, or one of its threads, has just ended
            continue
    return found


def memory(pid: int) -> dict[str, int]:
    """VmHWM, VmRSS and RssAnon of a process in kB; nothing once it has ended."""
    try:
        with open(f"/proc/{pid}/status") as file:
            return {key: int(kb) for key, kb in re.findall(r"^(VmHWM|VmRSS|RssAnon):\s+(\d+) kB", file.read(), re.M)}
    except OSError:
        return {}


class Sampler(threading.Thread):
    """Watches a process tree's memory until told to stop."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.rss, self.anonymous, self.samples = pid, 0, 0, 0
        self.ended = threading.Event()

    def run(self) -> None:
        """Looks at once, then every INTERVAL. VmHWM, the kernel's own mark, catches one process's peaks in between."""
        while True:
            seen = [memory(pid) for pid in descendants(self.pid)]
            self.rss = max(self.rss, sum(m.get("VmRSS", 0) for m in seen), *(m.get("VmHWM", 0) for m in seen))
            self.anonymous = max(self.anonymous, sum(m.get("RssAnon", 0) for m in seen))
            self.samples += 1
            if self.ended.wait(INTERVAL):
                return


def run(command: list[str], cwd: Path, log: Path, env: dict[str, str] | None = None) -> Measurement:
    """Runs a command to its end and measures it; what it prints goes to `log`.

    Raises CommandError if it cannot be started or does not exit with 0.
    """
    load = os.getloadavg()[0]
    environment = {key: value for key, value in os.environ.items() if key not in NOT_PASSED_ON} | (env or {})
    with log.open("wb") as out:
        began = time.perf_counter()
        try:
            process = subprocess.Popen(
                command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment
            )
        except OSError as error:
            raise CommandError(f"cannot start {command[0]}: {error}") from error
        sampler = Sampler(process.pid)
        sampler.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            sampler.ended.set()
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
    sampler.join()
    if process.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise CommandError(f"exit code {process.returncode} from: {' '.join(command)}\n{tail}")
    return Measurement(
        wall=wall,
        user=usage.ru_utime,
        system=usage.ru_stime,
        rss=sampler.rss * 1024 / 1e6,
        anonymous=sampler.anonymous * 1024 / 1e6,
        disk_read=usage.ru_inblock * 512 / 1e6,
        samples=sampler.samples,
        load=load,
    )


def warm(files: list[Path]) -> None:
    """Reads files once, so that a run finds them in the page cache, whatever ran before it."""
    buffer = memoryview(bytearray(1 << 22))
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def machine(folder: Path) -> dict[str, Any]:
    """What the numbers depend on: processor, memory, kernel, and where `folder` lies."""

    def first(path: str, pattern: str) -> str:
        try:
            found = re.search(pattern, Path(path).read_text(), re.M)
        except OSError:
            return "unknown"
        return found.group(1).strip() if found else "unknown"

    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    mount = max((m for m in mounts if folder.resolve().is_relative_to(m[1])), key=lambda m: len(m[1]))
    return {
        "processor": first("/proc/cpuinfo", r"^model name\s*:(.*)$"),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "kernel": platform.release(),
        "file_system": f"{mount[2]} on {mount[0]}",
        "disk_free_gb": round(shutil.disk_usage(folder).free / 1e9, 1),
    }
