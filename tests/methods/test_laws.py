"""The declared laws of all registered methods, over dtypes, numbers of models, shapes of tensors and kinds of support.

Every method that is registered is here by itself. A law is tried in two ways: on random models by hypothesis, and over
a grid. The grid crosses method × law × number of models (1 to 5, as far as the method goes), and method × dtype (fp32,
bf16, fp16) × number of models over the laws of the method; the long suite crosses all of these. Every model of the grid
holds tensors of size 0, 1 and 2, vectors, matrices, three dimensions, one that nobody changed and one that a single
model changed; whether one model is the base itself, and whether deltas tie, takes turns.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.checkpoint.checkpoint_files import write_tensors
from tests.methods.small_models import (
    FORMS,
    SHAPES,
    Tensors,
    fitting,
    make_recipe,
    merge_values,
    needed_globals,
    needed_weights,
    representable,
    same_bits,
    same_values,
    sparse_model,
    write_all,
)

import rlmerge

SEEDS = st.integers(0, 2**32)
LAWS = ("identity", "permutation", "zero", "scaling", "sign")
KERNELS = "kernels"
"""Beside the laws: compiled and NumPy kernels give the same bits."""
DECLARED = [(name, law) for name in rlmerge.method_names() for law in sorted(rlmerge.get_method(name).laws)]

CUT = ("dots", "ota", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della", "della_linear")
"""Methods that cut nothing by default: their laws are those of half a density, too."""
PLAIN = {name: {"density": 1.0} for name in ("sar", "dots", "ota")} | {
    name: {"epsilon": 0} for name in ("ram", "ramplus", "ramplus_tl")
}
"""Parameters under which a law holds exactly: nothing cut by default, no published constants."""
DATA_FREE = {"sar": {"sensitivity": "delta2"}}


# ---- Models -----------------------------------------------------------------------------------------------------

ODD = {
    "empty": (0,),
    "empty.rows": (0, 4),
    "scalar": (),
    "one": (1,),
    "two": (2,),
    "two.column": (2, 1),
    "vector": (9,),
    "norm.weight": (1, 11),
    "matrix.weight": (6, 8),
    "kernel.weight": (3, 2, 4),
    "nobody.weight": (4, 6),
    "single.weight": (5, 4),
}


@dataclass(frozen=True)
class Case:
    """One point of the grid."""

    dtype: str
    count: int
    idle: bool
    """The last model is the base itself."""
    ties: bool
    """Deltas are few multiples of a step."""

    @property
    def keys(self) -> list[str]:
        """The models."""
        return [f"e{k}" for k in range(self.count)]

    def models(self) -> tuple[Tensors, dict[str, Tensors]]:
        """The base and the experts; numbers that the dtype holds, so that no case rests on rounding."""
        rng = np.random.default_rng([ord(self.dtype[0]), self.count, self.idle, self.ties])
        base = {name: representable(rng.standard_normal(shape), self.dtype) for name, shape in ODD.items()}
        experts: dict[str, Tensors] = {}
        for number, key in enumerate(self.keys):
            tensors = {}
            for name, value in base.items():
                step = rng.integers(-3, 4, value.shape) * 0.25 if self.ties else rng.standard_normal(value.shape)
                moved = representable(value + np.asarray(step, np.float32), self.dtype)
                share = 0.0 if "nobody" in name or ("single" in name and number) else 0.6
                tensors[name] = np.where(rng.random(value.shape) < share, moved, value).astype(np.float32)
            experts[key] = dict(base) if self.idle and number == self.count - 1 else tensors
        return base, experts

    def fishers(self) -> dict[str, Tensors]:
        """Fishers in steps of 1/8, zeros among them, so that their sums are exact in any order."""
        rng = np.random.default_rng(9)
        return {key: {n: rng.integers(0, 9, s).astype(np.float32) / 8 for n, s in ODD.items()} for key in self.keys}


def counts(method: str, law: str) -> list[int]:
    """The numbers of models up to 5 that the method takes, and that the law speaks of."""
    arity = rlmerge.get_method(method).arity
    return [1] if law == "identity" else list(range(arity.minimum, min(arity.maximum or 5, 5) + 1))


def grid(method: str, law: str) -> list[Case]:
    """A case for every number of models, dtypes in turn (each at least once); the law decides where the turn begins."""
    numbers = counts(method, law)
    cases = []
    for start in (0, 2) if law == KERNELS else (LAWS.index(law),):
        for turn, count in enumerate(numbers * -(-len(FORMS) // len(numbers)), start):
            cases.append(Case(FORMS[turn % 3], count, idle=turn % 2 == 1 and count > 1, ties=turn // 2 % 2 == 1))
    return cases


def whole_grid(method: str, law: str) -> list[Case]:
    """Everything crossed with everything."""
    product = itertools.product(FORMS, counts(method, law), (False, True), (False, True))
    return [Case(*point) for point in product if point[1] > 1 or not point[2]]


def law_recipe(folder: Path, method: str, keys: list[str], cut: bool = True, data_free: bool = False) -> rlmerge.Recipe:
    """The method with its defaults, except where a law needs others; with `cut`, methods that can cut do.

    Fishers are given to a method that reads them under these parameters.
    """
    entry = rlmerge.get_method(method)
    keys = fitting(method, keys)
    parameters = PLAIN.get(method, {}) | needed_globals(method) | (DATA_FREE.get(method, {}) if data_free else {})
    parameters |= {"density": 0.5} if cut and method in CUT else {}
    values = {spec.name: spec.default for spec in entry.parameters} | parameters
    return make_recipe(folder, method, keys, parameters, needed_weights(method, keys), entry.uses_fisher(values))


# ---- Laws -------------------------------------------------------------------------------------------------------


class Law:
    """A law of one method on models in one folder."""

    def __init__(self, folder: Path, method: str, dtype: str, base: Tensors, experts: dict[str, Tensors], **options):
        self.folder, self.method, self.dtype, self.base, self.experts = folder, method, dtype, base, experts
        self.options = options

    def merge(self, keys: list[str], **more: bool) -> Tensors:
        found = merge_values(law_recipe(self.folder, self.method, keys, **self.options, **more))
        return {name: value.astype(np.float32) for name, value in found.items()}

    def write(self, base: Tensors, experts: dict[str, Tensors]) -> None:
        write_all(self.folder, base, experts, dtype=self.dtype)

    def deltas(self, factor: float) -> Tensors:
        """The merge of the scaled models as deltas: their base is zero."""
        scaled = {key: {n: v * np.float32(factor) for n, v in values.items()} for key, values in self.experts.items()}
        self.write({name: np.zeros_like(value) for name, value in self.base.items()}, scaled)
        return self.merge(list(self.experts))

    def permutation(self) -> None:
        """The order in which models are written changes no bit."""
        self.write(self.base, self.experts)
        keys = list(self.experts)
        results = [self.merge(order) for order in (keys, keys[::-1], keys[1:] + keys[:1])[: len(keys)]]
        assert all(same_bits(results[0], other) for other in results[1:])

    def scaling(self) -> None:
        """δ → 2^k·δ scales the merged delta by 2^k, bitwise; of subnormal fp16 numbers up to a step."""
        plain = self.deltas(1.0)
        for factor in (2.0**4, 2.0**-3):
            found = self.deltas(factor)
            for name, value in plain.items():
                expected, step = value * np.float32(factor), max(1.0, factor)
                tiny = (self.dtype == "F16") & (np.abs(expected) < 2.0**-14 * step)
                close = np.abs(found[name] - expected) <= np.where(tiny, 2.0**-24 * step, 0.0)
                assert close.all(), (factor, name)

    def sign(self) -> None:
        """-δ gives minus the merged delta."""
        assert same_values({name: -value for name, value in self.deltas(1.0).items()}, self.deltas(-1.0))

    def identity(self) -> None:
        """One model, at weight 1, comes back."""
        self.write(self.base, self.experts)
        assert same_values(self.merge(["e0"], cut=False), self.experts["e0"])

    def zero(self) -> None:
        """Experts that equal the base give the base; a tensor that nobody changed is the base's."""
        self.write(self.base, self.experts)
        found = self.merge(list(self.experts))
        same = [n for n in self.base if all((values[n] == self.base[n]).all() for values in self.experts.values())]
        assert same_bits({name: found[name] for name in same}, {name: self.base[name] for name in same})
        self.write(self.base, dict.fromkeys(self.experts, self.base))
        assert same_bits(self.merge(list(self.experts)), self.base)


