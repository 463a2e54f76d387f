"""T15: what training does to the norm of weights whose scale the loss ignores."""

import torch
from torch import nn
from torch.testing import assert_close

from gradcond import WeightStandardization, wrap


def scale_invariant():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 1, bias=False), nn.BatchNorm1d(1, eps=1e-30, affine=False))
    return model, torch.randn(64, 10), torch.randn(64, 1)


def loss(model, x, y):
    return (model(x) - y).square().mean()


def test_t15_the_squared_norm_grows_by_the_squared_step():
    model, x, y = scale_invariant()
    weight, lr = model[0].weight, 0.3
    optimizer = wrap(torch.optim.SGD([weight], lr=lr), model, [])
    for _ in range(20):
        before = weight.detach().square().sum()
        optimizer.zero_grad()
        loss(model, x, y).backward()
        assert_close((weight.detach() * weight.grad).sum(), torch.tensor(0.0), rtol=0, atol=1e-13)
        optimizer.step()
        assert_close(
            weight.detach().square().sum() - before, lr**2 * weight.grad.square().sum(), rtol=0, atol=1e-13
        )


def test_t15_decay_and_growth_balance_at_the_predicted_norm():
    model, x, _ = scale_invariant()
    weight, lr, decay = model[0].weight, 0.05, 0.02
    optimizer = wrap(torch.optim.SGD([weight], lr=lr, weight_decay=decay), model, [])
    generator = torch.Generator().manual_seed(0)
    norms, gradients = [], []
    for step in range(12000):
        optimizer.zero_grad()
        y = torch.randn(64, 1, generator=generator)  # noise keeps the gradient's mean square steady
        loss(model, x, y).backward()
        gradients.append((weight.grad.square().sum() * weight.detach().square().sum()).item())
        optimizer.step()
        if step > 4000:
            norms.append(weight.detach().norm().item() ** 4)
    mean_square = torch.tensor(gradients[4000:]).mean()  # |g~|^2 at unit norm
    predicted = lr * mean_square / (2 * decay)
    assert_close(torch.tensor(norms).mean(), predicted, rtol=0.05, atol=0)


def test_standardized_steps_have_no_radial_part():
    model, x, y = scale_invariant()
    weight = model[0].weight
    with torch.no_grad():
        weight -= weight.mean()
    optimizer = wrap(torch.optim.SGD([weight], lr=0.1), model, [WeightStandardization()])
    loss(model, x, y + 1).backward()
    norm = weight.detach().norm()
    optimizer.step()
    assert_close(weight.detach().norm(), norm, rtol=1e-14, atol=0)
    assert (weight.grad * weight).sum().abs() < weight.grad.norm() * norm
