"""GRPO: the loss from its definition, and from TRL on the same batch."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from rlmerge.errors import RlmergeError
from rlmerge.lab.optimizer import Optimizer, Rate
from rlmerge.lab.policy import Policy, add_lora, completion_logits, log_probabilities, read_policy, write_model
from rlmerge.lab.rlvr import Rlvr, draw, grpo_advantages, grpo_loss, in_parts, rewards_of, rlvr, tokens_of
from rlmerge.lab.text import batch_of


def test_advantages_by_hand() -> None:
    found = grpo_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]))
    assert found[:4].tolist() == pytest.approx([0.75 / 0.5001, *[-0.25 / 0.5001] * 3], rel=1e-6)
    assert found[4:].tolist() == [0.0] * 4


def batch_on(policy: Policy) -> tuple[list[Any], list[list[int]], list[list[int]], torch.Tensor]:
    """Problems, their prompts, samples with made-up rewards (random weights are never right)."""
    problems = batch_of("math:0", "tests", 0, 3)
    samples = draw(policy, problems, 4, "tests", 12)
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0]])
    return problems, [policy.encode(p.prompt) for p in problems], [tokens_of(s) for s in samples], rewards


def gradients_of(policy: Policy) -> dict[str, torch.Tensor]:
    """Takes them off the model."""
    found = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad()
    return found


def test_samples_are_a_function_of_weights_and_seed(policy: Policy) -> None:
    problems = batch_of("math:0", "tests", 0, 3)
    first = draw(policy, problems, 4, "tests", 12)
    assert first == draw(policy, problems, 4, "tests", 12)
    assert first != draw(policy, problems, 4, "others", 12)
    assert rewards_of(first, problems).shape == (3, 4)


def test_the_gradient_is_that_of_log_p_and_groups_without_advantage_can_be_left_out(policy: Policy) -> None:
    _, prompts, completions, rewards = batch_on(policy)
    logs, _ = log_probabilities(policy, prompts, completions)
    (-(grpo_advantages(rewards) * logs.sum(1)).sum() / (12 * 12)).backward()
    expected = gradients_of(policy)
    live = [0, 2]
    kept = [completions[4 * place + k] for place in live for k in range(4)]
    found = grpo_loss(policy, [prompts[k] for k in live], kept, grpo_advantages(rewards[live]), 12, 12)
    lengths = torch.tensor([len(completion) for completion in completions])
    assert found.item() == pytest.approx(-float((grpo_advantages(rewards) * lengths).sum()) / 144, rel=1e-4)
    found.backward()
    for name, gradient in gradients_of(policy).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-3)


def test_trl_computes_the_same_loss_and_gradients(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    from rlmerge.lab import trl

    monkeypatch.setattr(trl, "fast_bf16", lambda: False)

    problems, prompts, completions, rewards = batch_on(policy)
    advantages = grpo_advantages(rewards)
    ours = grpo_loss(policy, prompts, completions, advantages, 12, 12)
    ours.backward()
    gradients = gradients_of(policy)

    settings = Rlvr("math:0", 1, steps=1, prompts=3, group=4, max_new_tokens=12, trainer="trl")
    trainer = trl.make_trainer(policy, problems, settings, tmp_path, lambda **_: [0.0] * 12)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    left, right = max(map(len, prompts)), max(map(len, completions))
    pad = policy.tokenizer.pad_token_id
    several = [prompt for prompt in prompts for _ in range(4)]
    inputs = {
        "prompt_ids": torch.tensor([[pad] * (left - len(p)) + p for p in several]),
        "prompt_mask": torch.tensor([[0] * (left - len(p)) + [1] * len(p) for p in several]),
        "completion_ids": torch.tensor([c + [pad] * (right - len(c)) for c in completions]),
        "completion_mask": torch.tensor([[1] * len(c) + [0] * (right - len(c)) for c in completions]),
        "advantages": advantages,
        "num_items_in_batch": torch.tensor(sum(map(len, completions))),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = trainer._compute_loss(trainer.model, inputs)
        theirs.backward()
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-4, abs=1e-6)
    for name, parameter in policy.model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-3)


def test_parts_of_a_batch_hold_every_group_once() -> None:
    assert in_parts([1, 2, 5, 7], [30, 30, 50, 200], 80) == [[1, 2], [5], [7]]
    assert in_parts([3], [500], 80) == [[3]]
    assert in_parts([], [], 80) == []


def test_a_batch_in_parts_has_the_same_gradient(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the order of sums: the models of one step lie as close as fp32 gets them."""
    settings = Rlvr("math:0", 1, steps=1, prompts=6, group=4, rate=Rate(1e-3, 1), max_new_tokens=8)
    monkeypatch.setattr("rlmerge.lab.rlvr.rewards_of", lambda samples, batch: ALTERNATING[: len(batch)])
    rlvr(base, tmp_path / "whole", settings)
    monkeypatch.setattr("rlmerge.lab.rlvr.ACTIVATIONS", 1)
    rlvr(base, tmp_path / "parts", settings)
    logs = [json.loads((tmp_path / name / "log.jsonl").read_text()) for name in ("whole", "parts")]
    assert logs[0]["live_groups"] == logs[1]["live_groups"] == 6
    assert logs[1]["gradient_norm"] == pytest.approx(logs[0]["gradient_norm"], rel=2e-2)
    assert logs[1]["loss"] == pytest.approx(logs[0]["loss"], abs=1e-5)


