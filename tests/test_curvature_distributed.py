"""Curvature on several gloo processes equals one process; the scenarios are in distributed_curvature.py."""

import pathlib
import pickle

import pytest
import torch
from test_distributed import launch

from gradcond import curvature

HERE = pathlib.Path(__file__).parent


@pytest.mark.parametrize("processes", [2, 4])
def test_many_processes_equal_one(processes):
    output = launch(processes, HERE / "distributed_curvature.py")
    assert f"all scenarios passed on {processes} processes" in output


def test_a_group_that_is_none_is_told():
    with pytest.raises(TypeError, match="process group"):
        curvature.Hessian(torch.nn.Linear(2, 1), torch.nn.MSELoss(), [()], process_group="gloo")


def test_one_process_alone_still_wants_data_and_can_be_pickled():
    model = torch.nn.Linear(2, 1)
    with pytest.raises(ValueError, match="at least one batch"):
        curvature.Hessian(model, torch.nn.MSELoss(), [])
    H = curvature.Hessian(model, torch.nn.MSELoss(), [(torch.ones(3, 2), torch.zeros(3, 1))])
    v = torch.ones(3)
    assert torch.equal(pickle.loads(pickle.dumps(H)) @ v, H @ v)
