"""Fixtures that several test files share."""

from __future__ import annotations

import os

import pytest
import torch

from fishlib.data import ImageData, find

# Two workers on two cores: more threads each would only wait for one another.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))


@pytest.fixture(scope="session")
def digits() -> ImageData:
    return ImageData("digits", batch_size=64, device="cpu")


@pytest.fixture
def real_data(request):
    """A function that skips, by name, a test whose real data set is not on this machine."""
    def require(name: str) -> None:
        if find(name) is None:
            pytest.skip(f"{name}.npz is neither in FISHLIB_DATA nor in data/cache")
    return require
