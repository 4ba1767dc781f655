"""A merge method made of a plain function of NumPy arrays; `rlmerge.plugins.method` is the decorator."""

from __future__ import annotations

import keyword
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlmerge.errors import PluginError, RlmergeError

from .base import Arity, Block, Change, Merged, Method, Parameter, Result, Task, Whole

F64 = NDArray[np.float64]
Sees = Literal["changed", "every", "tensor"]
PROBES = 64
"""Coordinates of a block that are merged a second time, apart from the others."""


class FunctionMethod(Method):
    """merged = f(base, deltas, **parameters).

    sees    'changed': coordinates that some expert changed, base fp64[n] and deltas fp64[K, n]; the others keep the
            base, and each coordinate is on its own: the engine asks for any of them together
            'every': all coordinates, each on its own
            'tensor': one tensor at a time, base in its shape and deltas [K, *shape]

    Parameters come as keywords (`lambda` as `lambda_`): scalars, or one for each expert where they are per model. That
    coordinates are on their own is not believed: in every block a few are merged again without the others.
    """

    def __init__(
        self, function: Callable[..., Any], name: str, summary: str, parameters: Sequence[Parameter] = (),
        models: tuple[int, int | None] = (1, None), sees: Sees = "changed", symmetric: bool = False,
        formula: str = "", source: str = "",
    ) -> None:  # fmt: skip
        self.function = function
        self.name = name
        self.summary = summary
        self.formula = formula or (function.__doc__ or "").strip().partition("\n")[0] or "θ = f(θ0, δ)"
        self.source = source or "a function of one's own"
        # nothing is measured before the merge; only the census asks for weights
        self.parameters = tuple(replace(spec, late=spec.name != "weight") for spec in parameters)
        self.arity = Arity(*models)
        self.grain = "matrix" if sees == "tensor" else "element"
        self.symmetric = symmetric
        self.sees: Sees = sees

    def __call__(self, *arguments: Any, **parameters: Any) -> Any:
        """The function itself, for who tests it."""
        return self.function(*arguments, **parameters)

    @property
    def place(self) -> str:
        """Where the function stands: file and line."""
        code = self.function.__code__
        return f"{code.co_filename}:{code.co_firstlineno}"

    def merge(self, block: Block, task: Task, results: Mapping[str, Result]) -> Merged:
        """Calls the function for a block, and again for a few coordinates of it."""
        changed = np.zeros(block.size, np.bool_)
        for patch in block.patches:
            changed[patch.where] = True
        where = (np.arange(block.size) if self.sees == "every" else np.flatnonzero(changed)).astype(np.int32)
        if self.sees == "tensor" or not where.size:  # a tensor that nobody changed
            return Merged([])
        old, deltas = block.base_at(where), np.zeros((len(task.experts), where.size))
        place = np.empty(block.size, np.int32)
        place[where] = np.arange(where.size)
        for patch in block.patches:
            for row, k in enumerate(patch.experts.tolist()):
                deltas[k, place[patch.where]] = patch.delta[row]
        some = np.arange(0, where.size, max(2, where.size // PROBES))
        few = deltas[:, some]  # a copy: the function may write into its deltas
        merged = self._call(old, deltas, task)
        candidates = np.arange(0, block.size, max(1, block.size // PROBES))
        free = candidates[~changed[candidates]] if self.sees == "changed" else candidates[:0]
        self._probe(task, old[some], few, merged[some], block.base_at(free.astype(np.int32)), where.size)
        return Merged(merged if self.sees == "every" else [Change(where, old, merged)])

    def _probe(self, task: Task, old: F64, deltas: F64, merged: F64, base: F64, among: int) -> None:
        """Raises where the result depends on what is merged together, or where something unchanged would change.

        old, deltas and merged are those of a few coordinates among many; base is that of some which nobody changed.
        """
        with np.errstate(all="ignore"):
            found = self._call(
                np.concatenate([old, base]), np.concatenate([deltas, np.zeros((len(deltas), base.size))], axis=1), task
            )
            # sums of K terms may be added in another order
            far = np.abs(found[: old.size] - merged) > 1e-12 * np.abs(old) + 1e-6 * np.abs(deltas).max(axis=0)
            moved = np.abs(found[old.size :] - base) > 1e-12 * np.abs(base)
        if far.any():
            raise PluginError(
                f"{self.place}: method {self.name!r} at {task.tensor}: a coordinate comes out as "
                f"{merged[far][0]:.6g} among {among} and as {found[: old.size][far][0]:.6g} among {found.size}. Which "
                "ones are merged together is the engine's affair, so each must be on its own; write sees='tensor' for "
                "a function that needs a whole tensor."
            )
        if moved.any():
            raise PluginError(
                f"{self.place}: method {self.name!r} at {task.tensor}: where no expert changed anything it makes "
                f"{found[old.size :][moved][0]:.6g} of {base[moved][0]:.6g}, but it is asked for changed coordinates "
                "only. Write sees='every' if it is to change the others, too."
            )

    def whole(self, tensor: Whole, task: Task, results: Mapping[str, Result]) -> F64 | None:
        """Calls the function for a tensor, unless no expert changed it."""
        if not tensor.changed.any():
            return None
        deltas = np.stack([tensor.delta(k) for k in range(len(task.experts))])
        return self._call(tensor.base(), deltas, task).reshape(-1)

    def whole_cost(
        self, tensor: str, shape: tuple[int, ...], values: Mapping[str, Any], experts: int, gram: int | None = None
    ) -> tuple[float, int]:
        """Base, deltas, as much again for the function, and the result."""
        return 0, 8 * prod(shape) * (2 * experts + 3) if self.sees == "tensor" else 0

    def _call(self, base: F64, deltas: F64, task: Task) -> F64:
        """The function's result, fp64 in the shape of the base."""
        lent = base.view()
        lent.flags.writeable = False
        try:
            made = self.function(lent, deltas, **self._arguments(task))
        except RlmergeError:
            raise
        except (Exception, SystemExit) as error:
            place = place_of(error, {self.function.__code__.co_filename}) or self.place
            raise PluginError(
                f"{place}: method {self.name!r} at {task.tensor}, base fp64{list(base.shape)}, deltas "
                f"fp64{list(deltas.shape)}: {type(error).__name__}: {error}"
            ) from error
        made = np.asarray(made)
        if made.shape != base.shape or made.dtype.kind not in "fiu":
            found = "no array" if made.dtype == object else f"{made.dtype}{list(made.shape)}"
            raise PluginError(
                f"{self.place}: method {self.name!r} at {task.tensor} returned {found}: it must return the merged "
                f"values, one number for each of the base: fp64{list(base.shape)}."
            )
        return made.astype(np.float64, copy=False)

    def _arguments(self, task: Task) -> dict[str, Any]:
        """The parameters at this tensor, as keywords."""
        return {keyword_of(spec): _own(spec, task) if spec.per_model else task.values[spec.name]
                for spec in self.parameters}  # fmt: skip


def keyword_of(spec: Parameter) -> str:
    """What a function calls a parameter: its name, with an underscore behind a word of Python's own."""
    return f"{spec.name}_" if keyword.iskeyword(spec.name) else spec.name


def _own(spec: Parameter, task: Task) -> Any:
    """A per-model parameter, one value for each expert: numbers, flags, or words."""
    values = task.per_model[spec.name]
    if spec.kind == "choice":
        return [spec.choices[int(place)] for place in values]
    return values.astype({"integer": np.int64, "flag": np.bool_}.get(spec.kind, np.float64))


def place_of(error: BaseException, files: set[str]) -> str:
    """File and line of the innermost call in one of these files that led to an error; '' if none did."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
