"""Kernels called through kept machine code: found without numba, made anew when broken, refusing what is wrong."""

from __future__ import annotations

import ctypes
import json
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from rlmerge import kernels
from rlmerge.kernels import images, load_kernels

PLAIN = load_kernels("numpy")

RUN = """
import json, sys, threading
import numpy as np
from rlmerge.kernels import load_kernels
kernels = load_kernels("numba")
found = []
def go():
    base, out = np.ones(5), np.zeros(5)
    kernels.task_arithmetic(base, np.full((2, 5), 0.25), np.array([1.0, 3.0]), 0.5, out)
    found.append(out.tolist())
threads = [threading.Thread(target=go) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
scores = np.array([1.0, 2.0, 1.0, 0.5], np.float32)
hashes = np.zeros(4, np.uint64)
tied = kernels.tie_hashes(scores, np.float32(1.0), np.uint64(7), 100, np.arange(4, dtype=np.int32), hashes)
print(json.dumps([found, tied, hashes[:tied].tolist(), "numba" in sys.modules]))
"""


def run(cache: Path) -> list:
    """What a process of its own finds with this cache, and whether it loaded numba."""
    found = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, env=kernel_env(cache))
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def kernel_env(cache: Path) -> dict[str, str]:
    return os.environ | {"NUMBA_CACHE_DIR": str(cache)}


def test_later_runs_find_the_code_and_load_no_numba(tmp_path):
    first, then = run(tmp_path), run(tmp_path)
    assert first[-1]
    assert not then[-1]
    assert first[:-1] == then[:-1]
    assert first[0] == [[1.5] * 5] * 4
    hashes = np.zeros(4, np.uint64)
    scores, where = np.array([1.0, 2.0, 1.0, 0.5], np.float32), np.arange(4, dtype=np.int32)
    assert PLAIN.tie_hashes(scores, np.float32(1.0), np.uint64(7), 100, where, hashes) == then[1] == 2
    assert hashes[:2].tolist() == then[2]


def test_a_broken_image_is_made_anew(tmp_path):
    whole = run(tmp_path)
    for number, path in enumerate(sorted(tmp_path.rglob(f"*{images.SUFFIX}"))):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data[: (None, 50)[number % 2]])
    again = run(tmp_path)
    assert again[:-1] == whole[:-1]
    assert again[-1], "code with a flipped bit was run"
    assert run(tmp_path)[-1] is False


@pytest.fixture
def arguments():
    """Of task_arithmetic: base, delta, weight, scale, out."""
    return [np.ones(6), np.ones((2, 6)), np.ones(2), 1.0, np.zeros(6)]


def test_arrays_must_be_contiguous(arguments):
    arguments[1] = np.ones((6, 2)).T
    with pytest.raises(TypeError, match="'task_arithmetic' takes C-contiguous"):
        images.task_arithmetic(*arguments)
    assert not arguments[-1].any(), "it wrote before it looked"
    arguments[1] = np.ones((2, 12))[:, ::2]
    with pytest.raises(TypeError, match="C-contiguous"):
        images.task_arithmetic(*arguments)


class Special(np.ndarray):
    """As NumPy's memory maps and matrices are."""


@pytest.mark.parametrize("out", [np.frombuffer(bytes(48)), np.zeros(6)])
def test_what_may_only_be_read_is_not_written(arguments, out):
    """numba itself finds, when it compiles, that the kernel writes there."""
    arguments[0] = np.frombuffer(np.ones(6).tobytes())
    images.task_arithmetic(*arguments)
    assert arguments[4].tolist() == [3.0] * 6
    out.flags.writeable = False
    arguments[4] = out
    with pytest.raises(Exception, match=r"(?i)read.?only|Cannot modify"):
        images.task_arithmetic(*arguments)
    assert not out.any()


@pytest.mark.parametrize(
    "wrong",
    [
        np.ones(6, ">f8"), np.ones(6, np.complex128), np.ones(6, np.float16), np.array(1.0), np.ones(6).view(Special),
        np.ones(6, np.float32).view(Special),
    ],
)  # fmt: skip
def test_arrays_must_hold_what_kernels_know(arguments, wrong):
    arguments[0] = wrong
    with pytest.raises(TypeError, match="kernels take no"):
        images.task_arithmetic(*arguments)


def test_other_arguments_must_be_numbers(arguments):
    arguments[3] = "1"
    with pytest.raises(TypeError, match="kernels take no str"):
        images.task_arithmetic(*arguments)


