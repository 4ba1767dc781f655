"""The outer end of a worker: starts it, hands it sockets, reads what comes back within bounds, repairs it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import SandboxError
from .limits import Limits
from .worker import ANSWER, ORDER

_GRACE = 3.0  # seconds beyond the deadline in which a worker has to answer before it is replaced
_START = 20.0
# The worker must not import rlmerge, which may bring the whole of NumPy: its modules are a package of their own there.
_BOOT = (
    "import sys, types; box = types.ModuleType('box'); box.__path__ = [sys.argv[1]]; sys.modules['box'] = box; "
    "from box.worker import main; main(int(sys.argv[2]), sys.argv[3])"
)


@dataclass(slots=True)
class Process:
    """How one process of a check ended, and what it wrote. All of it was in the hands of the tested code."""

    output: bytes = b""
    errors: bytes = b""
    messages: list[dict[str, Any]] = field(default_factory=list)
    status: int | None = None  # exit status; negative: the signal; None where it was not there any more
    seconds: float = 0.0


@dataclass(slots=True)
class Outcome:
    """What came of a check.

    trouble  '' or what ended it from outside: 'timed out after 5 s', 'wrote more than 1024 KiB', 'the worker died'
    """

    processes: list[Process]
    trouble: str = ""

    def describe(self) -> str:
        """Why the first process did not end well; '' where it did."""
        first = self.processes[0]
        if self.trouble:
            return self.trouble
        for message in first.messages:
            for key in ("error", "setup"):
                if key in message:
                    return str(message[key])[:300]
        if first.status is None or first.status == 0:
            return ""
        if first.status < 0:
            return f"killed by {_signal_name(-first.status)}"
        return f"exit code {first.status}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class Client:
    """One worker, restarted when it is lost. Not for two threads at once."""

    def __init__(self, limits: Limits, isolate: bool) -> None:
        self.limits, self.isolate = limits, isolate
        self.filtered = False
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._start()

    def _start(self) -> None:
        mine, theirs = socket.socketpair()
        settings = json.dumps({"isolate": self.isolate, "limits": self.limits.as_dict()})
        folder = str(Path(__file__).parent)
        with theirs:
            # -S, -s: no site-packages; one hash seed, so that a verdict is the same every time.
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-s", "-P", "-B", "-c", _BOOT, folder, str(theirs.fileno()), settings],
                pass_fds=[theirs.fileno()],
                env={
                    "PYTHONHASHSEED": "0",
                    "PYTHONIOENCODING": "utf-8:surrogateescape",
                    "MALLOC_ARENA_MAX": "2",
                    "LANG": "C.UTF-8",
                },
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                cwd="/",
                start_new_session=True,
            )
        self._control = mine
        mine.settimeout(_START)
        hello = b""
        try:
            while len(hello) < 1024 and (part := mine.recv(1024 - len(hello))):
                hello += part
            found = json.loads(hello)
        except (OSError, ValueError):
            said = self._stop().decode(errors="replace").strip()
            raise SandboxError(f"the worker does not start: {said[-300:] or 'no message'}") from None
        if "error" in found:
            self.close()
            raise SandboxError(found["error"])
        self.filtered = bool(found["filtered"])
        mine.settimeout(None)

    def run(self, payloads: list[dict[str, Any]], wall: float | None = None) -> Outcome:
        """Runs one process, or two that are linked by a socket, until the first one ends."""
        if self._control is None:
            self._start()
        assert self._control is not None
        wall = self.limits.wall if wall is None else wall
        exchange = _Exchange(payloads, self.limits.output_kb * 1024)
        try:
            exchange.send(self._control, wall)
            answer = exchange.attend(self._control, time.monotonic() + wall + _GRACE)
        except OSError:
            answer = b""
        finally:
            exchange.close()
        processes = exchange.processes()
        if len(answer) < ANSWER.size:
            self._stop()
            return Outcome(processes, f"timed out after {wall:g} s" if exchange.late else "the worker died")
        timed_out, *rest = ANSWER.unpack(answer)
        for process, status, seconds in zip(processes, rest[:2], rest[2:]):
            process.status, process.seconds = os.waitstatus_to_exitcode(status), seconds
        if exchange.flooded:
            return Outcome(processes, f"wrote more than {self.limits.output_kb} KiB")
        # The kernel's clock of CPU seconds may be first, where threads use more than one core.
        if timed_out or (processes[0].status == -signal.SIGKILL and processes[0].seconds > int(wall) + 0.9):
            return Outcome(processes, f"timed out after {wall:g} s")
        return Outcome(processes)

    def _stop(self) -> bytes:
        """Kills the worker with all that it runs, returns its last words; the next `run` starts another."""
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            self._process.kill()
            said = self._process.communicate()[1]
            self._process = None
            return said
        return b""

    def close(self) -> None:
        """Ends the worker and all that it runs."""
        if self._control is not None and self._process is not None:
            self._control.close()  # it ends by itself then
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=1.0)
        self._stop()


class _Exchange:
    """The sockets and pipes of one check, as seen from outside."""

    def __init__(self, payloads: list[dict[str, Any]], limit: int) -> None:
        self._limit = limit
        self._count = len(payloads)
        self._inputs: dict[int, memoryview] = {}
        self._channels: list[socket.socket] = []
        self._read: dict[int, tuple[int, str]] = {}
        self._text: dict[tuple[int, str], bytearray] = {}
        self._theirs: list[int] = []
        self._pipes: list[int] = []
        self.flooded = self.late = False
        for place, payload in enumerate(payloads):
            mine, theirs = socket.socketpair()
            mine.setblocking(False)
            self._channels.append(mine)
            self._theirs.append(theirs.detach())
            self._inputs[mine.fileno()] = memoryview(json.dumps(payload).encode())
            self._read[mine.fileno()] = (place, "messages")
            for name in ("output", "errors"):
                if payload["mode"] == "program":
                    ours, write = os.pipe()
                    os.set_blocking(ours, False)
                    self._read[ours] = (place, name)
                    self._pipes.append(ours)
                else:
                    write = os.open(os.devnull, os.O_WRONLY)
                self._theirs.append(write)
        if self._count == 2:
            self._theirs += [end.detach() for end in socket.socketpair()]

    def send(self, control: socket.socket, wall: float) -> None:
        """Orders the check."""
        socket.send_fds(control, [ORDER.pack(b"R", self._count, wall)], self._theirs)
        self._close_theirs()

    def attend(self, control: socket.socket, deadline: float) -> bytes:
        """Feeds and drains until the worker answers; b'' when it does not."""
        answer = b""
        poll = select.poll()
        poll.register(control, select.POLLIN)
        for descriptor in self._read:
            poll.register(descriptor, select.POLLIN | (select.POLLOUT if descriptor in self._inputs else 0))
        while len(answer) < ANSWER.size:
            left = deadline - time.monotonic()
            if left <= 0:
                self.late = True
                return b""
            for descriptor, event in poll.poll(left * 1000):
                if descriptor == control.fileno():
                    part = control.recv(ANSWER.size - len(answer))
                    if not part:
                        return b""
                    answer += part
                    continue
                if event & select.POLLOUT and descriptor in self._inputs:
                    self._feed(poll, descriptor)
                if event & ~select.POLLOUT and not self._drain(descriptor):
                    poll.unregister(descriptor)
                if self.flooded:
                    self.flooded = False
                    for other in self._read:
                        _forget(poll, other)
                    control.sendall(ORDER.pack(b"K", 0, 0.0))
                    self._limit = -1
                    break
        if self._limit < 0:
            self.flooded = True
            return answer
        for descriptor in self._read:  # all writers are dead: what is left is in the buffers
            while self._drain(descriptor, ending=True):
                pass
        return answer

    def _feed(self, poll: select.poll, descriptor: int) -> None:
        rest = self._inputs[descriptor]
        channel = next(channel for channel in self._channels if channel.fileno() == descriptor)
        try:
            rest = rest[channel.send(rest) :] if rest else rest
            if not rest:
                channel.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            return
        except OSError:
            rest = rest[:0]  # it ended before it read everything
        self._inputs[descriptor] = rest
        if not rest:
            del self._inputs[descriptor]
            poll.modify(descriptor, select.POLLIN)

    def _drain(self, descriptor: int, ending: bool = False) -> bool:
        """Reads once; False at the end. `ending`: an empty buffer is the end too."""
        try:
            part = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return not ending
        except OSError:
            return False
        text = self._text.setdefault(self._read[descriptor], bytearray())
        text += part
        if sum(map(len, self._text.values())) > self._limit:
            self.flooded = True
            return False
        return bool(part)

    def processes(self) -> list[Process]:
        """What each process wrote."""
        found = [Process() for _ in range(self._count)]
        for (place, name), text in self._text.items():
            if name == "messages":
                found[place].messages = _messages(bytes(text))
            else:
                setattr(found[place], name, bytes(text))
        return found

    def _close_theirs(self) -> None:
        for descriptor in self._theirs:
            os.close(descriptor)
        self._theirs = []

    def close(self) -> None:
        """Lets go of every descriptor."""
        self._close_theirs()
        for channel in self._channels:
            channel.close()
        for pipe in self._pipes:
            os.close(pipe)


def _forget(poll: select.poll, descriptor: int) -> None:
    with contextlib.suppress(KeyError):
        poll.unregister(descriptor)


def _messages(text: bytes) -> list[dict[str, Any]]:
    """The JSON lines among what was written to a channel, a cut last one left out."""
    found = []
    for line in text.split(b"\n")[:-1]:
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(message, dict):
            found.append(message)
    return found
