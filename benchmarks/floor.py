"""The floor: reads the files that a merge must read, writes a file of the output's size, and does nothing else.

What a merge takes beyond this is arithmetic, decoding, hashing and start-up; nothing that reads and writes the same
bytes through the page cache with two threads can be much faster. With --hash it hashes what it reads and writes, too,
as a merge does that can say what it was made of. Chunks are read with pread into one reused buffer a thread, small
enough to stay in the CPU's cache; the output is preallocated and filled in place.
"""

from __future__ import annotations

import argparse
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

CHUNK = 1 << 20
"""Bytes read or written at once."""
See = Callable[[memoryview], object]


def pieces(length: int, parts: int, index: int) -> tuple[int, int]:
    """The index-th of `parts` nearly equal runs of `length` bytes, as (start, end)."""
    return length * index // parts, length * (index + 1) // parts


def read_range(file: int, buffer: memoryview, start: int, end: int, see: See) -> None:
    """Reads bytes start..end of an open file into the buffer, over and over from its beginning if it is shorter.

    `see` is given each piece.
    """
    while start < end:
        count = os.preadv(file, [buffer[: min(len(buffer), end - start)]], start)
        if count == 0:
            raise EOFError(f"file descriptor {file} ends at byte {start}, before {end}")
        see(buffer[:count])
        start += count


def write_range(file: int, buffer: memoryview, start: int, end: int) -> None:
    """Writes the buffer's first end - start bytes at `start`."""
    done = 0
    while start + done < end:
        done += os.pwrite(file, buffer[done : end - start], start + done)


def work(
    inputs: Iterable[tuple[int, int]], output: int, size: int, parts: int, mine: range, chunk: int, see: See
) -> None:
    """One thread: for each of its parts, reads that part of every (file, length), writes that part of the output."""
    buffer = memoryview(bytearray(chunk))
    for index in mine:
        for file, length in inputs:
            read_range(file, buffer, *pieces(length, parts, index), see)
        start, end = pieces(size, parts, index)
        see(buffer[: end - start])
        write_range(output, buffer, start, end)


def hasher() -> See:
    """Hashes everything that it is given, with xxh3-128."""
    import xxhash

    return xxhash.xxh3_128().update


def run(
    read: list[Path],
    write: Path,
    size: int,
    fsync: bool = False,
    threads: int = 2,
    chunk: int = CHUNK,
    hash_too: bool = False,
) -> None:
    """Reads all of `read` and writes `size` bytes to `write`.

    Raises OSError or EOFError, also when it happened in a thread; the output file is then worthless.
    """
    files = [os.open(path, os.O_RDONLY) for path in read]
    inputs = [(file, os.fstat(file).st_size) for file in files]
    output = os.open(write, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(output, 0, size)
    else:
        os.truncate(output, size)
    parts = -(-size // chunk)
    errors: list[BaseException] = []

    def guarded(mine: range) -> None:
        try:
            work(inputs, output, size, parts, mine, chunk, hasher() if hash_too else lambda _: None)
        except BaseException as error:
            errors.append(error)

    pool = [threading.Thread(target=guarded, args=(range(*pieces(parts, threads, i)),)) for i in range(threads)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    if errors:
        raise errors[0]
    if fsync:
        os.fsync(output)
    for file in (*files, output):
        os.close(file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--read", type=Path, nargs="+", required=True, help="files to read whole")
    parser.add_argument("--write", type=Path, required=True, help="file to write")
    parser.add_argument("--size", type=int, required=True, help="bytes to write")
    parser.add_argument("--fsync", action="store_true", help="wait until the disk has it")
    parser.add_argument("--hash", action="store_true", help="hash what is read and written")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--chunk", type=int, default=CHUNK, help="bytes written at once")
    args = parser.parse_args()
    run(args.read, args.write, args.size, args.fsync, args.threads, args.chunk, args.hash)
