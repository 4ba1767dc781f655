"""Break-outs, each really tried by code in the sandbox. None succeeds, and after each the worker serves the next."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import rlmerge
from rlmerge.evaluate.sandbox import Client, Isolation, Limits, Outcome, available, isolation, require, rooms, worker
from rlmerge.evaluate.sandbox.errors import SandboxError

pytestmark = pytest.mark.skipif(not available().isolated, reason=f"no isolation here: {available()}")


@pytest.fixture(scope="module")
def shared() -> Iterator[Client]:
    client = Client(Limits(wall=3.0), isolate=True)
    yield client
    client.close()


@pytest.fixture
def client(shared: Client) -> Iterator[Client]:
    """The worker, which must still be right after whatever was done in it."""
    worker = shared._process
    yield shared
    assert shared._process is worker, "the worker was lost"
    assert shared.run([{"mode": "program", "code": "print(6 * 7)", "stdin": ""}]).processes[0].output == b"42\n"


def attempt(client: Client, code: str, wall: float | None = None) -> Outcome:
    """Runs the attempt. What it tries by `attempt(...)` prints 'refused: …' or 'BROKEN: …'."""
    helper = """
        def attempt(action, *args):
            try:
                print("BROKEN:", repr(action(*args))[:200], flush=True)
            except BaseException as error:
                print("refused:", type(error).__name__, error, flush=True)
    """
    program = textwrap.dedent(helper) + textwrap.dedent(code)
    return client.run([{"mode": "program", "code": program, "stdin": ""}], wall)


def refused(outcome: Outcome) -> list[str]:
    """Its lines, all of them refusals."""
    lines = outcome.processes[0].output.decode().splitlines()
    assert outcome.describe() == ""
    assert lines
    assert all(line.startswith("refused:") for line in lines), lines
    return lines


# 1


def test_a_file_of_the_user_cannot_be_read(client: Client, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    secret.chmod(0o644)
    for folder in (tmp_path, *tmp_path.parents):
        assert folder.exists()
    targets = [str(secret), __file__, "/etc/passwd", "/etc/shadow", str(Path.home() / ".bashrc"), "/proc/self/environ"]
    code = f"""
        import os
        for path in {targets!r}:
            attempt(open, path)
        attempt(os.listdir, os.path.expanduser("~root"))
        attempt(os.listdir, {str(Path.cwd())!r})
        attempt(os.listdir, "/proc")
        attempt(os.listdir, "/sys")
        os.chdir("/")
        for up in ("../" * 20 + {str(secret)[1:]!r}, "..//..//etc/passwd"):
            attempt(open, up)
        attempt(os.chroot, "/tmp")
    """
    refused(attempt(client, code))


def test_open_descriptors_lead_nowhere(client: Client) -> None:
    code = """
        import os
        for number in range(5, 256):
            try:
                os.fstat(number)
            except OSError:
                continue
            print("BROKEN:", number)
        for number in range(5):
            try:
                attempt(os.fchdir, number)
            except OSError:
                pass
    """
    refused(attempt(client, code))


# 2


def test_nothing_outside_can_be_written(client: Client, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    library = os.path.dirname(os.__file__)
    code = f"""
        import os
        for path in {[str(tmp_path / "x"), library + "/x.py", "/x", "/dev/x", "/var/x", library + "/os.py"]!r}:
            attempt(open, path, "w")
        attempt(os.mkdir, "/x")
        attempt(os.unlink, {library + "/os.py"!r})
        attempt(os.rename, "/dev", "/y")
        attempt(os.chmod, {library!r}, 0o777)
        attempt(os.mknod, "sda", 0o60666, os.makedev(254, 0))
    """
    refused(attempt(client, code))
    assert list(tmp_path.iterdir()) == []


def test_the_read_only_root_cannot_be_remounted(client: Client) -> None:
    code = """
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        def call(name, *args):
            if getattr(libc, name)(*args) != 0:
                raise OSError(ctypes.get_errno(), name)
        attempt(call, "mount", b"none", b"/", None, 32 | 4096, None)
        attempt(call, "mount", b"proc", b"/tmp", b"proc", 0, None)
        attempt(call, "umount2", b"/tmp", 2)
        attempt(call, "unshare", 0x10000000)
        attempt(call, "unshare", 0x00020000)
        attempt(call, "setns", 0, 0)
        attempt(call, "setuid", 0)
        attempt(call, "chroot", b"/tmp")
    """
    refused(attempt(client, code))


# 3


def test_no_socket_opens(client: Client) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"""
            import socket
            attempt(socket.create_connection, ("127.0.0.1", {port}), 1)
            attempt(socket.create_connection, ("1.1.1.1", 53), 1)
            for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK, socket.AF_PACKET):
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
                    attempt(socket.socket, family, kind)
            attempt(socket.getaddrinfo, "example.org", 80)
        """
        refused(attempt(client, code))
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()


def test_asyncio_works_without_sockets(client: Client) -> None:
    code = "import asyncio\nasync def f():\n    await asyncio.sleep(0)\n    return 7\nprint(asyncio.run(f()))"
    assert attempt(client, code).processes[0].output == b"7\n"


# 4


def test_a_fork_bomb_does_not_start(client: Client) -> None:
    code = """
        import os, subprocess, ctypes
        attempt(os.fork)
        attempt(os.forkpty)
        attempt(subprocess.run, ["/bin/sh", "-c", "echo"])
        attempt(os.posix_spawn, "/bin/sh", ["sh"], {})
        attempt(os.execv, "/bin/sh", ["sh"])
        libc = ctypes.CDLL(None, use_errno=True)
        def call(*args):
            if (pid := libc.syscall(*args)) < 0:
                raise OSError(ctypes.get_errno(), str(args))
            return pid
        if os.uname().machine == "x86_64":
            attempt(call, 57)
            attempt(call, 58)
            attempt(call, 56, 17, 0, 0, 0, 0)
            attempt(call, 435, (ctypes.c_uint64 * 8)(), 64)
    """
    refused(attempt(client, code))


def test_threads_are_counted(client: Client) -> None:
    code = """
        import threading, time
        threading.stack_size(64 * 1024)
        started = 0
        try:
            for _ in range(1000):
                threading.Thread(target=time.sleep, args=(0.5,), daemon=True).start()
                started += 1
        except RuntimeError:
            pass
        print(started)
    """
    started = int(attempt(client, code).processes[0].output)
    assert 1 <= started < Limits().threads


# 5


def test_the_disk_cannot_be_filled(client: Client) -> None:
    before = os.statvfs("/tmp")
    code = """
        import os
        def fill():
            total = 0
            try:
                for number in range(10**6):
                    with open(f"/tmp/{number}", "wb") as file:
                        for _ in range(8):
                            total += file.write(bytes(1 << 20))
            except OSError as error:
                print(total >> 20, error.errno)
        def many():
            for number in range(10**6):
                os.mkdir(f"/tmp/d{number}")
        fill()
        for name in os.listdir("/tmp"):
            os.unlink("/tmp/" + name)
        attempt(many)
        print(len(os.listdir("/tmp")))
    """
    lines = attempt(client, code).processes[0].output.decode().splitlines()
    written, error = map(int, lines[0].split())
    assert written <= Limits().scratch_mb
    assert error == 28  # ENOSPC
    assert lines[1].startswith("refused:")
    assert int(lines[2]) <= Limits().inodes
    assert before.f_files - os.statvfs("/tmp").f_files == 0


def test_a_sparse_or_anonymous_file_is_no_way_around(client: Client) -> None:
    code = """
        import os
        def sparse():
            with open("x", "wb") as file:
                file.truncate(1 << 40)
        attempt(sparse)
        attempt(os.memfd_create, "x")
    """
    refused(attempt(client, code))


# 6


@pytest.mark.parametrize(
    "code",
    [
        "x = bytearray(1 << 34)",
        "x = []\nwhile True:\n    x.append(bytes(1 << 20))",
        "x = 'a'\nwhile True:\n    x += x",
        "import mmap\nx = [mmap.mmap(-1, 1 << 24) for _ in range(1000)]",
    ],
)
def test_memory_is_bounded(client: Client, code: str) -> None:
    outcome = attempt(client, code)
    assert outcome.describe() == "out of memory" or "Cannot allocate memory" in outcome.describe()


# 7


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time\ntime.sleep(1000)",
        "input_ = open('/dev/zero', 'rb')\nwhile True: input_.read(10)",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()",
        "import re\nre.match('(a+)+b', 'a' * 60)",
        "x = 10 ** 10 ** 9",
    ],
)
def test_nothing_outlives_the_deadline(client: Client, code: str) -> None:
    started = time.monotonic()
    outcome = attempt(client, code, wall=0.5)
    assert outcome.trouble == "timed out after 0.5 s"
    assert outcome.processes[0].status in (-9, None)
    assert time.monotonic() - started < 3


# 8


def test_signals_cannot_be_ignored(client: Client) -> None:
    code = """
        import os, signal, time
        for number in range(1, signal.NSIG):
            try:
                signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError):
                pass
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, signal.NSIG))
        try:
            os.setsid()
        except OSError:
            pass
        while True:
            try:
                while True: pass
            except BaseException:
                pass
    """
    outcome = attempt(client, code, wall=0.5)
    assert outcome.trouble == "timed out after 0.5 s"
    assert outcome.processes[0].status == -9


# 9


@pytest.mark.parametrize(
    "code",
    [
        "while True: print('x' * 100000)",
        "import sys\nwhile True: sys.stderr.write('x' * 100000)",
        "import os\nwhile True: os.write(3, b'x' * 100000)",
        "import os\nwhile True: os.write(3, b'{}\\n' * 999)",
    ],
)
def test_a_flood_is_cut(client: Client, code: str) -> None:
    started = time.monotonic()
    outcome = attempt(client, code)
    assert outcome.trouble == "wrote more than 1024 KiB"
    first = outcome.processes[0]
    assert len(first.output) + len(first.errors) < 1200 * 1024
    assert time.monotonic() - started < 3


# 10


def test_the_parent_is_out_of_reach(client: Client) -> None:
    assert client._process is not None
    pids = [os.getpid(), client._process.pid]
    code = f"""
        import ctypes, os, signal
        libc = ctypes.CDLL(None, use_errno=True)
        def call(name, *args):
            ctypes.set_errno(0)
            if getattr(libc, name)(*args) < 0 or ctypes.get_errno():
                raise OSError(ctypes.get_errno(), name)
        def vector(pid):
            memory = (ctypes.c_void_p * 2)(ctypes.addressof(ctypes.create_string_buffer(8)), 8)
            call("process_vm_readv", pid, memory, 1, memory, 1, 0)
        print("refused: parent", os.getppid()) if os.getppid() == 0 else print("BROKEN: parent")
        for pid in {pids!r} + list(range(2, 20)):
            attempt(os.kill, pid, signal.SIGKILL)
            attempt(call, "ptrace", 16, pid, 0, 0)
            attempt(vector, pid)
            attempt(open, f"/proc/{{pid}}/mem")
            attempt(os.pidfd_open, pid)
        attempt(call, "ptrace", 0, 0, 0, 0)
        attempt(open, "/proc/self/status")
        attempt(os.kill, -1, 9)
    """
    lines = refused(attempt(client, code))
    assert lines[0] == "refused: parent 0"


def test_everything_dies_with_the_worker() -> None:
    client = Client(Limits(wall=30), isolate=True)
    try:
        assert client._process is not None
        inner = _children(client._process.pid)
        client._process.kill()
        client._process.wait()
        deadline = time.monotonic() + 5
        while any(Path(f"/proc/{pid}").exists() and _alive(pid) for pid in inner) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert inner
        assert not [pid for pid in inner if Path(f"/proc/{pid}").exists() and _alive(pid)]
        outcome = client.run([{"mode": "program", "code": "print(1)", "stdin": ""}])
        assert outcome.trouble == "the worker died"
        outcome = client.run([{"mode": "program", "code": "print(1)", "stdin": ""}])
        assert outcome.processes[0].output == b"1\n"
    finally:
        client.close()


def test_everything_dies_with_rlmerge() -> None:
    code = (
        "import os, sys, threading, time\n"
        "from rlmerge.evaluate.sandbox import Client, Limits\n"
        "client = Client(Limits(wall=60), isolate=True)\n"
        "job = [{'mode': 'program', 'code': 'while True: pass', 'stdin': ''}]\n"
        "threading.Thread(target=client.run, args=(job,), daemon=True).start()\n"
        "time.sleep(0.3)\n"
        "print(client._process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    pid = int(done.stdout)
    deadline = time.monotonic() + 5
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _alive(pid)


def _children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[1]) == pid:
                found.append(int(entry.name))
    return found


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except OSError:
        return False


# One check and the next


def test_one_check_leaves_nothing_to_the_next(client: Client) -> None:
    first = """
        import builtins, os, sys, math
        open("/tmp/left", "w").write("x")
        os.chmod("/tmp", 0o755)
        os.environ["LEFT"] = "1"
        math.pi = 3
        builtins.print = lambda *args: None
        sys.modules["json"] = None
        os.umask(0)
    """
    assert attempt(client, first).describe() == ""
    second = """
        import json, math, os
        print(os.listdir("/tmp"), os.environ.get("LEFT"), math.pi > 3.1, oct(os.stat("/tmp").st_mode))
    """
    assert attempt(client, second).processes[0].output == b"[] None True 0o40700\n"


@pytest.mark.parametrize("code", ["import os\nos.abort()", "import ctypes\nctypes.string_at(0)", "raise SystemExit(3)"])
def test_a_crash_is_the_check_s_own(client: Client, code: str) -> None:
    assert attempt(client, code).describe() in ("killed by SIGABRT", "killed by SIGSEGV", "exit code 3")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_an_ordinary_user_has_the_same_sandbox() -> None:
    """A copy of the sandbox where `nobody` can read it, run by the system's Python, as `nobody`."""
    python = "/usr/bin/python3"
    asked = "import sys; print(sys.version_info >= (3, 11))"
    if not os.path.exists(python) or b"True" not in subprocess.run([python, "-c", asked], capture_output=True).stdout:
        pytest.skip("no Python 3.11 outside of root's home")
    source = Path(rlmerge.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        copy = Path(folder) / "rlmerge"
        shutil.copytree(source / "evaluate" / "sandbox", copy / "evaluate" / "sandbox")
        for name in ("__init__.py", "errors.py", "evaluate/__init__.py"):
            shutil.copy(source / name, copy / name)
        (Path(folder) / "secret").write_text("secret")
        code = (
            "import os\n"
            "from rlmerge.evaluate.sandbox import Client, Limits, available\n"
            "client = Client(Limits(wall=3), isolate=True)\n"
            "tried = 'import os, socket\\n'\n"
            f"for action in ('open(\"{folder}/secret\")', 'os.fork()', 'socket.socket()', 'open(\"/x\", \"w\")'):\n"
            "    tried += f'try:\\n  {action}\\n  print(1)\\nexcept OSError:\\n  print(0)\\n'\n"
            "tried += 'print(os.getpid(), os.listdir(\"/tmp\"))'\n"
            "outcome = client.run([{'mode': 'program', 'code': tried, 'stdin': ''}])\n"
            "print(os.getuid(), available(), outcome.describe(), outcome.processes[0].output.decode().split())\n"
            "client.close()\n"
        )
        done = subprocess.run(
            [python, "-c", code], capture_output=True, text=True, cwd=folder, user=65534, group=65534, extra_groups=[]
        )
    assert done.stderr == ""
    assert done.stdout == "65534 namespaces and a system call filter  ['0', '0', '0', '0', '1', '[]']\n"


def test_nothing_leaks_from_check_to_check(client: Client) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    for code in ("print(1)", "while True: print('x' * 99999)", "import os\nos._exit(1)") * 5:
        attempt(client, code)
    assert descriptors() == before


def test_input_and_output_are_whole(client: Client) -> None:
    text = "".join(f"{number} äöü €\n" for number in range(20_000))
    for code in ("import sys\nprint(sys.stdin.read(), end='')", "for line in open(0): print(line, end='')"):
        outcome = client.run([{"mode": "program", "code": code, "stdin": text}])
        assert outcome.processes[0].output.decode() == text


def test_more_threads_than_cores_do_not_outrun_the_limit(client: Client) -> None:
    code = "import threading, time\nfor _ in range(4): threading.Thread(target=lambda: sum(iter(int, 1))).start()"
    assert attempt(client, code, wall=1.0).trouble == "timed out after 1 s"


@pytest.mark.parametrize("seconds", ["0", "60"])
def test_waiting_without_pidfd(monkeypatch: pytest.MonkeyPatch, seconds: str) -> None:
    """As on macOS. The worker's loop runs here, on a process of ours."""
    monkeypatch.delattr(os, "pidfd_open")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        room = rooms.Room("x86_64", isolated=False, filtered=False, limits=Limits().as_dict())
        process = subprocess.Popen(["sleep", seconds], start_new_session=True)
        answer = worker.Worker(theirs, room, -1)._watch([process.pid], time.monotonic() + 0.5)
        timed_out, status, *_ = worker.ANSWER.unpack(answer)
        assert (timed_out, os.waitstatus_to_exitcode(status)) == ((0, 0) if seconds == "0" else (1, -9))
        process.returncode = 0  # it is reaped


def test_no_isolation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "available", lambda: Isolation(False, False, "user namespaces are off"))
    with pytest.raises(SandboxError, match=r"user namespaces are off.*--unsafe-exec"):
        require(unsafe=False)
    assert not require(unsafe=True).isolated


def test_limits_hold_without_isolation() -> None:
    client = Client(Limits(wall=1.0), isolate=False)
    try:
        assert attempt(client, "x = bytearray(1 << 34)").describe() == "out of memory"
        assert attempt(client, "while True: pass", wall=0.4).trouble == "timed out after 0.4 s"
        assert attempt(client, "while True: print('x' * 9999)").trouble == "wrote more than 1024 KiB"
        outcome = attempt(client, "import os\nprint(os.getcwd())\nopen('x', 'w').write('x')")
        folder = outcome.processes[0].output.decode().strip()
        assert folder
        assert not os.path.exists(folder)
    finally:
        client.close()