def hold(folder: Path, method: str, law: str, cases: list[Case]) -> None:
    """The law in every case, or an error that names the case."""
    for case in cases:
        for key, tensors in case.fishers().items():
            write_tensors(folder / f"fisher_{key}" / "fisher.safetensors", tensors, "F32")
        try:
            getattr(Law(folder, method, case.dtype, *case.models()), law)()
        except Exception as error:
            error.add_note(f"{method}, {law}, {case}")
            raise


@pytest.mark.parametrize(("method", "law"), DECLARED)
def test_laws_over_the_grid(tmp_path, method, law):
    hold(tmp_path, method, law, grid(method, law))


@pytest.mark.long
@pytest.mark.parametrize(("method", "law"), DECLARED)
def test_laws_over_the_whole_grid(tmp_path, method, law):
    hold(tmp_path, method, law, whole_grid(method, law))


@pytest.mark.parametrize("method", rlmerge.method_names())
def test_the_grid_has_every_pair(method):
    """A method meets each dtype with each number of models, ties and none, and (of several) one that is the base."""
    laws = [*rlmerge.get_method(method).laws, KERNELS]
    cases = [case for law in laws for case in grid(method, law)]
    numbers = counts(method, KERNELS)
    assert {(case.dtype, case.count) for case in cases} == set(itertools.product(FORMS, numbers))
    assert {case.ties for case in cases} == {False, True}
    assert {case.idle for case in cases if case.count > 1} == ({False, True} if numbers[-1] > 1 else set())


