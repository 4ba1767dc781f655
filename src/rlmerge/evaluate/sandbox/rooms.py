"""How a worker shuts itself in, once, and how each check gets a room of its own. Runs inside the workers.

A worker: user, mount, network, IPC and UTS namespaces, a read-only root that holds the standard library and three
devices, then a pid namespace. A check: a pid namespace and a mount namespace more, an empty tmpfs at /tmp, limits, no
capability, the system call filter. All of it goes when the first process of the check goes.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys

from . import kernel
from .callfilter import room_filter

SCRATCH = "/tmp"
NOBODY = 65534
_DEVICES = ("null", "zero", "urandom", "random")
_WORKER_NAMESPACES = kernel.CLONE_NEWNS | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS


def enter_namespaces(machine: str) -> int:
    """Takes this process out of the machine's users, files, network and IPC; returns a descriptor of its old /proc.

    As root the mounts are made first, with real privileges, and the worker goes on as `nobody`: the kernel counts no
    processes of root, and a folder such as /root may be closed to everybody else.
    """
    import tempfile

    staging = tempfile.gettempdir()
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
    if os.geteuid() == 0 and _leave_as_root():
        _build_root(staging)
        kernel.enter_root(machine, staging)
        _become_nobody()
        _enter_user_namespace(proc, 0)
    else:
        _enter_user_namespace(proc, _WORKER_NAMESPACES)
        _build_root(staging)
        kernel.enter_root(machine, staging)
    return proc


def _leave_as_root() -> bool:
    try:
        kernel.unshare(_WORKER_NAMESPACES)
    except OSError:
        return False  # root without privileges, as in a container: like any other user
    return True


def _become_nobody() -> None:
    try:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    except OSError:
        return  # a container without such a user: stay what we are, inside the namespaces
    kernel.set_dumpable()


def _enter_user_namespace(proc: int, more: int) -> None:
    user, group = os.geteuid(), os.getegid()
    kernel.unshare(kernel.CLONE_NEWUSER | more)
    for name, text in (("setgroups", "deny"), ("uid_map", f"1000 {user} 1"), ("gid_map", f"1000 {group} 1")):
        _write(proc, f"self/{name}", text)


def _write(proc: int, name: str, text: str) -> None:
    descriptor = os.open(name, os.O_WRONLY, dir_fd=proc)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def _open_sources() -> dict[str, int]:
    """What the new root will hold: path and descriptor, opened before anything is mounted over it."""
    import sysconfig

    paths = {os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")}
    paths |= {f"/dev/{name}" for name in _DEVICES}
    return {path: os.open(path, os.O_PATH) for path in sorted(paths) if os.path.exists(path)}


def _build_root(staging: str) -> None:
    """A tmpfs over `staging`, visible to this mount namespace only, with what Python needs, all of it read-only."""
    sources = _open_sources()
    hard = kernel.MS_NOSUID | kernel.MS_NODEV
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("tmpfs", staging, "tmpfs", hard, "size=1m,nr_inodes=512,mode=755")
    for target, descriptor in sources.items():
        place = staging + target
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            os.makedirs(place, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(place), exist_ok=True)
            os.close(os.open(place, os.O_CREAT | os.O_WRONLY, 0o644))
        flags = _mount_flags(descriptor)
        kernel.mount(f"/proc/self/fd/{descriptor}", place, None, kernel.MS_BIND)
        if not target.startswith("/dev/"):
            read_only = kernel.MS_BIND | kernel.MS_REMOUNT | kernel.MS_RDONLY | hard
            kernel.mount("none", place, None, read_only | flags)
        os.close(descriptor)
        packages = f"{place}/site-packages"
        if os.path.isdir(packages):  # what else is installed is nobody's business
            kernel.mount("tmpfs", packages, "tmpfs", hard | kernel.MS_RDONLY, "size=4k,mode=755")
    os.makedirs(staging + SCRATCH, exist_ok=True)
    kernel.mount("none", staging, None, kernel.MS_BIND | kernel.MS_REMOUNT | kernel.MS_RDONLY | hard)


def _mount_flags(descriptor: int) -> int:
    """Flags of the mount that a remount in a user namespace has to repeat."""
    found = os.fstatvfs(descriptor).f_flag
    kept = found & (kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC | kernel.MS_NOATIME | kernel.MS_NODIRATIME)
    return kept | (kernel.MS_RELATIME if found & 4096 else 0)  # ST_RELATIME has another value than MS_RELATIME


def forbid_user_namespaces(proc: int) -> None:
    """No user namespace below this one: the door to most of the kernel's surface. Best effort."""
    with contextlib.suppress(OSError):
        _write(proc, "sys/user/max_user_namespaces", "0")


class Room:
    """What a process of tested code does to itself between its fork and the first line of what a model wrote."""

    def __init__(self, machine: str, isolated: bool, filtered: bool, limits: dict[str, float]) -> None:
        self.machine = machine
        self.isolated = isolated
        self.filter = room_filter(machine) if filtered else b""
        self.limits = limits
        self._scratch_options = f"size={int(limits['scratch_mb'])}m,nr_inodes={int(limits['inodes'])},mode=700"

    def enter(self, scratch: str, wall: float) -> None:
        """After this, the process can only compute, write to its pipes and fill its scratch."""
        os.setsid()
        if self.isolated:
            kernel.unshare(kernel.CLONE_NEWNS)
            hard = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
            kernel.mount("tmpfs", scratch, "tmpfs", hard, self._scratch_options)
        elif sys.platform == "linux":
            kernel.die_with_parent()  # nothing else takes it along when the worker is killed
        os.chdir(scratch)
        self._set_limits(wall)
        if self.isolated:
            kernel.drop_capabilities(self.machine)
        if self.filter:
            kernel.forbid_new_privileges()
            kernel.set_filter(self.machine, self.filter)

    def set_common_limits(self) -> None:
        """Limits that a worker can live with itself, and so sets once for all processes it forks."""
        megabyte = 1 << 20
        self._set("RLIMIT_FSIZE", int(self.limits["scratch_mb"]) * megabyte)
        self._set("RLIMIT_CORE", 0)
        self._set("RLIMIT_MEMLOCK", 0)
        self._set("RLIMIT_MSGQUEUE", 0)
        self._set("RLIMIT_SIGPENDING", 256)

    def _set_limits(self, wall: float) -> None:
        self._set("RLIMIT_CPU", int(wall) + 1)
        self._set("RLIMIT_AS", int(self.limits["memory_mb"]) << 20)
        self._set("RLIMIT_NOFILE", int(self.limits["open_files"]))
        self._set("RLIMIT_NPROC", int(self.limits["threads"]))

    def _set(self, name: str, value: int) -> None:
        kind = getattr(resource, name, None)
        if kind is None:
            return
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(kind, (value, value))
        except (OSError, ValueError):
            if self.isolated:
                raise  # every Linux has all of these; macOS refuses some
