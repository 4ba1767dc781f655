"""Several workers, kept busy by a batch."""

from __future__ import annotations

import queue
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from .client import Client
from .isolation import Isolation
from .limits import Limits

Job = TypeVar("Job")
Result = TypeVar("Result")


class Pool:
    """`workers` prepared workers. Closed by `close`, a `with` block, or when nobody holds it any more."""

    def __init__(self, isolation: Isolation, limits: Limits | None = None, workers: int = 2) -> None:
        if workers < 1:
            raise ValueError("a pool needs a worker")
        self.limits = limits or Limits()
        self._free: queue.SimpleQueue[Client] = queue.SimpleQueue()
        clients: list[Client] = []
        self._close = weakref.finalize(self, _close_all, clients)
        for _ in range(workers):
            clients.append(Client(self.limits, isolation.isolated))
            self._free.put(clients[-1])
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="sandbox") if workers > 1 else None

    def map(self, work: Callable[[Client, Job], Result], jobs: Sequence[Job]) -> list[Result]:
        """`work` on every job with a worker to itself; results in order."""

        def one(job: Job) -> Result:
            client = self._free.get()
            try:
                return work(client, job)
            finally:
                self._free.put(client)

        if self._threads is None or len(jobs) < 2:
            return [one(job) for job in jobs]
        return list(self._threads.map(one, jobs))

    def close(self) -> None:
        """Ends all workers."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        self._close()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close_all(clients: list[Client]) -> None:
    for client in clients:
        client.close()
