"""Compiled kernels without numba: their machine code, kept by the run that compiled them.

numba takes a quarter of a second to load, LLVM's loader a sixth of that, and a merge of a small model needs little
more. So a kernel is compiled once, by numba, for the types that it is called with; the code is kept in the cache, with
a few instructions that take the arguments out of NumPy's arrays; and every call, the first run's too, goes to that
code through ctypes, which lets go of the GIL. What is in `compiled` says what a kernel does; this says how it is found
and called.

The calling convention is numba's own: `int f(result *, excinfo **, arguments)`, an array as (meminfo, parent, size,
itemsize, data, shape, strides). Source: numba, "Notes on Numba's architecture" and `numba.core.callconv`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import json
import os
import struct
import sys
import threading
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, ModuleSpec
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numpy as np
import xxhash

from rlmerge import kernels

NAME = "numba"
SUFFIX = ".kernel"
MAGIC = b"rlmerge kernel 1"

ARRAYS = ("f8", "f4", "i8", "u8", "i4", "u4", "u2", "u1", "b1")
"""What arrays may hold, as NumPy names it."""
SCALARS: dict[str, tuple[str, Any]] = {
    "float64": ("double", ctypes.c_double),
    "float32": ("float", ctypes.c_float),
    "int64": ("i64", ctypes.c_int64),
    "uint64": ("i64", ctypes.c_uint64),
    "bool": ("i8", ctypes.c_bool),
}
"""Other arguments, and results: their types in LLVM and in C."""
PYTHON = {float: "float64", int: "int64", bool: "bool", np.bool_: "bool"} | {
    getattr(np, name): name for name in ("float64", "float32", "int64", "uint64")
}
DONE, NONE, REFUSED = 0, -2, 100
"""What a call can come to: a result, none (numba's words), or an array that is not as it must be; else it raised."""
SOUND = 0x101
"""NumPy's flags of a C-contiguous, aligned array."""
_lock = threading.RLock()
if hasattr(os, "register_at_fork"):  # a child must not find it held by a thread that it has not
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)

Key = tuple[object, ...]


class Kernel:
    """One kernel, called like the function of the same name in `compiled`; for each set of types its code is found,
    or compiled and kept, at the first call.

    Arrays are C-contiguous, in the machine's byte order. Raises TypeError for what is not.
    """

    def __init__(self, name: str) -> None:
        self.__name__ = name
        self._loaded: dict[Key, Callable[..., Any]] = {}

    def __call__(self, *arguments: Any) -> Any:
        key = tuple([(a.dtype, a.ndim, a.flags.writeable) if type(a) is np.ndarray else type(a) for a in arguments])
        found = self._loaded.get(key)
        return (found or self._load(key, arguments))(*arguments)

    def _load(self, key: Key, arguments: tuple[Any, ...]) -> Callable[..., Any]:
        with _lock:
            if key not in self._loaded:
                self._loaded[key] = load(self.__name__, tuple(kind_of(a) for a in arguments))
            return self._loaded[key]


def kind_of(argument: object) -> str:
    """An argument's type as a word: `f8:2` is an array of float64 with two dimensions, `f8:-2` one that may only be
    read, `int64` a number.

    Raises TypeError for what kernels do not take.
    """
    if type(argument) is np.ndarray:
        held = argument.dtype.str[1:]
        if held not in ARRAYS or not argument.dtype.isnative or not argument.ndim:
            raise TypeError(f"kernels take no array of {argument.dtype} with {argument.ndim} dimensions")
        return f"{held}:{argument.ndim if argument.flags.writeable else -argument.ndim}"
    if type(argument) not in PYTHON:
        raise TypeError(f"kernels take no {type(argument).__name__}")
    return PYTHON[type(argument)]


def load(name: str, kinds: tuple[str, ...]) -> Callable[..., Any]:
    """The kernel's code for these types, from the cache or compiled and put there, ready to be called."""
    path = kernels.cache_folder() / f"{name}-{_state(kinds)}{SUFFIX}"
    image = _read(path) or _keep(path, _compile(name, kinds))
    return _callable(name, kinds, image)


def _numba_folder() -> Path:
    """Where numba is installed, without loading it."""
    spec = importlib.util.find_spec("numba")
    assert spec is not None, "numba is one of rlmerge's dependencies"
    return Path(spec.origin or "").parent


