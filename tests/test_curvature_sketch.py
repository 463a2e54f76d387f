"""Sketches tell apart what differs, however few or many numbers do; sums over batches are their sums."""

import pytest
import torch

from gradcond.curvature.sketch import SUMS, relative_difference, sketch
from gradcond.curvature.vectors import Sum, parts_of, stacked


@pytest.mark.parametrize("n", [1, 7, SUMS - 1, SUMS])
def test_few_numbers_are_their_own_sketch(n):
    x = torch.randn(n)
    assert torch.equal(sketch(list(x.split(3))), x)


def column():
    x = torch.zeros(1000, 4096)
    x[:, 17] = 1  # a unit, as it lies in the weight of a layer
    return x


CASES = {
    "all": lambda: torch.randn(300_000),
    "equal": lambda: torch.ones(300_000),
    "one": lambda: torch.eye(1, 100_000)[0],
    "two of opposite sign": lambda: torch.tensor([1.0] + SUMS * 2 * [0.0] + [-1.0, 0.0]).roll(5),
    "a column": column,
    "a row": lambda: column().mT,
}


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_norms_are_kept(name, short):
    x = CASES[name]()
    parts = [*x.reshape(-1)[:3000].split(1), x.reshape(-1)[3000:]] if short else [x]
    assert abs(float(sketch(parts).norm() / x.norm()) - 1) < 0.05


def test_sketches_are_linear_and_do_not_depend_on_the_pieces():
    x, y = torch.randn(2, 3, 50_000)
    torch.testing.assert_close(sketch([x]) - 2 * sketch([y]), sketch([x - 2 * y]))
    assert torch.equal(sketch([x, y]), sketch([x, y.clone()]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("change", [1e-6, 1e-3, 1.0])
def test_the_relative_difference_survives(change, dtype):
    shapes = [(300, 400), (300,), (5, 300, 3), ()]
    x = [torch.randn(shape, dtype=dtype) for shape in shapes]
    y = [a + change * torch.randn(a.shape, dtype=dtype) for a in x]
    exact = relative_difference([a.double() for a in x], [b.double() for b in y])
    assert abs(relative_difference([sketch(x)], [sketch(y)]) / exact - 1) < 0.05
    assert relative_difference([sketch(x)], [sketch(x)]) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sums_are_the_inverse_of_parts(dtype):
    parameters = [torch.empty(2, 3), torch.empty(()), torch.empty(4, dtype=dtype)]
    v, V = torch.randn(11).to(dtype), torch.randn(11, 2).to(dtype)
    total = Sum(33, torch.float64, torch.device("cpu"))
    assert torch.equal(total(), torch.zeros(33))  # nothing was added
    for _ in range(3):
        one = [part.reshape(1, -1) for part in parts_of(v, parameters)]
        total.add([one, [part.reshape(2, -1) for part in stacked(V, parameters)]])
    torch.testing.assert_close(total(), 3 * torch.cat([v, V.mT.reshape(-1)]).double())
