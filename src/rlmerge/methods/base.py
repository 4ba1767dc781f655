"""The contract between the engine and a merge method: parameters, blocks, stages, the merge of one block.

A method is a pure function of blocks: no file, no global state, no knowledge of threads or machines. Everything that
it must know before it can merge a block (thresholds, norms, means) is a *stage*: a measure over blocks whose summaries
add up in block order, and a reduction to a small result. Stages and merge see the same `Block` and the same `Task`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from math import prod
from types import ModuleType
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from rlmerge.kernels import CANCELS

Grain = Literal["element", "row", "matrix"]
Scope = Literal["tensor", "model"]
Law = Literal["permutation", "scaling", "identity", "sign", "zero"]
Summary = dict[str, NDArray[Any]]
Result = dict[str, Any]
Kept = TypeVar("Kept")


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a method: its place in the recipe, type, range, default and meaning.

    `default` None means required. `per_model` parameters may stand under a model or in the global `parameters:`;
    the others in the global ones only. `late` ones are used by the merge alone, so a sweep over them measures once.
    """

    name: str
    kind: Literal["number", "integer", "flag", "choice"]
    default: float | int | bool | str | None
    doc: str
    per_model: bool = False
    late: bool = False
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    """An exclusive lower bound."""
    flags: tuple[str, str] | None = None
    """What `true` and `false` mean for a choice that mergekit has as a flag."""


def weights_cancel(weight: NDArray[np.float64]) -> bool:
    """Whether weights cannot be divided by their sum, because it is 0 or only rounding."""
    return abs(float(np.sum(weight))) <= CANCELS * float(np.sum(np.abs(weight)))


@dataclass(frozen=True, slots=True)
class Arity:
    """How many models a method takes beside the base, and whether it needs one."""

    minimum: int = 1
    maximum: int | None = None
    base: Literal["required", "optional"] = "required"


@dataclass(frozen=True, slots=True)
class Origin:
    """The plugin that a method comes from: the name of its file, and the xxh3-128 of its source."""

    file: str
    digest: str


@dataclass(frozen=True, slots=True)
class Task:
    """What a method knows of one tensor before it sees a number of it.

    values       the global parameters at this tensor (gradients and filters resolved)
    per_model    the per-model parameters at this tensor, each fp64[K] in the order of `experts`
    keys         uint64[K], one hash key an expert: (seed, method, expert, tensor)
    key          the same without an expert
    fisher       whether every expert has a Fisher for this tensor
    repeats      whether it is the second copy of a tied tensor
    fisher_sums  Σ F of each expert's Fisher where the files record it, else empty
    gram         the dimension along which the inputs of a linear layer run, where every expert has their Gram matrix;
                 else None
    group        number of the points of a sweep that measure alike: what one group keeps is not another's
    """

    tensor: str
    shape: tuple[int, ...]
    experts: tuple[str, ...]
    values: Mapping[str, Any]
    per_model: Mapping[str, NDArray[np.float64]]
    keys: NDArray[np.uint64]
    key: int
    fisher: bool
    repeats: bool = False
    fisher_sums: tuple[float, ...] = ()
    group: int = 0
    gram: int | None = None

    @property
    def size(self) -> int:
        """Number of coordinates."""
        return prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """At least two dimensions of size > 1: only such tensors are sparsified by SAR (design, section 2)."""
        return sum(side > 1 for side in self.shape) >= 2


@dataclass
class Patch:
    """Coordinates of a block that one expert alone changed, or (one patch a block) that several changed.

    experts      int64[E]: the one expert, or all K
    where        int32[m], ascending: the coordinates in the block
    delta        fp64[E, m]: deltas there, unweighted; 0 where that expert changed nothing (the filter η applied)
    """

    experts: NDArray[np.int64]
    where: NDArray[np.int32]
    delta: NDArray[np.float64]

    @property
    def alone(self) -> bool:
        """Whether one expert changed all of it and nobody else did."""
        return self.delta.shape[0] == 1


