"""Runs a plan on a Ray cluster: each process opens the inputs and the shards by path and does jobs of the plan.

What travels: the plan once to each process, results of stages with a job, summaries and records back. Weights never do.
The driver keeps the journal and adds summaries in plan order, so that the bytes are those of a run in threads.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlmerge import kernels
from rlmerge.errors import ClusterError, PluginError
from rlmerge.kernels import Backend, load_kernels
from rlmerge.plan import Plan
from rlmerge.plugins import FILES, blame
from rlmerge.settings import KEPT_BYTES, PROCESS_BYTES, thread_bytes

from .folder import OutputFolder
from .inputs import stamps_of
from .journal import Journal
from .local import Inline
from .memory import Space, hold_memory
from .ray_cluster import Pool, spans_machines
from .schedule import Agenda, Run
from .work import Job, Outcome, Walked, Worker


class MergeWorker:
    """What a process has open: one thread's worth of a merge.

    digest   of the journal's first line: whose output it is
    stamps   of the input files, as the driver sees them
    durable  whether a unit is synced before it counts as done, as another machine may be lost with what it has not
    plugins  files of plugins, for their errors
    """

    def __init__(
        self, plan: Plan, backend: Backend, out: Path, names: tuple[str, ...], digest: str, stamps: list[list[int]],
        durable: bool, plugins: set[str],
    ) -> None:  # fmt: skip
        from threadpoolctl import threadpool_limits

        hold_memory()
        kernels.skip_blas = True
        FILES.update(plugins)
        _check_inputs(plan, stamps)
        self.worker = Worker(plan, load_kernels(backend), KEPT_BYTES)
        self.target = OutputFolder(plan, out, names)
        self.target.join(digest)
        self.durable = durable
        self.space = Space()
        threadpool_limits(1)

    def do(self, job: Job) -> tuple[Outcome, int]:
        """What comes of a job, and the bytes that it read. Raises PluginError for what goes wrong in a plugin."""
        before = self.worker.inputs.bytes_read
        try:
            outcome = self._walk(job) if job.alone is not None else self.worker.do(job, self.target.write, self.space)
        except Exception as error:
            if message := blame(error):
                raise PluginError(message) from error
            raise
        if not isinstance(outcome, list) and self.durable:
            self.target.sync(job.tensor)
        self.worker.forget(job.tensor, job.unit)
        return outcome, self.worker.inputs.bytes_read - before

    def _walk(self, job: Job) -> Walked:
        """A tensor of one unit through its stages to its merge, as a run of its own does it."""
        assert job.alone is not None
        name, journal = self.worker.plan.tensors[job.tensor].name, Journal(None, "", [])
        for group, known in enumerate(job.results):
            for stage, result in known.items():
                journal.results.put(group, name, stage, result)
        Run(self.worker, journal, Inline(self.worker, self.target.write, self.space)).merge(job.alone, [job.tensor])
        made = [entry for entry in journal.results.listed(name) if entry[1] not in job.results[entry[0]]]
        return Walked(made, journal.units[job.tensor, job.unit])


def _check_inputs(plan: Plan, stamps: list[list[int]]) -> None:
    host = socket.gethostname()
    for entry, stamp in zip(plan.files, stamps):
        try:
            (found,) = stamps_of([entry.path])
        except OSError as error:
            raise ClusterError(
                f"{entry.path}: {host} cannot read it: {error.strerror}. Every machine must see the inputs under the "
                "same paths: put them on a shared file system."
            ) from None
        if found != stamp:
            raise ClusterError(
                f"{entry.path}: on {host} it has {found[0]} bytes of {found[1]} ns, and where the command runs "
                f"{stamp[0]} of {stamp[1]}: it is another file. Every machine must see the same one."
            )


class RayExecutor:
    """Has jobs done by a pool; an `Executor`."""

    walks = True

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.bytes_read = 0

    def run(self, agenda: Agenda[Any]) -> None:
        """See `Executor`."""
        for item, (outcome, count) in self.pool.run(agenda.queue, agenda.job, agenda.more):
            self.bytes_read += count
            if isinstance(outcome, list):  # large arrays lie in Ray's store, read-only, and keep their place there
                outcome = [{key: value.copy() for key, value in summary.items()} for summary in outcome]
            agenda.settle(item, outcome)()


@contextlib.contextmanager
def merging(
    plan: Plan, target: OutputFolder, backend: Backend, digest: str, stamps: list[list[int]], limit: int | None,
    tell: Callable[[str], None],
) -> Iterator[RayExecutor]:  # fmt: skip
    """The executor of a merge on the cluster that this process is connected to, at most `limit` units at once."""
    arguments: dict[str, Any] = {
        "plan": plan, "backend": backend, "out": target.out, "names": target.names, "digest": digest, "stamps": stamps,
        "durable": spans_machines(), "plugins": set(FILES),
    }  # fmt: skip
    most, memory = len(plan.unit_list()), PROCESS_BYTES + thread_bytes(plan)
    with Pool(MergeWorker, arguments, most=most, limit=limit, memory=memory, tell=tell) as pool:
        yield RayExecutor(pool)
