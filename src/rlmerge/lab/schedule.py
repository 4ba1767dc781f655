"""Runs cells in processes of their own, each as soon as what it needs is done; says beforehand what there is to do."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rlmerge.lab.cells import Cell, cells, is_done, open_root, run_cell
from rlmerge.lab.presets import Preset


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
) -> None:
    """Does all cells (or those wanted) that are not done. An error ends the run, after what is under way."""
    open_root(root, preset)
    wanted = cells(preset) if wanted is None else wanted
    todo = {cell.name: cell for cell in wanted if not is_done(root, cell)}
    total, missing = len(wanted), set(todo)
    under_way: dict[Future[dict[str, Any]], Cell] = {}
    environment = os.environ.copy()
    os.environ["OMP_NUM_THREADS"] = "1"  # several processes of several threads would wait for each other
    try:
        context = get_context("spawn")
        with ProcessPoolExecutor(workers, context, initializer=_prepare, initargs=(os.getpid(),)) as pool:
            while missing:
                for cell in [cell for cell in todo.values() if not missing.intersection(cell.needs)]:
                    if len(under_way) < workers:  # no more: on an error nothing else shall begin
                        under_way[pool.submit(run_cell, root, preset, todo.pop(cell.name), cell.threads)] = cell
                for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                    cell = under_way.pop(future)
                    measured = future.result()
                    missing.discard(cell.name)
                    left = seconds_left(plan(root, preset, wanted), workers)
                    tell(Step(cell, total - len(missing), total, measured, left))
    finally:
        os.environ.clear()
        os.environ.update(environment)


def _prepare(parent: int) -> None:
    """In a new process: quiet, and gone when the one that began it is gone, even by a kill."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["TQDM_DISABLE"] = "1"

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