class Block(ABC):
    """A run of n consecutive coordinates of one tensor, as the base, K experts and their Fishers have them.

    Nothing is read before it is asked for: a method that never looks at `fisher` costs no byte of it. RL updates are
    sparse: a method of deltas works on `patches`, which hold every coordinate that some expert changed, each once, and
    asks for base, stored values and Fishers there. `base`, `expert` and `fisher` decode the whole block.

    A delta is `float64(expert) - float64(reference)`, formed by the engine: the reference is the base, or the base cast
    to the narrower dtype of the expert and back, or nothing where the expert already is a delta (LoRA; then
    `additive[k]` is true and expert[k] holds δ). So every method sees one rule, whatever an expert was stored as.
    Arrays belong to the engine: read them, copy them, do not write into them.

    start        flat offset of the first coordinate in the tensor
    size         n
    kernels      the loops to use, `rlmerge.kernels.compiled` or `.plain`: same names, same bits
    """

    start: int
    size: int
    kernels: ModuleType

    @property
    @abstractmethod
    def base(self) -> NDArray[np.float32]:
        """fp32[n]; zeros where the merge has no base."""

    @property
    @abstractmethod
    def expert(self) -> NDArray[np.float32]:
        """fp32[K, n]: values, or deltas where additive."""

    @property
    @abstractmethod
    def additive(self) -> NDArray[np.bool_]:
        """bool[K]."""

    @property
    @abstractmethod
    def comparable(self) -> NDArray[np.bool_]:
        """bool[K]: the expert is stored as a value whose reference is the base itself, so base + δ is that value."""

    @property
    @abstractmethod
    def fisher(self) -> NDArray[np.float32]:
        """fp32[K, n], or [0, 0] where this tensor has none."""

    @property
    @abstractmethod
    def patches(self) -> list[Patch]:
        """Every coordinate that some expert changed: a patch for each expert that alone changed some, in the order of
        experts, then what several changed. Patches of no coordinate are left out.
        """

    @abstractmethod
    def base_at(self, where: NDArray[np.int32]) -> NDArray[np.float64]:
        """The base at some coordinates, fp64[m]."""

    @abstractmethod
    def stored_at(self, experts: NDArray[np.int64], where: NDArray[np.int32]) -> NDArray[np.float64]:
        """What the files of some experts hold at some coordinates, fp64[E, m] (deltas where additive)."""

    @abstractmethod
    def fisher_at(self, experts: NDArray[np.int64], where: NDArray[np.int32]) -> NDArray[np.float32]:
        """The Fishers of some experts at some coordinates, fp32[E, m]."""

    @property
    @abstractmethod
    def roomy(self) -> bool:
        """Whether there is memory for all that stages may keep of this tensor; if not, keep what is dear to make."""

    @abstractmethod
    def keep(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """`make()`, or what it returned in an earlier stage if there was memory to keep it.

        For arrays (or lists and dataclasses of arrays) that cost more to make than to hold.
        """


def kept_patches(block: Block) -> list[Patch]:
    """The patches of a block, for methods that go over them in a stage and in the merge again."""
    return block.keep("patches", lambda: block.patches) if block.roomy else block.patches


class Whole(ABC):
    """A whole tensor, for methods of grain 'matrix': read block by block whenever it is asked for, and not kept.

    changed      bool[K]: the expert differs from its reference somewhere
    finite       no delta is NaN or infinite
    """

    changed: NDArray[np.bool_]
    finite: bool

    @abstractmethod
    def base(self) -> NDArray[np.float64]:
        """The base, fp64 in the tensor's shape; a new array."""

    @abstractmethod
    def expert(self, expert: int) -> NDArray[np.float64]:
        """The base and one expert's delta, fp64 in the tensor's shape; a new array."""

    @abstractmethod
    def combine(self, coefficients: NDArray[np.float64]) -> NDArray[np.float64]:
        """Σ c[i]·δi, fp64 in the tensor's shape; a new array. Experts are added in their order, those of 0 left out."""

    @abstractmethod
    def gram(self, expert: int) -> NDArray[np.float64]:
        """The Gram matrix of an expert's inputs, fp64[in, in], where `Task.gram` says that there is one; a new array.

        Finite, symmetric, its diagonal not negative.
        """

    def delta(self, expert: int) -> NDArray[np.float64]:
        """One expert's delta, fp64 in the tensor's shape; a new array."""
        only = np.zeros(len(self.changed))
        only[expert] = 1.0
        return self.combine(only)


@dataclass(slots=True)
class Change:
    """New values fp64[m] at coordinates `where` int32[m] of a block whose base holds `old` fp64[m] there."""

    where: NDArray[np.int32]
    old: NDArray[np.float64]
    values: NDArray[np.float64]

    def applied(self, block: Block) -> Change:
        """Itself; an `Update` makes one of these, for methods that go on with what another method has made."""
        return self


@dataclass(slots=True)
class Update:
    """base + scale·(gain·t) at coordinates `where` int32[m]: the engine adds t fp64[m] to the base that it holds."""

    where: NDArray[np.int32]
    update: NDArray[np.float64]
    gain: float
    scale: float

    def applied(self, block: Block) -> Change:
        """The same as new values."""
        old = block.base_at(self.where)
        return Change(self.where, old, old + self.scale * (self.gain * self.update))


@dataclass(slots=True)
class Average:
    """Σ weight[k]·θk in every coordinate, weight fp64[K]: the engine adds up the stored words that it holds."""

    weight: NDArray[np.float64]

    @property
    def is_copy(self) -> bool:
        """One model as it is: the signs of its zeros stay, which a sum would lose."""
        return self.weight.tolist() == [1.0]

    def applied(self, block: Block) -> NDArray[np.float64]:
        """The values, fp64[n]."""
        out = np.empty(block.size)
        if self.is_copy and not block.additive[0]:
            out[:] = block.expert[0]
            return out
        block.kernels.linear(block.base, block.expert, block.additive, self.weight, out)
        return out


@dataclass(slots=True)
class Merged:
    """What a method makes of one block, rounded once later, and statistics that add up.

    `values`: changes of the base, no coordinate twice; or fp64[n], every coordinate of the block, also as an average.
    """

    values: list[Change | Update] | NDArray[np.float64] | Average
    stats: Summary = field(default_factory=dict)


class Stage(ABC):
    """One measure over all blocks and its reduction. Summaries add up in block order: the same bits for any threads."""

    name: str
    scope: Scope = "tensor"
    carried: bool = False
    """Whether tensors that are copied and not merged are measured, too, where they have a Fisher."""

    def needed(self, task: Task, results: Mapping[str, Result]) -> bool:
        """Whether this tensor must be measured; if not, the tensor has no share in the summary."""
        return True

    def known(self, task: Task) -> Summary | None:
        """The summary of a whole tensor where small files tell it and nothing must be read (scope 'model' only)."""
        return None

    @abstractmethod
    def empty(self, count: int) -> Summary:
        """The summary of nothing, for `count` experts."""

    @abstractmethod
    def measure(self, block: Block, task: Task, results: Mapping[str, Result], summary: Summary) -> None:
        """Adds one block to the summary of its unit, in place. The blocks of a unit come in order."""

    def combine(self, total: Summary, part: Summary) -> None:
        """Adds the summary of the next unit to that of the units before it, in place (sums, unless a stage differs)."""
        for key, value in part.items():
            total[key] += value

    def skip(self, task: Task, results: Mapping[str, Result]) -> Result:
        """The result where this tensor need not be measured: that of nothing, unless a stage knows better."""
        return self.reduce(self.empty(len(task.experts)), task, results)

    @abstractmethod
    def reduce(self, total: Summary, task: Task, results: Mapping[str, Result]) -> Result:
        """The result that later stages and the merge see: JSON-able, with floats that survive JSON.

        At scope 'model' the task is that of the whole model: its tensor is '' and its shape (number of coordinates,).
        """


class Method(ABC):
    """A merge method: what it is called, what it takes, which laws it obeys, what it does to a block."""

    name: str
    summary: str
    formula: str
    source: str
    parameters: tuple[Parameter, ...] = ()
    arity: Arity = Arity()
    base_entry: Literal["model", "origin", "first"] = "model"
    """What an entry of `models` is that names an optional base: one more model; nothing, for deltas start there; or the
    model to begin with, wherever it stands."""
    grain: Grain = "element"
    """`row`: blocks hold whole rows (a row is what one index of the first dimension has; a vector is one row)."""
    laws: frozenset[Law] = frozenset()
    deterministic: bool = True
    symmetric: bool = True
    """Whether the order of the models means nothing; then they are processed in the order of their keys."""
    origin: Origin | None = None
    """Where a plugin's method comes from; rlmerge's own have none."""

    @property
    def averages_base(self) -> bool:
        """Whether a base is one more model to average: a recipe that gives every model its parameters gives it some."""
        return self.arity.base == "optional" and self.base_entry == "model" and self.arity.maximum != 1

    def check(self, values: Mapping[str, Any], per_model: Mapping[str, NDArray[np.float64]]) -> list[str]:
        """What is wrong with this combination of parameters, one sentence each; nothing if all is well."""
        return []

    def misfit(self, models: int, has_base: bool) -> str:
        """What is wrong with this number of models, within the arity, beside a base or without one; '' if nothing."""
        return ""

    @property
    def fisherless(self) -> str:
        """The way out of every message about a Fisher: the choice that reads none, or another method."""
        free = any(spec.name == "sensitivity" and "delta2" in spec.choices for spec in self.parameters)
        return "set `sensitivity: delta2`" if free else "choose a method that needs no Fisher"

    def uses_fisher(self, values: Mapping[str, Any]) -> bool:
        """Whether these global parameters make the method read Fishers."""
        return False

    def uses_gram(self, values: Mapping[str, Any]) -> bool:
        """Whether these global parameters make the method read Gram matrices of inputs."""
        return False

    def stages(self, values: Mapping[str, Any]) -> tuple[Stage, ...]:
        """The stages in their order, for these global parameters."""
        return ()

    def factors(self, task: Task, results: Mapping[str, Result]) -> list[float]:
        """The rescale factor of each expert at this tensor, for the report; empty where nothing is rescaled."""
        return []

    def whole(self, tensor: Whole, task: Task, results: Mapping[str, Result]) -> NDArray[np.float64] | None:
        """The merged values of a whole tensor, fp64[n]; None leaves it to `merge`. Only for grain 'matrix'."""
        return None

    def whole_cost(
        self, tensor: str, shape: tuple[int, ...], values: Mapping[str, Any], experts: int, gram: int | None = None
    ) -> tuple[float, int]:
        """What `whole` takes for a tensor: singular value decompositions of its shape (or their time), and bytes, at
        most. `gram` as in `Task`.
        """
        return 0, 0

    @abstractmethod
    def merge(self, block: Block, task: Task, results: Mapping[str, Result]) -> Merged:
        """The merged values of one block."""
