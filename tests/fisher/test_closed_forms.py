"""Models whose Fisher is known on paper, brought into the form of a language model of one token."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from rlmerge.fisher.gradients import SquaredGradients  # noqa: E402
from rlmerge.fisher.sequences import Sequence, Unit, make_batches  # noqa: E402

POINTS, FEATURES = 12, 5


class OneToken(torch.nn.Module):
    """Token x of the prompt stands for the features of point x; the next token is the answer."""

    def __init__(self, points: Any) -> None:
        super().__init__()
        self.config: Any = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=len(points)))
        self.register_buffer("points", points)

    answers: Any
    """Features → logits, of each model."""

    @property
    def base_model(self) -> Any:
        return self

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, input_ids: Any, attention_mask: Any = None, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.answers(self.points[input_ids.clamp(max=len(self.points) - 1)]))


class Logistic(OneToken):
    """p(y = 1 | x) = σ(w·x + b): logits (0, w·x + b)."""

    def __init__(self, points: Any) -> None:
        super().__init__(points)
        self.linear = torch.nn.Linear(FEATURES, 1, dtype=torch.float64)

    def answers(self, features: Any) -> Any:
        score = self.linear(features)
        return torch.cat([torch.zeros_like(score), score], -1)


GRID = torch.linspace(-12.0, 12.0, 481, dtype=torch.float64)


class Gaussian(OneToken):
    """y | x ~ N(w·x, 1) on a fine grid, whose sums are integrals to the last digit (trapezoidal rule)."""

    def __init__(self, points: Any) -> None:
        super().__init__(points)
        self.linear = torch.nn.Linear(FEATURES, 1, bias=False, dtype=torch.float64)

    def answers(self, features: Any) -> Any:
        return -0.5 * (GRID - self.linear(features)) ** 2


def true_fisher(model: Any, points: int) -> dict[str, Any]:
    """E over y ~ p(y|x) by enumeration: a gradient that is multiplied by √p counts p times when it is squared."""
    units = []
    for x in range(points):
        chances = model(torch.tensor([[x]])).logits[0, 0].detach().softmax(-1)
        units += [Unit((Sequence((x, y), 1, float(p) ** 0.5),)) for y, p in enumerate(chances) if float(p) > 1e-30]
    found = SquaredGradients(model)
    for batch in make_batches(units, 256, mean=False):
        found.add(batch)
    found.close()
    assert not found.notes
    return {name: value / points for name, value in found.total.items()}


def test_logistic_regression() -> None:
    torch.manual_seed(0)
    points = torch.randn(POINTS, FEATURES, dtype=torch.float64)
    model = Logistic(points)
    found = true_fisher(model, POINTS)
    p = torch.sigmoid(model.linear(points)).detach()
    # F = E[x xᵀ p (1 - p)], its diagonal
    assert torch.allclose(found["linear.weight"][0], (points**2 * p * (1 - p)).mean(0), rtol=1e-12)
    assert torch.allclose(found["linear.bias"], (p * (1 - p)).mean(0), rtol=1e-12)


def test_linear_gaussian() -> None:
    torch.manual_seed(1)
    points = torch.randn(POINTS, FEATURES, dtype=torch.float64)
    found = true_fisher(Gaussian(points), POINTS)
    # F = E[x xᵀ] / σ², σ = 1, whatever w is
    assert torch.allclose(found["linear.weight"][0], (points**2).mean(0), rtol=1e-10)


def test_a_batch_gradient_squared_would_be_something_else() -> None:
    torch.manual_seed(0)
    points = torch.randn(POINTS, FEATURES, dtype=torch.float64)
    model = Logistic(points)
    units = [Unit((Sequence((x, x % 2), 1),)) for x in range(POINTS)]
    found = SquaredGradients(model)
    for batch in make_batches(units, 256, mean=False):
        found.add(batch)
    found.close()
    p = torch.sigmoid(model.linear(points)).detach()[:, 0]
    gradients = (torch.arange(POINTS) % 2 - p)[:, None] * points
    assert torch.allclose(found.total["linear.weight"][0], (gradients**2).sum(0), rtol=1e-12)
    assert not torch.allclose(found.total["linear.weight"][0], gradients.sum(0) ** 2, rtol=0.1)
