"""What storing a merge in bf16 would keep of its updates, for methods that take more than one reading: the engine's own
run of the method's plan, of which nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlmerge.execute.journal import Journal
from rlmerge.execute.local import Threads
from rlmerge.execute.report import collect
from rlmerge.execute.schedule import Run
from rlmerge.execute.work import Worker
from rlmerge.kernels import Backend, load_kernels
from rlmerge.plan import without_records
from rlmerge.planner import make_plan
from rlmerge.recipe import Recipe
from rlmerge.settings import DEFAULT_SHARD_BYTES, KEPT_AT_MOST, KEPT_BYTES, limit_threads, make_variants

from .coordinates import Reading
from .document import Stored
from .summary import ratio

PREDICTED: tuple[tuple[str, tuple[dict[str, float | str], ...]], ...] = (
    ("ties", ({"density": 1.0}, {"density": 0.2})),
    ("sar", ({"sensitivity": "delta2"},)),
)
"""Methods with the settings of which survival is predicted; everything else is the method's default, weights 1."""

Make = Callable[[str, Mapping[str, Any]], Recipe]
"""A recipe over the models that are inspected, by method and settings."""


def predict_survival(
    make: Make,
    threads: int,
    memory: int | None = None,
    kernels: Backend = "auto",
    progress: Callable[[Reading], None] = lambda step: None,
) -> list[Stored]:
    """Survival, cosine and norm ratio of TIES and SAR in bf16, as the reports of such merges would give them.

    Raises what the merges would raise.
    """
    found: list[Stored] = []
    for method, points in PREDICTED:
        reports = _run(make, method, points, threads, memory, kernels, progress)
        for settings, report in zip(points, reports, strict=True):
            found.append(_stored(method, settings, report["total"]))
    return found


def _run(
    make: Make, method: str, points: Sequence[dict[str, float | str]], threads: int, memory: int | None,
    kernels: Backend, progress: Callable[[Reading], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """The reports of one method at several settings, from one run in memory."""
    from threadpoolctl import threadpool_limits

    recipe = make(method, {"weight": 1.0, "out_dtype": "bfloat16", **points[0]})
    variants = make_variants(recipe, points)
    with recipe.located():
        plan = without_records(make_plan(variants[0], variants, DEFAULT_SHARD_BYTES))
    progress(Reading(0, 0, f"what {method} would keep in bf16"))
    threads = limit_threads(threads, memory, plan)
    worker = Worker(plan, load_kernels(kernels, plan.values_read), min(threads * KEPT_BYTES, KEPT_AT_MOST))
    try:
        with threadpool_limits(1):
            journal = Journal(None, "", [])
            doer = Threads(worker, lambda variant, tensor, start, data: None, threads)
            run = Run(worker, journal, doer, lambda count: progress(Reading(count, 0)))
            run.merge(run.measure(), range(len(plan.tensors)))
            return collect(worker, journal)
    finally:
        worker.inputs.close()


def _stored(method: str, settings: dict[str, float | str], total: Mapping[str, Any]) -> Stored:
    wanted, real = total.get("intended_norm", 0.0), total.get("realised_norm", 0.0)
    return {
        "method": method,
        "settings": dict(settings),
        "survival": total.get("survival", {}).get("share"),
        "cosine": total.get("realised_cosine"),
        "norm_ratio": ratio(real, wanted),
    }
