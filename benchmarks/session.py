"""One invocation of the benchmark: measures the rows that are asked for and missing, and writes the report.

Kinds of cells: rows in which contenders take turns, and single ones (start-up, profiles, agreement with mergekit).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import agree
import measure
import mergekit_env
import models
import rows
from cells import Cell, Store, begun, measure_cell, next_run, summary, write_json
from contenders import METHODS, Place
from rows import Row

HERE = Path(__file__).resolve().parent

HELP_RUNS = 5
SECTIONS = ("help", "small", "nothing", "experts", "memory", "spectral", "profile", "methods", "agree", "large")
"""In the order in which they are measured."""
PROFILED = ("ties", "sar")


class Bench:
    """One invocation: what is asked for, where it is kept, and the program that is measured."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.small = args.small
        self.out = (args.out or args.data / "out").resolve()
        self.store = Store(self.out / ("cells-small" if self.small else "cells"), args.fresh)
        self.rlmerge = args.rlmerge.absolute()
        self.source = source_digest(self.rlmerge)
        self.main = "small" if self.small else "0.5B"
        self.rows = self._rows()

    def _rows(self) -> dict[str, list[Row]]:
        """All rows of all sections, whether asked for or not."""
        runs, skip = self.args.runs, self.args.skip_mergekit
        tiny = "tiny" if self.small else "135M"
        sizes = ("tiny", "small") if self.small else ("135M", "0.5B", "1.5B")
        large = "small" if self.small else "1.5B"
        return {
            "small": rows.start_up(tiny, runs),
            "nothing": rows.nothing(self.main, runs),
            "experts": rows.counts(tiny, runs),
            "memory": rows.memory(sizes),
            "spectral": rows.spectral(("tiny",) if self.small else ("square", "oblong")),
            "methods": rows.against("methods", self.main, tuple(METHODS), runs, skip),
            "large": rows.against("large", large, rows.LARGE, runs, skip),
        }

    def wanted(self, row: Row) -> bool:
        """Whether a row is asked for."""
        names = self.args.methods
        asked = row.section in self.args.sections and (not names or (row.method.merge or row.method.name) in names)
        return asked and (self.args.large or (row.section != "large" and row.size != "1.5B"))

    def place(self, size: str) -> Place:
        """Where models of a size are."""
        return Place((self.args.data / size).resolve(), self.out, self.rlmerge)

    def identity(self, row: Row) -> dict[str, Any]:
        """What a cell is a measurement of."""
        found = {
            "recipe": row.method.recipe("bfloat16"),
            "size": row.size,
            "threads": row.threads,
            "contenders": list(row.contenders),
            "source": self.source,
        }
        return found | ({"mergekit": mergekit_env.REQUIREMENTS} if "mergekit" in row.contenders else {})

    def measure(self, row: Row) -> Cell:
        """One row, as far as it is not measured yet."""
        place, method = self.place(row.size), row.method
        recipe, inputs = place.write_recipe(method, "bfloat16"), place.inputs(method)
        commands = place.commands(method, recipe, row.threads)
        own = f"{row.section}-{row.name}" if "first" in row.contenders else method.merge or method.name
        kernels = self.out / "kernels" / own

        def once(name: str) -> measure.Measurement:
            return place.once(commands[name], inputs, kernels, empty=name == "first")

        cell = self.store.load(row.section, row.name, self.identity(row))
        if "size" not in cell:
            cell |= {
                "size": row.size,
                "label": dict(row.label),
                "input_mb": round(sum(path.stat().st_size for path in inputs) / 1e6, 1),
                "output_mb": round(place.output_bytes() / 1e6, 1),
                "stages": stages(self.rlmerge, recipe, place.data),
            }
        measure_cell(
            cell,
            row.contenders,
            row_runs(row, self.args),
            once,
            lambda made: self.store.save(row.section, row.name, made),
            lambda text: say(f"{row.section:<9}{row.name:<20}{text.replace(f'{HERE.parent}/', '')}"),
        )
        place.clear()
        return cell

    def whole(self, row: Row) -> dict[str, Any] | None:
        """The summary of a row, or None while something of it is missing."""
        cell = begun(self.store.load(row.section, row.name, self.identity(row)))
        if next_run(cell, row.contenders, row_runs(row, self.args), time.time()) is not None:
            return None
        return summary(cell)

    def report(self) -> dict[str, Any]:
        """All that is measured of this rlmerge, and the names of what is missing."""
        found: dict[str, Any] = {
            "date": time.strftime("%Y-%m-%d"),
            "load_now": round(os.getloadavg()[0], 2),
            "machine": measure.machine(self.out),
            "versions": versions(self.rlmerge, self.args.skip_mergekit),
            "parameters": {name: size.parameters() for name, size in models.SIZES.items()},
            "runs": self.args.runs,
            "sections": {},
            "missing": [],
        }
        for section, list_of_rows in self.rows.items():
            for row in list_of_rows:
                made = self.whole(row)
                if made is None:
                    found["missing"].append(f"{section}/{row.name}")
                else:
                    found["sections"].setdefault(section, {})[row.name] = made
        for section, names in (("help", ["help"]), ("profile", PROFILED), ("agree", self.agreeing())):
            for name in names:
                cell = self.store.load(section, name, self.plain_identity(section, name))
                if "found" not in cell:
                    found["missing"].append(f"{section}/{name}")
                else:
                    found["sections"].setdefault(section, {})[name] = cell["found"]
        return found

    def agreeing(self) -> list[str]:
        """Methods that can be compared with mergekit's."""
        return [] if self.args.skip_mergekit else [name for name, method in METHODS.items() if method.mergekit]

    def plain_identity(self, section: str, name: str) -> dict[str, Any]:
        """Identity of a cell without turns."""
        dtype = "float32" if section == "agree" else "bfloat16"
        recipe = METHODS[name].recipe(dtype, agree=section == "agree") if name in METHODS else None
        return {"section": section, "recipe": recipe, "size": self.main, "source": self.source}

    def once_only(self, section: str, name: str, make: Callable[[], dict[str, Any]]) -> None:
        """A cell that is measured by one function call."""
        identity = self.plain_identity(section, name)
        cell = self.store.load(section, name, identity)
        if "found" not in cell:
            cell["found"] = make()
            if cell["found"].get("verdict") != "failed":
                self.store.save(section, name, cell)

    def help(self) -> dict[str, Any]:
        """How long each tool takes to print its help: its start-up."""
        commands = {"rlmerge": [str(self.rlmerge), "--help"]}
        if not self.args.skip_mergekit:
            commands["mergekit"] = [str(mergekit_env.executable()), "--help"]
        cell = begun({"identity": {}})
        log = self.out / "log.txt"
        measure_cell(
            cell,
            tuple(commands),
            HELP_RUNS,
            lambda name: measure.run(commands[name], self.out, log),
            lambda _: None,
            lambda text: say(f"help     {text}"),
        )
        return summary(cell)

    def profile(self, name: str) -> dict[str, Any]:
        """Where the time of one thread goes, median of three runs by their whole time."""
        place, method = self.place(self.main), METHODS[name]
        recipe, inputs = place.write_recipe(method, "bfloat16"), place.inputs(method)
        kernels = self.out / "kernels" / f"methods-{name}"
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(kernels), "HF_HUB_OFFLINE": "1"}
        command = [str(self.rlmerge.parent / "python"), str(HERE / "profile_merge.py"), str(recipe), str(self.out)]
        made = []
        for turn in range(4):
            measure.warm(inputs)
            os.sync()
            done = subprocess.run(command, cwd=place.data, env=environment, check=True, capture_output=True, text=True)
            made.append(json.loads(done.stdout.splitlines()[-1]))
            say(f"profile  {name:<20}{turn}/3 {made[-1]['total']:8.2f} s")
        return sorted(made[1:], key=lambda one: one["total"])[1]

    def agree(self, name: str) -> dict[str, Any]:
        """Runs both tools with `dtype: float32`, and with bfloat16, and compares their outputs."""
        place, method = self.place("tiny" if self.small else "small"), METHODS[name]
        found: dict[str, Any] = {}
        for dtype in ("float32", "bfloat16"):
            recipe = place.write_recipe(method, dtype, agree=True)
            commands = place.commands(method, recipe)
            kept = {tool: self.out / f"{name}-{tool}" for tool in ("rlmerge", "mergekit")}
            try:
                for tool, folder in kept.items():
                    shutil.rmtree(folder, ignore_errors=True)
                    place.once(commands[tool], place.inputs(method), self.out / "kernels" / "agree")
                    (place.out / "merged").replace(folder)
                if dtype == "bfloat16":
                    if not method.random:
                        found["bf16"] = agree.compare_bf16(*kept.values())
                elif method.random:
                    found = agree.compare_drawn(*kept.values(), place.data)
                else:
                    found = agree.compare(*kept.values(), place.data, method)
            except (measure.CommandError, ValueError) as error:
                found |= {"error": str(error).replace(f"{HERE.parent}/", ""), "verdict": "failed", "reason": ""}
                break
            finally:
                place.clear()
                for folder in kept.values():
                    shutil.rmtree(folder, ignore_errors=True)
        say(agree.describe(name, found))
        return found

    def everything(self, results: Path) -> None:
        """Measures what is asked for and missing, writing the report after each row."""
        args = self.args
        asked = [row for section in SECTIONS for row in self.rows.get(section, []) if self.wanted(row)]
        for size, have in rows.needs(asked).items():
            models.ensure((args.data / size).resolve(), models.SIZES[size], **have)
        if {"profile", "agree"} & set(args.sections):
            models.ensure(self.place(self.main).data, models.SIZES[self.main])
            agreeing = "tiny" if self.small else "small"
            models.ensure(self.place(agreeing).data, models.SIZES[agreeing], fishers=0)
        self.out.mkdir(parents=True, exist_ok=True)
        for section in (one for one in SECTIONS if one in args.sections):
            if section == "help":
                self.once_only("help", "help", self.help)
            elif section in ("profile", "agree"):
                for name in PROFILED if section == "profile" else self.agreeing():
                    if not args.methods or name in args.methods:
                        self.once_only(section, name, lambda s=section, n=name: getattr(self, s)(n))
            for row in self.rows.get(section, []):
                if self.wanted(row) and self.whole(row) is None:
                    self.measure(row)
                    write_json(results, self.report())
        write_json(results, self.report())


