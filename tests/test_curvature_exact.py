"""The whole spectrum of small operators: prescribed spectra, and the estimators' own answers."""

import numpy as np
import pytest
import torch
from known_spectra import Hidden
from scipy.integrate import trapezoid
from scipy.linalg import hadamard
from torch.testing import assert_close

from gradcond.curvature import condition_number, exact_spectrum, spectral_density, trace


def matrix(eigenvalues, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    a = (q * eigenvalues) @ q.mT
    return (a + a.mT) / 2


SPECTRA = {
    "random": torch.randn(150, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    "identity": torch.ones(20, dtype=torch.float64),
    "rank 5": torch.cat([torch.zeros(95), torch.arange(1, 6)]).double(),
    "plus and minus": torch.cat([torch.linspace(1, 2, 30), -torch.linspace(1, 2, 30)]).double(),
    "outliers": torch.cat([torch.linspace(0, 1, 97)[1:], torch.tensor([10.0, 20.0, 40.0])]).double(),
    "one": torch.tensor([3.0], dtype=torch.float64),
}


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", SPECTRA)
def test_every_eigenvalue_is_within_the_error(name, dtype, hidden):
    truth = SPECTRA[name].sort().values
    a = matrix(truth).to(dtype)
    counted = []
    spectrum = exact_spectrum(Hidden(a) if hidden else a, chunk=7, progress=counted.append)
    n, top = len(truth), truth.abs().max().item()
    assert spectrum.num_matvecs == sum(counted) == (n if hidden else 0)
    assert (spectrum.eigenvalues - truth).abs().max() <= max(4 * spectrum.error, 1e-14 * n * top)
    assert spectrum.error <= 1e-6 * top
    assert spectrum.trace == pytest.approx(truth.sum().item(), abs=1e-5 * n * top)


@pytest.mark.parametrize("name", ["random", "rank 5", "plus and minus", "outliers"])
def test_it_agrees_with_the_estimators(name):
    a = matrix(SPECTRA[name])
    n = len(a)
    spectrum, estimated = exact_spectrum(a), condition_number(a, max_matvecs=n + 3, tol=1e-4)
    assert spectrum.condition.kappa == pytest.approx(estimated.kappa, rel=1e-6)
    assert spectrum.condition.lambda_max == pytest.approx(estimated.lambda_max, rel=1e-8)
    assert spectrum.condition.resolved and spectrum.condition.converged
    assert spectrum.condition.kappa_lower_bound == pytest.approx(spectrum.condition.kappa, rel=1e-6)
    assert spectrum.trace == pytest.approx(float(trace(a, num_matvecs=n).estimate), rel=1e-9)
    sampled = spectral_density(a, n, 5)
    assert spectrum.density.quantile(0.5, absolute=True, above=1e-6) == pytest.approx(
        sampled.quantile(0.5, absolute=True, above=1e-6), rel=0.3
    )


def test_the_density_has_mass_one_and_no_sampling_error():
    values = SPECTRA["outliers"]
    d = exact_spectrum(matrix(values), grid="symlog").density
    assert trapezoid(d.density, d.grid) == pytest.approx(1, abs=1e-6)
    assert d.cdf[-1].item() == pytest.approx(1, abs=1e-6)
    assert not d.std_error.any()
    assert d.quantile(0.5) == pytest.approx(values.sort().values[(len(values) - 1) // 2].item(), rel=1e-12)
    assert_close(d.nodes, values.sort().values)


def test_a_spectrum_that_runs_into_the_noise_is_not_resolved():
    values = torch.logspace(-9, 0, 60, dtype=torch.float64)
    c = exact_spectrum(matrix(values).float()).condition
    assert not c.resolved
    assert np.isnan(c.kappa)
    assert 1e4 < c.kappa_lower_bound < 1.1e6
    assert exact_spectrum(matrix(values)).condition.kappa == pytest.approx(1e9, rel=1e-2)


@pytest.mark.parametrize("n", [2, 64, 512])
@pytest.mark.parametrize("name", ["whole numbers", "two clusters", "small one"])
def test_the_error_is_a_bound_and_zero_is_zero(name, n):
    truth = {
        "whole numbers": torch.randint(-8, 9, (n,), generator=torch.Generator().manual_seed(0)),
        "two clusters": torch.cat([torch.full((n // 2,), 4.0), torch.zeros(n - n // 2)]),
        "small one": torch.cat([torch.tensor([1.0, 2.0**-20]), torch.zeros(n - 2)]),
    }[name].double()
    signs = torch.from_numpy(hadamard(n)).double()
    spectrum = exact_spectrum((signs * truth) @ signs.mT / n)  # without rounding
    assert (spectrum.eigenvalues - truth.sort().values).abs().max() <= spectrum.error
    assert (spectrum.eigenvalues == 0).sum() == (truth == 0).sum()
    nonzero = truth.abs()[truth != 0]
    assert spectrum.condition.kappa == pytest.approx(float(nonzero.max() / nonzero.min()), rel=1e-6)
    assert spectrum.density.ratio(above=spectrum.condition.noise_floor).estimate == pytest.approx(
        float(nonzero.max() / nonzero.sort().values[(len(nonzero) - 1) // 2]), rel=1e-6
    )


def test_what_is_not_symmetric_is_refused():
    with pytest.raises(ValueError, match="symmetric"):
        exact_spectrum(Hidden(torch.tensor([[1.0, 2.0], [0.0, 1.0]])))
