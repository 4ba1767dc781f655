"""Hypothesis profiles ('default', or HYPOTHESIS_PROFILE=long) and the long suite, which runs only when asked for."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, settings

_CHECKS = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]

# derandomize: the same examples on every run, so a red test is red everywhere. Without shrinking, a red suite is as
# quick as a green one; the long profile shrinks.
settings.register_profile(
    "default",
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=_CHECKS,
)
settings.register_profile("long", settings.get_profile("default"), max_examples=300, phases=list(Phase))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out tests marked `long` unless `-m` speaks of them."""
    if "long" in (config.option.markexpr or ""):
        return
    left_out = [item for item in items if item.get_closest_marker("long")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("long")]
