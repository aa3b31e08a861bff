"""Kernel tests run with NaN in fresh memory, so that an output element nobody wrote cannot pass."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all(), "this torch does not fill fresh memory: the tests would prove less"
    yield
    torch.use_deterministic_algorithms(False)
