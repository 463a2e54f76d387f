"""What an engine keeps between steps is dropped when what it follows from has changed.

A copy of an optimizer keeps nothing between steps, so it does after a change what the original must do.
"""

import copy

import pytest
import torch
from cases import flat
from torch import nn

from gradcond import BNP, GradientCentralization, MeanShiftRejection, RateDamping, wrap

CHAINS = {
    "bnp": lambda: [BNP()],
    "bnp-every": lambda: [BNP(every=2)],
    "gc": lambda: [GradientCentralization()],
    "msr": lambda: [MeanShiftRejection()],
    "bnp+msr": lambda: [BNP(), MeanShiftRejection()],
    "gc+damping": lambda: [GradientCentralization(), RateDamping()],
}


def network():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3),
        nn.Flatten(),
        nn.Linear(12, 6),
        nn.ReLU(),
        nn.Linear(6, 5),
    )


def run(model, optimizer, steps, rows=9):
    for _ in range(steps):
        optimizer.zero_grad()
        dtype = next(model.parameters()).dtype
        model(1 + torch.randn(rows, 2, 6, 6, dtype=dtype)).square().mean().backward()
        optimizer.step()


def set_settings(model, optimizer, **settings):
    for conditioner in optimizer.conditioners:
        for key, value in settings.items():
            if hasattr(conditioner, key):
                setattr(conditioner, key, value)


def switch_off(model, optimizer):
    optimizer.param_groups[0]["gradcond"] = False


def switch_on(model, optimizer):
    optimizer.param_groups[1]["gradcond"] = True


def hold_less(model, optimizer):
    params = optimizer.param_groups[0]["params"]
    del params[[p is model[4].weight for p in params].index(True)]


def hold_others(model, optimizer):
    optimizer.param_groups[0]["params"] = [model[0].weight, model[4].bias]


def add_group(model, optimizer):
    optimizer.add_param_group({"params": list(model[6].parameters())})


def freeze_bias(model, optimizer):
    model[4].bias.requires_grad_(False)


def freeze_layer(model, optimizer):
    model[0].requires_grad_(False)


def replace_parameter(model, optimizer):
    before, model[4].weight = model[4].weight, nn.Parameter(2 * model[4].weight.detach())
    params = optimizer.param_groups[0]["params"]
    params[[p is before for p in params].index(True)] = model[4].weight


def show_another(model, optimizer):
    model[4].weight = nn.Parameter(2 * model[4].weight.detach())


def swap_data(model, optimizer):
    model[4].weight.data = model[4].weight.data.mT.contiguous().mT
    model[2].weight.data = 2 * model[2].weight.data.contiguous(memory_format=torch.channels_last)


def load(model, optimizer):
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["gradcond"]["chain"]:
        for layer in entry["layers"].values():
            layer.update({key: 2 * value for key, value in layer.items() if isinstance(value, torch.Tensor)})
            layer.update({key: 2 * value for key, value in layer.items() if key == "steps"})
    optimizer.load_state_dict(state)


CHANGES = {
    "switch-off": switch_off,
    "switch-on": switch_on,
    "hold-less": hold_less,
    "hold-others": hold_others,
    "add-group": add_group,
    "freeze-bias": freeze_bias,
    "freeze-layer": freeze_layer,
    "replace-parameter": replace_parameter,
    "show-another": show_another,
    "swap-data": swap_data,
    "load": load,
    "double": lambda model, optimizer: model.double(),
    "channels-last": lambda model, optimizer: model.to(memory_format=torch.channels_last),
    "side": lambda *both: set_settings(*both, side="output"),
    "rejection": lambda *both: set_settings(*both, rejection=0.3),
    "rescale": lambda *both: set_settings(*both, rescale=True),
    "eps": lambda *both: set_settings(*both, eps=0.5),
    "eps-zero": lambda *both: set_settings(*both, eps=0.0),
    "eps_rel": lambda *both: set_settings(*both, eps_rel=0.5),
    "scale": lambda *both: set_settings(*both, scale="batch"),
    "center": lambda *both: set_settings(*both, center=False),
    "standardize": lambda *both: set_settings(*both, standardize=False),
    "start": lambda *both: set_settings(*both, start="paper", decay=0.5),
}


def warm(chain, dtype=torch.float64):
    model = network().to(dtype)
    first, second = list(model[:4].parameters()), list(model[4].parameters())
    groups = [{"params": first + second}, {"params": list(model[6].parameters()), "gradcond": False}]
    optimizer = wrap(torch.optim.SGD(groups[:1], lr=1e-2), model, CHAINS[chain]())
    return model, optimizer, groups[1]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("chain", CHAINS)
