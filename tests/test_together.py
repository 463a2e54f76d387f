"""Steps taken for all layers at one go are those taken layer by layer, to the bit, and only where they may be."""

import copy
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from cases import wrapped
from torch import nn
from ways import WAYS, assert_same, batch, by_closure, frozen_now_and_then, network, ordinary, said_by

from gradcond import BNP, SGLD, MeanShiftRejection, NormClipping, RateDamping, wrap
from gradcond.statistics import Bank
from gradcond.together import Together


@pytest.fixture
def taken(monkeypatch):
    """What the steps at one go have said."""
    return said_by(Together, monkeypatch)


CHAINS = {
    "default": [BNP()],
    "every": [BNP(every=2)],
    "batch": [BNP(scale="batch", start="paper")],
    "no scale": [BNP(scale=None, start="first_batch", decay=0.0)],
    "no center": [BNP(center=False)],
    "no standardize": [BNP(standardize=False)],
    "no eps": [BNP(eps=0.0)],
    "damped": [BNP(), RateDamping()],
    "damped at once": [BNP(scale="batch", every=2), RateDamping(strength=100, delay=0, floor=1.0)],
    "not damped": [BNP(), RateDamping(strength=0)],
}


@pytest.mark.parametrize(
    "way, bias",
    [(way, bias) for way in WAYS for bias in (True, False) if bias or way is not frozen_now_and_then],
)
@pytest.mark.parametrize("chain", CHAINS)
def test_at_one_go_or_layer_by_layer_is_the_same(way, chain, bias, monkeypatch):
    found = []
    for possible in (True, False):
        if not possible:
            monkeypatch.setattr(Together, "step_", lambda self, *args: False)
        model = network(bias)
        optimizer = wrap(
            torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), model, copy.deepcopy(CHAINS[chain])
        )
        optimizer.fresh = copy.deepcopy(optimizer.state_dict())
        for t in range(8):
            way(model, optimizer, t)
        found.append(
            (list(model.parameters()), optimizer.state_dict(), optimizer.preconditioner(), optimizer.report())
        )
    assert_same(found[0][:2], found[1][:2])
    v = torch.randn(sum(p.numel() for p in found[0][0] if p.requires_grad))
    assert torch.equal(found[0][2].apply(v), found[1][2].apply(v))
    assert str(found[0][3]) == str(found[1][3])


@pytest.mark.parametrize("bare", [True, False])
def test_statistics_start_anew_from_a_state_that_has_none(bare):
    model = network()
    optimizer = wrapped(model, [BNP()], lr=0.05)
    fresh = copy.deepcopy((optimizer.optimizer if bare else optimizer).state_dict())
    for t in range(4):
        ordinary(model, optimizer, t)
    with pytest.warns(UserWarning, match="start anew") if bare else nullcontext():
        optimizer.load_state_dict(fresh)
    other = copy.deepcopy(model)
    beginning = wrapped(other, [BNP()], lr=0.05)
    for t in range(4):
        ordinary(model, optimizer, t)
        ordinary(other, beginning, t)
    assert_same(
        (list(model.parameters()), optimizer.state_dict()), (list(other.parameters()), beginning.state_dict())
    )


def test_all_evaluations_of_a_closure_see_the_first_ones_factor(taken):
    model = network()
    optimizer = wrap(torch.optim.LBFGS(model.parameters(), max_iter=3), model, [BNP()])
    for t in range(4):
        by_closure(model, optimizer, t)
        assert optimizer._engine.states[0]["0"]["steps"] == t + 1
    assert not taken


def test_layers_that_are_left_out_lay_nothing_by(taken):
    model = network()
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.05), model, [BNP()], only=lambda name: name != "2")
    for t in range(4):
        ordinary(model, optimizer, t)
    assert not any(taken) and optimizer._engine.captures["2"].collected is None


@pytest.mark.parametrize("chain", ["default", "damped", "not damped"])
def test_ordinary_steps_are_taken_at_one_go_once_the_moments_are_side_by_side(chain, taken):
    model = network()
    optimizer = wrapped(model, copy.deepcopy(CHAINS[chain]), lr=0.05)
    for t in range(6):
        ordinary(model, optimizer, t)
    assert taken == [False, False, True, True, True, True]


