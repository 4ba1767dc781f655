"""Likelihoods and KL beside plain loops; bootstrap and barriers beside formulas; sharpness beside its closed form."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.fisher.tiny_models import make_model, make_units  # noqa: E402
from tests.geometry.test_points import Plain, make_weights, random_model  # noqa: E402

from rlmerge.errors import NonFiniteError  # noqa: E402
from rlmerge.evaluate.statistics import student_quantile  # noqa: E402
from rlmerge.fisher.data import SequenceChoice  # noqa: E402
from rlmerge.fisher.sequences import make_batches  # noqa: E402
from rlmerge.geometry import passes  # noqa: E402
from rlmerge.geometry.directions import random_direction  # noqa: E402
from rlmerge.geometry.fragility import robustness, sharpness, spread  # noqa: E402
from rlmerge.geometry.landscape import Landscape  # noqa: E402
from rlmerge.geometry.passes import divergences, negative_log_likelihoods, score, slabs  # noqa: E402
from rlmerge.geometry.resampling import Resampling, barrier, excess  # noqa: E402
from rlmerge.geometry.weights import BASE  # noqa: E402


def batches(count: int = 9, tokens: int = 70) -> Any:
    return make_batches(make_units(count), tokens, False)


def plain_logits(model: Any, batch: Any, row: int) -> list[tuple[np.ndarray, int]]:
    """Of each scored token of a row, by itself and without padding: the logits before it, and the token."""
    length = int(batch.mask[row].sum())
    with torch.no_grad():
        logits = model(input_ids=batch.ids[row : row + 1, :length]).logits[0].double().numpy()
    scored = [t for t in range(length) if batch.factor[row, t] != 0.0]
    return [(logits[t - 1], int(batch.ids[row, t])) for t in scored]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("cells", [passes.CELLS, 3 * 61])
def test_losses_are_those_of_a_plain_loop(kind, cells, monkeypatch):
    monkeypatch.setattr(passes, "CELLS", cells)
    model = make_model(kind, torch.float32)
    for batch in batches():
        found = negative_log_likelihoods(score(model, batch), batch.units)
        for row in range(batch.units):
            expected = 0.0
            for logits, token in plain_logits(model, batch, row):
                p = np.exp(logits - logits.max())
                expected -= math.log(p[token] / p.sum())
            assert float(found[row]) == pytest.approx(expected, rel=1e-5)


def test_divergences_are_those_of_a_plain_loop(monkeypatch):
    monkeypatch.setattr(passes, "CELLS", 4 * 61)
    one, other = (make_model("llama", torch.float32, seed) for seed in (0, 1))
    for batch in batches(5):
        found = divergences(score(one, batch), score(other, batch), batch.units)
        for row in range(batch.units):
            expected = np.zeros(4)
            for (a, _), (b, _) in zip(plain_logits(one, batch, row), plain_logits(other, batch, row)):
                p, q = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (a, b))
                for v in range(len(p)):
                    ratio = math.log(p[v] / q[v])
                    expected += [p[v] * ratio, -q[v] * ratio, -p[v] * math.log(p[v]), -q[v] * math.log(q[v])]
            np.testing.assert_allclose([float(part[row]) for part in found], expected, rtol=1e-4)
        assert float(found.forward.min()) > 0.0


def test_a_model_diverges_from_itself_by_exactly_nothing():
    model = make_model("llama", torch.float32)
    for batch in batches(3):
        found = divergences(score(model, batch), score(model, batch), batch.units)
        assert found.forward.tolist() == found.reverse.tolist() == [0.0] * batch.units
        assert torch.equal(found.entropy, found.other_entropy)


def test_broken_models_are_named():
    model = make_model("llama", torch.float32)
    with torch.no_grad():
        model.lm_head.weight[5, 3] = float("inf")
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        score(model, batches(1)[0])


def test_slabs_hold_what_fits():
    found = batches(12)
    sizes = [4 * 61 * int((batch.factor != 0).sum()) for batch in found]
    most = max(sizes) + min(sizes)
    parts = list(slabs(found, 61, most))
    assert [place for part in parts for place in part] == list(range(len(found)))
    assert all(sum(sizes[place] for place in part) <= most for part in parts)
    assert 1 < len(parts) < len(found)
    assert len(list(slabs(found, 61, 1))) == len(found)


# -- resampling --------------------------------------------------------------------------------------------------------


def test_the_interval_of_a_ratio_has_its_analytic_width():
    random = np.random.default_rng(0)
    weight = random.integers(5, 30, 400).astype(float)
    values = weight * random.normal(2.0, 0.5, 400)
    found = Resampling(weight, 4000, 0).estimate(values)
    ratio = values.sum() / weight.sum()
    error = np.sqrt(((values - ratio * weight) ** 2).sum()) / weight.sum()  # linearised
    assert found["value"] == pytest.approx(ratio, rel=1e-12)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * error, rel=0.05)
    few = Resampling(weight[:5], 4000, 0)
    error = (
        np.std(values[:5] - values[:5].sum() / weight[:5].sum() * weight[:5], ddof=1) * math.sqrt(5) / weight[:5].sum()
    )
    assert few.stretch * few.draws(values[:5]).std() == pytest.approx(student_quantile(4) / 1.96 * error, rel=0.1)
    assert Resampling(np.ones(1), 10, 0).estimate(np.ones(1)) == {"value": 1.0, "low": None, "high": None}


def test_a_planted_barrier_is_found_where_it_is():
    alphas = np.linspace(0.0, 1.0, 11)
    weight = np.arange(1.0, 41.0)
    curve = 1.0 + alphas - 0.3 * np.sin(2 * np.pi * alphas)  # below the chord at 0.2 and 0.3, above it at 0.7 and 0.8
    level = np.random.default_rng(1).normal(1.0, 0.3, 40)
    found = barrier(Resampling(weight, 500, 0), (curve[:, None] + level) * weight, alphas)
    top = 0.3 * math.sin(2 * math.pi * 0.2)
    assert found["barrier"]["value"] == pytest.approx(max(top, 0.3 * math.sin(2 * math.pi * 0.3)))
    assert found["dip"]["value"] == pytest.approx(-found["barrier"]["value"])
    assert found["barrier"]["at"] in (0.7, 0.8)
    assert found["dip"]["at"] in (0.2, pytest.approx(0.3))
    # problems differ in level alone, and the same are drawn for all points: no doubt about the barrier
    assert found["barrier"]["high"] - found["barrier"]["low"] < 1e-12
    assert found["values"][0]["high"] - found["values"][0]["low"] > 0.05


@pytest.mark.parametrize("height", [0.0, 0.2])
def test_intervals_of_barriers_cover_the_truth(height):
    """Also where there is no barrier, and the largest of eleven uncertain values is above 0 all the same."""
    random = np.random.default_rng(5)
    alphas = np.linspace(0.0, 1.0, 11)
    curve = height * np.sin(np.pi * alphas)
    waves = np.array([np.sin(np.pi * alphas), np.sin(2 * np.pi * alphas), alphas])
    covered, biased = np.zeros(2), 0.0
    for seed in range(200):
        weight = random.integers(10, 40, 40).astype(float)
        own = 0.2 * random.standard_normal((40, 3)) @ waves
        values = (random.gamma(1.0, 0.1, (40, 1)) + curve + own).T * weight
        sampled = Resampling(weight, 200, seed)
        up, down = barrier(sampled, values, alphas), barrier(sampled, -values, alphas)
        biased += up["barrier"]["value"] / 200
        for place, one in enumerate((up["barrier"], {k: -v for k, v in down["dip"].items()})):
            low, high = sorted((one["low"], one["high"]))
            covered[place] += low <= height <= high
    assert biased > height + (0.02 if height == 0.0 else 0.0)
    assert covered.min() >= 0.92 * 200
    assert covered[0] == covered[1]


def test_a_flat_curve_has_no_excess_at_all():
    values = np.full((11, 3), 0.1)
    assert excess(values, np.linspace(0.0, 1.0, 11)).tolist() == np.zeros((11, 3)).tolist()


# -- fragility ---------------------------------------------------------------------------------------------------------


class Bowl:
    """A set on which the loss is Σ h·θ² / 2 + Σ g·θ: what `ProblemSet` is to a landscape."""

    name = "bowl"
    tokens = np.ones(1)

    def __init__(self, model: Plain) -> None:
        generator = torch.Generator().manual_seed(7)
        shapes = {name: value.shape for name, value in model.state_dict().items()}
        self.h = {n: torch.rand(shape, generator=generator).double() for n, shape in shapes.items()}
        self.g = {n: torch.randn(shape, generator=generator).double() for n, shape in shapes.items()}

    def losses(self, model: Plain) -> np.ndarray:
        state = {name: value.double() for name, value in model.state_dict().items()}
        return np.array([sum(float((self.h[n] * v * v / 2 + self.g[n] * v).sum()) for n, v in state.items())])


def bowl_space(*experts: Plain) -> tuple[Landscape, Bowl]:
    base = random_model(0)
    bowl = Bowl(base)
    weights = make_weights(*experts, base=base)
    sets: Any = [bowl]
    return Landscape(weights, sets, 0, SequenceChoice(), False, 10, 0, lambda: None), bowl


def test_sharpness_of_a_quadratic_is_its_closed_form():
    space, bowl = bowl_space()
    found = sharpness(space, BASE, 0, (0.03, 0.3), 200, 4)
    base = space.weights.stored[BASE]
    for step in found["sigmas"]:
        sigma = step["sigma"]
        # along one direction: half its curvature, whatever the slope
        of = random_direction(space.weights, BASE, 4)
        curvature = sum(float((h.view(-1) * of(name).double() ** 2).sum()) for name, h in bowl.h.items())
        assert step["directions"][0] == pytest.approx(sigma**2 * curvature / 2, rel=1e-4)
        # and over all: σ² Σ ‖θl‖² tr(Hl) / (2 nl)
        expected = sum(float(base[n].double().square().sum() * h.mean()) for n, h in bowl.h.items()) * sigma**2 / 2
        assert step["rise"] == pytest.approx(expected, abs=4 * step["deviation"] / math.sqrt(200))
        assert step["deviation"] < 0.2 * step["rise"]
    assert found["loss"] == float(bowl.losses(space.weights.place(()))[0])


def test_robustness_follows_the_delta_and_its_controls():
    one, two = random_model(1), random_model(2)
    space, bowl = bowl_space(one, two)
    found = robustness(space, "a", "b", 0, (0.5, 2.0), 60, 3)
    state = {name: value.double() for name, value in random_model(1).state_dict().items()}
    delta = {name: space.weights.delta("b", name).view(value.shape) for name, value in state.items()}

    def rise(scale: float) -> float:
        return sum(
            float((bowl.h[n] * ((v + scale * delta[n]) ** 2 - v**2) / 2 + bowl.g[n] * scale * delta[n]).sum())
            for n, v in state.items()
        )

    for step in found["scales"]:
        assert step["rise"] == pytest.approx(rise(step["scale"]), rel=1e-5)
        assert step["against"] == pytest.approx(rise(-step["scale"]), rel=1e-5)
        # controls: random signs leave no slope, permuted values the mean curvature
        control = step["control"]
        expected = sum(float(d.square().sum() * bowl.h[n].mean()) for n, d in delta.items()) * step["scale"] ** 2 / 2
        assert control["rise"] == pytest.approx(expected, abs=4 * control["deviation"] / math.sqrt(60))
    assert (found["expert"], found["along"]) == ("a", "b")


def test_one_direction_has_no_spread():
    assert spread([0.5]) == {"rise": 0.5, "deviation": None, "directions": [0.5]}
    assert SimpleNamespace(**spread([1.0, 3.0])).deviation == pytest.approx(math.sqrt(2.0))
