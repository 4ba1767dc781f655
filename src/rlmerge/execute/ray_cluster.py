"""Workers on the machines of a Ray cluster that do small jobs, and what becomes of the jobs of those that die.

This module alone imports ray, and only when somebody asks for a cluster. Nothing large goes through Ray: jobs say what
to do, and files that all machines see hold the rest.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from rlmerge.errors import ClusterError, MissingExtraError, RlmergeError
from rlmerge.version import VERSION

T = TypeVar("T")
LOCAL = "local"
STORE = 256 * 2**20
"""Bytes of the object store of a cluster of our own: for summaries on their way, of about a megabyte."""
BEAT = 2.0
"""Seconds after which a pool looks for machines that have come or gone, though no job ended."""
RETRIES = 5
"""Workers that a job may lose, or that may die one after the other before a job is done, until the run gives up."""
PATIENCE = 30.0
"""Seconds without any worker after which the user hears of it."""


def load_ray() -> Any:
    """The module ray. Raises MissingExtraError."""
    # before it is imported: it would report each run to its makers, and warn of what it means to change
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ModuleNotFoundError:
        raise MissingExtraError("--executor ray", "ray", "ray") from None
    return ray


@contextlib.contextmanager
def connected(address: str | None, processors: int) -> Iterator[None]:
    """Within it there is a cluster: that at `address` or in RAY_ADDRESS, else one of our own on this machine.

    A process that is connected already stays so, there and afterwards. Raises ClusterError where nothing answers.
    """
    ray = load_ray()
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or LOCAL
    _knock(address)
    own = {"num_cpus": processors, "object_store_memory": STORE, "include_dashboard": False}
    try:
        ray.init(address, log_to_driver=False, logging_level="ERROR", **(own if address == LOCAL else {}))
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise _nobody(address, error) from None
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raises ClusterError where nobody listens at HOST:PORT, which Ray itself would find out after minutes."""
    host, _, port = address.rpartition(":")
    if host and "/" not in address and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), 10.0).close()
        except (OSError, OverflowError) as error:
            raise _nobody(address, error) from None


def _nobody(address: str, error: Exception) -> ClusterError:
    return ClusterError(
        f"{address}: no Ray cluster answers there: {' '.join(str(error).split())[:300]}\n"
        "  Start one with 'ray start --head' and give its address and port, or leave --address out."
    )


def machines() -> list[dict[str, Any]]:
    """The resources of every living machine."""
    return [node["Resources"] for node in load_ray().nodes() if node["Alive"]]


def spans_machines() -> bool:
    """Whether the cluster is more than this machine, or may become so."""
    ray = load_ray()
    hosts = {node["NodeManagerHostname"] for node in ray.nodes()}
    return hosts != {socket.gethostname()} or ray.get_runtime_context().gcs_address.split(":")[0] != "127.0.0.1"


class Process:
    """A worker in a process of the cluster. What a user can mend comes back as a value, or Ray would wrap it."""

    def __init__(self) -> None:
        self.worker: Any = None

    def start(self, version: str, kind: Callable[..., Any], arguments: dict[str, Any]) -> str | RlmergeError:
        """Makes the worker. Returns the name of the machine."""
        host = socket.gethostname()
        if version != VERSION:
            return ClusterError(f"{host}: has rlmerge {VERSION}, and this machine {version}: install one version.")
        try:
            self.worker = kind(**arguments)
        except RlmergeError as error:
            return error
        return host

    def do(self, job: Any) -> Any:
        """What comes of a job, or the RlmergeError that it raised."""
        try:
            return self.worker.do(job)
        except RlmergeError as error:
            return error


@dataclass(eq=False)
class Member:
    """A process of a pool: its handle, where it runs ('' until it does), and how many jobs it has."""

    handle: Any
    host: str = ""
    jobs: int = 0


