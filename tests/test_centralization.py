"""Gradient and weight centralization against explicit projections and against each other."""

import copy

import pytest
import torch
from cases import LAYERS, backward, build, wrapped
from torch import nn
from torch.testing import assert_close

from gradcond import BNP, GradientCentralization, WeightCentralization, wrap


def centered(layer, g, side):
    """C g unit by unit, from the module's type alone."""
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    groups = getattr(layer, "groups", 1)
    g = g.clone()
    blocks = g.chunk(groups, 0)
    for block in blocks:  # (out, in, *taps) or (in, out, *taps) of one group
        block = block.transpose(0, 1) if transposed else block
        if side in ("input", "both"):
            for unit in block:
                unit -= unit.mean()
        if side in ("output", "both"):
            block -= block.mean(0)
    return g


@pytest.mark.parametrize("side", ["input", "output", "both"])
@pytest.mark.parametrize("layer", LAYERS)
def test_every_output_unit_is_centered_and_biases_are_left_alone(layer, side):
    model, x = build(layer, True)
    optimizer = wrapped(model, [GradientCentralization(side=side)])
    weight, bias = backward(model, x)
    optimizer.step()
    refused = layer in optimizer.report().left_alone or "frozen" in str(optimizer.report())
    expected = weight if refused else centered(model[0], weight, side)
    assert_close(model[0].weight.grad, expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(model[0].bias.grad, bias)
    assert "0.bias" in optimizer.report().left_alone


def test_conv_only_leaves_linear_layers_alone():
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Linear(9, 2))
    optimizer = wrapped(model, [GradientCentralization(conv_only=True)])
    raw = backward(model, torch.randn(4, 2, 5))
    optimizer.step()
    assert torch.equal(model[2].weight.grad, raw[2])
    assert model[0].weight.grad.mean((1, 2)).abs().max() < 1e-15 < raw[0].mean((1, 2)).abs().max()
    assert optimizer.report().left_alone["2.weight"] == "GradientCentralization: conv_only"


@pytest.mark.parametrize("others", [[], [BNP()]], ids=["alone", "with BNP"])
def test_conv_only_holds_from_the_step_it_is_set_or_loaded(others):
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(6, 4)
    optimizer = wrapped(model, [GradientCentralization(), *others])
    backward(model, x)
    optimizer.step()
    optimizer.conditioners[0].conv_only = True
    loading = copy.deepcopy(optimizer.state_dict())
    optimizer.conditioners[0].conv_only = False
    for change in (
        lambda: setattr(optimizer.conditioners[0], "conv_only", True),
        lambda: setattr(optimizer.conditioners[0], "conv_only", False),
        lambda: optimizer.load_state_dict(loading),
    ):
        change()
        optimizer.zero_grad()
        backward(model, x)
        optimizer.step()
        takes = not optimizer.conditioners[0].conv_only
        assert (model[0].weight.grad.sum(1).abs().max() < 1e-12) == takes
        assert ("GradientCentralization" in str(optimizer.report().conditioned)) == takes


def test_the_mean_weight_never_moves_under_momentum():
    model, x = build("conv2d", True)
    before = model[0].weight.detach().mean((1, 2, 3))
    bare = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    optimizer = wrap(bare, model, [GradientCentralization()])
    for _ in range(20):
        backward(model, x)
        optimizer.step()
    assert_close(model[0].weight.mean((1, 2, 3)), before, rtol=0, atol=1e-14)


def run(chain, base, steps=30):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    for layer in (model[0], model[2]):
        layer.weight.data -= layer.weight.data.mean(1, keepdim=True)
    x, y = torch.randn(32, 6) + 1, torch.randint(0, 2, (32,))
    optimizer = wrap(base(model.parameters()), model, chain)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("base", ["sgd", "momentum and decay", "adam"])
def test_t19_projecting_the_weights_equals_projecting_both_unless_the_optimizer_is_adam(base):
    bases = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
        "momentum and decay": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
        "adam": lambda p: torch.optim.Adam(p, lr=0.05),
    }
    weights_only = run([WeightCentralization()], bases[base])
    both = run([WeightCentralization(), GradientCentralization()], bases[base])
    difference = (weights_only - both).abs().max()
    assert (difference < 1e-13) == (base != "adam")
    assert base != "adam" or difference > 0.01


def test_weights_are_centered_after_each_step_and_the_report_says_so():
    model, x = build("transposed2d", True)
    optimizer = wrapped(model, [WeightCentralization()], lr=0.1)
    assert "weights are centered after every step" in str(optimizer.report())
    untouched = model[0].weight.detach().clone()
    assert torch.equal(model[0].weight, untouched)  # wrap itself moves nothing
    backward(model, x)
    optimizer.step()
    rows = model[0].weight.unflatten(0, (2, -1)).transpose(1, 2)
    assert rows.mean((2, 3, 4)).abs().max() < 1e-16


def test_an_unknown_side_is_refused():
    with pytest.raises(ValueError, match='must be "input", "output" or "both", got \'left\''):
        GradientCentralization(side="left")
