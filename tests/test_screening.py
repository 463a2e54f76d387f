"""Steps whose sums screen the gradients are those taken layer by layer, to the bit, and only where they may be."""

import copy
import itertools

import pytest
import torch
from cases import wrapped
from torch import nn
from ways import (
    WAYS,
    assert_same,
    batch,
    frozen_now_and_then,
    network,
    ordinary,
    said_by,
    the_first_layer_last_of_all,
)

from gradcond import BNP, GradientCentralization, MeanShiftRejection, WeightCentralization, wrap
from gradcond.screening import Screening


@pytest.fixture
def taken(monkeypatch):
    """What the screened steps have said."""
    return said_by(Screening, monkeypatch)


def convolutional(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 12)),
        nn.Conv1d(1, 4, 3, bias=bias),
        nn.ReLU(),
        nn.ConvTranspose1d(4, 2, 2, groups=2, bias=bias),
        nn.Flatten(),
        nn.Linear(22, 2, bias=bias),
    )


CHAINS = {
    "gc": lambda: [GradientCentralization()],
    "gc of both sides": lambda: [GradientCentralization(side="both")],
    "msr": lambda: [MeanShiftRejection(rejection=0.5, rescale=True)],
    "gc and msr": lambda: [GradientCentralization(), MeanShiftRejection()],
}


@pytest.mark.parametrize(
    "way, build, bias",
    [
        (way, build, bias)
        for way, build, bias in itertools.product(WAYS, [network, convolutional], [True, False])
        if (build is network and bias) or way not in (frozen_now_and_then, the_first_layer_last_of_all)
    ],
)
@pytest.mark.parametrize("chain", CHAINS)
def test_screened_or_layer_by_layer_is_the_same(way, chain, build, bias, monkeypatch):
    found = []
    for possible in (True, False):
        if not possible:
            monkeypatch.setattr(Screening, "step_", lambda self, *args: False)
        model = build(bias)
        optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), model, CHAINS[chain]())
        optimizer.fresh = copy.deepcopy(optimizer.state_dict())
        for t in range(6):
            way(model, optimizer, t)
        found.append((list(model.parameters()), optimizer.state_dict(), str(optimizer.report())))
    assert_same(*found)


@pytest.mark.parametrize(
    "chain, build", [("gc", network), ("gc of both sides", convolutional), ("msr", convolutional)]
)
def test_ordinary_steps_are_screened_after_the_first(chain, build, taken):
    model = build()
    optimizer = wrapped(model, CHAINS[chain](), lr=0.05)
    for t in range(4):
        ordinary(model, optimizer, t)
    assert taken == [False, True, True, True]


def test_layers_that_nothing_is_done_to_do_not_count(taken):
    model = convolutional()  # its Linear has no taps
    optimizer = wrapped(model, CHAINS["msr"](), lr=0.05)
    for t in range(2):
        ordinary(model, optimizer, t)
    assert taken[-1] and "5" not in optimizer.report().conditioned


@pytest.mark.parametrize(
    "chain",
    [CHAINS["gc and msr"](), [WeightCentralization()], [BNP()], [GradientCentralization(), BNP()], []],
    ids=str,
)
def test_other_chains_are_not(chain, taken):
    model = convolutional()
    optimizer = wrapped(model, chain, lr=0.05)
    for t in range(4):
        ordinary(model, optimizer, t)
    assert not any(taken) and len(taken) <= 2  # asked no more, once it is known


@pytest.mark.parametrize("kind, sizes", [(nn.LSTM, (12, 3)), (nn.MultiheadAttention, (12, 3))])
def test_layers_whose_rows_are_not_those_of_one_weight_are_not(kind, sizes, taken):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.other, self.rest = kind(*sizes), network()

        def forward(self, x):
            y = self.other(*[x[:, None]] * (3 if kind is nn.MultiheadAttention else 1))[0]
            return self.rest(x) + y.mean()

    model = Mixed()
    optimizer = wrapped(model, CHAINS["gc"](), lr=0.05)
    for t in range(3):
        ordinary(model, optimizer, t)
    assert not taken and "rest.0" in optimizer.report().conditioned


def test_several_processes_meet_in_the_engine(taken, monkeypatch):
    model = network()
    optimizer = wrapped(model, CHAINS["gc"](), lr=0.05)
    monkeypatch.setattr(type(optimizer._engine.ranks), "several", True)
    optimizer._engine.begin(optimizer.param_groups)
    assert not optimizer._engine.at_one_go


def test_a_state_without_the_layers_makes_them_anew(taken):
    model = network()
    optimizer = wrapped(model, CHAINS["gc"](), lr=0.05)
    for t in range(3):
        ordinary(model, optimizer, t)
    with pytest.warns(UserWarning, match="start anew"):
        optimizer.load_state_dict(optimizer.optimizer.state_dict())
    ordinary(model, optimizer, 3)
    ordinary(model, optimizer, 4)
    assert taken[-2:] == [False, True]
    assert all(name in optimizer._engine.states[0] for name in ("0", "2", "4"))


@pytest.mark.parametrize("check", [None, False])
@pytest.mark.parametrize("where", ["weight", "bias"])
def test_what_is_not_finite_changes_nothing_unless_nothing_is_looked_at(where, check, taken):
    model = network()
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.05), model, CHAINS["gc"](), check_finite=check)
    for t in range(3):
        ordinary(model, optimizer, t)
    model(batch(5)).square().mean().backward()
    getattr(model[2], where).grad.flatten()[0] = torch.inf
    before = copy.deepcopy((list(model.parameters()), [p.grad for p in model.parameters()]))
    if check is None:
        with pytest.raises(ValueError, match=f"nan or inf in the gradient of 2.{where}"):
            optimizer.step()
        assert_same((list(model.parameters()), [p.grad for p in model.parameters()]), before)
    else:
        optimizer.step()
        assert taken[-1] and not getattr(model[2], where).isfinite().all()
