"""Runs a plan: stages in their order, tensors side by side, sums in plan order; what computes a unit is an executor.

A tensor goes through its stages on its own while the others go through theirs; only a stage of scope 'model' waits for
all. Which thread or machine does what never shows in a result: summaries are added in plan order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

from rlmerge.methods.base import Stage, Summary

from .journal import Journal
from .work import Job, Outcome, Walked, Worker

T = TypeVar("T")
Wanted = list[tuple[int, Stage]]


@dataclass(frozen=True)
class Agenda(Generic[T]):
    """Work to do.

    queue   items, of which there may be more later
    job     what an item is
    settle  takes what came of an item, and may be called by several threads; what it returns is called one at a time
    more    fills an empty queue; while work is under way it may fill it later
    """

    queue: deque[T]
    job: Callable[[T], Job]
    settle: Callable[[T, Outcome], Callable[[], None]]
    more: Callable[[], bool] = lambda: False


class Executor(Protocol):
    """What does jobs: threads here (`local`), or machines (`ray_run`).

    walks       whether a tensor of one unit is one job, stages and merge: where a job costs a message, and what stages
                keep in memory is lost between jobs
    bytes_read  so far
    """

    walks: bool

    @property
    def bytes_read(self) -> int: ...

    def run(self, agenda: Agenda[Any]) -> None:
        """Works off an agenda; the first error stops all."""
        ...


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
    alone: bool = False
    wanted: Wanted = field(default_factory=list)
    totals: list[Total] = field(default_factory=list)


class Run:
    """A plan, the journal that knows what is done, and who does it. `tick` hears of bytes read after every job."""

    def __init__(
        self, worker: Worker, journal: Journal, executor: Executor, tick: Callable[[int], None] = lambda count: None
    ) -> None:
        self.worker = worker
        self.plan = worker.plan
        self.journal = journal
        self.executor = executor
        self.tick = tick
        self.merged = [t for t, tensor in enumerate(self.plan.tensors) if tensor.carry is None]
        self.steps = max((len(stages) for stages in worker.stages), default=0)

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
                self._walk_all(self.merged, first, step, merges=False)
            self._model_step(step)
            first = step + 1
        return first

    def merge(self, first: int, tensors: Iterable[int]) -> None:
        """Runs the remaining stages and the merge of these tensors."""
        tensors = list(tensors)
        self._walk_all(tensors, first, self.steps, merges=True)
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

        def wanted(unit: tuple[int, int]) -> list[tuple[int, int, Total]]:
            """Which of the chosen stages measure a unit: number, group, sum."""
            among = enumerate(chosen)
            return [(index, group, total) for index, (group, _, _, total) in among if (index, *unit) in places]

        def job(unit: tuple[int, int]) -> Job:
            name, asked = self.plan.tensors[unit[0]].name, tuple((group, step) for _, group, _ in wanted(unit))
            return Job(*unit, asked, tuple(self.journal.results.of(group, name) for group, _ in asked))

        def settle(unit: tuple[int, int], parts: Outcome) -> Callable[[], None]:
            assert isinstance(parts, list)

            def done() -> None:
                for (index, _, total), part in zip(wanted(unit), parts):
                    total.add(places[index, *unit], part)

            return done

        self._run(Agenda(deque(units), job, settle))
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

    def _walk_all(self, tensors: Iterable[int], first: int, last: int, merges: bool) -> None:
        queue: deque[tuple[_Walk, int]] = deque()
        waiting = deque(_Walk(tensor, first) for tensor in tensors)

        def more() -> bool:
            while waiting and not queue:
                self._advance(waiting.popleft(), last, merges, queue)
            return bool(queue)

        def job(item: tuple[_Walk, int]) -> Job:
            walk, unit = item
            name = self.plan.tensors[walk.tensor].name
            wanted = tuple((group, walk.step) for group, _ in walk.wanted)
            groups = [group for group, _ in wanted] or range(len(self.worker.leaders))
            results = tuple(self.journal.results.of(group, name) for group in groups)
            return Job(walk.tensor, unit, wanted, results, walk.step if walk.alone else None)

        def settle(item: tuple[_Walk, int], outcome: Outcome) -> Callable[[], None]:
            walk, unit = item
            if isinstance(outcome, list):
                return lambda: self._measured(walk, unit, outcome, last, merges, queue)
            record = outcome.record if isinstance(outcome, Walked) else outcome
            if isinstance(outcome, Walked):
                for group, stage, result in outcome.stages:
                    self.journal.stage(group, self.plan.tensors[walk.tensor].name, stage, result)
            self.journal.unit(record)
            return lambda: self._merged(walk)

        self._run(Agenda(queue, job, settle, more))

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
        left = [unit for unit in units if (walk.tensor, unit) not in self.journal.units] if merges else []
        staged = tensor.carry is None and walk.step < last
        walk.alone = self.executor.walks and staged and len(units) == len(left) == 1
        while tensor.carry is None and walk.step < last and not walk.alone:
            walk.wanted = self._pending(walk.step, walk.tensor)
            if walk.wanted and len(units):
                walk.left = len(units)
                walk.totals = [Total(stage, len(self.plan.experts_of(tensor))) for _, stage in walk.wanted]
                queue.extendleft((walk, unit) for unit in reversed(units))
                return
            self._finish(walk, {})
        if not walk.alone:
            walk.step = last
        walk.wanted = []
        if merges:
            walk.left = len(left)
            queue.extendleft((walk, unit) for unit in reversed(left))
        else:
            self.worker.memo.drop(walk.tensor)

    def _run(self, agenda: Agenda[Any]) -> None:
        """Has an agenda worked off; after every job the world hears of it."""

        def settled(item: Any, outcome: Outcome) -> Callable[[], None]:
            finish = agenda.settle(item, outcome)

            def done() -> None:
                finish()
                self.tick(self.executor.bytes_read)

            return done

        self.executor.run(replace(agenda, settle=settled))
        if agenda.queue:
            raise RuntimeError(f"{len(agenda.queue)} units of work were left undone")