@functools.cache
def _machine() -> str:
    """What compiled code depends on, besides the kernels' source: versions, processor, how Python lays out objects."""
    # reading numba's version costs as much as a kernel: the names of folders beside it have it, too
    installed = sorted(path.name for path in _numba_folder().parent.glob("numba-*"))
    version = os.stat(_numba_folder() / "_version.py")
    processor = (llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten(), llvm.get_process_triple())
    made_by = (installed, version.st_size, version.st_mtime_ns, llvmlite.__version__, np.__version__, sys.version)
    asked = sorted((key, value) for key, value in os.environ.items() if key.startswith("NUMBA_") and "DIR" not in key)
    return repr((processor, made_by, object.__basicsize__, asked, MAGIC))


def _state(kinds: tuple[str, ...]) -> str:
    return xxhash.xxh3_64_hexdigest(repr((_machine(), kinds)).encode())


Image = tuple[str, list[bytes]]
"""Type of the result ('none', or of SCALARS), and object files of which one has the function `call`."""


def _read(path: Path) -> Image | None:
    """A kept image; None where there is none, or one that is not whole."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    head = len(MAGIC) + 16
    sound = len(data) > head + 8 and data[: len(MAGIC)] == MAGIC
    if not sound or data[len(MAGIC) : head] != xxhash.xxh3_128_digest(data[head:]):
        return None
    (length,) = struct.unpack_from("<Q", data, head)
    fields = json.loads(data[head + 8 : head + 8 + length])
    objects, at = [], head + 8 + length
    for size in fields["objects"]:
        objects.append(data[at : at + size])
        at += size
    return fields["result"], objects


def _keep(path: Path, image: Image) -> Image:
    """Writes an image under a name of its own, then renames it: other processes find it whole or not at all."""
    result, objects = image
    fields = json.dumps({"result": result, "objects": [len(code) for code in objects]}).encode()
    body = struct.pack("<Q", len(fields)) + fields + b"".join(objects)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        part.write_bytes(MAGIC + xxhash.xxh3_128_digest(body) + body)
        os.replace(part, path)
    except OSError:  # no room, or nobody may write here: the next run compiles again
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    return image


def _compile(name: str, kinds: tuple[str, ...]) -> Image:
    """numba's code for the kernel, and a function `call` of few instructions that takes NumPy's arrays to it."""
    if kernels.skip_blas:
        _load_without_blas()
    module = importlib.import_module("rlmerge.kernels.compiled")
    from numba import types
    from numba.core import compiler
    from numba.core.registry import cpu_target

    def numba_type(kind: str) -> Any:
        held, _, dimensions = kind.partition(":")
        word = np.dtype(held).name if dimensions else kind
        scalar = types.boolean if word == "bool" else getattr(types, word)
        if not dimensions:
            return scalar
        return types.Array(scalar, abs(int(dimensions)), "C", readonly=int(dimensions) < 0)

    flags: Any = compiler.Flags()
    flags.nrt = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
    flags.error_model = "numpy"
    function = getattr(getattr(module, name), "py_func", getattr(module, name))
    contexts = cpu_target.typing_context, cpu_target.target_context
    made = compiler.compile_extra(*contexts, function, tuple(map(numba_type, kinds)), None, flags, {})
    result = str(made.signature.return_type)
    if result != "none" and result not in SCALARS:
        raise TypeError(f"kernel '{name}' returns {result}; kernels return numbers or nothing")
    return result, [made.library._get_compiled_object(), _assemble(_caller(made.fndesc.llvm_func_name, kinds))]


def _load_without_blas() -> None:
    """Loads the part of numba that looks for scipy's BLAS, without letting it find any."""
    if "scipy.linalg" not in sys.modules:
        sys.modules["scipy.linalg"] = None  # type: ignore[assignment]  # what Python takes for "there is none"
        try:
            importlib.import_module("numba.np.arraymath")
        finally:
            del sys.modules["scipy.linalg"]


