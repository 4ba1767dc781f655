"""The sums of a Fisher by processes of a Ray cluster: each holds the model and adds up chunks of sequences.

The sums of a chunk go into a file of their own beside the unfinished Fisher, which all machines see; whoever estimates
adds the files in the order of chunks. So neither the number of processes nor a lost one changes a bit of the result.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from rlmerge.errors import ClusterError
from rlmerge.evaluate.run import TransformersBackend, load_model
from rlmerge.execute.ray_cluster import Pool, connected, machines, spans_machines
from rlmerge.recipe import Recipe
from rlmerge.settings import default_threads

from .estimate import FisherSettings, Progress, batches_of
from .folder import sums_of_chunks
from .gradients import SquaredGradients
from .room import taken
from .sequences import Unit
from .store import save_tensors

if TYPE_CHECKING:
    from .estimate import Run

LOG, TOKENS = "log_probability", "tokens"
"""What a file of sums holds beside them."""


@dataclass(frozen=True)
class ModelSource:
    """Where a process gets the model from, the digest that its weights must have, and the run that it works for."""

    source: Path | Recipe
    base: Path | str | None
    weights: str
    run: str


class FisherWorker:
    """A process with the model.

    wanted     names of the parameters to accumulate, or None for all
    folder     where the sums of chunks go
    durable    whether they are synced before they count as done
    """

    def __init__(
        self, origin: ModelSource, settings: FisherSettings, checkpointing: bool, wanted: set[str] | None,
        units: list[Unit], size: int, folder: Path, durable: bool,
    ) -> None:  # fmt: skip
        host = socket.gethostname()
        if not folder.is_dir():
            raise ClusterError(
                f"{folder}: {host} does not see it. Every machine must see model and output under the same paths: put "
                "them on a shared file system."
            )
        model, tokenizer = load_model(origin.source, settings.threads, base=origin.base)
        if TransformersBackend(model, tokenizer).identity != origin.weights:
            raise ClusterError(f"{origin.source}: {host} loads other weights from it than the machine that asks.")
        self.squares = SquaredGradients(model, wanted, compute=settings.compute, checkpointing=checkpointing)
        self.squares.check(batches_of(units[:size], settings)[0])
        self.settings, self.units, self.size = settings, units, size
        self.folder, self.run, self.durable = folder, origin.run, durable

    def do(self, chunk: int) -> None:
        """Adds up one chunk, into a file that appears whole."""
        for value in self.squares.total.values():
            value.zero_()
        self.squares.log_probability, tokens = 0.0, 0
        for batch in batches_of(self.units[chunk * self.size : (chunk + 1) * self.size], self.settings):
            self.squares.add(batch)
            tokens += int(batch.mask.sum())
        said = {LOG: torch.tensor(self.squares.log_probability, dtype=torch.float64), TOKENS: torch.tensor(tokens)}
        file = file_of(self.folder, chunk, self.run)
        part = file.with_suffix(f".part-{socket.gethostname()}-{os.getpid()}")
        save_tensors({**self.squares.total, **said}, part)
        if self.durable:
            with open(part, "rb") as written:
                os.fsync(written.fileno())
        part.replace(file)


def file_of(folder: Path, chunk: int, run: str) -> Path:
    """Where the sums of a chunk are; the run's digest keeps out a process that still works for another run."""
    return folder / f"sums-{chunk:05d}-{run}.safetensors"


def add_on_cluster(
    run: Run, origin: ModelSource, progress: Callable[[Progress], None], units: list[Unit], first: int, size: int
) -> Generator[tuple[int, int]]:
    """Like `Run.add_here`, by the processes of a cluster. Chunks that an interrupted run left are not done again."""
    settings = run.settings
    for file in sums_of_chunks(run.folder):
        if file.suffix != ".safetensors" or not file.stem.endswith(origin.run):
            file.unlink()
    chunks = range(first // size, -(-len(units) // size))
    left = deque(chunk for chunk in chunks if not file_of(run.folder, chunk, origin.run).exists())
    done = set(chunks) - set(left)
    with connected(settings.address, default_threads()):
        folder, longest = run.folder.resolve(), max(unit.length * len(unit.sequences) for unit in units)
        settings = replace(settings, threads=settings.threads or threads_of(settings.workers))
        memory = settings.memory or taken(run.model, longest, settings.tokens, run.checkpointing)
        arguments = {
            "origin": origin, "settings": settings, "checkpointing": run.checkpointing, "units": units, "size": size,
            "wanted": set(run.squares.total), "folder": folder, "durable": spans_machines(),
        }  # fmt: skip
        with Pool(
            FisherWorker, arguments, most=len(left), limit=settings.workers, processors=settings.threads or 1,
            memory=memory, ahead=1, tell=lambda text: progress(Progress(text, 0, 0)),
        ) as pool:  # fmt: skip
            finished = pool.run(left, lambda chunk: chunk)
            for chunk in chunks:
                while chunk not in done:
                    done.add(next(finished)[0])
                yield chunk * size, _add_file(run.squares, file_of(run.folder, chunk, origin.run))


def _add_file(squares: SquaredGradients, file: Path) -> int:
    """Adds the sums of a chunk, a tensor at a time. Returns its tokens."""
    try:
        with safe_open(file, "pt") as opened:
            for name, total in squares.total.items():
                total += opened.get_tensor(name)
            squares.log_probability += float(opened.get_tensor(LOG))
            return int(opened.get_tensor(TOKENS))
    except (OSError, SafetensorError) as error:
        raise ClusterError(
            f"{file}: a worker has written it, and it cannot be read here: {error}. Is the folder on a file system "
            "that all machines share? The same command continues."
        ) from None


def threads_of(workers: int | None) -> int:
    """Threads of a process: all processors of the smallest machine, shared where several must fit on a single one."""
    sizes = [int(found["CPU"]) for found in machines() if found.get("CPU", 0.0) >= 1.0]
    return max(1, min(sizes, default=1) // (workers or 1) if len(sizes) == 1 else min(sizes))
