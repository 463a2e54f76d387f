"""What the trainers' tests share: float32, one thread, a fixed seed."""

import pytest
import torch


@pytest.fixture(autouse=True)
def reproducible():
    """In place of the one for all other tests: trainers are used in float32."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