def _caller(symbol: str, kinds: tuple[str, ...]) -> str:
    """LLVM source of `int call(result *, arguments)`, which calls `symbol`; arrays are given as Python objects.

    It returns REFUSED for an array that is not C-contiguous and aligned. Source: NumPy's C API,
    `PyArrayObject_fields`: after the object's head stand data, number of dimensions, shape, strides, base, descriptor
    and flags.
    """
    from llvmlite import ir

    pointer, word, status = ir.IntType(8).as_pointer(), ir.IntType(64), ir.IntType(32)
    numbers = {"double": ir.DoubleType(), "float": ir.FloatType(), "i64": word, "i8": ir.IntType(8)}
    given = [pointer if ":" in kind else numbers[SCALARS[kind][0]] for kind in kinds]
    module = ir.Module("caller")
    call = ir.Function(module, ir.FunctionType(status, [pointer, *given]), "call")
    build = ir.IRBuilder(call.append_basic_block())
    passed: list[Any] = [call.args[0], build.alloca(pointer)]
    sound = ir.Constant(status, SOUND)
    for kind, argument in zip(kinds, call.args[1:], strict=True):
        held, _, dimensions = kind.partition(":")
        if not dimensions:
            passed.append(argument)
            continue

        def read(base: Any, place: int, what: Any) -> Any:
            at = build.gep(build.bitcast(base, pointer), [ir.Constant(word, place)])
            return build.load(build.bitcast(at, what.as_pointer()))

        head, size, count = object.__basicsize__, ir.Constant(word, 1), abs(int(dimensions))
        sound = build.and_(sound, read(argument, head + 48, status))
        shape, strides = (
            [read(read(argument, head + at, pointer), 8 * d, word) for d in range(count)] for at in (16, 24)
        )
        for length in shape:
            size = build.mul(size, length)
        none = ir.Constant(pointer, None)
        passed += [none, none, size, ir.Constant(word, np.dtype(held).itemsize), read(argument, head, pointer)]
        passed += [*shape, *strides]
    with build.if_then(build.icmp_unsigned("!=", sound, ir.Constant(status, SOUND))):
        build.ret(ir.Constant(status, REFUSED))
    kernel = ir.Function(module, ir.FunctionType(status, [value.type for value in passed]), symbol)
    build.ret(build.call(kernel, passed))
    return str(module)


def _assemble(source: str) -> bytes:
    with _lock:
        llvm.initialize_native_asmprinter()
        module = llvm.parse_assembly(source)
        return _target().emit_object(module)


def _target() -> Any:
    """A new one each time: an engine takes its own along when it ends."""
    llvm.initialize_native_target()
    return llvm.Target.from_default_triple().create_target_machine(opt=2, jit=True)


@functools.cache
def _allocate() -> None:
    """Tells LLVM where the functions are that kernels get scratch memory from: numba's own, without the rest of it."""
    runtime = sys.modules.get("numba.core.runtime._nrt_python")
    if runtime is None:
        folder = _numba_folder() / "core" / "runtime"
        places = [folder / f"_nrt_python{suffix}" for suffix in EXTENSION_SUFFIXES]
        loader = ExtensionFileLoader("_nrt_python", str(next(place for place in places if place.exists())))
        runtime = importlib.util.module_from_spec(ModuleSpec(loader.name, loader, origin=loader.path))
        loader.exec_module(runtime)
    for name, address in runtime.c_helpers.items():  # named as numba names them, in numba.core.runtime.nrt
        llvm.add_symbol(name if name.startswith("_") else f"NRT_{name}", address)


_engines: list[Any] = []
"""Where the code lives, for as long as the process does."""


def _callable(name: str, kinds: tuple[str, ...], image: Image) -> Callable[..., Any]:
    """Loads an image and makes a Python function of it. Each has an engine of its own: numba numbers the names of
    helpers anew in every process, so that two images may use one name for different code."""
    result, objects = image
    _allocate()
    llvm.initialize_native_asmprinter()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target())
    for code in objects:
        engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    taken = [ctypes.py_object if ":" in kind else SCALARS[kind][1] for kind in kinds]
    function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, *taken)(engine.get_function_address("call"))
    integers = [i for i, kind in enumerate(kinds) if kind in ("int64", "uint64")]
    returned = SCALARS[result][1] if result != "none" else ctypes.c_int64

    def call(*arguments: Any) -> Any:
        if integers:  # ctypes takes no NumPy integers
            arguments = list(arguments)  # type: ignore[assignment]
            for i in integers:
                arguments[i] = int(arguments[i])  # type: ignore[index]
        status = function(ctypes.byref(place := returned()), *arguments)
        if status not in (DONE, NONE):
            raise _error(name, status)
        return place.value if result != "none" else None

    return call


def _error(name: str, status: int) -> Exception:
    if status == REFUSED:
        return TypeError(f"kernel '{name}' takes C-contiguous, aligned arrays only")
    return RuntimeError(f"kernel '{name}' failed (status {status}): arguments that do not fit together, or no memory")


def __getattr__(name: str) -> Any:
    """The kernel of that name, as an attribute of this module; `__all__` are all names, which `plain` has, too."""
    if name == "__all__":
        return importlib.import_module("rlmerge.kernels.plain").__all__
    if name.startswith("_"):
        raise AttributeError(f"no kernel is called '{name}'")
    return globals().setdefault(name, Kernel(name))
