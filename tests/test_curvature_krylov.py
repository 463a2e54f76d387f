"""Lanczos, eigenpairs, density, condition number and trace on matrices of prescribed spectrum."""

import sys
import warnings

import numpy as np
import pytest
import torch
from scipy.linalg import eigh_tridiagonal
from scipy.sparse import csr_array
from scipy.sparse.linalg import aslinearoperator
from scipy.stats import wasserstein_distance
from torch import nn

from gradcond.curvature import (
    GGN,
    Hessian,
    Operator,
    Preconditioned,
    condition_number,
    diagonal,
    eigsh,
    spectral_density,
    trace,
    tridiagonalize,
)
from gradcond.curvature.basis import orthogonalize_along_


def matrix(eigenvalues, dtype=torch.float64):
    """A dense symmetric matrix with these eigenvalues and random eigenvectors."""
    Q = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues)))[0]
    A = (Q * eigenvalues) @ Q.mT
    return ((A + A.mT) / 2).to(dtype)


class Diagonal(Operator):
    def __init__(self, entries):
        super().__init__(len(entries), entries.dtype, entries.device)
        self.entries = entries

    def _columns(self, V):
        return self.entries[:, None] * V


def spectra(n):
    bulk = torch.linspace(-1, 1, n)
    return {
        "random": torch.randn(n),
        "clustered": torch.cat([1 + 1e-9 * torch.randn(20), 0.1 * torch.randn(n - 20)]),
        "rank 5": torch.cat([torch.tensor([5.0, 4, 3, 2, 1]), torch.zeros(n - 5)]),
        "multiple": torch.cat([torch.tensor([9.0, 9, 9, 7, 7]), bulk[5:]]),
        "plus and minus": torch.cat([torch.linspace(0.5, 1, n // 2), -torch.linspace(0.5, 1, n // 2)]),
        "outliers": torch.cat([torch.tensor([40.0, 20, 10]), bulk[3:]]),
        "identity": torch.ones(n),
        "zero": torch.zeros(n),
        "tiny": 1e-12 * torch.randn(n),
    }


NAMES = list(spectra(40))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("steps", [1, 60, 150])
@pytest.mark.parametrize("name", NAMES)
def test_lanczos_identities(name, steps, dtype, tolerance):
    eigenvalues = spectra(150)[name]
    A = matrix(eigenvalues, dtype)
    T = tridiagonalize(A, steps=steps)
    Q, A = T.basis.double(), A.double()
    dense = torch.diag(T.alphas) + torch.diag(T.betas, 1) + torch.diag(T.betas, -1)
    scale = eigenvalues.abs().max()
    assert (Q.mT @ Q - torch.eye(steps)).abs().max() <= tolerance
    remainder = A @ Q - Q @ dense
    remainder[:, -1] -= T.residual.double()
    assert remainder.abs().max() <= tolerance * scale
    assert T.asymmetry <= tolerance * scale
    if steps == 150:
        torch.testing.assert_close(T.eigh()[0], eigenvalues.sort()[0], rtol=0, atol=float(tolerance * scale))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_ghosts(dtype):
    values = tridiagonalize(matrix(spectra(150)["rank 5"], dtype), steps=100).eigh()[0]
    assert (values.abs() > 1e-4).sum() == 5
    values = tridiagonalize(matrix(spectra(150)["outliers"], dtype), steps=100).eigh()[0]
    assert [int((values - outlier).abs().lt(1e-3).sum()) for outlier in (40, 20, 10)] == [1, 1, 1]


def test_tridiagonalize_starts_where_it_is_told():
    T = tridiagonalize(matrix(torch.randn(9)), torch.full((9,), 2.0), steps=3)
    torch.testing.assert_close(T.basis[:, 0], torch.full((9,), 1 / 3))


WANTED = {"LA": lambda x: x.sort(descending=True)[0], "SA": lambda x: x.sort()[0]}


@pytest.mark.parametrize("k", [1, 5, 60])
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
@pytest.mark.parametrize("name", NAMES)
def test_eigsh_on_known_spectra(name, which, k):
    eigenvalues = spectra(60)[name]
    A, scale = matrix(eigenvalues), eigenvalues.abs().max()
    pairs = eigsh(A, k, which)
    found, wanted = pairs.eigenvalues, WANTED.get(which, lambda x: x[x.abs().argsort(descending=True)])(eigenvalues)
    if which == "LM":  # which of +x and -x comes first is free
        found, wanted = found.abs(), wanted.abs()
        assert (found.diff() <= 1e-12 * scale).all()
    torch.testing.assert_close(found, wanted[:k], rtol=0, atol=float(1e-8 * scale))
    remainder = A @ pairs.eigenvectors - pairs.eigenvectors * pairs.eigenvalues
    torch.testing.assert_close(pairs.residuals, remainder.norm(dim=0), rtol=1e-6, atol=1e-13)
    assert pairs.converged.all() and (pairs.residuals <= 1e-6 * scale).all()
    overlap = pairs.eigenvectors.mT @ pairs.eigenvectors - torch.eye(k)
    assert overlap.abs().max() <= 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_eigsh_in_single_precision(name):
    eigenvalues = spectra(60)[name]
    pairs = eigsh(matrix(eigenvalues, torch.float32), 5)
    assert pairs.eigenvalues.dtype == torch.float32 and pairs.converged.all()
    wanted = eigenvalues.sort(descending=True)[0][:5]
    error = (pairs.eigenvalues.double() - wanted).abs().max()
    assert error <= 2e-6 * eigenvalues.abs().max()


def test_eigsh_keeps_its_tolerance_at_a_breakdown():
    for _ in range(8):
        A = matrix(torch.cat([torch.tensor([5.0, 5, 5, 1, 1]), torch.zeros(195)]), torch.float32)
        assert eigsh(A, 5).converged.all()


def test_eigsh_does_not_claim_what_it_has_not():
    eigenvalues = torch.rand(500)
    with pytest.warns(UserWarning, match="not converged in 12 products"):
        pairs = eigsh(matrix(eigenvalues), 4, max_matvecs=12)
    assert not pairs.converged.any() and pairs.num_matvecs == 12
    distance = (pairs.eigenvalues[:, None] - eigenvalues).abs().min(1)[0]
    assert (distance <= pairs.residuals).all()


def density_problem(seed):
    generator = torch.Generator().manual_seed(seed)
    Z = torch.randn(800, 400, generator=generator)
    A = Z @ Z.mT / 800
    A[0, 0] += 20
    A[1, 1] += 10
    return A, torch.linalg.eigvalsh(A)


def distance(eigenvalues, points, weights):
    """Wasserstein distance to the true spectrum, relative to its range."""
    return wasserstein_distance(eigenvalues, points, None, weights) / float(eigenvalues[-1] - eigenvalues[0])


def test_density_of_a_bulk_with_outliers():
    nodes, curves = [], []
    for seed in range(4):
        A, eigenvalues = density_problem(seed)
        d = spectral_density(A, seed=seed)
        assert d.num_matvecs == 400
        torch.testing.assert_close(d.weights.sum(), torch.tensor(1.0))
        torch.testing.assert_close(torch.trapezoid(d.density, d.grid), torch.tensor(1.0), rtol=0, atol=1e-9)
        torch.testing.assert_close(d.cdf[-1], torch.tensor(1.0), rtol=0, atol=1e-9)
        mass = torch.nn.functional.pad((d.density[1:] + d.density[:-1]) / 2 * d.grid.diff(), (0, 1))
        nodes.append(distance(eigenvalues, d.nodes, d.weights))
        curves.append(distance(eigenvalues, d.grid, mass))
    # the error of five probes is that of their mean, 1 / n sqrt(2 |offdiagonal|^2 / 5) = 8e-4 of the range
    assert np.mean(nodes) <= 1.2e-3 and np.mean(curves) <= 2e-3
    assert np.mean(curves) <= np.mean(nodes) + 5e-4  # smoothing adds little


@pytest.mark.parametrize("grid", ["linear", "symlog"])
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_density_follows_the_scale(scale, grid):
    A, _ = density_problem(0)
    one, scaled = (spectral_density(c * A, 30, 2, grid=grid) for c in (1.0, scale))
    torch.testing.assert_close(scaled.grid / scale, one.grid, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(scaled.density * scale, one.density, rtol=1e-6, atol=1e-6 * float(one.density.max()))


def test_outliers_stay_sharp_beside_a_smooth_bulk():
    A, _ = density_problem(0)
    d = spectral_density(A)
    step = float(d.grid[1] - d.grid[0])
    near = (d.grid > 19) & (d.grid < 22)
    half = d.density[near] > d.density[near].max() / 2
    assert 0 < half.sum() * step <= 6 * step
    bulk = d.density[(d.grid > 0.5) & (d.grid < 2)]
    assert bulk.min() > 0.5 * bulk.mean()


@pytest.mark.parametrize("grid", ["linear", "symlog", "log", "tensor"])
def test_grids(grid):
    A = matrix(torch.linspace(0.01, 3, 150).pow(3))
    d = spectral_density(A, 40, 3, grid=torch.linspace(-1, 30, 999) if grid == "tensor" else grid)
    torch.testing.assert_close(torch.trapezoid(d.density, d.grid), torch.tensor(1.0), rtol=0, atol=1e-9)
    assert (d.grid.diff() > 0).all() and (d.density >= 0).all() and (d.cdf.diff() >= 0).all()
    mean = torch.trapezoid(d.density * d.grid, d.grid)
    torch.testing.assert_close(mean, d.nodes @ d.weights, rtol=0.02, atol=0)
    assert d.std_error.shape == d.density.shape and (d.std_error > 0).any()


def test_nodes_are_exact_where_the_krylov_space_ends():
    d = spectral_density(torch.diag(torch.tensor([2.0, 2.0, -1.0, 0.0])), 3, num_probes=1)
    torch.testing.assert_close(d.nodes, torch.tensor([-1.0, 0.0, 2.0]))
    torch.testing.assert_close(d.weights, torch.tensor([0.25, 0.25, 0.5]))
    assert d.num_matvecs == 3 and torch.isnan(d.std_error).all()
    assert [d.quantile(q) for q in (0, 0.25, 0.3, 0.5, 0.6, 1)] == pytest.approx([-1, -1, 0, 0, 2, 2], abs=1e-12)
    assert d.quantile(0.3, absolute=True, above=0.5) == pytest.approx(1)
    assert d.quantile(0.4, absolute=True, above=0.5) == pytest.approx(2)
    assert np.isnan(d.quantile(0.5, above=3))


@pytest.mark.parametrize("eigenvalues", [[1.0] * 5, [0.0] * 5, [-2.0]], ids=str)
def test_density_of_a_multiple_of_the_identity(eigenvalues):
    eigenvalues = torch.tensor(eigenvalues)
    d = spectral_density(torch.diag(eigenvalues), grid="symlog")
    torch.testing.assert_close(d.nodes, eigenvalues[:1].expand(len(d.nodes)))
    torch.testing.assert_close(torch.trapezoid(d.density, d.grid), torch.tensor(1.0), rtol=0, atol=1e-9)


def test_probes_estimate_the_trace():
    eigenvalues = torch.randn(250) + 1
    d = spectral_density(matrix(eigenvalues), 20, 10)
    estimates = 250 * d.first_moments
    error = estimates.std() / 10**0.5
    assert (estimates.mean() - eigenvalues.sum()).abs() <= 3 * error
    torch.testing.assert_close(estimates.mean(), 250 * d.nodes @ d.weights)
    assert d.probes.unique().tolist() == list(range(10))


def condition_problem(dtype):
    torch.set_default_dtype(torch.float32)  # the draws that make kappa 3783
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 10)).double()
    x, y = torch.randn(30, 20).double(), torch.randint(0, 10, (30,))
    torch.set_default_dtype(torch.float64)
    values = torch.linalg.eigvalsh(GGN(model, nn.CrossEntropyLoss(), [(x, y)]).to_dense())
    nonzero = values[values > 1e-12 * values[-1]]
    assert len(nonzero) == 270 and round(float(nonzero[-1] / nonzero[0])) == 3783
    G = GGN(model.to(dtype), nn.CrossEntropyLoss(), [(x.to(dtype), y)])
    return G, float(nonzero[-1] / nonzero[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_condition_number_of_a_rank_deficient_gauss_newton_matrix(dtype):
    G, kappa = condition_problem(dtype)
    c = condition_number(G)
    assert c.num_matvecs <= 200 and c.resolved and c.converged
    assert c.kappa == pytest.approx(kappa, rel=1e-2)
    assert (0.9995 if dtype == torch.float64 else 0.995) * kappa <= c.kappa_lower_bound <= kappa * (1 + 1e-6)
    assert (c.lower_bounds.diff() >= 0).all() and c.lower_bounds[-1] <= kappa * (1 + 1e-6)
    assert abs(c.lambda_min) <= c.noise_floor  # the null space, which the range start leaves out


@pytest.mark.parametrize("budget", [5, 30, 100, 150])
def test_lower_bounds_hold_whatever_the_budget(budget):
    G, kappa = condition_problem(torch.float64)
    c = condition_number(G, max_matvecs=budget, seed=1)
    assert c.num_matvecs <= budget
    assert 1 <= c.kappa_lower_bound <= kappa and c.lower_bounds[-1] <= kappa
    assert not (c.resolved and c.converged)
    if c.resolved:
        assert c.kappa >= c.kappa_lower_bound * 0.98
    else:
        assert np.isnan(c.kappa) and "unresolved" in str(c)


KNOWN = {
    "identity": (torch.ones(6), 1),
    "negative": (torch.tensor([-3.0, -1.0, 0.0]), 3),
    "one by one": (torch.tensor([-3.0]), 1),
    "indefinite": (torch.tensor([8.0, -4.0, -2.0, 1.0, 0.0, 0.0]), 8),
    "multiple": (torch.tensor([5.0, 5.0, 2.0, 2.0, 2.0, 0.0]), 2.5),
    "nine decades": (10.0 ** -torch.arange(10), 1e9),
    "far apart": (torch.tensor([1.0, 1e-5, 1e-10, 0.0, 0.0, 0.0]), 1e10),
    "rank 1": (torch.cat([torch.tensor([3.0]), torch.zeros(30)]), 1),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_condition_numbers(name):
    eigenvalues, kappa = KNOWN[name]
    c = condition_number(matrix(eigenvalues))
    assert c.resolved and c.converged and c.kappa == pytest.approx(kappa, rel=1e-4)
    assert c.lambda_max == pytest.approx(float(eigenvalues.max()), abs=1e-12)
    assert c.lambda_min == pytest.approx(float(eigenvalues.min()), abs=1e-12)


def test_condition_numbers_beyond_rounding_are_not_resolved():
    c = condition_number(matrix(torch.tensor([1.0, 1e-9]), torch.float32))
    assert c.kappa == 1 and c.noise_floor > 1e-7  # 1e-9 counts as zero
    zero = condition_number(torch.zeros(4, 4))
    assert not zero.resolved and np.isnan(zero.kappa) and zero.lambda_max == 0


class Noisy(Diagonal):
    def _columns(self, V):
        return super()._columns(V) + 1e-6 * torch.randn(V.shape) * V.norm()


def test_the_noise_floor_is_measured():
    quiet, noisy = Diagonal(torch.linspace(0.1, 1, 300)), Noisy(torch.linspace(0.1, 1, 300))
    assert condition_number(quiet, max_matvecs=50).noise_floor < 1e-14
    assert 3e-6 < condition_number(noisy, max_matvecs=50).noise_floor < 3e-4


def test_trace_and_diagonal():
    A = matrix(torch.randn(100) + 1)
    exact = trace(A, 100)
    torch.testing.assert_close(exact.estimate, A.trace())
    assert exact.std_error == 0 and exact.num_matvecs == 100
    torch.testing.assert_close(diagonal(A, 100).estimate, A.diagonal())
    estimates = torch.stack([trace(A, 11, seed).estimate for seed in range(200)])
    errors = torch.stack([trace(A, 11, seed).std_error for seed in range(200)])
    assert (estimates.mean() - A.trace()).abs() <= 4 * estimates.std() / 200**0.5
    torch.testing.assert_close(errors.square().mean().sqrt(), estimates.std(), rtol=0.15, atol=0)
    rough = diagonal(A, 50)
    assert ((rough.estimate - A.diagonal()).abs() <= 5 * rough.std_error).all()
    assert torch.isnan(trace(A, 1).std_error)


def test_standard_errors_do_not_depend_on_the_block(monkeypatch):
    A = matrix(torch.randn(100))
    whole = torch.stack([trace(A, 8, seed).std_error for seed in range(100)]).square().mean()
    monkeypatch.setattr(sys.modules["gradcond.curvature.probes"], "_block", lambda n: 3)
    parts = torch.stack([trace(A, 8, seed).std_error for seed in range(100)]).square().mean()
    torch.testing.assert_close(parts, whole, rtol=0.2, atol=0)


class Scaling:
    def __init__(self, n):
        self.P = torch.randn(n, n)

    def factor(self, z):
        return self.P @ z

    def factor_transpose(self, v):
        return self.P.mT @ v


def test_preconditioned():
    model, x, y = nn.Linear(3, 2), torch.randn(6, 3), torch.randint(0, 2, (6,))
    H, M = Hessian(model, nn.CrossEntropyLoss(), [(x, y)]), Scaling(8)
    K = Preconditioned(H, M)
    dense = M.P.mT @ H.to_dense() @ M.P
    torch.testing.assert_close(K.to_dense(), dense, rtol=0, atol=1e-12 * float(dense.abs().max()))
    assert K.num_matvecs == 8
    torch.testing.assert_close(eigsh(K, 2).eigenvalues, torch.linalg.eigvalsh(dense).flip(0)[:2])
    assert Preconditioned(K, M).shape == (8, 8)


def test_preconditioned_refuses_maps_that_are_not_adjoint():
    M = Scaling(5)
    M.factor_transpose = M.factor
    with pytest.raises(ValueError, match="<P u, v> = <u, P\\^T v>"):
        Preconditioned(torch.eye(5), M)
    M.factor_transpose = lambda v: v[:2]
    with pytest.raises(ValueError, match="shape"):
        Preconditioned(torch.eye(5), M)
    with pytest.raises(TypeError, match="factor"):
        Preconditioned(torch.eye(5), torch.eye(5))


FUNCTIONS = {
    "eigsh": lambda A: eigsh(A, 2),
    "density": lambda A: spectral_density(A, 10, 1),
    "condition": condition_number,
    "trace": lambda A: trace(A, 6),
    "diagonal": lambda A: diagonal(A, 6),
    "tridiagonalize": lambda A: tridiagonalize(A, steps=5),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_bad_operators(name):
    call, lopsided = FUNCTIONS[name], torch.randn(8, 8)

    class Lopsided(Diagonal):
        def _columns(self, V):
            return lopsided @ V

    for A, message in [
        (torch.ones(3, 2), "square"),
        (torch.ones(3), "square"),
        (lopsided, "symmetric"),
        (Lopsided(torch.ones(8)), "symmetric"),
        (aslinearoperator(lopsided.numpy()), "symmetric"),
        (torch.full((3, 3), torch.nan), "NaN"),
        (Diagonal(torch.full((60,), torch.nan)), "NaN"),
        (Diagonal(torch.tensor([1.0, 2, torch.inf, 4]).repeat(15)), "NaN or infinity"),
        (torch.eye(3).long(), "floating-point"),
        (csr_array(1j * np.eye(3)), "real floating-point"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(A)
    with pytest.raises(TypeError, match="shape and @"):
        call("matrix")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_anything_symmetric_will_do_and_nothing_global_is_drawn(name):
    A = matrix(torch.randn(9)).contiguous()
    state, call = torch.get_rng_state(), FUNCTIONS[name]

    def numbers(A):
        fields = vars(call(A)).values()
        return [f for f in fields if isinstance(f, torch.Tensor) and f.ndim == 1]

    expected, locked = numbers(A), A.numpy().copy()
    locked.setflags(write=False)
    several = (A.numpy(), locked, aslinearoperator(A.numpy()), A.clone().requires_grad_(), A.to_sparse())
    for same in several:
        torch.testing.assert_close(numbers(same), expected, rtol=1e-6, atol=1e-9, equal_nan=True)
    assert torch.equal(torch.get_rng_state(), state)


HALF = {
    "eigsh": lambda A: eigsh(A, 2, tol=0.03).eigenvalues.double(),
    "density": lambda A: spectral_density(A, 10, 2).lambda_max,
    "condition": lambda A: condition_number(A, max_matvecs=9).lambda_max,
    "trace": lambda A: trace(A, 60).estimate,
}


@pytest.mark.parametrize("name", HALF)
def test_half_precision_models(name):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(16, 4), torch.randint(0, 3, (16,))
    exact = HALF[name](GGN(model, nn.CrossEntropyLoss(), [(x, y)]))
    half = HALF[name](GGN(model.bfloat16(), nn.CrossEntropyLoss(), [(x.bfloat16(), y)]))
    torch.testing.assert_close(half, exact, rtol=0.1, atol=0.0)


def test_progress_counts_the_products():
    A, done = matrix(torch.rand(30)), []
    counts = [
        eigsh(A, 2, progress=done.append).num_matvecs,
        spectral_density(A, 10, 2, progress=done.append).num_matvecs,
        condition_number(A, progress=done.append).num_matvecs,
        trace(A, 12, progress=done.append).num_matvecs,
        diagonal(A, 12, progress=done.append).num_matvecs,
    ]
    assert sum(done) == sum(counts) and counts[1:2] + counts[3:] == [20, 12, 12]


REFUSED = {
    "k above n": (lambda A: eigsh(A, 6), r"k must be in 1..5, got 6"),
    "k zero": (lambda A: eigsh(A, 0), r"k must be in 1..5, got 0"),
    "which": (lambda A: eigsh(A, 1, "SM"), "which must be one of LA, SA, LM"),
    "budget": (lambda A: eigsh(A, 3, max_matvecs=5), "at least 6"),
    "steps": (lambda A: tridiagonalize(A, steps=6), r"steps must be in 1..5, got 6"),
    "start": (lambda A: tridiagonalize(A, torch.ones(4), steps=2), r"shape \(5,\)"),
    "zero start": (lambda A: tridiagonalize(A, torch.zeros(5), steps=2), "not zero"),
    "probes": (lambda A: spectral_density(A, num_probes=0), "one probe"),
    "grid": (lambda A: spectral_density(A, grid="cubic"), "cubic"),
    "log grid": (lambda A: spectral_density(A - 2 * torch.eye(5), grid="log"), "symlog"),
    "log grid, rounding": (
        lambda A: spectral_density(torch.diag(torch.tensor([1, 1e-8], dtype=torch.float32)), grid="log"),
        "above 1.19e-07, where their sign is known, got 1e-08",
    ),
    "short grid": (lambda A: spectral_density(A, grid=torch.linspace(0.5, 2, 9)), "covers all nodes"),
    "unsorted grid": (lambda A: spectral_density(A, grid=torch.tensor([2.0, 0.0])), "ascending"),
    "endless grid": (lambda A: spectral_density(A, grid=torch.tensor([-torch.inf, torch.inf])), "finite"),
    "tolerance": (lambda A: condition_number(A, tol=-1e-2), "tol must not be negative, got -0.01"),
    "products": (lambda A: trace(A, 0), "at least 1"),
    "quantile": (lambda A: spectral_density(A).quantile(2), r"\[0, 1\]"),
    "small budget": (lambda A: condition_number(A, max_matvecs=4), "at least 5"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call(torch.diag(torch.linspace(0, 1, 5)))


class Returns:
    """An operator whose products are what a function makes of the vectors."""

    shape, dtype, device = (9, 9), torch.float64, torch.device("cpu")

    def __init__(self, function):
        self.function = function

    def __matmul__(self, v):
        return self.function(v)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_products_are_of_the_shape_of_the_vectors_and_need_no_gradient(name):
    entries = torch.linspace(1, 2, 9).requires_grad_()
    FUNCTIONS[name](Returns(lambda v: torch.einsum("i,i...->i...", entries, v)))
    for function, got in ((lambda v: v[:-1], r"shape \(8"), (lambda v: v.numpy(), "ndarray")):
        with pytest.raises(ValueError, match=rf"product that is a tensor of shape \(9.*, got {got}"):
            FUNCTIONS[name](Returns(function))


def test_same_seed_same_answer():
    A = matrix(torch.rand(40))
    one, same, other = (spectral_density(A, 10, 2, seed) for seed in (1, 1, 2))
    assert torch.equal(one.nodes, same.nodes) and not torch.equal(one.nodes, other.nodes)
    with warnings.catch_warnings():
        assert torch.equal(eigsh(A, 2, seed=1).eigenvectors, eigsh(A, 2, seed=1).eigenvectors)


@pytest.mark.parametrize("large", [[], [0], [0, 1, 2]])
def test_what_was_not_known_to_be_large_is_removed_too(large):
    """One pass where the rows named hold nearly all of a vector, more where they do not."""
    Q = torch.linalg.qr(torch.randn(200, 40))[0].mT
    parts = [Q[:16].clone(), Q[16:].clone()]
    w = torch.randn(2, 40) @ Q + 1e-9 * torch.randn(2, 200)
    expected = Q @ w.mT
    coefficients = orthogonalize_along_(parts, w, large)
    torch.testing.assert_close(coefficients, expected, rtol=0, atol=1e-13)
    assert (Q @ w.mT).norm() <= 1e-14 * w.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_operator_may_return_its_argument(dtype):
    class Same(Operator):
        def _columns(self, V):
            return V

    A = Same(20, dtype, torch.device("cpu"))
    assert eigsh(A, 2).eigenvalues.tolist() == pytest.approx([1, 1])
    assert (spectral_density(A, 3, 2).nodes - 1).abs().max() < 1e-6
    assert condition_number(A).kappa == pytest.approx(1)


def test_a_tridiagonal_matrix_on_which_lapack_gives_up_is_taken_another_way(monkeypatch):
    from gradcond.curvature import lanczos

    def gives_up(alphas, betas, **options):
        if not options:
            raise np.linalg.LinAlgError("stemr did not converge")
        return eigh_tridiagonal(alphas, betas, **options)

    monkeypatch.setattr(lanczos, "eigh_tridiagonal", gives_up)
    alphas, betas = np.array([3.0, -1.0, 2.0]), np.array([0.5, 1e-300])
    values, vectors = lanczos.eigh_of(alphas, betas)
    T = np.diag(alphas) + np.diag(betas, 1) + np.diag(betas, -1)
    np.testing.assert_allclose(T @ vectors, vectors * values, atol=1e-14)
