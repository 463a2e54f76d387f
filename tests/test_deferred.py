"""Moments put off to the backward pass are those taken at once, and keep nothing alive that autograd does not."""

import gc
import weakref

import pytest
import torch
from cases import wrapped
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from gradcond import BNP
from gradcond.inputs import _MANY
from gradcond.moments import channel_moments, is_matrix, moments_of_matrices


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2))


def capture(optimizer, name="0"):
    return optimizer._engine.captures[name]


def statistics(optimizer):
    return {name: (s["mean"], s["variance"], s["rows"]) for name, s in optimizer._engine.states[0].items()}


@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 80)), min_size=1, max_size=4),
    offset=st.sampled_from([0.0, 3.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    constant=st.booleans(),
)
def test_moments_of_several_matrices_are_those_of_each(sizes, offset, dtype, constant):
    matrices = [torch.randn(*size, dtype=dtype) * 1e-2 for size in sizes]
    matrices[-1] += offset
    if constant:
        matrices[0][:, 0] = -0.42
    assert all(map(is_matrix, matrices))
    for x, (mean, variance) in zip(matrices, moments_of_matrices(matrices), strict=True):
        expected = channel_moments(x, 1)
        assert_close(mean, expected[0], rtol=1e-6, atol=1e-7)
        assert_close(variance, expected[1], rtol=1e-2, atol=1e-11)


def test_matrices_of_two_precisions_keep_theirs():
    exact = torch.randn(128, 64, dtype=torch.float64) * 1e-2 + 1e4
    found = moments_of_matrices([exact.float(), exact])
    assert [mean.dtype for mean, _ in found] == [torch.float32, torch.float64]
    for x, (_, variance) in zip((exact.float(), exact), found, strict=True):
        assert_close(variance.double(), x.double().var(0, correction=0), rtol=1e-2, atol=0)


def train(optimizer, model, steps=4, accumulate=1):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for _ in range(accumulate):
            x = torch.randn(7, 6, generator=generator) + 2
            model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("accumulate", [1, 3])
def test_put_off_or_not_is_the_same(accumulate):
    found = []
    for may_wait in (True, False):
        model = network()
        optimizer = wrapped(model, [BNP()], lr=0.1)
        for c in optimizer._engine.captures.values():
            assert c.may_wait
            c.may_wait = may_wait
        train(optimizer, model, accumulate=accumulate)
        found.append((statistics(optimizer), list(model.parameters())))
    assert_close(found[0], found[1], rtol=1e-13, atol=1e-14)


def test_the_first_layer_that_is_reached_settles_all():
    model = network()
    optimizer = wrapped(model, [BNP()], lr=0.1)
    output = model(torch.randn(3, 6))
    waiting = optimizer._engine.observer.waiting
    assert len(waiting) == 3 and all(ref().moments is None for ref in waiting)
    left = [ref() for ref in waiting]
    output.sum().backward()
    assert all(d.moments is not None and d.x is None for d in left)
    assert optimizer._engine.observer.waiting == []


def test_an_input_lives_no_longer_than_its_graph():
    model = network()
    optimizer = wrapped(model, [BNP()], lr=0.1)
    x = torch.randn(3, 6)
    seen, output = weakref.ref(x), model(x)
    del x
    gc.collect()
    assert seen() is not None  # autograd holds it for the gradient of the weight
    loss = output.sum()
    loss.backward()
    gc.collect()
    assert seen() is None and loss is not None  # the graph is still there, what it has saved is not
    seen = weakref.ref(y := torch.randn(3, 6))
    output = model(y)
    del y, output
    gc.collect()
    assert seen() is None
    optimizer.step()
    assert {rows for _, _, rows in statistics(optimizer).values()} == {3}


@pytest.mark.parametrize("inputs", [6, 100])
def test_a_batch_without_rows_counts_nothing(inputs):
    model = nn.Sequential(nn.Linear(inputs, 5), nn.Linear(5, 2))
    optimizer = wrapped(model, [BNP()], lr=0.1)
    model(torch.ones(0, inputs)).sum().backward()
    model(torch.ones(3, inputs)).sum().backward()
    optimizer.step()
    assert {rows for _, _, rows in statistics(optimizer).values()} == {3}


def test_passes_without_a_way_back_leave_no_trail():
    model = network()
    optimizer = wrapped(model, [BNP()], lr=0.1)
    for _ in range(_MANY):
        model(torch.zeros(1, 6))
    assert len(optimizer._engine.observer.waiting) <= _MANY


@pytest.mark.parametrize("how", ["autocast", "checkpoint", "ghost", "subclass", "three axes", "columns"])
def test_what_autograd_does_not_keep_is_looked_at_at_once(how):
    class Own(nn.Linear):
        """May do anything with its input."""

    model = nn.Sequential((Own if how == "subclass" else nn.Linear)(6, 5)).to(torch.float32)
    optimizer = wrapped(model, [BNP(ghost=2 if how == "ghost" else None)], lr=0.1)
    shape = (2, 3, 6) if how == "three axes" else (3, 6)
    x = torch.randn(shape, dtype=torch.float32)
    if how == "columns":
        x = torch.randn(6, 3, dtype=torch.float32).T
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x)
    elif how == "checkpoint":
        output = checkpoint(model, x, use_reentrant=False)
    else:
        output = model(x)
    assert optimizer._engine.observer.waiting == []
    output.float().sum().backward()
    optimizer.step()
    rows = 2 if how == "ghost" else 6 if how == "three axes" else 3
    assert capture(optimizer).collected is None and statistics(optimizer)["0"][2] in (rows, 3)
    if how != "ghost":
        assert_close(statistics(optimizer)["0"][0], x.flatten(0, -2).mean(0))


def test_derivatives_that_leave_no_gradient_in_the_weights_count_nothing():
    model = network()
    optimizer = wrapped(model, [BNP()], lr=0.1)
    x = torch.randn(4, 6, requires_grad=True)
    slope = torch.autograd.grad(model(x).sum(), x, create_graph=True)[0]
    torch.autograd.grad(slope.square().sum(), list(model.parameters()), allow_unused=True)
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    assert_close(statistics(optimizer)["0"], (torch.ones(6), torch.zeros(6), 2))
