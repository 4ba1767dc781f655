"""A worker: a small interpreter that shuts itself in once and then forks a process, or two, for every check.

It is started by `pool` and never sees what it runs: code, input and tests travel on sockets that are handed through to
the processes, so nothing of one check is in the memory from which the next is forked. Orders and answers are frames of
fixed size on its control socket.
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import json
import os
import select
import signal
import socket
import struct
import sys
import time
from typing import Any

from . import harness, judge, kernel, rooms  # noqa: F401  judge: imported before the room is shut
from .callfilter import has_filter, room_filter, worker_filter

ORDER = struct.Struct("<cBd")  # b'R' run or b'K' kill, number of processes, wall seconds
ANSWER = struct.Struct("<B2i2d")  # timed out, exit statuses (-1: none), CPU seconds
DESCRIPTORS = 3  # of each process: channel, standard output, standard error; then the two ends of the link

# Imported once: what most programs import, and extension modules whose shared libraries are out of reach later. The
# rest of the standard library is read from disk when it is wanted: every module here makes every fork dearer, most of
# all those that do something after a fork (threading 0.5 ms, random 0.2 ms).
PRELOADED = ("bisect", "collections", "functools", "heapq", "itertools", "math", "re", "string", "typing")
PRELOADED += ("zlib", "_bz2", "_lzma")


def main(control: int, settings: str) -> None:
    """Entry of the process that `pool` starts. `settings`: JSON of limits and whether to isolate."""
    wanted = json.loads(settings)
    with socket.socket(fileno=control) as link:
        link.setblocking(True)
        for name in PRELOADED:
            try:
                importlib.import_module(name)
            except ImportError:
                continue  # an interpreter built without it
        try:
            _serve(link, wanted)
        except OSError as error:
            _hello(link, error=str(error))


def _hello(link: socket.socket, **found: object) -> None:
    link.sendall(json.dumps(found).encode().ljust(1024)[:1024])


def _serve(link: socket.socket, wanted: dict[str, Any]) -> None:
    """Shuts this process in, says so, and works."""
    machine, isolate = os.uname().machine, bool(wanted["isolate"])
    if isolate:
        if machine not in kernel.NUMBERS:
            raise OSError(f"no sandbox for the architecture {machine}")
        proc = rooms.enter_namespaces(machine)
        kernel.unshare(kernel.CLONE_NEWPID)
        pid = os.fork()
        if pid:  # the machine knows this process: it waits, and takes the other one along when it dies
            link.close()
            os.waitpid(pid, 0)
            os._exit(0)
        kernel.die_with_parent()
        namespace = os.open("self/ns/pid", os.O_RDONLY, dir_fd=proc)
        rooms.forbid_user_namespaces(proc)
        os.close(proc)
    else:
        namespace = -1
    filtered = sys.platform == "linux" and has_filter(machine) and _filter_works(machine)
    if filtered:
        kernel.forbid_new_privileges()
        kernel.set_filter(machine, worker_filter(machine))
    room = rooms.Room(machine, isolate, filtered, wanted["limits"])
    os.environ.clear()
    os.environ.update(HOME=rooms.SCRATCH, TMPDIR=rooms.SCRATCH, LANG="C.UTF-8", PATH="")
    sys.path[:] = [path for path in sys.path if path and "site-packages" not in path]
    sys.argv[:] = ["solution.py"]
    _hello(link, isolated=isolate, filtered=filtered, user=os.getuid(), processes=isolate and _own_count())
    for descriptor in (0, 1, 2):
        quiet = os.open("/dev/null", os.O_RDWR)
        os.dup2(quiet, descriptor)
        os.close(quiet)
    gc.collect()
    gc.freeze()  # the collector of a forked process would copy every page
    room.set_common_limits()
    Worker(link, room, namespace).work()


def _own_count() -> bool:
    """Whether the kernel counts processes per user namespace (5.14 and later)."""
    major, minor, *_ = (int("".join(filter(str.isdigit, part)) or 0) for part in os.uname().release.split("."))
    return (major, minor) >= (5, 14)


def _filter_works(machine: str) -> bool:
    """Tries the system call filter in a process of its own: it cannot be taken off again."""
    pid = os.fork()
    if pid == 0:
        try:
            kernel.forbid_new_privileges()
            kernel.set_filter(machine, worker_filter(machine))
            kernel.set_filter(machine, room_filter(machine))
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


class Worker:
    """The loop of a worker: one order at a time."""

    def __init__(self, link: socket.socket, room: rooms.Room, namespace: int) -> None:
        self._link, self._room, self._namespace = link, room, namespace
        self._folders: dict[int, str] = {}  # scratch of each process, where there are no namespaces
        self._ended: dict[int, tuple[int, int, Any]] = {}  # what wait4 said before it was asked for

    def work(self) -> None:
        """Until the other end hangs up."""
        while True:
            order, descriptors = self._receive()
            if not order:
                return
            kind, processes, wall = ORDER.unpack(order)
            if kind != b"R":
                continue  # a kill that came too late
            started = time.monotonic()
            pids = [self._start(place, descriptors, processes, wall) for place in range(processes)]
            for descriptor in descriptors:
                os.close(descriptor)
            self._link.sendall(self._watch(pids, started + wall))

    def _receive(self) -> tuple[bytes, list[int]]:
        order, descriptors, _, _ = socket.recv_fds(self._link, ORDER.size, 2 * DESCRIPTORS + 2)
        while order and len(order) < ORDER.size:
            more = self._link.recv(ORDER.size - len(order))
            order = order + more if more else b""
        return order, descriptors

    def _start(self, place: int, descriptors: list[int], processes: int, wall: float) -> int:
        scratch = rooms.SCRATCH if self._room.isolated else _new_folder()
        if self._namespace >= 0:
            kernel.unshare(kernel.CLONE_NEWPID)
        pid = os.fork()
        if pid == 0:
            try:
                self._become(place, descriptors, processes, scratch, wall)
            finally:
                os._exit(125)
        if self._namespace >= 0:
            kernel.setns(self._namespace, kernel.CLONE_NEWPID)  # or the next unshare is refused
        else:
            self._folders[pid] = scratch
        return pid

    def _become(self, place: int, descriptors: list[int], processes: int, scratch: str, wall: float) -> None:
        """In the new process: nothing stays open but its own channel (3), its output and its end of the link (4)."""
        own = descriptors[place * DESCRIPTORS : (place + 1) * DESCRIPTORS]
        if processes == 2:
            own = [*own, descriptors[2 * DESCRIPTORS + place]]
        # Out of the way first: a descriptor may lie where another has to go.
        channel, output, errors, *link = (_move_up(descriptor) for descriptor in own)
        self._link.detach()
        quiet = os.open("/dev/null", os.O_RDONLY)
        for source, target in ((quiet, 0), (output, 1), (errors, 2), (channel, 3), *((end, 4) for end in link)):
            os.dup2(source, target)
        os.closerange(5 if link else 4, 1024)
        try:
            self._room.enter(scratch, wall)
        except OSError as error:
            harness.write_line(3, {"setup": str(error)})
            return
        harness.run(3, 4 if link else None)

    def _watch(self, pids: list[int], deadline: float) -> bytes:
        """Waits for the first process, kills the others, reports how they ended."""
        timed_out = not self._wait_for(pids[0], deadline)
        statuses, seconds = [-1, -1], [0.0, 0.0]
        for place, pid in enumerate(pids):
            if pid not in self._ended:
                self._kill(pid)
            _, status, used = self._ended.pop(pid, None) or os.wait4(pid, 0)
            statuses[place], seconds[place] = status, used.ru_utime + used.ru_stime
            if pid in self._folders:
                _remove(self._folders.pop(pid))
        return ANSWER.pack(timed_out, *statuses, *seconds)

    def _wait_for(self, pid: int, deadline: float) -> bool:
        """Until the process ends, an order comes (to kill) or the deadline: False for the deadline."""
        if not hasattr(os, "pidfd_open"):
            return self._wait_slowly(pid, deadline)
        process = os.pidfd_open(pid)
        try:
            left = max(0.0, deadline - time.monotonic())
            return bool(select.select([process, self._link], [], [], left)[0])
        finally:
            os.close(process)

    def _wait_slowly(self, pid: int, deadline: float) -> bool:
        while time.monotonic() < deadline:
            if select.select([self._link], [], [], 0.002)[0]:
                return True
            ended = os.wait4(pid, os.WNOHANG)
            if ended[0]:
                self._ended[pid] = ended
                return True
        return False

    def _kill(self, pid: int) -> None:
        """The first process of a pid namespace takes all others along; without one, its session has to do."""
        try:
            if not self._room.isolated:
                os.killpg(pid, signal.SIGKILL)
            os.kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass


def _new_folder() -> str:
    import tempfile

    return tempfile.mkdtemp(prefix="rlmerge-")


def _remove(folder: str) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def _move_up(descriptor: int) -> int:
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD, 64)
