"""A plan: what to compute, from which bytes, into which bytes, as plain data (JSON). `planner` makes it.

With a plan and the paths in it, any worker can measure or merge any unit. Its digest covers the versions, the recipe,
the plugin and the inputs, so that a run is only ever continued by itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from math import prod
from typing import Any

import xxhash

from rlmerge.checkpoint.fisher import FisherFolder
from rlmerge.checkpoint.folder import Checkpoint
from rlmerge.checkpoint.gram import GramFolder
from rlmerge.checkpoint.layout import WIDTH, OutputFile
from rlmerge.checkpoint.restack import Stack
from rlmerge.checkpoint.vocabulary import Vocabulary
from rlmerge.methods.base import Method
from rlmerge.parameters import Resolved, Resolver, Spot
from rlmerge.plugins import origin_of
from rlmerge.recipe import Recipe
from rlmerge.version import VERSION

FORMAT = 2


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes of one stored tensor: index of the file in the plan, first byte, dtype, number of bytes.

    `kind` is 'dense', or how the two `parts` of a Fisher make a tensor: see `checkpoint.fisher`; or 'packed': steps
    from the base's words, with the table of their chunks as the one part, or without any where nothing changed.
    """

    file: int
    start: int
    dtype: str
    nbytes: int
    kind: str = "dense"
    parts: tuple[Place, ...] = ()


@dataclass(frozen=True, slots=True)
class GatheredPlace(Place):
    """A tensor in the order of a new vocabulary: its row r is what map number `rows` of the plan says of r.

    file     of the model that it stands for; `dtype` is what is read, whatever the rows are stored in
    nbytes   of the gathered tensor
    origins  where each model of the map stores the tensor, or None
    """

    rows: int = 0
    origins: tuple[Place | None, ...] = ()


