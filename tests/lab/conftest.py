"""One thread: two test processes share two cores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.lab.smallest import smallest_policy

from rlmerge.lab.policy import Policy, write_model


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def policy() -> Policy:
    return smallest_policy()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a bf16 model."""
    made = smallest_policy()
    folder = tmp_path_factory.mktemp("lab") / "base"
    write_model(made, {name: p.detach().bfloat16() for name, p in made.model.named_parameters()}, folder)
    return folder
