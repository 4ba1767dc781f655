"""`rlmerge inspect`: what training did, on one screen and in one JSON document."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlmerge import kernels
from rlmerge.disk_errors import disk_errors
from rlmerge.errors import MissingExtraError, OutputError, RecipeError
from rlmerge.figures import as_text, gathered, short_names

from .options import Parser, at_least, declare_download, declare_output, declare_report, parse_bytes
from .show import ReadingLine, warn

if TYPE_CHECKING:
    from rlmerge.geometry.document import Document, Evidence, Number, Scope
    from rlmerge.geometry.function import FunctionSettings
    from rlmerge.geometry.matrix_figures import SpectraSettings

NULLS = ("none", "masks", "all")
USAGE = "[OPTIONS] BASE EXPERT [EXPERT ...]"
DESCRIPTION = """\
See what training did to make experts of a base: how much changed and by how
much, what experts share and where they conflict, beside a null model, and what
storing a merge would keep; a verdict and a recipe.

One reading for all coordinate-wise measures, and three for TIES and SAR in
bf16. -o writes all of it as JSON: per tensor, layer, kind of module, total;
--html as one page to look at."""


def declare(parser: Parser) -> None:
    """Its arguments."""
    add = parser.add_argument
    add("base", metavar="BASE", help="model folder that the experts were trained from")
    add("experts", metavar="EXPERT", nargs="+", help="model folder, delta pack, LoRA folder, or model+lora")
    add("--name", metavar="NAME", action="append", default=[], help="what an expert is called; once for each")
    add("-o", "--out", metavar="FILE", type=Path, help="write the whole document (.json)")
    declare_report(parser)
    add("--recipe", metavar="FILE", type=Path, help="write the recommended recipe (.yml)")
    add("--trajectory", action="store_true", help="the experts are checkpoints of one run, in their order")
    add("--no-null", action="store_true", help="leave out the null model")
    add("--no-storage", action="store_true", help="leave out what average, sum, TIES and SAR would keep in bf16")
    add("--spectra", action="store_true", help="decompose every matrix, too: minutes to hours")
    add("--spectra-null", metavar="WHAT", choices=NULLS, help="of shuffled updates: none, masks (default), all")
    add("--spectra-exact", action="store_true", help="never by a random sketch, however large the matrix")
    add("--data", metavar="[NAME=]FILE", action="append", default=[], help="measure loss and KL, too (extra 'model')")
    add("--source", metavar="S", default="own", help="with --data: own (default) right answers, gold or sampled")
    add("--sequences", metavar="N", type=at_least(1), help="with --data: sequences of each set; default 64")
    add("--max-new-tokens", metavar="N", type=at_least(1), default=256, help="with --data: of sampling; default 256")
    add("--points", metavar="N", type=at_least(0), default=11, help="with --data: of a path; default 11, 0 for none")
    add("--pass-rate", metavar="N", type=at_least(0), default=0, help="with --data: problems answered at each point")
    add("--unsafe-exec", action="store_true", help="run model-written code although nothing isolates it")
    add("--seed", metavar="N", type=at_least(0), default=0, help="of null model, samples and directions; default 0")
    add("--threads", metavar="N", type=at_least(1), help="worker threads; default: all processors")
    add("--memory", metavar="SIZE", help="bound on memory, such as 600MB")
    add("--kernels", metavar="KIND", default="auto", help="numba, numpy (the same bits, slowly), or auto (default)")
    declare_download(parser)
    declare_output(parser)


def run(given: Namespace) -> None:
    """Measures, writes, and prints a summary."""
    from rlmerge.execute.memory import hold_memory
    from rlmerge.execute.safe_files import write_inside
    from rlmerge.geometry.inspect import inspect
    from rlmerge.report.outputs import check_apart, check_places, write_outputs

    if given.out is not None:
        _check_out(given.out)
    check_places(given.html, given.figures)
    for option, path in (("--out", given.out), ("--html", given.html), ("--figures", given.figures)):
        check_apart(option, path, [given.base, *given.experts])
    hold_memory()
    kernels.skip_blas = not (_asks_spectra(given) or given.data)
    line = ReadingLine(given.quiet)
    try:
        found = inspect(
            given.base, given.experts, names=given.name, null=not given.no_null, storage=not given.no_storage,
            trajectory=given.trajectory, spectra=_spectra(given), data=_data(given.data), function=_function(given),
            recipe=given.recipe, seed=given.seed, threads=given.threads, memory=parse_bytes(given.memory, "--memory"),
            kernels=given.kernels, download=given.download, progress=line,
        )  # fmt: skip
    finally:
        line.close()
    if given.out is not None:
        text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        with disk_errors():
            write_inside(given.out.absolute().parent, given.out.name, text.encode())
    if given.html is not None or given.figures is not None:
        from rlmerge.report.geometry_page import geometry_page

        write_outputs(geometry_page(found), given.html, given.figures)
    if given.json:
        json.dump(found, sys.stdout, allow_nan=False)
        print()
    elif not given.quiet:
        _show(found)
        written = (
            (given.out, "the whole document"), (given.html, "the page"), (given.figures, "its figures"),
            (given.recipe, "the recommended recipe"),
        )  # fmt: skip
        lines = [f"{path}: {what}" for path, what in written if path is not None]
        print("\n".join(["", *lines]) if lines else "", end="\n" if lines else "")


def _check_out(path: Path) -> None:
    """Raises OutputError before hours of work where the document cannot be written."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        what = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise OutputError(f"--out {path}: {what}. Write the name of a file, such as report.json.")
    if path.exists():
        try:
            earlier = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            earlier = None
        if not isinstance(earlier, dict) or not str(earlier.get("schema", "")).startswith("rlmerge.geometry/"):
            raise OutputError(
                f"--out {path}: is there, and no report of rlmerge inspect. Write another name, or remove it."
            )