class Pool:
    """Processes, each with a worker `kind(**arguments)`: as many as fit, or `limit`, but no more than there are jobs.

    A context, which ends them.

    most        how many jobs there are, at most
    kind        a class with `do(job)`, known by its import path on every machine
    processors, memory  what one process takes of its machine
    ahead       jobs that a process has at once: 2, so that it never waits for the next, or 1 where a job is long
    tell        hears, in a sentence, of processes that died and of none being there
    Raises ClusterError if no machine is large enough.
    """

    def __init__(
        self, kind: Callable[..., Any], arguments: dict[str, Any], *, most: int, limit: int | None = None,
        processors: int = 1, memory: int = 0, ahead: int = 2, tell: Callable[[str], None] = lambda text: None,
    ) -> None:  # fmt: skip
        self._ray = load_ray()
        self._most, self._limit = most, limit
        self._processors, self._memory = processors, memory
        self._ahead = ahead
        self._tell = tell
        if self.slots() == 0:
            largest = max(machines(), key=lambda found: found.get("memory", 0.0), default={})
            cpus, room = largest.get("CPU", 0), largest.get("memory", 0) / 1e9
            raise ClusterError(
                f"a worker takes {processors} processor(s) and {memory / 1e9:.2f} GB, and no machine of the cluster "
                f"has them: that with most memory has {cpus:.0f} and {room:.2f} GB for Ray. "
                "Start one with more (ray start --memory BYTES says how much Ray may give away)."
            )
        _send_plugins(self._ray)
        options = {"num_cpus": processors, "memory": memory, "max_restarts": 0, "max_task_retries": 0}
        self._actor = self._ray.remote(**options)(Process)
        self._given = [VERSION, kind, self._ray.put(arguments)]
        self._members: list[Member] = []
        self._starting: dict[Any, Member] = {}
        self._deaths = 0
        self._looked = 0.0
        self._alone_since = time.monotonic()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for member in self._members:
            self._ray.kill(member.handle)
        self._members, self._starting = [], {}

    def slots(self) -> int:
        """How many processes the machines have room for."""
        room = 0
        for found in machines():
            fitting = int(found.get("CPU", 0.0) // self._processors)
            room += min(fitting, int(found.get("memory", 0.0) // self._memory)) if self._memory else fitting
        return room

    def run(
        self, queue: deque[T], job: Callable[[T], Any], more: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[T, Any]]:
        """Works off a queue that may grow; yields items as they are done, and what came of each.

        job, more  what an item is, asked when somebody is free for it; fills an empty queue

        Items of a process that died are done again by another. Raises what a job raised, and ClusterError where
        processes keep dying.
        """
        again: deque[tuple[T, int]] = deque()
        sent: dict[Any, tuple[Member, T, int]] = {}
        while True:
            self._grow()
            while (member := self._free()) is not None and (again or queue or more()):
                item, losses = again.popleft() if again else (queue.popleft(), 0)
                sent[member.handle.do.remote(job(item))] = member, item, losses
                member.jobs += 1
            if not (sent or again or queue or more()):
                return
            for ref in self._wait([*sent, *self._starting]):
                if ref in self._starting:
                    self._started(ref)
                    continue
                member, item, losses = sent.pop(ref)
                member.jobs -= 1
                outcome, lost = self._get(ref)
                if lost:
                    if losses == RETRIES:
                        raise ClusterError(
                            f"a unit of work lost {losses + 1} workers one after the other, the last on {member.host}: "
                            f"{lost}\n  Does it need more memory than its machine has? What is done is kept; the same "
                            "command continues."
                        )
                    self._bury(member, lost)
                    again.append((item, losses + 1))
                else:
                    self._deaths = 0
                    yield item, outcome

    def _wait(self, refs: list[Any]) -> list[Any]:
        """Some that are done, or none after a beat."""
        if not refs:  # every machine has gone
            time.sleep(BEAT)
            return []
        return self._ray.wait(refs, num_returns=1, timeout=BEAT)[0]

    def _get(self, ref: Any) -> tuple[Any, str]:
        """What a job returned, and '' or how it was lost. Raises what it raised."""
        failures = self._ray.exceptions
        try:
            outcome = self._ray.get(ref)
        except (
            failures.RayActorError, failures.ObjectLostError, failures.NodeDiedError, failures.WorkerCrashedError,
            failures.OutOfMemoryError,
        ) as error:  # fmt: skip
            return None, " ".join(str(error).split())[:300]
        if isinstance(outcome, RlmergeError):
            raise outcome
        return outcome, ""

    def _free(self) -> Member | None:
        """The process with the fewest jobs, if it may have one more."""
        running = [member for member in self._members if member.host and member.jobs < self._ahead]
        return min(running, key=lambda member: member.jobs, default=None)

    def _grow(self) -> None:
        """Starts processes on machines that have come, and in the place of those that died."""
        now = time.monotonic()
        if any(member.host for member in self._members):
            self._alone_since = now
        elif now - self._alone_since > PATIENCE:
            self._alone_since = now
            self._tell("no worker has a processor yet: are the cluster's machines busy with something else, or gone?")
        if self._members and now - self._looked < BEAT:
            return
        self._looked = now
        wanted = self._limit if self._limit is not None else self.slots()
        for _ in range(min(wanted, self._most) - len(self._members)):
            member = Member(self._actor.remote())
            self._members.append(member)
            self._starting[member.handle.start.remote(*self._given)] = member

    def _started(self, ref: Any) -> None:
        member = self._starting.pop(ref)
        try:
            host, lost = self._get(ref)
        except self._ray.exceptions.RayTaskError as error:  # rlmerge is not there, or another one
            raise ClusterError(f"a worker cannot start: {error.cause or error}") from error
        if lost:
            self._bury(member, lost)
        else:
            member.host = host

    def _bury(self, member: Member, lost: str) -> None:
        """Takes a dead process out. Raises ClusterError if many died and nothing was done in between."""
        if member not in self._members:
            return
        self._members.remove(member)
        self._ray.kill(member.handle)
        self._deaths += 1
        if self._deaths > RETRIES + len(self._members):
            raise ClusterError(
                f"{self._deaths} workers died and no unit was done in between, the last: {lost}\n"
                "  What is done is kept; the same command continues."
            )
        place = f"on {member.host}" if member.host else "that was about to start"
        self._tell(f"a worker {place} was lost; what it had is done again")


def _send_plugins(ray: Any) -> None:
    """Methods of plugins go to the machines as code: nothing there can import them."""
    for name, module in list(sys.modules.items()):
        if name.startswith("rlmerge_plugin_"):
            ray.cloudpickle.register_pickle_by_value(module)
