"""What one check may use. The numbers travel to the workers as plain JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Upper bounds for one process of tested code. Each check has one such process, or two (see `docs/sandbox.md`).

    wall       seconds until everything is killed; CPU seconds are bounded by the same number, rounded up
    memory_mb  address space, the interpreter's own 30 MB included
    output_kb  bytes that may be written to all pipes together, in KiB
    scratch_mb size of the tmpfs at /tmp, the only place that can be written
    inodes     files in it
    open_files descriptors
    threads    threads; new processes are refused by the system call filter, and counted here where there is none
    """

    wall: float = 5.0
    memory_mb: int = 256
    output_kb: int = 1024
    scratch_mb: int = 16
    inodes: int = 1024
    open_files: int = 64
    threads: int = 32

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)
