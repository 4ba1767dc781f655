"""Probabilities with a shared prompt are those of whole sequences."""

from __future__ import annotations

import torch

from rlmerge.lab.policy import Policy, document_loss, expected_pass, log_probabilities
from rlmerge.lab.text import batch_of


def plain(policy: Policy, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """log p of every completion token, one sequence at a time, from the definition."""
    logits = policy.model(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    return torch.stack([logits[len(prompt) + place - 1, token] for place, token in enumerate(completion)])


def rows_of(policy: Policy) -> tuple[list[list[int]], list[list[int]]]:
    """Three prompts, and two completions of each, of several lengths; those of a prompt lie together."""
    problems = [*batch_of("math:0", "tests", 0, 2), *batch_of("code:0", "tests", 0, 1)]
    prompts = [policy.encode(problem.prompt) for problem in problems]
    completions = []
    for place, problem in enumerate(problems):
        whole = policy.encode(problem.completion or "")
        completions += [whole[: 5 + 3 * place], whole[:-1]]
    return prompts, completions


def test_shared_prompts_change_nothing(policy: Policy) -> None:
    prompts, completions = rows_of(policy)
    logs, mask = log_probabilities(policy, prompts, completions)
    for row, completion in enumerate(completions):
        expected = plain(policy, prompts[row // 2], completion)
        torch.testing.assert_close(logs[row, : len(completion)], expected, atol=2e-6, rtol=1e-5)
        assert mask[row].sum() == len(completion)
    assert not logs[~mask].detach().any()


def test_gradients_through_shared_prompts(policy: Policy) -> None:
    prompts, completions = rows_of(policy)
    log_probabilities(policy, prompts, completions)[0].sum().backward()
    found = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad()
    torch.stack([plain(policy, prompts[row // 2], c).sum() for row, c in enumerate(completions)]).sum().backward()
    for name, parameter in policy.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-4, rtol=1e-3)


def test_the_loss_of_documents(policy: Policy) -> None:
    prompts, completions = rows_of(policy)
    rows = [(prompts[k], completions[2 * k]) for k in range(3)]
    total = weight = 0.0
    for prompt, completion in rows:
        whole = plain(policy, (prompt + completion)[:1], (prompt + completion)[1:])
        weights = torch.tensor([0.25] * (len(prompt) - 1) + [1.0] * len(completion))
        total, weight = total - float((whole * weights).sum().detach()), weight + float(weights.sum())
    assert abs(document_loss(policy, rows, 0.25).item() - total / weight) < 1e-5


def test_expected_pass_is_the_probability_of_the_text(policy: Policy) -> None:
    problem = batch_of("math:0:answer-only", "tests", 0, 1)[0]
    chance = expected_pass(policy, [problem.prompt], [problem.completion or ""])[0]
    exact = plain(policy, policy.encode(problem.prompt), policy.encode(problem.completion or "")).sum().exp().item()
    assert abs(chance - exact) < 5e-2 * exact  # bf16 where the processor has it
