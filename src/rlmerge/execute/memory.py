"""Memory that is used again: the buffers of a thread, and what stages keep of blocks for the next stage."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Hashable
from dataclasses import fields, is_dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray


def hold_memory() -> None:
    """Asks glibc to keep freed memory and to share one arena: block arrays come and go by the thousand, and giving
    their pages back to the kernel each time costs a third of a merge. Elsewhere, nothing. For processes of our own.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((-1, 2**30), (-3, 2**30), (-2, 2**26), (-8, 1)):  # trim, mmap threshold; top pad; arenas
            libc.mallopt(option, value)


class Space:
    """The buffers of one thread, grown on demand and used again for every block."""

    def __init__(self) -> None:
        self._flat: dict[str, NDArray[Any]] = {}
        self.factors: dict[tuple[int, int], tuple[NDArray[np.float64], NDArray[np.float64], bytes]] = {}
        self.compact: dict[tuple[int, int], tuple[NDArray[Any], NDArray[Any], bytes]] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """A C-contiguous array with undefined content; valid until the same name is asked for again."""
        size = prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.size < size:
            flat = self._flat[name] = np.empty(size, dtype)
        return flat[:size].reshape(shape)


class Memo:
    """What stages keep of blocks for the next stage of the same tensor, within a number of bytes."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._held: dict[int, dict[tuple[int, Hashable], Any]] = {}
        self._bytes: dict[int, int] = {}
        self._total = 0
        self._lock = threading.Lock()

    def get(self, tensor: int, start: int, key: Hashable) -> Any:
        """What is kept, or None."""
        return self._held.get(tensor, {}).get((start, key))

    def put(self, tensor: int, start: int, key: Hashable, value: Any, spare: bool = False) -> bool:
        """Keeps a value if there is room; a `spare` one leaves half of the budget to others."""
        size = bytes_of(value)
        with self._lock:
            if self._total + size > (self.budget // 2 if spare else self.budget):
                return False
            self._held.setdefault(tensor, {})[start, key] = value
            self._bytes[tensor] = self._bytes.get(tensor, 0) + size
            self._total += size
            return True

    def drop(self, tensor: int) -> None:
        """Forgets a tensor."""
        with self._lock:
            self._held.pop(tensor, None)
            self._total -= self._bytes.pop(tensor, 0)


def bytes_of(value: Any) -> int:
    """Bytes of the arrays in a value: an array, a list, tuple or dict of values, a dataclass."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, (tuple, list)):
        return sum(map(bytes_of, value))
    if isinstance(value, dict):
        return sum(map(bytes_of, value.values()))
    if is_dataclass(value):
        return sum(bytes_of(getattr(value, entry.name)) for entry in fields(value))
    return 32
