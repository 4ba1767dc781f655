"""The vectorised squares against a loop of single backward passes: every layer, every way of batching."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.fisher.tiny_models import CONFIGS, make_model, make_units  # noqa: E402

from rlmerge.errors import FisherError  # noqa: E402
from rlmerge.fisher.gradients import SquaredGradients  # noqa: E402
from rlmerge.fisher.sequences import Sequence, Unit, make_batch, make_batches  # noqa: E402


def squares(model: Any, units: list[Unit], tokens: int = 1000, mean: bool = False, **options: Any) -> SquaredGradients:
    found = SquaredGradients(model, **options)
    for batch in make_batches(units, tokens, mean):
        found.add(batch)
    found.close()
    return found


def by_hand(model: Any, units: list[Unit], mean: bool = False) -> dict[str, Any]:
    """Written from the definition: log-softmax, one backward pass a unit, square, add. Nothing of ours in it."""
    total = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    for unit in units:
        model.zero_grad()
        value: Any = 0.0
        for row in unit.sequences:
            logs = model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
            scored = [logs[t - 1, row.ids[t]] for t in range(row.start, len(row.ids))]
            value = value + row.weight * sum(scored) / (len(scored) if mean else 1)
        value.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                total[name] += parameter.grad**2
    model.zero_grad(set_to_none=True)
    return total


def error(found: dict[str, Any], expected: dict[str, Any]) -> float:
    assert found.keys() == expected.keys()
    return max(
        float((found[name].double() - value).norm() / max(float(value.norm()), 1e-300))
        for name, value in expected.items()
    )


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("rows", [1, 3])
def test_float64_is_the_loop(kind: str, rows: int) -> None:
    model, units = make_model(kind), make_units(6, rows)
    expected = by_hand(model, units)
    limit = 1e-6 if kind == "gemma2" else 1e-10  # Gemma's norms compute in fp32, whatever the model's dtype is
    found = squares(model, units)
    assert not found.notes
    assert error(found.total, expected) < limit
    assert error(squares(model, units, plain=True).total, expected) < limit


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2", "mixtral"])
def test_float32_is_near(kind: str) -> None:
    units = make_units(6)
    expected = by_hand(make_model(kind), units)
    assert error(squares(make_model(kind, torch.float32), units).total, expected) < 1e-4


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2", "qwen2-moe"])
@pytest.mark.parametrize("tokens", [1, 25, 60])
def test_batches_and_padding_change_nothing(kind: str, tokens: int) -> None:
    model, units = make_model(kind), make_units(7)
    assert error(squares(model, units, tokens).total, squares(model, units).total) < 1e-12


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("options", [{"columns": 3}, {"checkpointing": True}, {"columns": 3, "checkpointing": True}])
def test_long_sequences_in_pieces(kind: str, options: dict[str, Any]) -> None:
    model, units = make_model(kind), make_units(4)
    found = squares(model, units, 1, **options)
    assert error(found.total, by_hand(model, units)) < (1e-6 if kind == "gemma2" else 1e-10)


ODD = {
    "opt": lambda: transformers.OPTConfig(
        vocab_size=61, hidden_size=24, ffn_dim=40, num_hidden_layers=2, num_attention_heads=4, dropout=0.3,
        max_position_embeddings=64, word_embed_proj_dim=24, pad_token_id=1,
    ),
    "ctrl": lambda: transformers.CTRLConfig(vocab_size=61, n_embd=24, dff=40, n_layer=2, n_head=4, n_positions=64),
    "xglm": lambda: transformers.XGLMConfig(
        vocab_size=61, d_model=24, ffn_dim=40, num_layers=2, attention_heads=4, max_position_embeddings=64, dropout=0.4,
    ),
    "neox-japanese": lambda: transformers.GPTNeoXJapaneseConfig(
        vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_multiple_size=2,
        max_position_embeddings=64,
    ),
}  # fmt: skip
"""Positions looked up by a mask, changes in place, dropout of a layer's own, a module that gives its bias away."""


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_odd_architectures(kind: str, checkpointing: bool) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(ODD[kind](), dtype=torch.float32).eval()
    made = [one.sequences[0] for one in make_units(4)]
    units = [Unit((Sequence(tuple(2 + i for i in one.ids), one.start),)) for one in made]
    if checkpointing and not model.supports_gradient_checkpointing:
        with pytest.raises(FisherError, match="checkpointing"):
            squares(model, units, 30, checkpointing=True)
        return
    found, expected = squares(model, units, 30, checkpointing=checkpointing).total, by_hand(model, units)
    largest = max(float(value.norm()) for value in expected.values())
    for name, value in expected.items():  # the bias of keys has no gradient, only rounding
        assert float((found[name] - value).norm()) < 1e-4 * float(value.norm()) + 1e-11 * largest, name
    assert not any(module.training for module in model.modules())