def row_runs(row: Row, args: argparse.Namespace) -> int:
    """Turns of a row: no more than asked for."""
    return min(row.runs, args.runs) if row.section != "small" else row.runs


STAGES = """
import json, sys
from pathlib import Path
from rlmerge import parse_recipe
from rlmerge.plan import PartResolver
from rlmerge.planner import make_plan
plan = make_plan(parse_recipe(Path(sys.argv[1]).read_text(), folder=Path.cwd()))
merged = next(tensor for tensor in plan.tensors if tensor.carry is None)
values = PartResolver(plan.recipe, plan.layers).resolve(merged).values
print(json.dumps([stage.name for stage in plan.recipe.method.stages(values)]))
"""


def stages(rlmerge: Path, recipe: Path, data: Path) -> list[str]:
    """What the method measures before it merges, as rlmerge itself has it."""
    command = [str(rlmerge.parent / "python"), "-c", STAGES, str(recipe)]
    done = subprocess.run(command, cwd=data, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def source_digest(rlmerge: Path) -> str:
    """What tells one rlmerge from another: a digest of its source."""
    python = rlmerge.parent / "python"
    code = "import pathlib, rlmerge; print(pathlib.Path(rlmerge.__file__).parent)"
    done = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True)
    folder, state = Path(done.stdout.strip()), hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        state.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return state.hexdigest()[:16]


def commit_of_source() -> str | None:
    """The last commit that changed rlmerge's source, with a mark if there are changes since."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words, "--", "src"], cwd=HERE.parent, capture_output=True, text=True)
        return done.stdout.strip()

    commit = git("log", "-1", "--format=%h", "--abbrev=12")
    return f"{commit}{'-dirty' if git('status', '--porcelain') else ''}" if commit else None


def versions(rlmerge: Path, skip_mergekit: bool) -> dict[str, Any]:
    """Versions of all that is measured, the commit (with a mark if the tree has changes), the digest of the source."""
    names = ("rlmerge", "numpy", "numba", "safetensors")
    found: dict[str, Any] = {"python": sys.version.split()[0]}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    found["commit"] = commit_of_source()
    found["source"] = source_digest(rlmerge)
    if not skip_mergekit:
        found["mergekit"] = mergekit_env.versions()
    return found


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)
