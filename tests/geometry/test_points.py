"""Points around a base and its experts: stored values at the ends, sums rounded once between them; directions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from rlmerge.errors import MismatchError  # noqa: E402
from rlmerge.geometry.directions import along_delta, random_direction, shuffled_delta, size_of  # noqa: E402
from rlmerge.geometry.weights import BASE, Weights, between, kept, make_point, same_bits  # noqa: E402

SHAPES = {"first": (40, 7), "second": (31,)}


class Plain(torch.nn.Module):
    """A model that is its tensors."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        super().__init__()
        for name, value in tensors.items():
            self.register_parameter(name, torch.nn.Parameter(value.clone()))


def random_model(seed: int, dtype: Any = torch.float32) -> Plain:
    generator = torch.Generator().manual_seed(seed)
    return Plain({name: torch.randn(shape, generator=generator).to(dtype).float() for name, shape in SHAPES.items()})


def make_weights(*experts: Plain, base: Plain | None = None) -> Weights:
    weights = Weights(base or random_model(0))
    for place, expert in enumerate(experts):
        weights.add("abc"[place], expert, f"expert {place}")
    return weights


def words(model: Any) -> dict[str, np.ndarray]:
    return {name: value.numpy().view(np.int32).copy() for name, value in model.state_dict().items()}


def assert_equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_ends_are_the_models_bit_for_bit(dtype):
    base, expert, other = (random_model(seed, dtype) for seed in range(3))
    with torch.no_grad():
        # 1 + (1e-12 - 1) is not 1e-12 in fp64; and the sign of a zero is a bit, too
        base.first[0, :3] = torch.tensor([1.0, 1.0, 0.0])
        expert.first[0, :3] = torch.tensor([1e-12 if dtype == torch.float32 else 2.0**-14, -0.0, -0.0])
        expert.second.copy_(base.second)
    expected = [words(model) for model in (base, expert, other)]
    weights = make_weights(expert, other, base=base)
    for point, model in ((make_point([("a", 1.0)]), 1), (between(BASE, "b", 1.0), 2), (between("b", "a", 1.0), 1),
                         (between("a", "b", 0.0), 1), (between(BASE, "a", 0.0), 0)):  # fmt: skip
        assert_equal(words(weights.place(point)), expected[model])
    assert weights.stored["a"]["second"] is weights.stored[BASE]["second"]
    assert weights.stored["a"]["first"].dtype == dtype


def test_between_is_summed_in_fp64_and_rounded_once():
    base, one, two = (random_model(seed) for seed in range(3))
    values = [{name: value.double().numpy().copy() for name, value in m.state_dict().items()} for m in (base, one, two)]
    weights = make_weights(one, two, base=base)
    found = weights.place(make_point([("a", 0.7), ("b", -0.25)])).state_dict()
    for name, value in found.items():
        o, a, b = (v[name] for v in values)
        exact = o + 0.7 * (a - o) - 0.25 * (b - o)
        assert (value.numpy() != exact.astype(np.float32)).mean() <= 0.01  # a tie of fp32 that fp64 falls beside
        np.testing.assert_allclose(value.numpy(), exact, rtol=1.2e-7, atol=1e-9)


def test_nothing_lies_between_equal_models():
    one = random_model(1)
    expected = words(one)
    weights = make_weights(one, random_model(1))
    for alpha in np.linspace(0.0, 1.0, 11):
        assert_equal(words(weights.place(between("a", "b", float(alpha)))), expected)
    assert weights.distance("a", "b") == 0.0


def test_a_move_is_added_to_the_point():
    weights = make_weights(random_model(1))
    place = make_point([("a", 1.0)])
    start = {name: value.double().numpy().copy() for name, value in weights.place(place).state_dict().items()}
    delta = {name: weights.delta("a", name).numpy() for name in SHAPES}
    moved = weights.place(place, [(0.5, along_delta(weights, "a"))]).state_dict()
    for name, value in moved.items():
        expected = (start[name].ravel() + 0.5 * delta[name]).astype(np.float32)
        np.testing.assert_array_equal(value.numpy().ravel(), expected)