ALTERNATING = torch.tensor([[1.0, 0.0, 0.0, 1.0]] * 6)


def test_other_advantages() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    assert grpo_advantages(rewards, "centred").tolist() == [0.75, -0.25, -0.25, -0.25]
    # less the mean of the other three
    assert grpo_advantages(rewards, "rloo").tolist() == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])


def test_the_tempered_policy_is_what_is_sampled_and_trained(policy: Policy) -> None:
    _, prompts, completions, _ = batch_on(policy)
    logits, ids, mask = completion_logits(policy, prompts, completions)
    logs, _ = log_probabilities(policy, prompts, completions, 0.5)
    expected = (logits / 0.5).log_softmax(-1)[torch.arange(len(logits)), ids[mask]]
    torch.testing.assert_close(logs[mask], expected)
    problems = batch_of("math:0", "tests", 0, 3)
    cold = [sample.tokens for sample in draw(policy, problems, 4, "tests", 12, 1e-4)]
    assert len(set(map(tuple, cold[:4]))) == 1, "near temperature 0 all samples are the likeliest"


def test_a_curriculum_takes_equal_parts() -> None:
    settings = Rlvr("math:2", 1, steps=10, curriculum=("math:1", "math:2", "math:3"))
    assert [settings.task_at(step) for step in (0, 3, 4, 6, 7, 9)] == [
        "math:1", "math:1", "math:2", "math:2", "math:3", "math:3",
    ]  # fmt: skip
    assert Rlvr("math:2", 1).task_at(99) == "math:2"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"advantage": "ppo"}, "advantage 'ppo'"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"lora": 4, "trainer": "trl"}, "trainer 'trl'"),
        ({"curriculum": ("none:1",)}, "none"),
    ],
)
def test_settings_that_mean_nothing(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(RlmergeError, match=message):
        rlvr(tmp_path, tmp_path / "out", Rlvr("math:0", 1, **wrong))


def test_a_lora_is_trained_alone_and_stored_merged(policy: Policy, tmp_path: Path) -> None:
    """Its product lies in the models that are written, rounded once; base weights do not move."""
    pytest.importorskip("peft")
    weights = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    write_model(policy, weights, tmp_path / "base")
    settings = Rlvr("math:0", 3, steps=2, prompts=2, group=4, rate=Rate(1e-2, 1), max_new_tokens=8, lora=2)
    trained = add_lora(read_policy(tmp_path / "base"), settings.lora, settings.seed)
    optimizer = Optimizer(trained)
    assert optimizer.names
    assert all("lora_" in name for name in optimizer.names)
    problems = batch_of("math:0", "tests", 0, 2)
    samples = draw(trained, problems, 4, "tests", 8)
    completions, prompts = [tokens_of(s) for s in samples], [trained.encode(p.prompt) for p in problems]
    advantages = grpo_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]]))
    for _ in range(2):  # B is 0 at first, so A moves in the second step only
        optimizer.step(grpo_loss(trained, prompts, completions, advantages, 8, 8), 1e-2)
    masters = dict(zip(optimizer.names, optimizer.masters))
    write_model(trained, masters, tmp_path / "fp32")
    found = {name: p.detach() for name, p in read_policy(tmp_path / "fp32").model.named_parameters()}
    assert set(found) == set(weights)
    moved = {name for name in found if not torch.equal(found[name], weights[name])}
    layer = "model.layers.0.self_attn.q_proj"
    assert f"{layer}.weight" in moved
    assert not any("embed" in name or "norm" in name or "lm_head" in name for name in moved)
    product = masters[f"{layer}.lora_B.default.weight"] @ masters[f"{layer}.lora_A.default.weight"]
    torch.testing.assert_close(found[f"{layer}.weight"], weights[f"{layer}.weight"] + 2 * product)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    again = add_lora(read_policy(tmp_path / "base"), settings.lora, settings.seed)
    first = add_lora(read_policy(tmp_path / "base"), settings.lora, settings.seed)
    for one, other in zip(again.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(one, other), "the same seed, the same start"
