"""What this machine offers to keep model-written code apart, found by trying it."""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass

from .errors import SandboxError
from .limits import Limits


@dataclass(frozen=True, slots=True)
class Isolation:
    """What a worker really has.

    namespaces  user, mount, pid, network, IPC and UTS namespaces with a read-only root and a tmpfs scratch
    filtered    the system call filter (seccomp)
    reason      why there are no namespaces; '' where there are
    """

    namespaces: bool
    filtered: bool
    reason: str = ""

    @property
    def isolated(self) -> bool:
        """Whether model-written code may run here without `--unsafe-exec`."""
        return self.namespaces

    def __str__(self) -> str:
        if self.namespaces:
            return "namespaces" + (" and a system call filter" if self.filtered else ", no system call filter")
        return f"no isolation ({self.reason})"


NONE = Isolation(False, False, "not asked for")


@functools.cache
def available() -> Isolation:
    """What there is, by starting a worker and running a line of Python in it. Asked once a process."""
    if not sys.platform.startswith("linux"):
        return Isolation(False, False, f"namespaces are a matter of Linux, this is {sys.platform}")
    from .client import Client

    try:
        client = Client(Limits(), isolate=True)
    except SandboxError as error:
        return Isolation(False, False, str(error))
    try:
        outcome = client.run([{"mode": "program", "code": "print(6 * 7)", "stdin": ""}])
    finally:
        client.close()
    if outcome.processes[0].output != b"42\n":
        return Isolation(False, client.filtered, f"a first program does not run: {outcome.describe()}")
    return Isolation(True, client.filtered)


def require(unsafe: bool) -> Isolation:
    """What to run with; SandboxError where there is nothing and the user has not accepted that."""
    found = available()
    if found.isolated or unsafe:
        return found
    raise SandboxError(
        "The `python` verifier runs code that a model wrote, and nothing here keeps it from your files: "
        f"{found.reason}. "
        "Run on a Linux that allows user namespaces, or accept the risk with --unsafe-exec."
    )
