"""Worker processes that judge answers and can be killed: one answer too slow, and only that answer is lost.

Parsers of mathematics can run for ever on what a model writes, inside C code that no exception interrupts. So each
answer goes as a line of JSON to a process of ours, which has a deadline and a memory limit. Works in any thread. This
protects from slowness, not from malice: text that is meant as a program goes to the sandbox of the `python` verifier.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from rlmerge.errors import RlmergeError

_START = 120.0
"""Seconds that a worker may take to import what it needs."""


class WorkerError(RlmergeError):
    """A worker process that cannot be started."""


class Workers:
    """Processes that run one function on JSON values, with a deadline for each value. One thread at a time may call."""

    def __init__(
        self, target: str, deadline: float = 5.0, processes: int = 2, warm: Any = None, memory_mb: int = 4096
    ) -> None:
        """target   'module:function', a function of one JSON value that returns one
        deadline    seconds for each value; start-up time does not count
        warm        a value that each new process works on first, to have its imports done before time begins
        """
        self._target = target
        self._deadline = deadline
        self._count = processes
        self._memory = memory_mb
        self._warm = warm
        self._workers: list[_Worker] = []
        self._finalizer = weakref.finalize(self, _stop, self._workers)

    def __call__(self, values: Sequence[Any]) -> list[Any]:
        """The results in order; for a value that took too long or killed its worker, an exception object."""
        results: list[Any] = [None] * len(values)
        waiting = list(range(len(values)))[::-1]
        while len(self._workers) < min(self._count, len(values)):
            self._workers.append(_Worker(self._target, self._warm, self._memory))
        try:
            while waiting or any(worker.task is not None for worker in self._workers):
                for place, worker in enumerate(self._workers):
                    if worker.task is None and waiting:
                        worker.give(waiting.pop(), values, self._deadline)
                    elif worker.ended():
                        worker.kill()
                        results[worker.finish()] = WorkerDied("the checker died")
                        self._workers[place] = _Worker(self._target, self._warm, self._memory)
                    elif worker.late():
                        results[worker.finish()] = TimeoutError(f"timed out after {self._deadline:g} s")
                        self._workers[place] = _Worker(self._target, self._warm, self._memory)
                for number, result in _collect(self._workers):
                    results[number] = result
        except BaseException:
            self.close()
            raise
        return results

    def close(self) -> None:
        """Ends the processes; the next call starts new ones."""
        _stop(self._workers)


class WorkerDied(Exception):
    """A worker that ended on a value: out of memory, or a crash of its parser."""


class _Worker:
    """One process. It says 'ready' once its imports are done; then a line in, a line out."""

    def __init__(self, target: str, warm: Any, memory_mb: int) -> None:
        code = f"from rlmerge.evaluate.killable import serve; serve({target!r}, {warm!r}, {memory_mb})"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        self.task: int | None = None
        self.ready = False
        self.until = time.monotonic() + _START
        self._buffer = b""
        self._value: bytes | None = None
        self._seconds = 0.0

    def give(self, number: int, values: Sequence[Any], seconds: float) -> None:
        """Queues a value; it is sent, and its time begins, when the worker is ready."""
        self.task, self._seconds = number, seconds
        self._value = json.dumps(values[number]).encode() + b"\n"
        if self.ready:
            self._send()

    def read(self) -> list[tuple[int, Any]]:
        """What has arrived, as (number, result)."""
        assert self.process.stdout
        self._buffer += os.read(self.process.stdout.fileno(), 1 << 16)
        *lines, self._buffer = self._buffer.split(b"\n")
        results = []
        for line in lines:
            if not self.ready:
                self.ready = True
                self._send()
            elif self.task is not None:
                results.append((self.finish(), json.loads(line)))
        return results

    def _send(self) -> None:
        self.until = time.monotonic() + self._seconds
        if self._value is not None and self.process.stdin:
            with suppress(BrokenPipeError):
                self.process.stdin.write(self._value)
                self.process.stdin.flush()
            self._value = None

    def ended(self) -> bool:
        """Whether the process is gone while it had a task; WorkerError if it never got ready."""
        if self.task is None or self.process.poll() is None:
            return False
        if not self.ready:
            said = self.process.stderr.read().decode("utf-8", "replace") if self.process.stderr else ""
            raise WorkerError(f"A checking process could not start: {(said.strip().splitlines() or ['no reason'])[-1]}")
        return True

    def late(self) -> bool:
        """Whether its time is over (then it is killed)."""
        if self.task is None or time.monotonic() < self.until:
            return False
        if not self.ready:
            self.kill()
            raise WorkerError(f"A checking process was not ready after {_START:g} s.")
        self.kill()
        return True

    def finish(self) -> int:
        """Frees the worker; the number of what it worked on."""
        assert self.task is not None
        number, self.task = self.task, None
        return number

    def kill(self) -> None:
        """Kills the process and what it started, and closes its pipes."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe:
                with suppress(OSError):
                    pipe.close()


def _collect(workers: Sequence[_Worker]) -> list[tuple[int, Any]]:
    """Waits a moment for any worker, and reads what there is."""
    outputs = {worker.process.stdout: worker for worker in workers if worker.process.stdout and worker.task is not None}
    readable, _, _ = select.select(list(outputs), [], [], 0.05)
    return [result for pipe in readable for result in outputs[pipe].read()]


def _stop(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.kill()
    workers.clear()


def serve(target: str, warm: Any, memory_mb: int) -> None:
    """The worker's life: lines of JSON from stdin to the function, its results to what was stdout."""
    out = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # a parser that prints must not break the protocol
    module, _, name = target.partition(":")
    function: Callable[[Any], Any] = getattr(__import__(module, fromlist=[name]), name)
    if warm is not None:
        function(warm)
    os.dup2(nowhere, 2)  # errors of the imports were worth hearing; an unread pipe would block
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    out.write(b'"ready"\n')
    out.flush()
    for line in sys.stdin.buffer:
        out.write(json.dumps(function(json.loads(line))).encode() + b"\n")
        out.flush()