def test_sums_of_layers_out_of_step_are_added_to_one_by_one(taken, monkeypatch):
    found = []
    for possible in (True, False):
        model = network()
        optimizer = wrapped(model, [BNP(), RateDamping()], lr=0.05)
        for t in range(3):
            ordinary(model, optimizer, t)
        optimizer._engine.states[1]["0"]["steps"] = 7
        if not possible:
            monkeypatch.setattr(Together, "step_", lambda self, *args: False)
        for t in range(3):
            ordinary(model, optimizer, t)
        found.append((list(model.parameters()), optimizer.state_dict()))
    assert taken[2:6] == [True] * 4
    assert_same(*found)
    assert [state["steps"] for state in optimizer._engine.states[1].values()] == [10, 6, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_variances_side_by_side_are_damped_as_by_themselves(dtype):
    bnp = BNP()
    for sizes in ([1, 2, 3], [5, 11, 7], [9, 4, 8, 6]):  # vectors end in the middle of layers
        states = [
            {"mean": torch.zeros(n, dtype=dtype), "variance": torch.rand(n, dtype=dtype), "steps": 1} for n in sizes
        ]
        q = [1.0 + n**0.5 for n in sizes]
        metrics = Bank(states, states[0]["mean"]).damped(bnp.eps_rel, bnp.eps, q)
        for state, metric, own in zip(states, metrics, q, strict=True):
            assert torch.equal(metric, bnp._metric(state["variance"], own))


@pytest.mark.parametrize("chain", ["default", "damped"])
def test_noise_goes_through_the_same_factor(chain, monkeypatch):
    found = []
    for possible in (True, False):
        if not possible:
            monkeypatch.setattr(Together, "step_", lambda self, *args: False)
        model = network()
        noise = torch.Generator().manual_seed(0)
        sampler = SGLD(model.parameters(), lr=0.01, temperature=1e-4, generator=noise)
        optimizer = wrap(sampler, model, copy.deepcopy(CHAINS[chain]))
        for t in range(5):
            ordinary(model, optimizer, t)
        found.append((list(model.parameters()), optimizer.state_dict()))
    assert_same(*found)


def test_each_layer_is_damped_only_where_the_damping_takes_it(taken):
    @dataclass
    class NotTheMiddle(RateDamping):
        """Leaves one layer alone."""

        def refusal(self, layer):
            return "asked to" if layer.units == 5 and layer.inputs == 5 else None

    model = network()
    optimizer = wrapped(model, [BNP(), NotTheMiddle()], lr=0.05)
    for t in range(4):
        ordinary(model, optimizer, t)
    assert not any(taken) and set(optimizer._engine.states[1]) == {"0", "4"}


def test_damped_with_rates_of_its_own_a_layer_is_asked_by_itself(taken):
    model = network()
    groups = [{"params": model[:2].parameters()}, {"params": model[2:].parameters(), "lr": 0.01}]
    optimizer = wrap(torch.optim.SGD(groups, lr=0.05), model, [BNP(), RateDamping()])
    tensor = network()
    other = wrap(
        torch.optim.Adam(tensor.parameters(), lr=torch.tensor(0.05), foreach=False), tensor, [BNP(), RateDamping()]
    )
    for t in range(4):
        ordinary(model, optimizer, t)
        ordinary(tensor, other, t)
    assert not any(taken)


@pytest.mark.parametrize(
    "chain",
    [[BNP(), MeanShiftRejection()], [MeanShiftRejection()], [RateDamping()], [BNP(), NormClipping()]],
    ids=lambda chain: " ".join(c.name for c in chain),
)
def test_other_chains_go_from_layer_to_layer(chain, taken):
    model = network()
    optimizer = wrapped(model, chain, lr=0.05)
    for t in range(4):
        ordinary(model, optimizer, t)
    assert not any(taken)


@pytest.mark.parametrize(
    "kind, sizes", [(nn.Conv1d, (1, 2, 3)), (nn.Linear, (12, 12, False)), (nn.Embedding, (4, 12))]
)
def test_other_layers_go_one_by_one(kind, sizes, taken):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.other, self.rest = kind(*sizes), network()

        def forward(self, x):
            if isinstance(self.other, nn.Embedding):
                return self.rest(x + self.other(torch.zeros(len(x), dtype=torch.long)))
            y = self.other(x[:, None] if isinstance(self.other, nn.Conv1d) else x)
            return self.rest(x) + y.mean()

    model = Mixed()
    optimizer = wrapped(model, [BNP()], lr=0.05)
    for t in range(4):
        ordinary(model, optimizer, t)
    assert not any(taken)


@pytest.mark.parametrize("where", ["weight", "bias", "input"])
@pytest.mark.parametrize("chain", ["default", "damped"])
def test_what_is_not_finite_changes_nothing(chain, where, taken):
    model = network()
    optimizer = wrapped(model, copy.deepcopy(CHAINS[chain]), lr=0.05)
    for t in range(4):
        ordinary(model, optimizer, t)
    before = copy.deepcopy((list(model.parameters()), optimizer.state_dict()))
    x = batch(5)
    if where == "input":
        x[0, 0] = torch.nan
    model(x).square().mean().backward()
    if where != "input":
        getattr(model[2], where).grad.flatten()[0] = torch.inf
    with pytest.raises(ValueError, match="finite"):
        optimizer.step()
    assert taken[-2:] == [True, False]
    assert_same((list(model.parameters()), optimizer.state_dict()), before)
    optimizer.zero_grad()
    ordinary(model, optimizer, 6)
    assert taken[-1]


def test_where_it_is_said_that_nothing_is_looked_at_nothing_is(taken):
    model = network()
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.05), model, [BNP()], check_finite=False)
    for t in range(4):
        ordinary(model, optimizer, t)
    model(batch(5)).square().mean().backward()
    model[0].weight.grad[0, 0] = torch.nan
    optimizer.step()
    assert taken[-1] and model[0].weight.isnan().any()


def test_a_method_made_of_bnp_is_asked_for_each_layer(taken):
    @dataclass
    class Twice(BNP):
        """Asked for each layer."""

        def row_map(self, layer, state):
            asked.append(layer.name)
            return super().row_map(layer, state)

    asked, model = [], network()
    optimizer = wrapped(model, [Twice()], lr=0.05)
    for t in range(4):
        ordinary(model, optimizer, t)
    assert not any(taken) and asked == ["0", "2", "4"] * 4


def test_half_precision_goes_from_layer_to_layer(taken):
    model = network(dtype=torch.bfloat16)
    optimizer = wrapped(model, [BNP()], lr=0.05)
    for t in range(4):
        model(batch(t).bfloat16()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not any(taken)