def test_numbers_of_numpy_are_numbers(arguments):
    images.task_arithmetic(*arguments[:3], np.float64(0.5), arguments[4])
    assert arguments[4].tolist() == [2.0] * 6
    words = np.arange(4, dtype=np.uint16)
    assert images.weigh(words, np.int64(1)) == images.weigh(words, 1) == PLAIN.weigh(words, 1)


def test_there_is_no_kernel_of_another_name():
    with pytest.raises(AttributeError):
        images.no_such_kernel(1)
    with pytest.raises(AttributeError):
        _ = images._private
    assert images.__all__ == PLAIN.__all__


def test_a_kernel_that_raises_says_so():
    words = np.zeros((2, 8), np.uint16)
    words[1] = 1
    places, alone, several = np.zeros((2, 8), np.int32), np.zeros((1, 8)), np.zeros(8)
    with pytest.raises((RuntimeError, IndexError, ValueError), match="patches_bf16"):
        images.patches_bf16(words, places, np.zeros(3, np.int64), alone, several)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_does_not_wait_for_a_thread_that_it_has_not():
    """The parent holds the lock in another thread while it forks."""
    started, end = threading.Event(), threading.Event()

    def hold():
        with images._lock:
            started.set()
            end.wait(5)

    threading.Thread(target=hold).start()
    started.wait()
    threading.Timer(0.3, end.set).start()
    child = os.fork()
    if not child:
        os._exit(0 if images._lock.acquire(timeout=5) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("home", ["", "~", "relative"])
def test_without_a_home_nothing_is_left_here(tmp_path, home):
    """Nor loaded from here: it would be code that somebody else put there."""
    code = "from rlmerge.kernels import cache_folder; print(cache_folder())"
    unset = ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "HOME")
    env = {key: value for key, value in os.environ.items() if key not in unset} | {"XDG_CACHE_HOME": home, "HOME": "~"}
    found = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    folder = Path(found.stdout.strip())
    assert folder.is_absolute()
    assert tmp_path not in folder.parents
    assert not list(tmp_path.iterdir())
    assert not folder.exists(), "it was for that process only"


def test_kernels_let_go_of_the_interpreter():
    """While one thread is in a kernel, another counts."""
    values, out = np.ones(1 << 24), np.zeros(1 << 24, np.uint16)
    images.encode_bf16(values[:1], out[:1])
    counted, done = 0, threading.Event()

    def go():
        for _ in range(5):
            images.encode_bf16(values, out)
        done.set()

    thread = threading.Thread(target=go)
    thread.start()
    while not done.is_set():
        counted += 1
    thread.join()
    assert counted > 10_000


def undefined(code: bytes) -> set[str]:
    """Names that an ELF object expects of others. Source: System V ABI, object files."""
    section_table, entry = struct.unpack_from("<Q", code, 0x28)[0], struct.unpack_from("<HHH", code, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", code, section_table + i * entry[0]) for i in range(entry[1])]
    found = set()
    for _, kind, _, _, offset, size, link, _, _, each in sections:
        if kind == 2:  # a symbol table; `link` is its table of strings
            strings = sections[link][4]
            for at in range(offset + each, offset + size, each):
                name, info, _, section, _, _ = struct.unpack_from("<IBBHQQ", code, at)
                if section == 0 and info >> 4:
                    found.add(code[strings + name : code.index(b"\0", strings + name)].decode())
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF")
def test_code_needs_nothing_of_numba_but_its_memory():
    """Whatever else a kernel called would be missing in a process that has not loaded numba."""
    known = {"call"} | {f"NRT_{name}" for name in runtime_functions()}
    images.tie_hashes(
        np.ones(1, np.float32), np.float32(1.0), np.uint64(7), 0, np.zeros(1, np.int32), np.zeros(1, np.uint64)
    )
    libc, seen = ctypes.CDLL(None), 0
    for path in kernels.cache_folder().glob(f"*{images.SUFFIX}"):
        image = images._read(path)
        assert image is not None
        code, caller = image[1]
        (symbol,) = undefined(caller)
        seen += 1
        missing = {name for name in undefined(code) - known if not hasattr(libc, name)}
        assert not missing, f"{path.name} needs {missing}"
        assert symbol not in undefined(code)
    assert seen


def runtime_functions() -> set[str]:
    from numba.core.runtime import _nrt_python

    return set(_nrt_python.c_helpers)
