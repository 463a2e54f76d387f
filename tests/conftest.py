"""What every test shares: float64 by default, one thread (small matrices), a fixed seed, no open figures."""

import pytest
import torch


@pytest.fixture(autouse=True)
def reproducible():
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
