"""The few Linux system calls that the sandbox needs and Python does not have, by ctypes. Runs inside the workers.

Every function raises OSError with the name of the call.
"""

from __future__ import annotations

import ctypes
import os

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_NOATIME, MS_NODIRATIME, MS_BIND, MS_REC = 32, 1024, 2048, 4096, 16384
MS_PRIVATE, MS_RELATIME = 1 << 18, 1 << 21
MNT_DETACH = 2

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38

# Numbers of calls without a wrapper in every libc.
NUMBERS = {
    "x86_64": {"pivot_root": 155, "capset": 126, "seccomp": 317},
    "aarch64": {"pivot_root": 41, "capset": 91, "seccomp": 277},
}

_libc = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


# Made before the fork: every object that is made or touched after it costs a page fault.
_CAPABILITY_HEADER = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
_NO_CAPABILITY = (ctypes.c_uint32 * 6)()


def _checked(result: int, call: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    """Leaves the namespaces in `flags` for new ones."""
    _checked(_libc.unshare(flags), "unshare")


def setns(descriptor: int, kind: int) -> None:
    """Enters the namespace behind an open descriptor."""
    _checked(_libc.setns(descriptor, kind), "setns")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """mount(2)."""
    words = [None if word is None else word.encode() for word in (source, target, kind)]
    result = _libc.mount(*words, ctypes.c_ulong(flags), None if data is None else data.encode())
    _checked(result, f"mount {kind or 'bind'} on {target}")


def enter_root(machine: str, folder: str) -> None:
    """Makes `folder` the root of this mount namespace and lets go of the old one."""
    os.chdir(folder)
    _checked(_libc.syscall(NUMBERS[machine]["pivot_root"], b".", b"."), "pivot_root")
    _checked(_libc.umount2(b".", MNT_DETACH), "umount2")
    os.chdir("/")


def die_with_parent() -> None:
    """SIGKILL for this process when its parent dies."""
    _prctl(_PR_SET_PDEATHSIG, 9, "PR_SET_PDEATHSIG")


def set_dumpable() -> None:
    """Gives /proc/self back to this process after a change of its user."""
    _prctl(_PR_SET_DUMPABLE, 1, "PR_SET_DUMPABLE")


def drop_capabilities(machine: str) -> None:
    """No capability is left, and none can come back: without new privileges the bounding set grants nothing."""
    _checked(_libc.syscall(NUMBERS[machine]["capset"], _CAPABILITY_HEADER, _NO_CAPABILITY), "capset")
    forbid_new_privileges()


def forbid_new_privileges() -> None:
    """No set-uid program counts from here on; a system call filter needs it."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1, "PR_SET_NO_NEW_PRIVS")


def set_filter(machine: str, program: bytes) -> None:
    """Installs a seccomp filter for all threads of this process."""
    wanted = _Program(len(program) // 8, program)
    number = NUMBERS[machine]["seccomp"]
    _checked(_libc.syscall(number, 1, 0, ctypes.byref(wanted)), "seccomp")  # 1: SECCOMP_SET_MODE_FILTER


def _prctl(option: int, value: int, name: str) -> None:
    _checked(_libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), name)
