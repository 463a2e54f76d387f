"""Weight standardization: the tangent map, the manifold, and the layer that it equals to first order."""

import math

import pytest
import torch
from cases import LAYERS, backward, build, wrapped
from torch import nn
from torch.testing import assert_close

from gradcond import WeightCentralization, WeightStandardization, wrap


def rows_of(layer, tensor):
    tensor = tensor.unflatten(0, (getattr(layer, "groups", 1), -1))
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        tensor = tensor.transpose(1, 2)
    return tensor.flatten(0, 1).flatten(1)  # one row per output unit


def long_enough(layer):
    return rows_of(build(layer, True)[0][0], build(layer, True)[0][0].weight).shape[1] >= 3


@pytest.mark.parametrize("layer", [name for name in LAYERS if long_enough(name)])
def test_m_is_the_explicit_matrix_of_every_output_unit(layer):
    model, x = build(layer, True)
    optimizer = wrapped(model, [WeightStandardization(eps=0)])
    weight, bias = backward(model, x)
    expected = []
    for w, g in zip(rows_of(model[0], model[0].weight.detach()), rows_of(model[0], weight), strict=True):
        n = len(w)
        c = torch.eye(n) - torch.ones(n, n) / n
        u = c @ w / (c @ w).norm()
        expected.append((c - torch.outer(u, u)) @ g / w.var())
    optimizer.step()
    assert_close(rows_of(model[0], model[0].weight.grad), torch.stack(expected), rtol=1e-11, atol=1e-12)
    assert torch.equal(model[0].bias.grad, bias)


@pytest.mark.parametrize("gain", [None, 0.5])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_rows_stay_on_the_manifold_under_any_optimizer(base, gain):
    model, x = build("transposed2d", True)
    own = rows_of(model[0], model[0].weight.detach()).std(1)
    before = model[0].weight.detach().clone()
    optimizer = wrap(base(model.parameters(), lr=1e-3), model, [WeightStandardization(gain=gain)])
    assert torch.equal(model[0].weight, before)  # announced, not yet done
    assert "at the first step" in str(optimizer.report())
    for _ in range(5):
        backward(model, x)
        optimizer.step()
        rows = rows_of(model[0], model[0].weight.detach())
        assert rows.mean(1).abs().max() < 1e-15
        assert_close(rows.std(1), own if gain is None else torch.full_like(own, gain))
    assert "were put to mean 0" in str(optimizer.report())


@pytest.mark.parametrize("gain", [None, 1.0])
@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
def test_it_is_training_the_reparametrized_filter_to_first_order(kind, gain):
    """One step is the same to rounding; over several |v| grows: the relative distance falls like lr^2."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 4) if kind is nn.Linear else nn.Conv2d(2, 4, 3)
    x = torch.randn(8, 6) if kind is nn.Linear else torch.randn(8, 2, 5, 5)
    with torch.no_grad():  # start on the manifold, so that both see the same filter
        rows = layer.weight.flatten(1)
        deviation = rows.std(1, keepdim=True) if gain is None else torch.full((4, 1), gain)
        rows = deviation * (rows - rows.mean(1, keepdim=True)) / rows.std(1, keepdim=True)
        layer.weight.copy_(rows.view_as(layer.weight))
    start = layer.weight.detach().clone()

    def filtered(v):
        flat = v.flatten(1)
        unit = (flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True)
        return (deviation * unit).view_as(v)

    def loss(weight):
        return (torch.func.functional_call(layer, {"weight": weight}, (x,)) ** 3).mean()

    def relative_distance(lr, steps):
        v = (start.flatten(1) * deviation).view_as(start).requires_grad_()
        layer.weight.data.copy_(start)
        bare = torch.optim.SGD([layer.weight], lr=lr)
        optimizer = wrap(bare, layer, [WeightStandardization(eps=0, gain=gain)])
        for _ in range(steps):
            (g,) = torch.autograd.grad(loss(filtered(v)), v)
            v = (v - lr * g).detach().requires_grad_()
            optimizer.zero_grad()
            loss(layer.weight).backward()
            optimizer.step()
        reparametrized = filtered(v).detach()
        return ((layer.weight.detach() - reparametrized).norm() / (reparametrized - start).norm()).item()

    scale = 0.1 * deviation.min().item() ** 3
    assert relative_distance(scale, 1) < 1e-12
    distances = [relative_distance(scale * lr, 5) for lr in (0.2, 0.04, 0.008)]
    assert distances[0] > 1e-7  # there is a difference to measure
    orders = [math.log(distances[i] / distances[i + 1], 5) for i in range(2)]
    assert orders == pytest.approx([2, 2], abs=0.15)


def test_constant_rows_and_short_rows_are_left_alone_and_reported():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(2, 2))
    nn.init.zeros_(model[1].weight)
    optimizer = wrapped(model, [WeightStandardization()], lr=0.1)
    raw = backward(model, torch.randn(5, 4))
    optimizer.step()
    assert torch.equal(model[1].weight.grad, raw[2])
    assert torch.equal(model[2].weight.grad, raw[4])
    left_alone = optimizer.report().left_alone
    assert "constant rows" in left_alone["1.weight"]
    assert "rows of one or two weights" in left_alone["2.weight"]
    assert not torch.equal(model[0].weight.grad, raw[0]) or not raw[0].any()


@pytest.mark.parametrize("method", [WeightStandardization, WeightCentralization])
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_modules_are_left_alone_as_a_whole(method, kind):
    model = nn.Sequential(kind(4, 5))
    report = wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, [method()]).report()
    assert not report.conditioned
    assert "several weights make one row" in report.left_alone["0.weight_ih_l0"]


def test_weights_loaded_after_wrap_count():
    model = nn.Linear(4, 3)
    nn.init.zeros_(model.weight)
    optimizer = wrapped(model, [WeightStandardization()], lr=0.0)
    nn.init.normal_(model.weight)
    backward(model, torch.randn(5, 4))
    optimizer.step()
    assert_close(model.weight.mean(1), torch.zeros(3), rtol=0, atol=1e-15)


@pytest.mark.parametrize("settings", [{"eps": -1.0}, {"gain": 0.0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must .* got"):
        WeightStandardization(**settings)
