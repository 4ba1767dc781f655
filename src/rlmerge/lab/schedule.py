"""Runs cells in processes of their own, each as soon as what it needs is done; says beforehand what there is to do."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from rlmerge.lab.cells import Cell, Work, cells, is_done, run_cell
from rlmerge.lab.errors import LabError
from rlmerge.lab.presets import DOMAINS, Preset

Result = TypeVar("Result")


@dataclass(frozen=True)
class Planned:
    """A cell, the seconds that it takes by the preset's measurements, and whether it is done."""

    cell: Cell
    seconds: float
    done: bool


@dataclass(frozen=True)
class Step:
    """A cell that was done: how many are, of how many, what it measured, seconds that are left by the preset."""

    cell: Cell
    done: int
    total: int
    measured: dict[str, Any]
    left: float

    @property
    def line(self) -> str:
        """For a terminal: ' 12 of 111  eval-base: math 54.0%, code 29.8%, 4 s; about 5 min left'."""
        scores = [f"{key} {value:.1%}" for key, value in self.measured.items() if key in DOMAINS]
        shown = ", ".join([*scores, f"{self.measured['seconds']:.0f} s"])
        return f"{self.done:>4} of {self.total}  {self.cell.name}: {shown}; about {self.left / 60:.0f} min left"


def plan(root: Path, preset: Preset, wanted: list[Cell] | None = None) -> list[Planned]:
    """All cells (or those wanted) in order."""
    found = cells(preset) if wanted is None else wanted
    return [Planned(cell, preset.seconds[cell.kind], is_done(root, cell)) for cell in found]


def seconds_left(planned: list[Planned], workers: int) -> float:
    """What is left, on so many processes: pre-training takes them all, the rest is shared."""
    left = [one for one in planned if not one.done]
    shared = sum(one.seconds for one in left if one.cell.threads == 1)
    return sum(one.seconds for one in left if one.cell.threads > 1) + shared / workers


def run(
    root: Path,
    preset: Preset,
    workers: int,
    tell: Callable[[Step], None] = lambda step: None,
    wanted: list[Cell] | None = None,
    work: Work | None = None,
) -> None:
    """Does all cells (or those wanted) that are not done, in a root that is opened. The first error ends the run, after
    what is under way; LabError for a process that the system has killed.

    work    what the cells are, where they are not those of the lab; a function of a module
    """
    wanted = cells(preset) if wanted is None else wanted
    todo = {cell.name: cell for cell in wanted if not is_done(root, cell)}
    total, missing = len(wanted), set(todo)
    under_way: dict[Future[dict[str, Any]], Cell] = {}
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # several processes of several threads would wait for each other
    try:
        context = get_context("spawn")
        with ProcessPoolExecutor(workers, context, initializer=_prepare, initargs=(os.getpid(),)) as pool:
            while missing:
                for cell in [cell for cell in todo.values() if not missing.intersection(cell.needs)]:
                    if len(under_way) < workers:  # no more: on an error nothing else shall begin
                        threads_of = min(cell.threads, workers, os.cpu_count() or 1)
                        under_way[pool.submit(run_cell, root, preset, todo.pop(cell.name), threads_of, work)] = cell
                for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                    cell = under_way.pop(future)
                    measured = future.result()
                    missing.discard(cell.name)
                    left = seconds_left(plan(root, preset, wanted), workers)
                    tell(Step(cell, total - len(missing), total, measured, left))
    except BrokenProcessPool:
        names = ", ".join(cell.name for cell in under_way.values())
        raise LabError(
            f"a process was killed while it worked on {names}: perhaps memory ran out. The same command goes on; "
            "--workers 1 takes half the memory."
        ) from None
    finally:
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = threads


def in_own_process(work: Callable[..., Result], *arguments: Any) -> Result:
    """What a function of a module returns in a new process, which imports what it needs and ends with this one."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=_prepare, initargs=(os.getpid(),)) as pool:
        return pool.submit(work, *arguments).result()


def _prepare(parent: int) -> None:
    """In a new process: quiet, and gone when the one that began it is gone, even by a kill."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["TQDM_DISABLE"] = "1"

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
