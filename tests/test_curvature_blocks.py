"""Blocks asked side by side get what each gets by itself, from one pass over the data for all of them."""

import threading

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gradcond.curvature import (
    GGN,
    EmpiricalFisher,
    Hessian,
    MonteCarloFisher,
    Preconditioned,
    condition_number,
    each_block,
    eigsh,
    spectral_density,
    trace,
)

KINDS = [Hessian, GGN, EmpiricalFisher, MonteCarloFisher]
LAYERS = ["0.*", "2.*", "4.*"]


def problem(batches=2):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    data = [(torch.randn(8, 6), torch.randint(0, 3, (8,))) for _ in range(batches)]
    return model, nn.CrossEntropyLoss(), data


def by_name(H):
    return {name: H.block(name) for name in LAYERS}


def passes(model):
    """How often the model has been called; by its first layer, since its own call may be another's."""
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_blocks(kind, batches):
    H = kind(*problem(batches), method="double_backward")
    found = each_block(by_name(H), lambda B: B.to_dense(chunk=7))
    whole = H.to_dense()
    for name, block in by_name(H).items():
        assert_close(found[name], block.to_dense(), rtol=1e-13, atol=1e-15)
        own = torch.cat([torch.arange(H.shape[0])[H.slices[key]] for key in block.names])
        assert_close(found[name], whole[own][:, own], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "function",
    [
        lambda B: eigsh(B, 2, tol=1e-10).eigenvalues,
        lambda B: spectral_density(B, 8, 2).nodes,
        lambda B: torch.tensor(condition_number(B, max_matvecs=25).lambda_max),
        lambda B: trace(B, 12).estimate,
    ],
    ids=["eigenpairs", "density", "condition number", "trace"],
)
def test_what_is_found_out_is_what_each_block_tells_by_itself(function):
    H = Hessian(*problem(), method="double_backward")
    found = each_block(by_name(H), function)
    assert list(found) == LAYERS
    for name, block in by_name(H).items():
        assert_close(found[name], function(block), rtol=1e-8, atol=1e-10)


def test_one_pass_serves_all_blocks():
    model, loss_fn, data = problem()
    H = Hessian(model, loss_fn, data, method="double_backward")
    H.check_deterministic()
    calls, blocks = passes(model), by_name(H)
    each_block(blocks, lambda B: [B @ torch.ones(B.shape[0]) for _ in range(5)])
    assert len(calls) == 5 * len(data)
    assert [B.num_matvecs for B in blocks.values()] == [5, 5, 5]


def test_the_graph_of_a_single_batch_is_built_once():
    model, loss_fn, data = problem(1)
    H = Hessian(model, loss_fn, data, method="double_backward")
    H.check_deterministic()
    calls = passes(model)
    each_block(by_name(H), lambda B: B.to_dense())
    assert len(calls) == 1


def test_one_that_is_done_sooner_does_not_hold_up_the_others():
    model, loss_fn, data = problem()
    H = Hessian(model, loss_fn, data)
    H.check_deterministic()
    calls = passes(model)
    steps = {"0.weight": 1, "2.weight": 4, "4.weight": 0}

    def some(B):
        v = torch.ones(B.shape[0])
        for _ in range(steps[B.names[0]]):
            v = B @ v
        return v

    found = each_block(by_name(H), some)
    assert len(calls) == 4 * len(data)
    block = H.block("2.*")
    assert_close(found["2.*"], block @ (block @ (block @ (block @ torch.ones(block.shape[0])))))


def test_changes_of_variables_and_parts_of_parameters_are_blocks_too():
    H = Hessian(*problem(), method="double_backward")

    class Halves:
        """P = I / 2."""

        def factor(self, z):
            return z / 2

        factor_transpose = factor

    K, row = Preconditioned(H, Halves()), [0, 1, 2, 30]
    blocks = {
        "layer": Preconditioned(H.block("0.*"), Halves()),
        "rows": K.block(row),
        "sum": H.block("2.*").shift(1.0),
    }
    found = each_block(blocks, lambda B: B.to_dense())
    for name, block in blocks.items():
        assert_close(found[name], block.to_dense(), rtol=1e-12, atol=1e-14)
    assert_close(found["rows"], H.to_dense()[row][:, row] / 4, rtol=1e-12, atol=1e-14)


def test_the_same_block_may_be_there_twice():
    H = Hessian(*problem())
    block = H.block("2.*")
    found = each_block({"a": block, "b": block}, lambda B: B @ torch.ones(B.shape[0]))
    assert torch.equal(found["a"], found["b"]) and each_block({}, trace) == {}


class Failing:
    """Data that cannot be read a third time."""

    def __init__(self, data, error):
        self.data, self.error, self.times = data, error, 0

    def __iter__(self):
        self.times += 1
        if self.times == 5:  # after the two products that show whether H is repeatable
            raise self.error
        yield from self.data


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_when_a_pass_fails_all_stop_and_it_is_told(error):
    model, loss_fn, data = problem()
    H = Hessian(model, loss_fn, Failing(data, error), method="double_backward")
    blocks, threads = by_name(H), threading.active_count()
    with pytest.raises(type(error)):
        each_block(blocks, lambda B: eigsh(B, 2))
    assert threading.active_count() == threads
    for block in blocks.values():
        assert_close(block @ torch.ones(block.shape[0]), H.block(*block.names) @ torch.ones(block.shape[0]))


@pytest.mark.parametrize("after", [0, 2])
def test_when_one_function_fails_the_others_end(after):
    H = Hessian(*problem())
    done, threads = [], threading.active_count()

    def function(B):
        v = torch.ones(B.shape[0])
        for _ in range(after):
            B @ v
        if B.names[0] == "2.weight":
            raise RuntimeError("mine")
        for _ in range(50):
            B @ v
        done.append(B)

    with pytest.raises(RuntimeError, match="mine"):
        each_block(by_name(H), function)
    assert not done and threading.active_count() == threads


def test_blocks_of_several_matrices_are_refused():
    model, loss_fn, data = problem()
    H = Hessian(model, loss_fn, data)
    for other in (GGN(model, loss_fn, data), Hessian(model, loss_fn, data[:1]), Hessian(*problem())):
        with pytest.raises(ValueError, match="one matrix"):
            each_block({"a": H.block("0.*"), "b": other.block("2.*")}, trace)
    with pytest.raises(TypeError, match="'b' is of a Wrapped"):
        each_block({"a": H.block("0.*"), "b": H.block("2.*") + torch.eye(30)}, trace)


def test_a_matrix_that_cannot_be_repeated_is_refused_before_anything_runs():
    model, loss_fn, data = problem()
    model.insert(1, nn.Dropout(0.5))
    H, ran = Hessian(model, loss_fn, data), []
    with pytest.raises(ValueError, match="Dropout"):
        each_block({"0.*": H.block("0.*")}, ran.append)
    assert not ran