@dataclass(frozen=True, slots=True)
class ExpertSource:
    """One expert's version of a tensor: 'tensor' (stored values), 'low_rank' (the base's + scale·B·A), 'sum' (stored
    values + scale·B·A), 'base' (unchanged).
    """

    kind: str
    place: Place | None = None
    a: Place | None = None
    b: Place | None = None
    rank: int = 0
    scale: float = 0.0
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One output tensor: where its inputs lie, what happens to it, how it is cut into units and blocks.

    carry      why it is copied from the base instead of merged, or None
    block      coordinates of a block; units are multiples of it
    units      [start, stop) in coordinates; a single one for methods of grain 'matrix'
    fishers    also of a tensor that is carried: they count in the mean of a Fisher
    fisher_sums  Σ F of each, where every fisher.json records it and the merge will read them
    fisher_digests  xxh3-128 of each, where every fisher.json records it beside the sum and the tensor is one unit
    repeats    the tensor of which it is a tied copy, or '': both are made with the random numbers, parameters and
               Fishers of that one, so that the copies stay equal
    part, spot the part of the recipe that makes it, and where it stands in a slice
    base_sum   the weighted sum (hex) that delta packs say the base's words have, or ''
    grams      fp32[in, in] of each expert's inputs, or none; `gram_digests`: xxh3-128 where every gram.json records it
    gram_first   the inputs run along the first dimension of the tensor, not along the last
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    base: Place | None
    experts: tuple[ExpertSource, ...]
    fishers: tuple[Place, ...]
    carry: str | None
    block: int
    units: tuple[tuple[int, int], ...]
    repeats: str = ""
    fisher_sums: tuple[float, ...] = ()
    fisher_digests: tuple[str, ...] = ()
    base_sum: str = ""
    part: int = 0
    spot: Spot | None = None
    grams: tuple[Place, ...] = ()
    gram_digests: tuple[str, ...] = ()
    gram_first: bool = False

    @property
    def size(self) -> int:
        """Number of coordinates."""
        return prod(self.shape)

    @property
    def known_as(self) -> str:
        """The name that decides parameters and random numbers."""
        return self.repeats or self.name


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One input file: as its header says, not as it is named."""

    path: str
    size: int
    digest: str
    model: str


@dataclass(frozen=True)
class Plan:
    """Everything a worker needs to know. `variants` are the recipes of a sweep (one, as a rule) over the same inputs.

    `block` is the most coordinates of a block. `has_base` is False for averages without a base: then the donor only
    lends names, dtypes and files. `part_experts` are the experts of each part of the recipe, `experts` all of them.
    `stacks` say which layers the output has, where they are others than the donor's; `roles`, for sliced models,
    whether a tensor outside of the layers belongs before or after them. `vocabulary` is the output's, where the recipe
    says how it comes about; `chat_template` the template that it names. `tied` is what config.json must say of
    embedding and head, where the donor's says something else.
    """

    variants: tuple[Recipe, ...]
    experts: tuple[str, ...]
    has_base: bool
    files: tuple[FileEntry, ...]
    tensors: tuple[TensorPlan, ...]
    outputs: tuple[OutputFile, ...]
    layers: int
    notes: tuple[str, ...]
    donor: Checkpoint
    models: tuple[Checkpoint, ...]
    base: Checkpoint | None
    fishers: tuple[FisherFolder, ...]
    block: int
    part_experts: tuple[tuple[str, ...], ...]
    stacks: tuple[Stack, ...] = ()
    roles: Mapping[str, str] = field(default_factory=dict)
    vocabulary: Vocabulary | None = None
    chat_template: str | None = None
    grams: tuple[GramFolder, ...] = ()
    tied: bool | None = None

    @property
    def recipe(self) -> Recipe:
        """The first variant; all variants agree on inputs, dtype and rounding."""
        return self.variants[0]

    @property
    def methods(self) -> list[Method]:
        """The methods that take part, each once."""
        return list({id(recipe.method): recipe.method for recipe in self.variants}.values())

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-able data, without times and without anything that depends on this run."""
        return json.loads(self._text())

    def _text(self) -> str:
        """The canonical JSON. json opens the plan's objects itself, four times as fast as `asdict` would."""
        data = {
            "format": FORMAT,
            "rlmerge": VERSION,
            "block": self.block,
            "variants": [recipe.to_dict() for recipe in self.variants],
            "plugins": [asdict(origin) for origin in map(origin_of, self.methods) if origin],
            "experts": list(self.experts),
            "has_base": self.has_base,
            "layers": self.layers,
            "part_experts": [list(keys) for keys in self.part_experts],
            "files": self.files,
            "tensors": self.tensors,
            "outputs": [output.to_dict() for output in self.outputs],
            "rows": self.vocabulary.table.digest() if self.vocabulary else "",
        }

        def opened(entry: Any) -> dict[str, Any]:
            return {name: getattr(entry, name) for name in entry.__slots__}

        return json.dumps(data, sort_keys=True, separators=(",", ":"), default=opened)

    def experts_of(self, tensor: TensorPlan) -> tuple[str, ...]:
        """The experts of a tensor, in the order of its sources."""
        return self.part_experts[tensor.part]

    def places_of(self, tensor: TensorPlan) -> list[int]:
        """The number among all experts of each expert of a tensor."""
        return [self.experts.index(key) for key in self.experts_of(tensor)]

    def digest(self) -> str:
        """xxh3-128 of the canonical JSON: versions, recipes, plugins, inputs (paths, sizes, headers), layout."""
        return xxhash.xxh3_128_hexdigest(self._text().encode())

    @property
    def values_read(self) -> int:
        """Stored values that one reading of base, experts and Fishers takes; packed steps at what NumPy needs for them.

        A byte of steps, about one change, takes it as long as three values (measured: 29 ns).
        """
        merged = [tensor for tensor in self.tensors if tensor.carry is None]
        places = [source.place for tensor in merged for source in tensor.experts]
        packed = sum(place.nbytes for place in places if place is not None and place.kind == "packed")
        return sum(t.size * (1 + len(t.experts) + len(t.fishers)) for t in merged) + 3 * packed

    def unit_list(self) -> list[tuple[int, int]]:
        """All units in plan order as (tensor, unit) indices."""
        return [(t, u) for t, tensor in enumerate(self.tensors) for u in range(len(tensor.units))]


class PartResolver:
    """The parameters of a recipe at the tensors of a plan, each by the part that makes it."""

    def __init__(self, recipe: Recipe, layers: int) -> None:
        self.parts = tuple(Resolver(part.recipe, recipe.method, layers) for part in recipe.parts)

    def resolve(self, tensor: TensorPlan, name: str = "") -> Resolved:
        """The parameters at a tensor, known by this name, or else by the one that decides parameters."""
        return self.parts[tensor.part].resolve(name or tensor.known_as, tensor.spot)


def without_records(plan: Plan) -> Plan:
    """The same plan, believing no fisher.json: for who hands out tensors before the last one is checked."""
    tensors = tuple(
        tensor  # nothing else tells the sum of a sparse Fisher
        if any(place.kind == "sparse" for place in tensor.fishers)
        else replace(tensor, fisher_sums=(), fisher_digests=())
        for tensor in plan.tensors
    )
    return replace(plan, tensors=tensors)


def sum_bytes(plan: Plan, fisher_passes: int = 1) -> dict[str, int]:
    """Bytes that one reading of all inputs and one writing of the output move."""
    read = fisher = 0
    for tensor in plan.tensors:
        read += tensor.base.nbytes if tensor.base else 0
        for source in tensor.experts:
            given = [place for place in (source.place, source.a, source.b) if place]
            read += sum(place.nbytes + sum(part.nbytes for part in place.parts) for place in given)
        fisher += sum(place.nbytes for place in tensor.fishers)
        read += sum(place.nbytes for place in tensor.grams)
    written = sum(tensor.size * WIDTH[tensor.dtype] for tensor in plan.tensors)
    return {"read": read, "fisher": fisher * fisher_passes, "written": written}
