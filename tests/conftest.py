"""What every test run shares: one torch thread, one seed, Triton's interpreter or a GPU's cases."""

import pytest
import torch

# Triton reads this once, when it is first imported, and then runs every kernel on the CPU in NumPy. That may
# be while a folder's conftest.py is imported, so before any hook of this file.
if not torch.cuda.is_available():
    pytest.MonkeyPatch().setenv("TRITON_INTERPRET", "1")


def pytest_configure() -> None:
    # Two workers share two cores; a second thread in each only makes them wait for one another.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
