"""Does the jobs of a run on this machine, in threads or, if one is enough, in the thread that asks."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from .memory import Space
from .schedule import Agenda
from .work import Worker, Write


class Threads:
    """A number of threads that share one worker and write through `write`; an `Executor`. One is the thread that asks:
    to start another for every tensor takes longer than a small merge.
    """

    walks = False

    def __init__(self, worker: Worker, write: Write, threads: int) -> None:
        self.worker = worker
        self.write = write
        self.threads = threads
        self._lock = threading.Condition()
        self._spaces = threading.local()

    @property
    def bytes_read(self) -> int:
        """So far."""
        return self.worker.inputs.bytes_read

    def _space(self) -> Space:
        if not hasattr(self._spaces, "space"):
            self._spaces.space = Space()
        return self._spaces.space

    def run(self, agenda: Agenda[Any]) -> None:
        """See `Executor`."""
        if self.threads == 1:
            with np.errstate(divide="warn", over="warn", under="ignore", invalid="warn"):  # as a new thread has it
                Inline(self.worker, self.write, self._space()).run(agenda)
            return
        queue, failures = agenda.queue, list[BaseException]()
        busy = 0

        def step() -> bool:
            """One item, or the news that there is none; whatever goes wrong goes wrong for the whole run."""
            nonlocal busy
            with self._lock:
                while not queue and not failures and not agenda.more() and busy:
                    self._lock.wait()
                if failures or not queue:
                    return False
                item = queue.popleft()
                busy += 1
            try:
                finish = agenda.settle(item, self.worker.do(agenda.job(item), self.write, self._space()))
            except BaseException:
                with self._lock:
                    busy -= 1
                raise
            with self._lock:
                # in one breath: between the two, others would see neither work under way nor what follows from it
                busy -= 1
                if not failures:
                    finish()
                self._lock.notify_all()
            return True

        def loop() -> None:
            try:
                while step():
                    pass
            except BaseException as error:
                failures.append(error)
            finally:
                with self._lock:
                    self._lock.notify_all()

        threads = [threading.Thread(target=loop, daemon=True, name=f"rlmerge-{i}") for i in range(self.threads)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)
        except BaseException as error:
            failures.append(error)
            with self._lock:
                self._lock.notify_all()
            for thread in threads:
                thread.join()
            raise
        if failures:
            raise failures[0]


class Inline:
    """One job after the other, in the thread that asks; an `Executor`."""

    walks = False

    def __init__(self, worker: Worker, write: Write, space: Space) -> None:
        self.worker = worker
        self.write = write
        self.space = space

    @property
    def bytes_read(self) -> int:
        """So far."""
        return self.worker.inputs.bytes_read

    def run(self, agenda: Agenda[Any]) -> None:
        """See `Executor`."""
        while agenda.queue or agenda.more():
            item = agenda.queue.popleft()
            agenda.settle(item, self.worker.do(agenda.job(item), self.write, self.space))()