@pytest.mark.parametrize(("method", "law"), DECLARED)
@settings(max_examples=settings.default.max_examples // 3)
@given(SEEDS, st.booleans())
def test_declared_laws_hold(tmp_path_factory, method, law, seed, ties):
    folder = tmp_path_factory.mktemp("laws")
    rng = np.random.default_rng(seed)
    base, experts = sparse_model(rng, 3, grid=ties)
    for key in experts:
        fisher = {name: (rng.integers(0, 9, shape) / 8).astype(np.float32) for name, shape in SHAPES.items()}
        write_tensors(folder / f"fisher_{key}" / "fisher.safetensors", fisher, "F32")
    getattr(Law(folder, method, "F32", base, experts, data_free=True), law)()


# ---- What holds of every method -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", rlmerge.method_names())
def test_kernels_agree_over_the_grid(tmp_path, method):
    """Compiled and NumPy kernels give the same bits, of tensors of every shape."""
    for case in grid(method, KERNELS):
        base, experts = case.models()
        write_all(tmp_path, base, experts, case.fishers(), case.dtype)
        recipe = law_recipe(tmp_path, method, case.keys)
        assert same_bits(merge_values(recipe, kernels="numba"), merge_values(recipe, kernels="numpy")), case


@pytest.mark.parametrize("method", rlmerge.method_names())
def test_registry_entries_are_complete(method):
    entry = rlmerge.get_method(method)
    assert entry.name == method
    assert entry.laws <= set(LAWS)
    assert entry.laws
    assert entry.summary
    assert entry.formula
    assert entry.source
    assert entry.grain in ("element", "row", "matrix")
    for spec in entry.parameters:
        assert spec.doc
        assert spec.kind != "choice" or spec.default in spec.choices
