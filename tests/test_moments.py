"""Means and variances of channels: every layout and kernel against float64, and what they promise at the edges."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from gradcond.moments import channel_moments

# shape, axis: each kernel and each edge of the choice between them
SHAPES = [
    ((7,), 0),
    ((1, 784), -1),
    ((6, 100), -1),
    ((128, 100), 1),
    ((2, 3, 5, 20), 3),
    ((40000, 3), -1),
    ((20011, 3), -1),
    ((128, 3, 16, 16), 1),
    ((2, 32, 16, 16), 1),
    ((128, 20, 3, 3), 1),
    ((8, 64, 1, 1), 1),
    ((3, 30, 30), 0),
    ((5, 1), 0),
    ((1, 5, 1), 1),
    ((4, 3, 2, 5, 6), 1),
]


def reference(x, axis):
    x = x.double().movedim(axis, 0).flatten(1) if x.dim() > 1 else x.double()[:, None]
    return x.mean(1), x.var(1, correction=0)


def layouts(x):
    """The same numbers under other strides."""
    yield x
    yield x.mT.contiguous().mT if x.dim() > 1 else torch.stack([x, x], 1)[:, 0]
    yield torch.stack([x, x], -1)[..., 0]
    if x.dim() == 4:
        yield x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape, axis", SHAPES, ids=str)
def test_moments_are_those_in_double_precision(shape, axis, dtype):
    x = (torch.randn(shape) + 0.5).to(dtype)
    expected = reference(x, axis)
    for y in layouts(x):
        found = channel_moments(y.requires_grad_(), axis)
        exact = dtype == torch.float64
        assert all(a.dtype == torch.promote_types(dtype, torch.float32) and not a.requires_grad for a in found)
        assert_close(
            found, expected, rtol=1e-12 if exact else 1e-4, atol=1e-13 if exact else 1e-6, check_dtype=False
        )


@pytest.mark.parametrize(
    "shape, axis", [*SHAPES, ((2, 9), 1), ((3, 9), 1), ((1000000, 2), 1), ((300001, 1), 1)], ids=str
)
def test_a_mean_a_million_deviations_away_leaves_the_variance(shape, axis):
    x = (torch.randn(shape) * 1e-2 + 1e4).float()
    for y in layouts(x):
        mean, variance = channel_moments(y, axis)
        expected = reference(x, axis)
        assert_close(variance, expected[1], rtol=1e-2, atol=0, check_dtype=False)
        assert_close(mean, expected[0], rtol=1e-7, atol=0, check_dtype=False)


def test_one_such_channel_among_others_keeps_its_variance():
    x = torch.randn(128, 100)
    x[:, 3] = x[:, 3] * 1e-2 + 1e4
    x = x.float()
    assert_close(channel_moments(x, 1)[1].double(), reference(x, 1)[1], rtol=1e-2, atol=0)


@pytest.mark.parametrize("value", [0.0, -0.42, 1e4, 1e12])
@pytest.mark.parametrize("shape, axis", SHAPES, ids=str)
def test_constants_have_no_variance(shape, axis, value):
    x = torch.full(shape, value, dtype=torch.float32)
    mean, variance = channel_moments(x, axis)
    assert_close(mean, torch.full_like(mean, value))
    assert torch.equal(variance, torch.zeros_like(mean))


def test_a_constant_channel_among_others_has_next_to_none():
    x = torch.randn(128, 784, dtype=torch.float32)
    x[:, 5] = -0.42
    assert 0 <= channel_moments(x, 1)[1][5] < 1e-12


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize("shape, axis", SHAPES, ids=str)
def test_an_entry_that_is_not_finite_shows_in_the_variance_of_its_channel(shape, axis, where, value):
    x = torch.randn(shape, dtype=torch.float32)
    x[tuple(where for _ in shape)] = value
    for y in layouts(x):
        assert not channel_moments(y, axis)[1][where].isfinite()


def test_expanded_and_batched_inputs():
    x = torch.randn(1, 6).expand(4, 6)
    assert_close(channel_moments(x, -1), (x[0], torch.zeros(6)))
    batch = torch.randn(3, 5, 4)
    means, variances = torch.func.vmap(lambda x: channel_moments(x, -1))(batch)
    assert_close((means, variances), (batch.mean(1), batch.var(1, correction=0)))


@pytest.mark.parametrize("shape, axis", [((5,), 0), ((4, 5), -1), ((2, 5, 3, 3), 1)], ids=str)
def test_shapes_without_numbers_and_compiled_graphs(shape, axis):
    assert [m.shape for m in channel_moments(torch.empty(shape, device="meta"), axis)] == [(5,), (5,)]
    x = torch.randn(shape)
    compiled = torch.compile(channel_moments, backend="eager", fullgraph=True)
    assert_close(compiled(x, axis), channel_moments(x, axis))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    axis=st.integers(-4, 3),
    scale=st.sampled_from([1e-12, 1e-3, 1.0, 1e6]),
    shift=st.sampled_from([0.0, 1e-3, 1.0, 1e3]),
    seed=st.integers(0, 99),
)
def test_variances_are_right_and_never_negative(shape, axis, scale, shift, seed):
    axis = axis % len(shape)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(scale).add(shift * scale).float()
    expected = reference(x, axis)
    for y in layouts(x):
        mean, variance = channel_moments(y, axis)
        assert (variance >= 0).all()
        assert_close(variance, expected[1], rtol=1e-2, atol=1e-5 * float(expected[1].mean()), check_dtype=False)
        assert_close(mean, expected[0], rtol=1e-5, atol=1e-6 * scale * (shift + 1), check_dtype=False)
