"""Runs a plan with threads on this machine: stages in their order, tensors side by side, sums in plan order.

A tensor goes through its stages on its own while the others go through theirs; only a stage of scope 'model' waits for
all. Which thread does what never shows in a result: summaries are added in plan order.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from rlmerge.methods.base import Stage, Summary

from .inputs import Space
from .journal import Journal
from .work import Worker, Write

T = TypeVar("T")
Wanted = list[tuple[int, Stage]]


class Total:
    """Adds summaries in the order of their units, whenever they come."""

    def __init__(self, stage: Stage, experts: int) -> None:
        self.stage = stage
        self._experts = experts
        self._total: Summary | None = None
        self._next = 0
        self._early: dict[int, Summary] = {}

    @property
    def total(self) -> Summary:
        """The sum so far."""
        return self.stage.empty(self._experts) if self._total is None else self._total

    def add(self, place: int, part: Summary) -> None:
        """Adds the summary of unit number `place`; those after it wait for it."""
        self._early[place] = part
        while self._next in self._early:
            part = self._early.pop(self._next)
            if self._total is None:
                self._total = part
            else:
                self.stage.combine(self._total, part)
            self._next += 1

    def check(self, units: int) -> None:
        """A sum over fewer units than there are must never become a result."""
        if self._next != units or self._early:
            raise RuntimeError(f"stage {self.stage.name!r} measured {self._next} of {units} units")


@dataclass
class _Walk:
    """One tensor on its way through the stages of a phase and the merge."""

    tensor: int
    step: int = 0
    left: int = 0
    wanted: Wanted = field(default_factory=list)
    totals: list[Total] = field(default_factory=list)


class LocalRun:
    """A plan, the journal that knows what is done, and a number of threads."""

    def __init__(
        self, worker: Worker, journal: Journal, threads: int, tick: Callable[[int], None] = lambda count: None
    ) -> None:
        self.worker = worker
        self.plan = worker.plan
        self.journal = journal
        self.threads = threads
        self.tick = tick
        self.merged = [t for t, tensor in enumerate(self.plan.tensors) if tensor.carry is None]
        self.steps = max((len(stages) for stages in worker.stages), default=0)
        self._lock = threading.Condition()
        self._spaces = threading.local()

    # -- what must be done ----------------------------------------------------------------------------------------

    def is_model_step(self, step: int) -> bool:
        """Whether some group's stage at this step needs the whole model."""
        return any(step < len(stages) and stages[step].scope == "model" for stages in self.worker.stages)

    def _pending(self, step: int, tensor: int) -> Wanted:
        """Stages of a step that still must measure this tensor."""
        name = self.plan.tensors[tensor].name
        wanted = []
        for group, stages in enumerate(self.worker.stages):
            if step >= len(stages):
                continue
            results = self.journal.results.of(group, name)
            task = self.worker.task(self.worker.leaders[group], tensor)
            if stages[step].name not in results and stages[step].needed(task, results):
                wanted.append((group, stages[step]))
        return wanted

    def measure(self) -> int:
        """Runs all stages up to and including the last of scope 'model'. Returns the first step that is left."""
        first = 0
        for step in range(self.steps):
            if not self.is_model_step(step):
                continue
            if step > first:
                self._walk_all(self.merged, first, step, None)
            self._model_step(step)
            first = step + 1
        return first

    def merge(self, first: int, tensors: Iterable[int], write: Write) -> None:
        """Runs the remaining stages and the merge of these tensors."""
        tensors = list(tensors)
        self._walk_all(tensors, first, self.steps, write)
        for tensor in tensors:
            self.worker.check_sums(tensor, self.journal.units)

    # -- one stage over the whole model ---------------------------------------------------------------------------

    def _model_step(self, step: int) -> None:
        experts = len(self.plan.experts)
        chosen: list[tuple[int, Stage, set[int], Total]] = []
        known: list[dict[int, Summary]] = []
        for group, stages in enumerate(self.worker.stages):
            if step < len(stages) and stages[step].name not in self.journal.results.of(group, ""):
                among = range(len(self.plan.tensors)) if stages[step].carried else self.merged
                members = {t for t in among if any(g == group for g, _ in self._pending(step, t))}
                chosen.append((group, stages[step], members, Total(stages[step], experts)))
                tasks = {t: self.worker.task(self.worker.leaders[group], t) for t in sorted(members)}
                found = {t: stages[step].known(task) for t, task in tasks.items()}
                known.append({t: summary for t, summary in found.items() if summary is not None})
        left = [members - have.keys() for (_, _, members, _), have in zip(chosen, known)]
        units = [(t, u) for t in sorted(set().union(*left)) for u in range(len(self.plan.tensors[t].units))]
        places: dict[tuple[int, int, int], int] = {}
        for index, measured in enumerate(left):
            for place, (t, u) in enumerate(unit for unit in units if unit[0] in measured):
                places[index, t, u] = place

        def work(unit: tuple[int, int]) -> Callable[[], None]:
            wanted = [entry for entry in enumerate(chosen) if (entry[0], *unit) in places]
            name = self.plan.tensors[unit[0]].name
            asked = [(g, stage, self.journal.results.of(g, name)) for _, (g, stage, _, _) in wanted]
            parts = self.worker.measure(asked, *unit, self._space())

            def done() -> None:
                for (index, (_, _, _, total)), part in zip(wanted, parts):
                    total.add(places[index, *unit], part)

            return done

        self._run(deque(units), work)
        for (group, stage, members, total), measured, have in zip(chosen, left, known):
            total.check(sum(len(self.plan.tensors[t].units) for t in measured))
            summary = total.total
            for part in have.values():
                stage.combine(summary, part)
            leader = self.worker.leaders[group]
            task = self.worker.model_task(leader, sorted(members) or self.merged[:1])
            result = stage.reduce(summary, task, self.journal.results.of(group, ""))
            self.journal.stage(group, "", stage.name, result)

    # -- tensors on their own -------------------------------------------------------------------------------------

    def _walk_all(self, tensors: Iterable[int], first: int, last: int, write: Write | None) -> None:
        queue: deque[tuple[_Walk, int]] = deque()
        waiting = deque(_Walk(tensor, first) for tensor in tensors)

        def more() -> bool:
            while waiting and not queue:
                self._advance(waiting.popleft(), last, write is not None, queue)
            return bool(queue)

        def work(item: tuple[_Walk, int]) -> Callable[[], None]:
            walk, unit = item
            name = self.plan.tensors[walk.tensor].name
            if walk.step < last and walk.wanted:
                asked = [(g, stage, self.journal.results.of(g, name)) for g, stage in walk.wanted]
                parts = self.worker.measure(asked, walk.tensor, unit, self._space())
                return lambda: self._measured(walk, unit, parts, last, write is not None, queue)
            assert write is not None
            results = [self.journal.results.of(g, name) for g in range(len(self.worker.leaders))]
            record = self.worker.merge(walk.tensor, unit, results, write, self._space())
            self.journal.unit(record)
            return lambda: self._merged(walk)

        self._run(queue, work, more)

    def _measured(
        self, walk: _Walk, unit: int, parts: list[Summary], last: int, merges: bool, queue: deque[tuple[_Walk, int]]
    ) -> None:
        for total, part in zip(walk.totals, parts):
            total.add(unit, part)
        walk.left -= 1
        if walk.left == 0:
            for total in walk.totals:
                total.check(len(self.plan.tensors[walk.tensor].units))
            self._finish(walk, {g: total.total for (g, _), total in zip(walk.wanted, walk.totals)})
            self._advance(walk, last, merges, queue)

    def _merged(self, walk: _Walk) -> None:
        walk.left -= 1
        if walk.left == 0:
            self.worker.memo.drop(walk.tensor)
            self.worker.check_sums(walk.tensor, self.journal.units)

    def _finish(self, walk: _Walk, totals: dict[int, Summary]) -> None:
        """Reduces one step of a tensor for every group that has it."""
        name = self.plan.tensors[walk.tensor].name
        for group, stages in enumerate(self.worker.stages):
            if walk.step >= len(stages):
                continue
            stage, results = stages[walk.step], self.journal.results.of(group, name)
            if stage.name in results:
                continue
            task = self.worker.task(self.worker.leaders[group], walk.tensor)
            if group in totals:
                self.journal.stage(group, name, stage.name, stage.reduce(totals[group], task, results))
            else:
                self.journal.results.put(group, name, stage.name, stage.skip(task, results))
        walk.step += 1

    def _advance(self, walk: _Walk, last: int, merges: bool, queue: deque[tuple[_Walk, int]]) -> None:
        """Moves a tensor to its next stage that needs measuring, or to the merge; its units go to the front."""
        tensor = self.plan.tensors[walk.tensor]
        units = range(len(tensor.units))
        while tensor.carry is None and walk.step < last:
            walk.wanted = self._pending(walk.step, walk.tensor)
            if walk.wanted and len(units):
                walk.left = len(units)
                walk.totals = [Total(stage, len(self.plan.experts_of(tensor))) for _, stage in walk.wanted]
                queue.extendleft((walk, unit) for unit in reversed(units))
                return
            self._finish(walk, {})
        walk.step, walk.wanted = last, []
        if merges:
            left = [unit for unit in units if (walk.tensor, unit) not in self.journal.units]
            walk.left = len(left)
            queue.extendleft((walk, unit) for unit in reversed(left))
        else:
            self.worker.memo.drop(walk.tensor)

    # -- threads --------------------------------------------------------------------------------------------------

    def _space(self) -> Space:
        if not hasattr(self._spaces, "space"):
            self._spaces.space = Space()
        return self._spaces.space

    def _run(
        self, queue: deque[T], work: Callable[[T], Callable[[], None]], more: Callable[[], bool] | None = None
    ) -> None:
        """Works off a queue that may grow; `work` runs in parallel, what it returns one at a time.

        `more` fills an empty queue (while work is under way it may fill it later). The first error stops all threads.
        """
        failures: list[BaseException] = []
        busy = 0

        def step() -> bool:
            """One item, or the news that there is none; whatever goes wrong goes wrong for the whole run."""
            nonlocal busy
            with self._lock:
                while not queue and not failures and not (more is not None and more()) and busy:
                    self._lock.wait()
                if failures or not queue:
                    return False
                item = queue.popleft()
                busy += 1
            try:
                finish = work(item)
            except BaseException:
                with self._lock:
                    busy -= 1
                raise
            with self._lock:
                # in one breath: between the two, others would see neither work under way nor what follows from it
                busy -= 1
                if not failures:
                    finish()
                    self.tick(self.worker.inputs.bytes_read)
                self._lock.notify_all()
            return True

        def loop() -> None:
            try:
                while step():
                    pass
            except BaseException as error:
                failures.append(error)
            finally:
                with self._lock:
                    self._lock.notify_all()

        threads = [threading.Thread(target=loop, daemon=True, name=f"rlmerge-{i}") for i in range(self.threads)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)
        except BaseException as error:
            failures.append(error)
            with self._lock:
                self._lock.notify_all()
            for thread in threads:
                thread.join()
            raise
        if failures:
            raise failures[0]
        if queue:
            raise RuntimeError(f"{len(queue)} units of work were left undone")