def test_a_change_between_steps_is_seen(chain, change):
    model, optimizer, group = warm(chain, torch.float32 if change == "double" else torch.float64)
    if change == "switch-on":
        optimizer.add_param_group(group)
    run(model, optimizer, 3)
    other, twin = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (other, twin)):
        CHANGES[change](m, o)
        torch.manual_seed(5)
        run(m, o, 1, rows=4)
        run(m, o, 2)
        assert o.report() is not None
    assert flat(list(model.parameters())).isfinite().all()
    assert torch.equal(flat(list(model.parameters())), flat(list(other.parameters())))
    assert str(optimizer.report()) == str(twin.report())


@pytest.mark.parametrize("change", ["switch-off", "hold-others", "freeze-layer", "add-group"])
def test_the_report_follows_a_change(change):
    model, optimizer, _ = warm("bnp")
    run(model, optimizer, 2)
    before = set(optimizer.report().conditioned)
    CHANGES[change](model, optimizer)
    assert set(optimizer.report().conditioned) != before


@pytest.mark.parametrize("chain", ["gc", "msr", "bnp"])
def test_a_gradient_that_was_refused_leaves_nothing_for_the_next_step(chain):
    model, optimizer, _ = warm(chain)
    run(model, optimizer, 2)
    other, twin = copy.deepcopy((model, optimizer))
    optimizer.zero_grad()
    model(torch.randn(9, 2, 6, 6)).square().mean().backward()
    model[2].weight.grad[1, 2, 0, 1] = torch.nan
    raw = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"nan or inf in the gradient of 2\.weight"):
        optimizer.step()
    for p, gradient in zip(model.parameters(), raw, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=0, atol=0, equal_nan=True)
    for m, o in ((model, optimizer), (other, twin)):
        torch.manual_seed(5)
        run(m, o, 2)
    assert torch.equal(flat(list(model.parameters())), flat(list(other.parameters())))


@pytest.mark.parametrize("chain", ["gc", "msr"])
def test_a_row_whose_sum_overflows_is_not_refused(chain):
    model, optimizer, _ = warm(chain, torch.float32)
    run(model, optimizer, 2)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    model[2].weight.grad.fill_(1e38)
    optimizer.step()


def test_a_layer_whose_hooks_are_gone_leaves_the_others_in_step():
    model, optimizer, _ = warm("bnp")
    run(model, optimizer, 3)
    other, twin = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (other, twin)):
        m[2]._forward_hooks.clear()
        torch.manual_seed(5)
        with pytest.warns(UserWarning, match="layer '2' has a gradient, but none of its inputs were seen"):
            run(m, o, 2)
    assert torch.equal(flat(list(model.parameters())), flat(list(other.parameters())))
    states = optimizer._engine.states[0]
    assert [states[name]["steps"] for name in ("0", "2", "4")] == [5, 3, 5]


def test_a_layer_that_has_rested_is_not_in_step():
    model, optimizer, _ = warm("bnp")
    model[:4].requires_grad_(False)
    optimizer.param_groups[0]["params"] += list(model[6].parameters())
    run(model, optimizer, 3)
    model[4].requires_grad_(False)
    run(model, optimizer, 1)
    model[4].requires_grad_(True)
    other, twin = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (other, twin)):
        torch.manual_seed(5)
        run(m, o, 2)
    assert torch.equal(flat(list(model.parameters())), flat(list(other.parameters())))
    states = optimizer._engine.states[0]
    assert [states[name]["steps"] for name in ("4", "6")] == [5, 6]


def test_what_can_be_computed_again_is_not_copied():
    model, optimizer, _ = warm("bnp")
    run(model, optimizer, 3)
    _, twin = copy.deepcopy((model, optimizer))
    assert all(not key.startswith("_") for state in twin._engine.states[0].values() for key in state)
    assert any(key.startswith("_") for state in optimizer._engine.states[0].values() for key in state)


@pytest.mark.parametrize("seed", range(5))
def test_a_copy_goes_on_to_the_last_bit_in_float32(seed):
    """Also where a row has more inputs than there are rows (q > 1)."""
    torch.manual_seed(seed)
    model = nn.Sequential(*[layer for width in range(8, 20) for layer in (nn.LazyLinear(width), nn.Tanh())])
    model.float()(torch.ones(1, 7, dtype=torch.float32))
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, [BNP()])

    def train(model, optimizer, steps):
        for step in steps:
            torch.manual_seed(step)
            optimizer.zero_grad()
            model(torch.randn(4, 7, dtype=torch.float32)).square().sum().backward()
            optimizer.step()

    train(model, optimizer, range(3))
    other, twin = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (other, twin)):
        train(m, o, range(3, 5))
    assert torch.equal(flat(list(model.parameters())), flat(list(other.parameters())))
