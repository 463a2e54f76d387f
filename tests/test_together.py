"""Steps taken for all layers at one go are those taken layer by layer, to the bit, and only where they may be."""

import copy
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from cases import wrapped
from torch import nn
from torch.utils._pytree import tree_leaves

from gradcond import BNP, MeanShiftRejection, NormClipping, RateDamping, wrap
from gradcond.together import Together


def network(bias=True, dtype=None):
    torch.manual_seed(0)
    layers = nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 5, bias=bias), nn.ReLU(), nn.Linear(5, 2)
    return nn.Sequential(*layers).to(dtype)


@pytest.fixture
def taken(monkeypatch):
    """What the steps at one go have said."""
    said, step_ = [], Together.step_

    def told(self, *args):
        said.append(step_(self, *args))
        return said[-1]

    monkeypatch.setattr(Together, "step_", told)
    return said


def assert_same(one, other):
    one, other = tree_leaves(one), tree_leaves(other)
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def batch(t, rows=4):
    return torch.randn(rows, 12, generator=torch.Generator().manual_seed(t)) * 2 + 1


def ordinary(model, optimizer, t):
    model(batch(t)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def batches_of_changing_size(model, optimizer, t):
    model(batch(t, rows=1 + t % 3 * 6)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def accumulated_and_clipped(model, optimizer, t):
    for i in range(3):
        (model(batch(10 * t + i)).square().mean() / 3).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


def by_closure(model, optimizer, t):
    def closure():
        optimizer.zero_grad()
        loss = model(batch(t)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)


def put_together_by_the_caller(model, optimizer, t):
    parts = []
    for i in range(2):
        optimizer.zero_grad()
        model(batch(10 * t + i)).square().mean().backward()
        parts.append([p.grad for p in model.parameters()])
    for p, one, other in zip(model.parameters(), *parts, strict=True):
        p.grad = one + other
    optimizer.step()
    optimizer.zero_grad()


def stepped_twice(model, optimizer, t):
    model(batch(t)).square().mean().backward()
    optimizer.step()
    optimizer.step()  # with the gradients that are conditioned already
    optimizer.zero_grad()


def a_layer_left_out_now_and_then(model, optimizer, t):
    output = model(batch(t)) if t % 2 else model[:3](batch(t))
    output.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def frozen_now_and_then(model, optimizer, t):
    model[2].bias.requires_grad_(t % 2 == 1)
    ordinary(model, optimizer, t)


def saved_and_loaded(model, optimizer, t):
    ordinary(model, optimizer, t)
    if t == 4:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def started_over(model, optimizer, t):
    ordinary(model, optimizer, t)
    if t == 4:
        optimizer.load_state_dict(optimizer.fresh)


def settings_that_change(model, optimizer, t):
    optimizer.conditioners[0].eps_rel = 0.01 * (1 + t % 3)
    optimizer.conditioners[0].decay = 0.9 - 0.1 * (t % 2)
    optimizer.conditioners[-1].strength = t % 3  # of no meaning to BNP
    optimizer.conditioners[-1].floor = 0.01 * (t % 2)
    optimizer.param_groups[0]["lr"] = 0.01 * t
    ordinary(model, optimizer, t)


WAYS = [
    ordinary,
    batches_of_changing_size,
    accumulated_and_clipped,
    by_closure,
    put_together_by_the_caller,
    stepped_twice,
    a_layer_left_out_now_and_then,
    frozen_now_and_then,
    saved_and_loaded,
    started_over,
    settings_that_change,
]
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


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("way", WAYS)
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
            if bias or way is not frozen_now_and_then:
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


def test_sums_of_layers_out_of_step_are_added_to_one_by_one(taken):
    found = []
    for out_of_step in (False, True):
        model = network()
        optimizer = wrapped(model, [BNP(), RateDamping()], lr=0.05)
        for t in range(3):
            ordinary(model, optimizer, t)
        for state in optimizer._engine.states[1].values():
            state["steps"] = 3
        optimizer._engine.states[1]["0"]["steps"] += out_of_step
        for t in range(3):
            ordinary(model, optimizer, t)
        assert taken[-3:] == [True] * 3
        found.append(copy.deepcopy(optimizer._engine.states[1]))
    assert [state["steps"] for state in found[1].values()] == [7, 6, 6]
    assert not torch.equal(found[0]["0"]["factor"], found[1]["0"]["factor"])
    assert [list(state) for state in found[0].values()] == [["steps", "sum", "factor"]] * 3


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
