"""Matrices of few outputs: their square root against the dense matrix, and what is made of it."""

import copy

import pytest
import torch
from known_spectra import Hidden, matrix
from torch import nn
from torch.testing import assert_close

from gradcond.curvature import (
    GGN,
    DiagonalFactor,
    EmpiricalFisher,
    Hessian,
    MonteCarloFisher,
    Preconditioned,
    condition_number,
    diagonal,
    exact_spectrum,
    frobenius_norm,
    spectral_density,
    trace,
)
from gradcond.curvature.root import Root


def network(seed=0, sizes=(6, 9, 4)):
    torch.manual_seed(seed)
    first, hidden, last = sizes
    return nn.Sequential(nn.Linear(first, hidden), nn.Tanh(), nn.Linear(hidden, last))


def batches(sizes, classes=4, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(k, 6, generator=g), torch.randint(0, classes, (k,), generator=g)) for k in sizes]


def saddle(output, target):
    """Concave in half of the outputs, and with a term of two data together."""
    return output[:, :2].square().mean() - output[:, 2:].square().mean() + output[0].prod()


MATRICES = {
    "cross-entropy": lambda model, data: GGN(model, nn.CrossEntropyLoss(), data),
    "weights, some ignored": lambda model, data: GGN(
        model, nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 3.0]), ignore_index=2), data
    ),
    "sum": lambda model, data: GGN(model, nn.CrossEntropyLoss(reduction="sum"), data),
    "indefinite": lambda model, data: GGN(model, saddle, data[:1]),
    "weight_fn": lambda model, data: GGN(model, saddle, data, weight_fn=lambda batch: float(len(batch[0]) != 5)),
    "a block": lambda model, data: GGN(model, nn.CrossEntropyLoss(), data).block("2.*"),
    "empirical": lambda model, data: EmpiricalFisher(model, nn.CrossEntropyLoss(), data),
    "drawn": lambda model, data: MonteCarloFisher(model, nn.CrossEntropyLoss(), data, mc_samples=2),
    "preconditioned": lambda model, data: Preconditioned(
        GGN(model, nn.CrossEntropyLoss(), data), DiagonalFactor(torch.linspace(0.1, 2, 103))
    ),
}


@pytest.mark.parametrize("name", MATRICES)
def test_the_root_squared_is_the_matrix(name):
    A = MATRICES[name](network(), batches([5, 3, 7]))
    root, dense = A.root(100), A.to_dense()
    assert len(root.rows) <= 60 and root.rows.shape[1] == len(dense) == A.shape[0]
    scale = dense.abs().max()
    assert_close(root.rows.mT @ (root.signs[:, None] * root.rows), dense, rtol=0, atol=1e-13 * scale)
    v = torch.randn(len(dense))
    assert_close(root @ v, dense @ v, rtol=0, atol=1e-12 * scale)
    expected = torch.linalg.eigvalsh(dense)
    expected = expected[expected.abs() > 1e-12 * expected.abs().max()]
    found = root.eigenvalues()
    found = found[found.abs() > 1e-12 * expected.abs().max()]
    assert_close(found, expected, rtol=1e-9, atol=0)
    assert (bool((expected < 0).any())) == (name in ("indefinite", "weight_fn"))


