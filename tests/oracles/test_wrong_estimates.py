"""Densities and traces of peers that are wrong, or raise; ours beside them."""

import curvature_peers as peers
import numpy as np
import pytest
import torch
from references import dense_hessian, symmetric
from scipy.stats import wasserstein_distance
from torch import nn

from gradcond.curvature import Hessian, spectral_density, trace

eigenthings = peers.load("hessian_eigenthings.algorithms")
LambdaOperator = peers.load("hessian_eigenthings.operators.base").LambdaOperator


def network():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return model, torch.randn(40, 6), torch.randint(0, 3, (40,))


def test_pyhessian_trace_stops_on_a_lucky_step():
    """It stops where the running mean moves little, or is negative: after a few probes, far from the trace."""
    model, x, y = network()
    exact = float(dense_hessian(model, nn.CrossEntropyLoss(), x, y).trace())
    counts, errors = [], []
    for _ in range(40):
        model.zero_grad()
        samples = peers.pyhessian_hessian(model, nn.CrossEntropyLoss(), [(x, y)]).trace(maxIter=100)
        counts.append(len(samples))
        errors.append(np.mean(samples) - exact)
    H = Hessian(model, nn.CrossEntropyLoss(), [(x, y)])
    ours = trace(H, num_matvecs=40)
    assert min(counts) <= 3  # of the hundred it was allowed
    assert np.abs(errors).max() > 0.2 * exact
    assert abs(float(ours.estimate) - exact) < 4 * float(ours.std_error)
    assert np.abs(errors).max() > 4 * float(ours.std_error)


def test_pyhessian_density_raises():
    """It calls torch.eig, which is gone."""
    model, x, y = network()
    with pytest.raises((AttributeError, RuntimeError), match="eig"):
        peers.pyhessian_hessian(model, nn.CrossEntropyLoss(), [(x, y)]).density(iter=10)
    spectral_density(Hessian(model, nn.CrossEntropyLoss(), [(x, y)]), 10, 1)


def bulk_and_outliers():
    Z = torch.randn(400, 200)
    values = torch.linalg.eigvalsh(Z @ Z.mT / 400)
    values[-2:] = torch.tensor([10.0, 20.0])
    return values


def peak(grid, density, low, high):
    inside = (grid >= low) & (grid <= high)
    return float(density[inside].max())


def test_hessian_eigenthings_blurs_the_bulk_beside_outliers():
    """One width for all nodes, range / steps: the gap between the zeros and the bulk is filled."""
    values = bulk_and_outliers()
    A = symmetric(values)
    theirs = eigenthings.spectral_density(
        LambdaOperator(lambda v: A @ v, len(A), dtype=A.dtype), num_runs=5, lanczos_steps=40, seed=0
    )
    ours = spectral_density(A, 40, 5)
    gap = values[values > 1e-6].min()
    assert theirs.sigma > 2 * float(gap)
    # half of all eigenvalues are zero: below half the gap there is nothing else
    for grid, density, sharp in ((theirs.grid, theirs.density, False), (ours.grid, ours.density, True)):
        share = torch.trapezoid(torch.where(grid.abs() < gap, density, 0.0), grid)
        assert (float(share) > 0.4) == sharp, float(share)

    def spread(grid, density):
        weights = (density * torch.gradient(grid)[0]).clamp_min(0)
        return wasserstein_distance(values, grid, None, weights)

    assert spread(theirs.grid, theirs.density) > 5 * spread(ours.grid, ours.density)


def test_a_density_of_curvlinops_takes_more_products_than_its_steps():
    """It looks for the ends of the spectrum by ARPACK first; ours takes what it was given."""
    A = symmetric(bulk_and_outliers())
    count = 0

    class Counted:
        shape, dtype, device = A.shape, A.dtype, A.device

        def __matmul__(self, v):
            nonlocal count
            count += 1
            return A @ v

        def to_scipy(self):
            linear = peers.load("scipy.sparse.linalg").LinearOperator
            return linear(A.shape, matvec=lambda v: (self @ torch.from_numpy(v)).numpy(), dtype=np.float64)

    peers.load("curvlinops").lanczos_approximate_spectrum(Counted(), 20, num_repeats=2)
    assert count > 40 + 10
    assert spectral_density(A, 20, 2).num_matvecs == 40