def _asks_spectra(given: Namespace) -> bool:
    """Settings of spectra ask for them, too."""
    return given.spectra or given.spectra_exact or given.spectra_null is not None


def _spectra(given: Namespace) -> SpectraSettings | bool:
    """How matrices are measured, if they are."""
    if not _asks_spectra(given):
        return False
    from rlmerge.geometry.matrix_figures import SpectraSettings

    return SpectraSettings(null=given.spectra_null or "masks", exact=given.spectra_exact, seed=given.seed)


def _data(given: list[str]) -> str | dict[str, str] | None:
    """'--data FILE' for all experts, '--data NAME=FILE' for one each."""
    pairs = [text.partition("=") for text in given]
    if any(equals for _, equals, _ in pairs):
        if not all(equals for _, equals, _ in pairs):
            raise RecipeError("--data: give one FILE for all experts, or NAME=FILE for each of them.")
        return {name: file for name, _, file in pairs}
    if len(given) > 1:
        raise RecipeError("--data is given several times without names: write NAME=FILE for each expert.")
    return given[0] if given else None


def _function(given: Namespace) -> FunctionSettings | None:
    """How function space is measured; nothing without --data."""
    if not given.data:
        return None
    try:
        from rlmerge.fisher.data import SequenceChoice
        from rlmerge.geometry.function import FunctionSettings
    except ModuleNotFoundError as error:
        raise MissingExtraError("rlmerge inspect --data", error.name or "torch", "model") from None
    choice = SequenceChoice(given.source, given.sequences, max_new_tokens=given.max_new_tokens, seed=given.seed)
    return FunctionSettings(
        choice, points=given.points, pass_rate=given.pass_rate, seed=given.seed, unsafe=given.unsafe_exec,
        threads=given.threads,
    )  # fmt: skip


# -- on the screen -----------------------------------------------------------------------------------------------------