@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-11), (torch.float32, 2e-6)])
@pytest.mark.parametrize("sizes", [[30], [11, 11, 8]])
@pytest.mark.parametrize("seed", range(6))
def test_condition_numbers_of_few_outputs_are_exact(seed, sizes, dtype, error):
    # Lanczos is 1e-2 off after as many products, and leaves some unresolved after 200
    model, g = network(seed, (20, 30, 10)), torch.Generator().manual_seed(seed)
    inputs, targets = torch.randn(30, 20, generator=g), torch.randint(0, 10, (30,), generator=g)
    inputs = inputs.to(dtype)
    values = torch.linalg.eigvalsh(GGN(model, nn.CrossEntropyLoss(), [(inputs.double(), targets)]).to_dense())
    kappa = float(values[-1] / values[values > 1e-12 * values[-1]].min())
    data = list(zip(inputs.split(sizes), targets.split(sizes), strict=True))
    G = GGN(model.to(dtype), nn.CrossEntropyLoss(), data)
    G.check_deterministic()
    before, counted = G.num_matvecs, []
    c = condition_number(G, max_matvecs=161, progress=counted.append)
    assert c.resolved and c.converged and c.kappa == pytest.approx(kappa, rel=error)
    assert c.num_matvecs == sum(counted) == G.num_matvecs - before == 1 + 270 // 2
    assert 1 - 1e-3 < c.kappa_lower_bound / kappa <= 1 + error
    assert c.lambda_min == 0 and c.lambda_max == pytest.approx(float(values[-1]), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("seed", range(5))
def test_short_dtypes_resolve_what_is_above_their_floor(seed, dtype):
    model, data = network(seed), batches([7, 3], seed=seed)
    values = torch.linalg.eigvalsh(GGN(model, nn.CrossEntropyLoss(), data).to_dense())
    short = [(inputs.to(dtype), targets) for inputs, targets in data]
    c = condition_number(GGN(model.to(dtype), nn.CrossEntropyLoss(), short))
    kappa = float(values[-1] / values[values > c.noise_floor].min())
    assert c.resolved and c.kappa == pytest.approx(kappa, rel=2 * c.noise_floor / c.lambda_min_nonzero)
    assert c.kappa_lower_bound <= kappa * (1 + 1e-6)


def test_data_that_repeat_themselves_add_no_eigenvalue():
    model, ((inputs, targets),) = network().float(), batches([12])
    once = [(inputs.float(), targets)]
    one, two = (condition_number(GGN(model, nn.CrossEntropyLoss(), once * k), max_matvecs=60) for k in (1, 2))
    assert one.resolved and two.resolved and two.num_matvecs > one.num_matvecs
    assert two.kappa == pytest.approx(one.kappa, rel=1e-4)


def test_more_outputs_than_the_budget_pays_for_are_left_to_lanczos():
    G = GGN(network(), nn.CrossEntropyLoss(), batches([5, 3, 7]))
    assert G.root(59) is None and G.root(60) is not None
    assert len(condition_number(G, max_matvecs=30).lower_bounds) > 1  # 60 rows and the first product are 31
    assert len(condition_number(G, max_matvecs=31).lower_bounds) == 1
    assert Hessian(network(), nn.CrossEntropyLoss(), batches([5])).root(1000) is None
    assert condition_number(GGN(nn.Linear(6, 4), nn.CrossEntropyLoss(), batches([9]))).resolved  # 28 < 36


def test_exact_spectra_by_either_way_are_the_same():
    G = GGN(network(), nn.CrossEntropyLoss(), batches([5, 3, 7]))
    few, all_columns = exact_spectrum(G, grid="symlog"), exact_spectrum(Hidden(G.to_dense()), grid="symlog")
    assert few.num_matvecs == 1 + 45 // 2 + 1 and all_columns.num_matvecs == 103
    top = all_columns.condition.lambda_max
    assert_close(few.eigenvalues, all_columns.eigenvalues, rtol=0, atol=1e-14 * top)
    assert few.trace == pytest.approx(all_columns.trace, rel=1e-12)
    assert few.condition.kappa == pytest.approx(all_columns.condition.kappa, rel=1e-9)
    assert float(few.density.weights.sum()) == pytest.approx(1, abs=1e-12)
    assert_close(few.density.first_moments, all_columns.density.first_moments, rtol=1e-12, atol=0)
    assert few.density.quantile(0.9) == pytest.approx(all_columns.density.quantile(0.9), rel=1e-9)
    points = torch.linspace(-0.1 * top, 1.1 * top, 500)
    few, all_columns = (exact_spectrum(A, grid=points).density.density for A in (G, Hidden(G.to_dense())))
    assert_close(few, all_columns, rtol=1e-9, atol=1e-9 * float(few.max()))


def test_what_is_linear_in_the_outputs_is_zero():
    G = GGN(network(), lambda output, target: output.mean(), batches([5]))
    assert not exact_spectrum(G).eigenvalues.any() and condition_number(G).lambda_max == 0


def test_no_data_make_a_matrix_of_zeros():
    nothing = [(torch.zeros(0, 6), torch.zeros(0, dtype=torch.long))]
    G = GGN(network(), nn.CrossEntropyLoss(reduction="sum"), nothing)
    assert (
        not exact_spectrum(G).eigenvalues.any() and trace(G, 9).estimate == 0 and G.root(9).rows.shape == (0, 103)
    )


def test_nothing_is_left_behind():
    model, data = network(), batches([5, 3])
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    G = MonteCarloFisher(model, nn.CrossEntropyLoss(), data)
    v = torch.randn(G.shape[0], generator=torch.Generator().manual_seed(0))
    image = G @ v
    G.root(50)
    assert torch.equal(G @ v, image) and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_root_of_another_matrix_is_refused():
    class Wrong(Hidden):
        def root(self, most, progress=None):
            return Root(torch.eye(len(self.A))[:5], torch.ones(5))

    with pytest.raises(ValueError, match="symmetric"):
        condition_number(Wrong(matrix(torch.linspace(1, 2, 20))))


def test_a_loss_that_is_not_finite_is_named():
    data = [*batches([5]), (torch.full((3, 6), torch.nan), torch.zeros(3, dtype=torch.long))]
    with pytest.raises(ValueError, match="expected a finite loss, got nan on batch 1"):
        GGN(network(), nn.CrossEntropyLoss(), data).root(100)


def test_densities_of_few_outputs_have_no_sampling_error():
    model, data = network(sizes=(6, 40, 4)), batches([5, 3, 7])
    G = GGN(model, nn.CrossEntropyLoss(), data)
    d = spectral_density(G, 16, 2)  # 444 parameters, 60 outputs: 1 + 45 / 2 of 32 products
    assert d.num_matvecs == 24 and not d.std_error.any() and len(d.nodes) == 46
    values = torch.linalg.eigvalsh(G.to_dense())
    assert_close(d.nodes[1:], values[-45:], rtol=1e-9, atol=0)
    assert d.quantile(0.5) == 0 and d.quantile(0.5, above=1e-9) == pytest.approx(float(values[-23]), rel=1e-9)
    assert spectral_density(G, 16, 1).std_error.isnan().all()  # too few products


def test_sums_over_the_spectrum_of_few_outputs_are_exact():
    for name in ("cross-entropy", "indefinite", "empirical", "preconditioned"):
        A = MATRICES[name](network(), batches([5, 3, 7]))
        dense = A.to_dense()
        expected = {trace: dense.trace(), diagonal: dense.diagonal(), frobenius_norm: dense.norm()}
        for function, truth in expected.items():
            found = function(A, 50)
            assert_close(found.estimate, truth, rtol=1e-12, atol=1e-13 * float(dense.abs().max()))
            assert not found.std_error.any() and found.num_matvecs <= 31
    assert trace(A, 50, method="hutchinson").std_error > 0  # as asked for
    assert trace(A, 20).std_error > 0  # 60 rows and a product are 31
