"""Fixtures that every test file shares."""

from __future__ import annotations

import os

# before anything imports the hub's client: a test that reaches for the network should fail at once
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings

# the same examples on every machine; no deadline, for CI machines are shared
settings.register_profile("fastcache", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("fastcache")


@pytest.fixture(autouse=True)
def one_thread():
    """pytest-xdist runs one process per core; more threads would only fight for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
