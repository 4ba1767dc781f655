"""The table of all methods, as cells: tuned on the first pair of experts, then measured on test problems of each pair.

The experts are those that come with the package, a pair (math and code) for each training seed. Of a method, every
setting of its grid is merged in memory and evaluated on validation problems of the first pair; the best one and the
defaults are then merged to a folder and evaluated on test problems of both pairs. The second pair had no say in it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import xxhash

from rlmerge.demo.assets import DATA, EXPERTS, models_digest
from rlmerge.lab.cells import Cell, input_of, lab_work, model_of, opened_root, read_cell
from rlmerge.lab.contenders import INPUTS, Contender, inputs_of, write_recipe
from rlmerge.lab.errors import LabError
from rlmerge.lab.grids import Entry, Setting, entries
from rlmerge.lab.presets import DOMAINS, TINY, Preset
from rlmerge.lab.schedule import Step, in_own_process, run
from rlmerge.methods import get_method

VARIANTS = ("default", "tuned")


@dataclass(frozen=True)
class TablePreset(Preset):
    """Sizes of the table; `methods` are labels of its rows.

    tuning     validation problems of each domain
    repeats    merges of which the fastest counts
    """

    tuning: int = 300
    repeats: int = 5


TABLE = TablePreset(
    **{
        **vars(TINY),
        "name": "methods",
        "kinds": ("rlvr",),
        "tuning": 300,
        "seconds": {"models": 2, "fisher": 5, "gram": 5, "eval": 4, "tune": 25, "score": 7},
    }
)


def run_table(out: Path, preset: TablePreset, workers: int, tell: Callable[[Step], None] = lambda step: None) -> Path:
    """Makes the table in `out`, and returns its page; what is there already is not done again.

    Raises LabError if `out` holds something else, such as a table of other models or grids.
    """
    from rlmerge.lab.table_page import write_table

    with opened_root(out, preset, f"{models_digest()} {_grids_digest(preset)}"):
        run(out, preset, workers, tell, table_cells(preset), table_work)
        return write_table(out, preset)


def _grids_digest(preset: TablePreset) -> str:
    return xxhash.xxh3_64_hexdigest(repr(entries(preset.methods)).encode())


def experts_of(seed: int) -> dict[str, str]:
    """The pair of a training seed, by domain."""
    return {domain: f"rlvr-{domain}-{seed}" for domain in DOMAINS}


def table_cells(preset: TablePreset) -> list[Cell]:
    """All cells, each after those it needs. Inputs are made for the pairs of which some setting needs them."""
    rows = entries(preset.methods)
    used = {kind for entry in rows for setting in entry.settings for kind in _inputs(entry, setting)}
    found = [Cell("models", "models")]
    found += [Cell(f"{kind}-{name}", kind, ("models",)) for kind in INPUTS if kind in used for name in EXPERTS]
    found += [Cell(f"eval-{name}", "eval", ("models",)) for name in ("base", *EXPERTS)]
    found += [Cell(f"tune-{entry.label}", "tune", _needs(entry, preset.seeds[0])) for entry in rows]
    for seed in preset.seeds:
        for entry in rows:
            needs = _needs(entry, seed)
            found.append(Cell(score_name(seed, "default", entry), "score", needs))
            found.append(Cell(score_name(seed, "tuned", entry), "score", (*needs, f"tune-{entry.label}")))
    return found


def score_name(seed: int, variant: str, entry: Entry) -> str:
    """The cell that measures a row at its defaults or tuned, for one pair."""
    return f"score-{seed}-{variant}-{entry.label}"


def _inputs(entry: Entry, setting: Setting) -> tuple[str, ...]:
    return inputs_of(get_method(entry.method), setting)


def _needs(entry: Entry, seed: int) -> tuple[str, ...]:
    kinds = dict.fromkeys(kind for setting in entry.settings for kind in _inputs(entry, setting))
    return ("models", *(f"{kind}-{expert}" for kind in kinds for expert in experts_of(seed).values()))


def table_work(root: Path, preset: Preset, cell: Cell) -> Iterator[tuple[str, Any]]:
    """Does a cell of the table; yields what it measured."""
    assert isinstance(preset, TablePreset)
    if cell.kind == "models":
        _unpack_models(root)
    elif cell.kind == "tune":
        yield from _tuned(root, preset, _entry(cell.name.removeprefix("tune-")))
    elif cell.kind == "score":
        _, seed, variant, label = cell.name.split("-", 3)
        yield from _scored(root, preset, int(seed), variant, _entry(label))
    else:
        yield from lab_work(root, preset, cell)


@cache
def _entry(label: str) -> Entry:
    return next(entry for entry in entries() if entry.label == label)


def _unpack_models(root: Path) -> None:
    """Base and experts as folders, so that each can be what a merge begins with."""
    from rlmerge.packs.restore import unpack

    base = model_of(root, "base")
    shutil.copytree(model_of(DATA, "base"), base, dirs_exist_ok=True)
    for name in EXPERTS:
        if not model_of(root, name).exists():
            model_of(root, name).parent.mkdir(parents=True, exist_ok=True)
            unpack(model_of(DATA, name), model_of(root, name), base=base, threads=1)


def write_setting(root: Path, entry: Entry, setting: Setting, seed: int, name: str) -> Path:
    """Writes the recipe of a row at a setting, for the experts of a seed, to recipes/NAME.yml."""
    pair = experts_of(seed)
    onto = setting.get("onto", "")
    taken = [domain for domain in DOMAINS if domain != onto and entry.only in ("", domain)]
    experts = {pair[domain]: model_of(root, pair[domain]) for domain in taken}
    whole = {key: value for key, value in setting.items() if key != "onto" and not isinstance(value, tuple)}
    pairs = {key: value for key, value in setting.items() if isinstance(value, tuple)}
    each = {pair[domain]: {key: value[number] for key, value in pairs.items()} for number, domain in enumerate(DOMAINS)}
    contender = Contender(entry.label, entry.method, whole, _inputs(entry, setting), each if pairs else {})
    inputs = {kind: {expert: input_of(root, kind, expert) for expert in experts} for kind in INPUTS}
    out = root / "recipes" / f"{name}.yml"
    write_recipe(contender, model_of(root, pair[onto] if onto else "base"), experts, inputs, out)
    return out


def _tuned(root: Path, preset: TablePreset, entry: Entry) -> Iterator[tuple[str, Any]]:
    """Tries the settings on validation problems; the best mean of both domains wins, of equal ones the first."""
    tried = []
    for number, setting in enumerate(entry.settings):
        name = f"tune-{entry.label}-{number}"
        recipe = write_setting(root, entry, setting, preset.seeds[0], name)
        tried.append(_evaluated(root, preset, recipe, name, entry.label, "validation", preset.tuning))
    means = [round(sum(one[domain] for domain in DOMAINS) / len(DOMAINS), 9) for one in tried]  # equal ones are equal
    chosen = means.index(max(means))
    yield "tried", tried
    yield "chosen", chosen
    yield from ((domain, tried[chosen][domain]) for domain in DOMAINS)


def _scored(root: Path, preset: TablePreset, seed: int, variant: str, entry: Entry) -> Iterator[tuple[str, Any]]:
    """Merges in a process of its own, as `merge_cost` says, and evaluates the folder on test problems."""
    from rlmerge.lab.merge_cost import merge_and_measure

    chosen = read_cell(root, f"tune-{entry.label}")["chosen"] if variant == "tuned" else 0
    yield "setting", chosen
    if variant == "tuned" and not chosen:
        return  # the defaults, which are measured already
    name = score_name(seed, variant, entry)
    recipe = write_setting(root, entry, entry.settings[chosen], seed, name)
    out = model_of(root, name)
    out.parent.mkdir(parents=True, exist_ok=True)
    yield "merge", in_own_process(merge_and_measure, recipe, out, preset.repeats)
    yield from _evaluated(root, preset, out, name, entry.label, "test", preset.problems).items()
    shutil.rmtree(out.parent)  # its recipe stays


def _evaluated(
    root: Path, preset: TablePreset, model: Path, name: str, label: str, split: str, problems: int
) -> dict[str, Any]:
    """Greedy accuracy of a folder or a recipe's merge by domain, and what tells its weights from others."""
    from rlmerge.evaluate.backend import Sampling
    from rlmerge.evaluate.results import scores
    from rlmerge.evaluate.run import TransformersBackend, evaluate, load_model
    from rlmerge.evaluate.tasks import load_task

    backend = TransformersBackend(*load_model(model), batch=preset.eval_batch)
    found: dict[str, Any] = {"weights": backend.identity}
    sampling = Sampling(max_new_tokens=preset.max_new_tokens)
    for domain in DOMAINS:
        task = load_task(preset.tasks[domain], split, problems)
        out = root / "results" / name / f"{domain}.jsonl"
        made = scores(evaluate(backend, task, out, label=name, sampling=sampling, role="merged", name=label))
        found[domain] = sum(c / n for c, n in zip(made.c, made.n)) / len(made.ids)
    return found


def chosen_results(root: Path, seed: int, variant: str, entry: Entry) -> str:
    """The cell that holds what a row measured: that of its defaults, too, where tuning has chosen them."""
    name = score_name(seed, variant, entry)
    if "merge" not in (found := read_cell(root, name)):
        if variant == "default":
            raise LabError(f"{root}: {name} holds no merge: {sorted(found)}. Remove cells/{name}.json.")
        return score_name(seed, "default", entry)
    return name