def test_one_unit_first_and_several_later() -> None:
    model, units = make_model("gpt2"), make_units(6)
    found = SquaredGradients(model)
    found.add(make_batch(units[:1], mean=False))
    found.add(make_batch(units[1:], mean=False))
    found.close()
    assert error(found.total, by_hand(model, units)) < 1e-10


def test_mean_over_tokens() -> None:
    model, units = make_model("llama"), make_units(5)
    assert error(squares(model, units, mean=True).total, by_hand(model, units, mean=True)) < 1e-10


def test_log_probability_is_summed() -> None:
    model, units = make_model("qwen2"), make_units(3)
    expected = 0.0
    for unit in units:
        (row,) = unit.sequences
        logs = model(torch.tensor([row.ids])).logits[0].detach().log_softmax(-1)
        expected += sum(float(logs[t - 1, row.ids[t]]) for t in range(row.start, len(row.ids)))
    assert squares(model, units).log_probability == pytest.approx(expected, rel=1e-12)


def test_wanted_parameters_only() -> None:
    model, units = make_model("llama-tied"), make_units(3)
    name = "model.layers.1.mlp.down_proj.weight"
    found = squares(model, units, wanted={name, "model.embed_tokens.weight"})
    expected = by_hand(model, units)
    assert error(found.total, {key: expected[key] for key in found.total}) < 1e-10
    assert set(found.total) == {name, "model.embed_tokens.weight"}


class Shared(torch.nn.Module):
    """Uses the weight of one layer inside another's forward, and one layer twice: no hook can see the first."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.first = torch.nn.Linear(24, 24, dtype=torch.float64)
        self.inner = inner

    def forward(self, x: Any) -> Any:
        hidden = self.first(torch.tanh(self.first(x)))
        return self.inner(hidden) + torch.nn.functional.linear(hidden, self.inner.weight * 0.5)


def test_what_hooks_cannot_see_is_done_the_plain_way() -> None:
    torch.manual_seed(3)
    model, units = make_model("llama"), make_units(5)
    model.model.layers[0].self_attn.o_proj = Shared(model.model.layers[0].self_attn.o_proj)
    found = squares(model, units)
    assert error(found.total, by_hand(model, units)) < 1e-10
    assert len(found.notes) == 1
    assert "o_proj.inner.weight" in found.notes[0]
    assert "o_proj.first" not in found.notes[0]  # called twice, which is no difficulty


def test_parameters_are_thawed_and_hooks_are_gone() -> None:
    model, units = make_model("llama"), make_units(2)
    frozen = model.model.embed_tokens.weight.requires_grad_(False)
    model.train()
    squares(model, units)
    assert model.training
    assert not frozen.requires_grad
    assert model.lm_head.weight.requires_grad
    assert all(not module._forward_hooks for module in model.modules())


def test_bf16_products_are_near() -> None:
    model, units = make_model("llama-tied", torch.float32), make_units(6)
    exact = by_hand(make_model("llama-tied"), units)
    found = squares(model, units, compute="bf16")
    assert error(found.total, exact) < 0.1
    assert error(found.total, exact) > 1e-4  # it is bf16 indeed
    assert all(value.dtype == torch.float32 for value in found.total.values())


def test_padding_is_on_the_right_and_masked() -> None:
    batch = make_batch([Unit((Sequence((1, 2, 3), 1),)), Unit((Sequence((4, 5), 1, 2.0),))], mean=True)
    assert batch.ids.tolist() == [[1, 2, 3], [4, 5, 0]]
    assert batch.mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.factor.tolist() == [[0.0, 0.5, 0.5], [0.0, 2.0, 0.0]]
    assert batch.scored == (1, 3)


def test_batches_hold_at_most_so_many_tokens() -> None:
    units = make_units(20)
    batches = make_batches(units, 50, mean=False)
    assert all(batch.ids.numel() <= 50 for batch in batches)
    assert sum(batch.units for batch in batches) == 20
    assert len(batches) < 20
