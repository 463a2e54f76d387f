"""What every test shares: float64 by default, one thread (small matrices), a fixed seed, no open figures."""

import pytest
import torch

collect_ignore_glob = ["distributed_*.py"]  # run under torchrun, by test_distributed.py


def pytest_report_header(config):
    left = [f for f in ("trainers", "oracles") if not any(f in argument for argument in config.args)]
    return [f"not collected here: tests/{folder}, which needs the extra of that name" for folder in left]


@pytest.fixture(autouse=True)
def reproducible():
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
