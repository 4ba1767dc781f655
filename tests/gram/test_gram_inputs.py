"""What layers see, against plain hooks on single sequences, for several architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.fisher.tiny_models import make_model, make_units  # noqa: E402

from rlmerge.checkpoint.folder import open_checkpoint  # noqa: E402
from rlmerge.errors import GramError  # noqa: E402
from rlmerge.fisher.sequences import Unit, make_batch, make_batches  # noqa: E402
from rlmerge.gram.estimate import _names  # noqa: E402
from rlmerge.gram.inputs import InputProducts, Weight  # noqa: E402

UNITS = make_units(6)
KINDS = ["llama", "llama-tied", "qwen2", "gpt2", "mixtral", "qwen2-moe", "gemma2"]


def measured(model: Any, answer: bool = False, tokens: int = 100, units: list[Unit] = UNITS) -> InputProducts:
    products = InputProducts(model, answer)
    products.look(make_batch([units[0], units[0]], False))
    products.want(products.leaders)
    if products.unpadded:
        tokens = 1
    for batch in make_batches(units, tokens, False):
        products.add(batch)
    return products


def by_hand(model: Any, answer: bool = False) -> dict[Weight, Any]:
    """Σ xᵀx by hooks on modules, sequence by sequence, experts from their module's arguments."""
    names = {id(value): name for name, value in model.named_parameters()}
    found: dict[Weight, Any] = {}
    counted: Any = None

    def add(weight: Weight, x: Any) -> None:
        x = x.double()
        found[weight] = found.get(weight, 0.0) + x.T @ x

    def linear(module: Any, args: Any) -> None:
        add(Weight(names[id(module.weight)]), args[0].reshape(-1, args[0].shape[-1])[counted])

    def experts(module: Any, args: Any) -> None:
        hidden, index, _ = args
        for expert in range(module.gate_up_proj.shape[0]):
            x = hidden.reshape(-1, hidden.shape[-1])[(index.reshape(-1, index.shape[-1]) == expert).any(1)]
            gate, up = (x @ module.gate_up_proj[expert].T).chunk(2, -1)
            add(Weight(names[id(module.gate_up_proj)], expert), x)
            add(Weight(names[id(module.down_proj)], expert), module.act_fn(gate) * up)

    handles = []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D":
            handles.append(module.register_forward_pre_hook(linear))
        elif hasattr(module, "gate_up_proj") and module.gate_up_proj.__class__ is torch.nn.Parameter:
            handles.append(module.register_forward_pre_hook(experts))
        elif "Router" in type(module).__name__:
            handles.append(module.register_forward_pre_hook(linear))
    for unit in UNITS:
        sequence = unit.sequences[0]
        length = len(sequence.ids)
        counted = torch.arange(sequence.start - 1, length - 1) if answer else torch.arange(length)
        with torch.no_grad():
            model(torch.tensor([sequence.ids]))
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_equals_plain_hooks(kind: str) -> None:
    model = make_model(kind)
    products, wanted = measured(model), by_hand(model)
    looked_up = Weight(next(name for name, _ in model.named_parameters()))
    if kind not in ("llama", "mixtral", "qwen2-moe"):  # these have a head of their own
        wanted.pop(looked_up, None)
    assert products.linear.keys() == wanted.keys()
    for weight, linear in products.linear.items():
        found = products.total[linear.same or weight]
        assert torch.allclose(found, wanted[weight], rtol=1e-9, atol=1e-9), weight
    assert products.positions == sum(len(unit.sequences[0].ids) for unit in UNITS)
    # 7 linear layers have 4 inputs
    if kind == "llama":
        assert len(products.leaders) == 2 * 4 + 1


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_positions_that_predict_the_answer(kind: str) -> None:
    model = make_model(kind)
    products, wanted = measured(model, answer=True), by_hand(model, answer=True)
    for weight, linear in products.linear.items():
        assert torch.allclose(products.total[linear.same or weight], wanted[weight], rtol=1e-9, atol=1e-9), weight
    assert products.positions == sum(unit.sequences[0].scored for unit in UNITS)


def test_answers_of_a_mixture_leave_its_experts_out() -> None:
    products = measured(make_model("mixtral"), answer=True)
    assert not any("experts" in weight.parameter for weight in products.linear)
    assert any("self_attn.q_proj" in weight.parameter for weight in products.linear)
    assert "With --positions all they have one" in products.notes[0]


def test_rows_of_experts_are_counted() -> None:
    model = make_model("mixtral")
    products = measured(model)
    rows = [
        products.rows[weight] for weight in products.leaders if weight.parameter.endswith("0.mlp.experts.down_proj")
    ]
    assert len(rows) == 4
    assert sum(rows) == 2 * products.positions  # two experts a token
    assert model.config._experts_implementation == "eager"


def test_inputs_that_part_company_are_an_error() -> None:
    """Layers that had one input at the first look, and later not."""
    model = make_model("llama")
    products = InputProducts(model)
    products.look(make_batch([UNITS[0], UNITS[0]], False))
    products.want(products.leaders)
    layer = model.model.layers[1].self_attn.v_proj
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2.0,))
    with pytest.raises(GramError, match=r"layers\.1\.self_attn\.v_proj\.weight: had the same input"):
        products.add(make_batch(UNITS[:1], False))


def test_logits_are_made_for_one_position_only() -> None:
    model = make_model("llama")
    shapes = []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape[1]))
    measured(model)
    assert set(shapes) == {1}


@pytest.mark.parametrize(
    ("kind", "expert"),
    [
        ("mixtral", "block_sparse_moe.experts.3.w{}.weight"), ("qwen2-moe", "experts.3.{}_proj.weight"),
        ("llama", ""), ("gpt2", ""),
    ],
)  # fmt: skip
def test_names_are_those_of_the_files(tmp_path: Path, kind: str, expert: str) -> None:
    """Also of experts, which transformers stacks when it loads them."""
    model = make_model(kind, torch.float32)
    model.save_pretrained(tmp_path)
    stored = open_checkpoint(tmp_path)
    products = measured(model)
    names = _names(model, products, stored)
    listed = sorted(name for group in names.values() for name in group)
    matrices = {name for name, info in stored.tensors.items() if len(info.shape) == 2}
    embeddings = {name for name in matrices if any(part in name for part in ("embed_tokens", "wte", "wpe"))}
    assert set(listed) == matrices - embeddings
    assert len(listed) == len(set(listed))
    assert products.notes == []
    if expert:
        gate, up, down = ("w1", "w3", "w2") if kind == "mixtral" else ("gate", "up", "down")
        prefix = "model.layers.1.mlp." if kind == "qwen2-moe" else "model.layers.1."
        of = {name: weight for weight, group in names.items() for name in group}
        name = prefix + expert.replace("w{}", "{}")
        assert of[name.format(gate)] == of[name.format(up)] == Weight("model.layers.1.mlp.experts.gate_up_proj", 3)
        assert of[name.format(down)] == Weight("model.layers.1.mlp.experts.down_proj", 3)
