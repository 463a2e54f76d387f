"""Spectral densities: pooled Krylov spaces, exact small matrices, ratios of quantiles."""

import numpy as np
import pytest
import torch
from known_spectra import Hidden, matrix
from scipy.stats import wasserstein_distance
from torch.testing import assert_close

from gradcond.curvature import Operator, exact_spectrum, spectral_density, trace, tridiagonalize
from gradcond.curvature.lanczos import Lanczos
from gradcond.curvature.operators import Products, generator_from
from gradcond.curvature.pooling import pooled


def bulk_with_outliers(seed):
    generator = torch.Generator().manual_seed(seed)
    Z = torch.randn(800, 400, generator=generator)
    A = Z @ Z.mT / 800
    A[0, 0] += 20
    A[1, 1] += 10
    return A, torch.linalg.eigvalsh(A)


def distance(d, eigenvalues):
    width = float(eigenvalues.max() - eigenvalues.min())
    return wasserstein_distance(eigenvalues, d.nodes, None, d.weights) / width


def spectra(n):
    g = torch.Generator().manual_seed(1)
    bulk = torch.linspace(-1, 1, n)
    return {
        "random": torch.randn(n, generator=g),
        "clustered": torch.cat([1 + 1e-9 * torch.randn(20, generator=g), 0.1 * torch.randn(n - 20, generator=g)]),
        "rank 5": torch.cat([torch.tensor([5.0, 4, 3, 2, 1]), torch.zeros(n - 5)]),
        "plus and minus": torch.cat([torch.linspace(0.5, 1, n // 2), -torch.linspace(0.5, 1, n // 2)]),
        "outliers": torch.cat([torch.tensor([40.0, 20, 10]), bulk[3:]]),
        "identity": torch.ones(n),
        "zero": torch.zeros(n),
    }


NAMES = list(spectra(40))


def runs(A, steps, count):
    products, generator = Products(A), generator_from(0)
    out = []
    for _ in range(count):
        signs = torch.randint(0, 2, (products.n,), generator=generator) * 2 - 1
        out.append(Lanczos(products, signs.to(products.work_dtype), generator=generator))
        for _ in range(steps):
            out[-1].step()
    return out


def test_pooled_weights_leave_one_run_out():
    A = matrix(torch.linspace(-1, 2, 60))
    own = runs(A, 4, 3)
    nodes, weights, residuals = pooled(own)
    bases = [run.basis.mT for run in own]
    U = torch.linalg.qr(torch.cat(bases, 1))[0]
    values, S = torch.linalg.eigh(U.mT @ A @ U)
    Y = U @ S
    assert_close(nodes, values)
    assert_close(residuals, (A @ Y - Y * values).norm(dim=0), rtol=1e-6, atol=1e-9)
    for i, base in enumerate(bases):
        W = torch.linalg.qr(torch.cat([b for j, b in enumerate(bases) if j != i], 1))[0]
        w = base[:, 0] - W @ (W.mT @ base[:, 0])
        expected = (W.mT @ Y).square().sum(0) + (60 - 8) * (Y.mT @ w / w.norm()) ** 2
        assert_close(weights[i], expected / 60, rtol=0, atol=1e-6)


def test_one_run_is_gauss_quadrature():
    A = matrix(torch.linspace(-1, 2, 60))
    nodes, weights, residuals = pooled(runs(A, 5, 1))
    T = tridiagonalize(A, runs(A, 5, 1)[0].basis[0], steps=5)
    values, S = T.eigh()
    assert_close(nodes, values)
    assert_close(weights[0], S[0] ** 2)
    assert_close(residuals, S[-1].abs() * T.residual.norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_nodes_of_a_bulk_with_outliers(dtype):
    errors = []
    for seed in range(4):
        A, eigenvalues = bulk_with_outliers(seed)
        d = spectral_density(A.to(dtype), seed=seed)
        errors.append(distance(d, eigenvalues))
        assert d.num_matvecs == 400
        for outlier in eigenvalues[-2:]:  # each once, of weight 1 / n
            near = (d.nodes - outlier).abs() < 1e-3
            assert_close(d.weights[near].sum(), torch.tensor(1 / 800), rtol=1e-4, atol=0)
    # over 24 seeds the mean is 2.3e-4; five separate probes have 8e-4
    assert np.mean(errors) <= 3.2e-4 and max(errors) <= 5e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_prescribed_spectra(name, dtype):
    eigenvalues = spectra(200)[name]
    A = Hidden(matrix(eigenvalues).to(dtype))
    d = spectral_density(A, 30, 4)
    top, slack = float(eigenvalues.abs().max()), {torch.bfloat16: 5e-2}.get(dtype, 1e-5)
    assert d.num_matvecs <= 120
    assert_close(d.weights.sum(), torch.tensor(1.0))
    assert_close(torch.trapezoid(d.density, d.grid), torch.tensor(1.0), rtol=0, atol=1e-6)
    assert_close(d.cdf[-1], torch.tensor(1.0), rtol=0, atol=1e-6)
    assert (d.weights >= 0).all() and (d.density >= 0).all() and (d.nodes.diff() >= 0).all()
    assert eigenvalues.min() - slack * top <= d.lambda_min and d.lambda_max <= eigenvalues.max() + slack * top
    moved = wasserstein_distance(eigenvalues, d.nodes, None, d.weights)
    assert moved <= {"plus and minus": 0.1}.get(name, 0.06) * max(top, 1e-300) + slack * top


@pytest.mark.parametrize("name", ["rank 5", "identity", "zero"])
def test_an_invariant_space_ends_it_early_and_exactly(name):
    eigenvalues = spectra(200)[name]
    d = spectral_density(matrix(eigenvalues), 30, 4)
    assert d.num_matvecs < 60
    for value in eigenvalues.unique():
        share = d.weights[(d.nodes - value).abs() < 1e-9].sum()
        assert_close(share, (eigenvalues == value).double().mean(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("n", [1, 2, 40, 41])
def test_what_fits_into_the_budget_is_exact(n):
    eigenvalues = torch.linspace(-1, 3, n) ** 3
    counted = []
    d = spectral_density(Hidden(matrix(eigenvalues)), 20, 2, progress=counted.append)
    assert d.num_matvecs == sum(counted) <= 40
    if n <= 40:
        assert_close(d.nodes, eigenvalues, rtol=0, atol=1e-12)
        assert_close(d.weights, torch.full((n,), 1 / n))
        assert not d.std_error.any() and d.num_matvecs == n
    else:
        assert d.std_error.any()


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_pooled_densities_follow_the_scale(scale):
    A = bulk_with_outliers(0)[0]
    one, scaled = (spectral_density(c * A, 80, 5) for c in (1.0, scale))
    assert_close(scaled.grid / scale, one.grid, rtol=1e-6, atol=1e-9)
    assert_close(scaled.density * scale, one.density, rtol=1e-6, atol=1e-6 * float(one.density.max()))


def test_a_shift_moves_the_density():
    A = matrix(spectra(200)["random"])
    one, shifted = (spectral_density(A + c * torch.eye(200), 30, 4) for c in (0.0, 5.0))
    assert_close(shifted.nodes - 5, one.nodes, rtol=0, atol=1e-7)
    assert_close(shifted.weights, one.weights, rtol=0, atol=1e-7)


def test_first_moments_and_their_error():
    eigenvalues, found = spectra(200)["outliers"], []
    for seed in range(30):
        d = spectral_density(matrix(eigenvalues), 20, 4, seed)
        error = d.first_moments.std() / len(d.first_moments) ** 0.5
        found.append([float(d.first_moments.mean() - eigenvalues.mean()), float(error)])
    off, error = np.array(found).T
    assert abs(off.mean()) <= 4 * off.std() / 30**0.5
    # the probes share what they know, so the error is somewhat too small
    assert 0.5 <= np.sqrt((error**2).mean()) / off.std() <= 1.5
    t = trace(matrix(eigenvalues), 80, method="hutchinson")
    combined = np.hypot(float(t.std_error), 200 * error[-1])
    assert abs(200 * float(d.first_moments.mean()) - float(t.estimate)) <= 3 * combined


def test_large_matrices_are_not_pooled(monkeypatch):
    A = matrix(torch.linspace(0, 1, 150))
    monkeypatch.setattr("gradcond.curvature.spectrum.POOL", 1000)
    d = spectral_density(A, 10, 3, seed=4)
    generator = generator_from(4)
    for probe in range(3):
        signs = torch.randint(0, 2, (150,), generator=generator, dtype=torch.int8) * 2 - 1
        values, S = tridiagonalize(A, signs.double(), steps=10).eigh()
        assert_close(d.nodes[d.probes == probe], values)
        assert_close(d.weights[d.probes == probe] * 3, S[0] ** 2)


def test_ratios_hold_within_what_they_say():
    for seed, name in enumerate(["random", "outliers", "plus and minus"]):
        eigenvalues = spectra(300)[name]
        sizes = eigenvalues.abs()
        for q in (0.25, 0.5, 0.9):
            truth = float(sizes.max() / sizes.quantile(q))
            ratio = spectral_density(matrix(eigenvalues), 40, 4, seed).ratio(q)
            assert abs(ratio.estimate - truth) <= 3 * ratio.std_error + ratio.resolution
            assert 0 < ratio.resolution < np.inf
    exact = exact_spectrum(matrix(eigenvalues)).density.ratio(0.5)
    assert exact.estimate == pytest.approx(float(sizes.max() / sizes.sort()[0][149]), rel=1e-9)
    assert exact.std_error == exact.resolution == 0


def test_ratios_that_cannot_be_told_from_infinity():
    d = spectral_density(matrix(spectra(200)["rank 5"]), 30, 4)
    assert d.ratio(0.5).resolution == np.inf
    assert d.ratio(0.5, above=1e-6).estimate == pytest.approx(5 / 3, rel=1e-6)
    assert np.isnan(spectral_density(matrix(torch.linspace(1, 2, 90)), 20, 1).ratio().std_error)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        d.ratio(1.5)


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_quantiles_count_eigenvalues_that_are_zero(shift):
    d = spectral_density(torch.diag(torch.tensor([0.0, 0.0, 0.0, 1.0, 2.0])) + shift * torch.eye(5))
    assert [d.quantile(q) - shift for q in (0.5, 0.7, 0.9)] == [0, 1, 2]
    assert d.quantile(0.5, absolute=True) == shift and d.quantile(0.5, above=shift) == shift + 1
    assert d.ratio().estimate == (3 if shift else np.inf)
    assert d.ratio(above=shift).estimate == (3 / 2 if shift else 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("least", [0.1, 1e-3])
def test_what_has_no_curvature_stays_below_the_noise_floor(dtype, least):
    eigenvalues = torch.cat([torch.logspace(np.log10(least), 0, 60), torch.zeros(440)])
    A, floor = Hidden(matrix(eigenvalues).to(dtype)), 8 * torch.finfo(dtype).eps
    for seed in range(3):
        d = spectral_density(A, 80, 5, seed)
        assert_close(d.weights[d.nodes.abs() > floor].sum(), torch.tensor(60 / 500), rtol=0.03, atol=0)
        ratios = 1 / eigenvalues[:60].quantile(torch.tensor([0.45, 0.55]))
        assert ratios[1] <= d.ratio(0.5, above=floor).estimate <= ratios[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_eigenvalue_is_as_near_as_the_residual_says(dtype):
    g = torch.Generator().manual_seed(3)
    A = matrix(torch.cat([torch.rand(300, generator=g) + 0.1, torch.zeros(700)])).to(dtype)
    d, eigenvalues = spectral_density(Hidden(A), 80, 5, 3), torch.linalg.eigvalsh(A.double())
    distances = (eigenvalues - d.nodes[:, None]).abs().min(1).values
    assert (distances <= 2 * d.residuals + 1e-13).all()


def test_the_same_seed_gives_the_same_density():
    A = bulk_with_outliers(0)[0]
    one, same, other = (spectral_density(A, 32, 3, seed) for seed in (1, 1, 2))
    assert torch.equal(one.density, same.density) and not torch.equal(one.nodes, other.nodes)


class Rounded(Operator):
    """Products of a float32 operator as a half-precision part makes them."""

    def __init__(self, A):
        super().__init__(len(A), torch.float32, A.device)
        self.A = A.float()

    def _columns(self, V):
        return (self.A @ V).bfloat16().float()


def test_noise_beyond_the_dtype_makes_no_eigenvalues():
    eigenvalues = torch.cat([torch.tensor([4.0, 3.0, 2.0]), torch.rand(997) ** 6])
    density = spectral_density(Rounded(matrix(eigenvalues)), 80, 5)
    assert density.lambda_max == pytest.approx(4, abs=5e-3) and density.lambda_min > -5e-3