def test_models_that_do_not_fit_are_refused():
    weights = make_weights()
    with pytest.raises(MismatchError, match="other: first is"):
        weights.add("x", Plain({"first": torch.zeros(40, 8), "second": torch.zeros(31)}), "other")
    with pytest.raises(MismatchError, match="other: the base has 'second', and other has not"):
        weights.add("x", Plain({"first": torch.zeros(40, 7)}), "other")


def test_what_is_kept_narrow_is_exact():
    wide = torch.tensor([1.0, 1.0 + 2.0**-23])
    for value, dtype in ((wide, torch.float32), (wide.bfloat16().float(), torch.bfloat16),
                         (torch.tensor([1.0 + 2.0**-10]), torch.float16)):  # fmt: skip
        narrow = kept(value)
        assert narrow.dtype == dtype
        assert same_bits(narrow.float(), value)
        assert narrow.data_ptr() != value.data_ptr()
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))


def test_rounding_is_no_delta():
    """An expert in bf16 whose base is fp32 differs everywhere, and was trained at one coordinate."""
    base = random_model(0)
    expert = Plain({name: value.bfloat16().float() for name, value in base.state_dict().items()})
    with torch.no_grad():
        expert.first[3, 2] = 8.0
    weights = make_weights(expert, base=base)
    assert weights.delta("a", "second").count_nonzero() == 0
    assert weights.delta("a", "first").nonzero().tolist() == [[3 * 7 + 2]]
    norm, support = size_of(weights, "a")
    assert support == 1 / (40 * 7 + 31)
    assert norm == abs(8.0 - float(base.first[3, 2].detach().bfloat16()))


def sparse_expert() -> tuple[Plain, Plain]:
    base = random_model(0)
    expert = random_model(0)
    with torch.no_grad():
        expert.first[torch.rand(40, 7, generator=torch.Generator().manual_seed(3)) < 0.4] *= 1.5
    return base, expert


def test_controls_have_the_support_and_the_norm_of_the_delta():
    base, expert = sparse_expert()
    weights = make_weights(expert, base=base)
    delta = weights.delta("a", "first").numpy()
    drawn = [shuffled_delta(weights, "a", seed)("first").numpy() for seed in range(3)]
    for found in drawn:
        np.testing.assert_array_equal(found != 0.0, delta != 0.0)
        np.testing.assert_array_equal(np.sort(np.abs(found)), np.sort(np.abs(delta)))
        assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(delta), rel=1e-15)
        cosine = found @ delta / (delta @ delta)
        assert abs(cosine) < 0.4  # 0 ± 0.1 for 110 values
        assert abs(np.sign(found).sum()) < 0.4 * np.count_nonzero(found)
        assert 0.3 < np.mean(np.sign(found[delta != 0.0]) == np.sign(delta[delta != 0.0])) < 0.7
    assert not np.array_equal(np.abs(drawn[0]), np.abs(delta))
    assert not np.array_equal(drawn[0], drawn[1])
    np.testing.assert_array_equal(drawn[2], shuffled_delta(weights, "a", 2)("first").numpy())
    assert shuffled_delta(weights, "a", 0)("second") is None
    assert along_delta(weights, "a")("second") is None


def test_random_directions_have_the_norm_of_each_tensor():
    weights = make_weights(random_model(1))
    for key in (BASE, "a"):
        of = random_direction(weights, key, 5)
        for name in SHAPES:
            size = float(weights.stored[key][name].double().norm())
            assert float(of(name).double().norm()) == pytest.approx(size, rel=1e-6)
    one, other = (random_direction(weights, BASE, seed)("first").numpy() for seed in (5, 6))
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.3
    nothing = make_weights(base=Plain({"first": torch.zeros(3, 2)}))
    assert random_direction(nothing, BASE, 0)("first") is None
