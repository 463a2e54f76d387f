"""Eigenvalues of peers that are wrong, most of them marked as converged; ours beside them."""

import warnings

import curvature_peers as peers
import pytest
import torch
from references import dense_hessian, symmetric
from torch import nn

from gradcond.curvature import Hessian, eigsh

eigenthings = peers.load("hessian_eigenthings.algorithms")
LambdaOperator = peers.load("hessian_eigenthings.operators.base").LambdaOperator
fast_lanczos = peers.load("curvlinops.papyan2020traces.spectrum").fast_lanczos


def as_operator(A):
    return LambdaOperator(lambda v: A @ v, len(A), dtype=A.dtype)


def distance(values, exact):
    """From each value to the nearest eigenvalue."""
    return (values.double()[:, None] - exact.double()).abs().min(1).values


OUTLIERS = torch.cat([torch.tensor([40.0, 20.0, 10.0]), torch.linspace(0, 1, 497)]).double()
RANK_FIVE = torch.cat([torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]), torch.zeros(195)]).double()


def test_hessian_eigenthings_certifies_six_copies_of_one_eigenvalue():
    """Beyond 50 steps it does not reorthogonalize, and copies of the largest eigenvalue come up."""
    A = symmetric(OUTLIERS)
    theirs = eigenthings.lanczos(as_operator(A), k=6, max_iter=100, seed=0)
    torch.testing.assert_close(theirs.eigenvalues, torch.full((6,), 40.0))
    assert theirs.converged.all()
    pairs = eigsh(A, 6)
    wanted = OUTLIERS.sort(descending=True).values[:6]
    assert pairs.converged.all()
    torch.testing.assert_close(pairs.eigenvalues, wanted, rtol=0, atol=1e-6 * 40)


def test_hessian_eigenthings_certifies_values_far_from_any_eigenvalue():
    """After the fifth step in float32 it goes on with noise, for its breakdown test is absolute."""
    A = symmetric(RANK_FIVE, torch.float32)
    theirs = eigenthings.lanczos(as_operator(A), k=8, max_iter=40, seed=0)
    wrong = distance(theirs.eigenvalues, RANK_FIVE) > 0.1
    assert wrong.sum() >= 2 and theirs.converged[wrong].all()
    pairs = eigsh(A, 8)
    assert pairs.converged.all() and distance(pairs.eigenvalues, RANK_FIVE).max() <= 5e-6
    assert ((pairs.eigenvalues > 0.5) == torch.tensor([True] * 5 + [False] * 3)).all()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_deflation_of_hessian_eigenthings_leaves_the_spectrum(seed):
    """A pair that did not converge is deflated all the same, and the next one is certified of what is left."""
    A = torch.diag(torch.cat([torch.tensor([1.0, -1.0, 0.3]), torch.zeros(47)]))
    theirs = eigenthings.deflated_power_iteration(as_operator(A), k=3, seed=seed, max_iter=1000)
    outside = theirs.eigenvalues.abs() > 1.01
    assert outside.any() and theirs.converged[outside].all()
    pairs = eigsh(A, 3, "LM")
    torch.testing.assert_close(pairs.eigenvalues.sort().values, torch.tensor([-1.0, 0.3, 1.0]))


@pytest.mark.parametrize(("k", "error"), [(1, 5), (5, 1), (10, 0.2)])
def test_the_default_steps_of_hessian_eigenthings_do_not_reach(k, error):
    """min(2 k, n - 1) steps, and nothing but flags to tell."""
    bulk = torch.rand(5000, generator=torch.Generator().manual_seed(0)) ** 6 * 2 - 0.2
    bulk[:12] = torch.tensor([9, 7, 6, 5.5, 5, 4, 3.5, 3, 2.8, 2.6, 2.4, 2.2])
    A = LambdaOperator(lambda v: bulk * v, len(bulk), dtype=torch.float64)
    wanted = bulk.sort(descending=True).values[:k]
    theirs = eigenthings.lanczos(A, k=k, seed=0)
    assert theirs.iterations == 2 * k and not theirs.converged.all()
    assert (theirs.eigenvalues - wanted).abs().max() > error

    class Diagonal:
        shape, dtype, device = (len(bulk),) * 2, bulk.dtype, bulk.device

        def __matmul__(self, v):
            return bulk * v if v.ndim == 1 else bulk[:, None] * v

    pairs = eigsh(Diagonal(), k)
    assert pairs.converged.all()
    torch.testing.assert_close(pairs.eigenvalues, wanted, rtol=0, atol=1e-6 * 9)


def test_curvlinops_lanczos_repeats_outliers():
    torch.manual_seed(0)
    nodes = fast_lanczos(symmetric(OUTLIERS), 100)[0]
    assert ((nodes - 40).abs() < 1e-2).sum() >= 8
    assert ((eigsh(symmetric(OUTLIERS), 6).eigenvalues - 40).abs() < 1e-2).sum() == 1


def test_curvlinops_lanczos_goes_on_in_an_exhausted_space():
    torch.manual_seed(0)
    nodes = fast_lanczos(symmetric(RANK_FIVE), 40)[0]
    assert ((nodes - 5).abs() < 1e-2).sum() >= 5
    assert (eigsh(symmetric(RANK_FIVE), 8).eigenvalues > 0.5).sum() == 5


def test_curvlinops_lanczos_divides_by_zero_on_the_identity():
    assert fast_lanczos(torch.eye(30), 3)[0].isnan().sum() == 2
    torch.testing.assert_close(eigsh(torch.eye(30), 3).eigenvalues, torch.ones(3))


def small_network():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return model, torch.randn(40, 6), torch.randint(0, 3, (40,))


def test_pyhessian_misses_close_and_opposite_eigenvalues():
    """Its power iteration stops on a small change; of two opposite eigenvalues it finds something between."""
    model, x, y = small_network()
    exact = torch.linalg.eigvalsh(dense_hessian(model, nn.CrossEntropyLoss(), x, y))
    wanted = exact[exact.abs().argsort(descending=True)[:8]]
    hessian = peers.pyhessian_hessian(model, nn.CrossEntropyLoss(), [(x, y)])
    theirs = torch.tensor(hessian.eigenvalues(top_n=8)[0])
    assert (theirs - wanted).abs().max() > 0.03 * wanted.abs().max()
    pairs = eigsh(Hessian(model, nn.CrossEntropyLoss(), [(x, y)]), 8, "LM")
    assert pairs.converged.all()
    torch.testing.assert_close(pairs.eigenvalues, wanted, rtol=0, atol=1e-10)


def test_hessian_eigenthings_has_no_eigenvalues_for_bfloat16():
    model, x, y = small_network()
    top = torch.linalg.eigvalsh(dense_hessian(model, nn.CrossEntropyLoss(), x, y)).max()
    half, data = model.bfloat16(), [(x.bfloat16(), y)]
    operator = peers.eigenthings_operator("Hessian", half, nn.CrossEntropyLoss(), data)
    with pytest.raises(NotImplementedError, match="BFloat16"):
        eigenthings.lanczos(operator, k=1, max_iter=10)
    with pytest.raises(NotImplementedError, match="BFloat16"):
        eigenthings.hutch_plus_plus(operator, num_matvecs=9)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*eigenpairs not converged")  # rounding of 2^-8 is above any tol
        pairs = eigsh(Hessian(half, nn.CrossEntropyLoss(), data), 1)
    assert abs(float(pairs.eigenvalues) - float(top)) < 0.05 * float(top)