def _show(found: Document) -> None:
    total = found["coordinates"]["total"] if "coordinates" in found else None
    assert total is not None
    keys = list(total["experts"])
    print(f"{found['base']['reference']}: {total['coordinates']:,} coordinates, {found['base']['dtype']}\n")
    print(as_text(_experts(total, keys)))
    if total["pairs"]:
        print("\n" + as_text(_pairs(total, keys)))
    if "trajectory" in total:
        run = total["trajectory"]
        shares = run["never"], run["consistently"], run["cancelled"]
        print("\n trajectory: never {}, consistently {}, cancelled {}".format(*map(_percent, shares)))
    if "storage" in found:
        rows = [
            [_method(one), _percent(one["survival"]), _plain(one["cosine"]), _plain(one["norm_ratio"])]
            for one in found["storage"]["merges"]
        ]
        print("\n" + as_text([["stored in bf16", "survival", "cosine", "norm"], *rows]))
    _show_verdict(found)


def _experts(total: Scope, keys: list[str]) -> list[list[str]]:
    rows = [["", *short_names(keys)]]
    each = [total["experts"][key] for key in keys]
    rows.append(["support", *(_percent(one["support"]) for one in each)])
    rows.append(["support of bf16 casts", *(_percent(one["support_bf16"]) for one in each)])
    rows.append(["changes above 1e-5", *(_percent(_above(one["sweep"]["absolute"], 1e-5)) for one in each)])
    rows.append(["norm of the update", *(f"{one['norm']:.3g}" for one in each)])
    rows.append(["relative to the base", *(_small(one["relative_norm"]) for one in each)])
    rows.append(["changes of one step", *(_percent(_one_step(one["steps"])) for one in each)])
    rows.append(["unique to it", *(_percent(total["regions"]["unique"][key]) for key in keys)])
    return rows


def _pairs(total: Scope, keys: list[str]) -> list[list[str]]:
    names = dict(zip(keys, short_names(keys)))
    nulls = total["null"]["pairs"] if "null" in total else [None] * len(total["pairs"])
    rows = [["(null model)", "cosine", "Jaccard", "lift", "conflict of overlap", "of energy"]]
    for pair, null in zip(total["pairs"], nulls):
        cells = [f"{names[pair['a']]}, {names[pair['b']]}"]
        for key, shown in (("cosine", _plain), ("jaccard", _plain), ("lift", _plain)):
            cells.append(_beside(shown(pair[key]), None if null is None else shown(null[key])))
        for key in ("conflict_overlap", "conflict_energy"):
            cells.append(_beside(_percent(pair[key]), None if null is None else _percent(null[key])))
        rows.append(cells)
    return rows


def _show_verdict(found: Document) -> None:
    if "verdict" not in found:
        return
    verdict = found["verdict"]
    keys = [expert["key"] for expert in found["experts"]]
    names = dict(zip(keys, short_names(keys), strict=True))
    print(f"\n{verdict['looks']}")
    for key, one in verdict["experts"].items():
        print(f" {names[key]}: {one['looks']}; {'; '.join(map(_evidence, one['evidence']))}")
    for reason in verdict["recommended"]["reasons"]:
        print(f" {reason}")
    print("\n" + verdict["recommended"]["recipe"].rstrip())
    sys.stdout.flush()
    for text in gathered(verdict["warnings"], names):
        warn(text)


def _evidence(one: Evidence) -> str:
    said = {"rlvr": "RLVR", "sft": "SFT", "none": "neither"}[one["vote"]]
    return f"{one['criterion']} {_small(one['value'])}: {said} (RLVR {one['rlvr']}, SFT {one['sft']})"


def _method(one: Any) -> str:
    given = {key: value for key, value in one["settings"].items() if one["method"] not in ("average", "sum")}
    return " ".join([one["method"], *(f"{key} {value}" for key, value in given.items())])


def _above(sweep: list[Any], bound: float) -> Number:
    return next((one["share"] for one in sweep if one["above"] == bound), None)


def _one_step(steps: Any) -> Number:
    return dict(zip(steps["at_least"], steps["share"])).get(1)


def _beside(text: str, null: str | None) -> str:
    return text if null is None else f"{text} ({null})"


def _percent(share: Number) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _plain(value: Number) -> str:
    return "-" if value is None else f"{value:.3f}"


def _small(value: Number) -> str:
    return "-" if value is None else f"{value:.2g}"
