"""Stochastic gradient Langevin dynamics: what it samples, with and without a factor, and that chains resume."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import gradcond
from gradcond import SGLD

CHAINS = 10_000  # columns of one parameter, rows of a layer: each a chain of its own
NOISE = 3.0  # the observations' standard deviation

P = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.7, 0.0], [-0.3, 0.2, 1.5]], dtype=torch.float64)  # not symmetric


def regression():
    """Inputs, targets, and mean and precision of the posterior under the prior N(0, I)."""
    torch.manual_seed(1)
    x = torch.randn(40, 3) @ torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.3], [0.0, 0.0, 0.8]])
    y = x @ torch.tensor([1.0, -2.0, 0.5]) + NOISE * torch.randn(40)
    precision = x.mT @ x / NOISE**2 + torch.eye(3)
    return x, y, torch.linalg.solve(precision, x.mT @ y / NOISE**2), precision


def potential(theta, x, y):
    """The negative log posterior U, summed over chains."""
    return (x @ theta - y[:, None]).square().sum() / (2 * NOISE**2) + theta.square().sum() / 2


def stationary(precision, lr, p):
    """The chain's exact covariance: that of z is (K - lr K^2 / 2)^-1 with K = P^T H P."""
    k = p.mT @ precision @ p
    return p @ torch.linalg.inv(k - lr / 2 * k @ k) @ p.mT


def assert_covariance(samples, expected, *, errors=5.0):
    """Samples (n, count) have this covariance, to so many standard errors of each entry."""
    count, variance = samples.shape[1], expected.diag()
    error = ((variance[:, None] * variance + expected**2) / count).sqrt()
    assert ((torch.cov(samples) - expected).abs() / error).max() < errors


def by_hand(p):
    """A factor_ that multiplies with a fixed P."""

    def factor_(noises):
        for _, noise in noises:
            noise.copy_(p @ noise)

    return factor_


def test_the_comparison_of_covariances_fails_where_it_should():
    samples = torch.randn(2, CHAINS)
    assert_covariance(samples, torch.eye(2))
    for wrong in (1.1 * torch.eye(2), torch.tensor([[1.0, 0.08], [0.08, 1.0]])):
        with pytest.raises(AssertionError):
            assert_covariance(samples, wrong)


@pytest.mark.parametrize(("p", "temperature"), [(None, 1.0), (P, 0.25)], ids=["bare", "factor"])
def test_it_samples_the_posterior(p, temperature):
    x, y, mean, precision = regression()
    matrix = torch.eye(3) if p is None else p
    lowest, *_, highest = torch.linalg.eigvalsh(matrix.mT @ precision @ matrix).tolist()
    lr = 0.1 / highest
    theta = nn.Parameter(mean[:, None].repeat(1, CHAINS))
    optimizer = SGLD([theta], lr=lr, temperature=temperature, generator=torch.Generator().manual_seed(2))
    if p is not None:
        optimizer.factor_ = by_hand(p)
    for _ in range(int(3 / lr / lowest)):  # variances are within exp(-6) of their limits
        optimizer.zero_grad()
        potential(theta, x, y).backward()
        theta.grad.copy_(matrix @ matrix.mT @ theta.grad)
        optimizer.step()
    samples, posterior = theta.detach(), temperature * torch.linalg.inv(precision)
    exact = temperature * stationary(precision, lr, matrix)
    assert_covariance(samples, exact)
    deviations = exact.diag().div(CHAINS).sqrt()
    assert ((samples.mean(1) - mean).abs() / deviations).max() < 5
    # lr K <= 0.1: the bias is between 0 and 0.1 / 2 / (1 - 0.1 / 2) of the posterior
    excess = torch.linalg.eigvals(torch.linalg.solve(posterior, exact)).real - 1
    assert 0 < excess.min() < excess.max() < 0.053


@pytest.mark.parametrize("p", [None, P], ids=["bare", "factor"])
def test_the_noise_has_covariance_2_lr_temperature_m(p):
    theta = nn.Parameter(torch.zeros(3, CHAINS))
    optimizer = SGLD([theta], lr=0.2, temperature=0.6, generator=torch.Generator().manual_seed(3))
    if p is not None:
        optimizer.factor_ = by_hand(p)
    theta.grad = torch.zeros(3, CHAINS)
    optimizer.step()
    m = torch.eye(3) if p is None else p @ p.mT
    assert_covariance(theta.detach(), 2 * 0.2 * 0.6 * m)


def test_wrapped_sgld_samples_with_the_preconditioner():
    """Each row [bias, weights] of the layer is one chain, and the full batch keeps P as it is."""
    torch.manual_seed(1)
    x = 1 + torch.randn(40, 2) @ torch.tensor([[1.0, 0.8], [0.0, 0.5]])
    rows = torch.cat([torch.ones(40, 1), x], 1)
    precision = rows.mT @ rows / NOISE**2
    model = nn.Linear(2, CHAINS)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    sgld = SGLD(model.parameters(), lr=0.5, generator=torch.Generator().manual_seed(4))
    optimizer = gradcond.wrap(sgld, model, [gradcond.BNP()])

    def step(scale):
        """With the gradient of scale * U at targets zero."""
        optimizer.zero_grad()
        (scale * model(x).square().sum() / (2 * NOISE**2)).backward()
        optimizer.step()

    def chains():
        return torch.cat([model.bias[None], model.weight.mT]).detach().clone()

    step(0.0)
    one = [2 * CHAINS, 0, 1]  # bias and weights of the first unit among all parameters
    basis = torch.zeros(3 * CHAINS, 3).index_put((torch.tensor(one), torch.arange(3)), torch.tensor(1.0))
    applied = optimizer.preconditioner().apply(basis)
    m = applied[one]
    assert applied.count_nonzero() == m.count_nonzero()
    assert_covariance(chains(), 2 * 0.5 * m)

    p = torch.linalg.cholesky(m)
    lowest, *_, highest = torch.linalg.eigvalsh(p.mT @ precision @ p).tolist()
    lr = 0.2 / highest
    for group in optimizer.param_groups:
        group["lr"] = lr
    for _ in range(int(3 / lr / lowest)):
        step(1.0)
    assert_close(optimizer.preconditioner().apply(basis)[one], m, rtol=1e-10, atol=0)
    assert_covariance(chains(), stationary(precision, lr, p))


def quadratic(n=4):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(n, 3)), nn.Parameter(torch.randn(n))]


def descend(optimizer, parameters, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        sum(p.pow(4).sum() for p in parameters).backward()
        optimizer.step()


def test_the_step_is_the_formula():
    parameters = quadratic()
    unused = nn.Parameter(torch.ones(2))
    groups = [{"params": [parameters[0]]}, {"params": [unused, parameters[1]], "lr": 0.3, "temperature": 2.0}]
    optimizer = SGLD(groups, lr=0.1, generator=torch.Generator().manual_seed(5))
    seen = []
    optimizer.factor_ = lambda noises: seen.append([(p, noise.clone()) for p, noise in noises])
    before = [p.detach().clone() for p in parameters]
    descend(optimizer, parameters, 1)
    generator = torch.Generator().manual_seed(5)
    noises = [torch.randn(p.shape, generator=generator) for p in parameters]
    assert [p is q for (p, _), q in zip(seen[0], parameters, strict=True)] == [True, True]  # once, all groups
    assert len(seen) == 1
    for i, (lr, temperature) in enumerate([(0.1, 1.0), (0.3, 2.0)]):
        assert torch.equal(seen[0][i][1], noises[i])
        expected = before[i] - lr * 4 * before[i] ** 3 + (2 * lr * temperature) ** 0.5 * noises[i]
        assert_close(parameters[i].detach(), expected, rtol=1e-14, atol=1e-15)
    assert torch.equal(unused, torch.ones(2))


def test_temperature_zero_is_gradient_descent_and_maximize_ascends():
    a, b, c = quadratic(), quadratic(), quadratic()
    descend(SGLD(a, lr=0.01, temperature=0.0), a, 5)
    descend(torch.optim.SGD(b, lr=0.01), b, 5)
    for p, q in zip(a, b, strict=True):
        assert_close(p, q, rtol=1e-14, atol=0)
    ascending = SGLD(c, lr=0.01, temperature=0.0, maximize=True)
    for _ in range(5):
        ascending.zero_grad()
        (-sum(p.pow(4).sum() for p in c)).backward()
        ascending.step()
    assert all(map(torch.equal, a, c))


def test_a_closure_is_evaluated_with_grad():
    parameters = quadratic()
    optimizer = SGLD(parameters, lr=0.1, generator=torch.Generator().manual_seed(6))

    def closure():
        optimizer.zero_grad()
        loss = sum(p.pow(4).sum() for p in parameters)
        loss.backward()
        return loss

    expected = closure().item()
    with torch.no_grad():
        assert optimizer.step(closure).item() == expected
    others = quadratic()
    descend(SGLD(others, lr=0.1, generator=torch.Generator().manual_seed(6)), others, 1)
    assert all(map(torch.equal, parameters, others))
    assert optimizer.step() is None


def through_a_file(optimizer, parameters):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = SGLD(parameters, lr=99.0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    return resumed, parameters


def copied(optimizer, parameters):
    resumed, parameters = copy.deepcopy((optimizer, parameters))
    return resumed, parameters


def pickled(optimizer, parameters):
    resumed, parameters = pickle.loads(pickle.dumps((optimizer, parameters)))
    return resumed, parameters


@pytest.mark.parametrize("resume", [through_a_file, copied, pickled])
def test_a_resumed_chain_is_the_uninterrupted_one(resume):
    parameters, others = quadratic(), quadratic()
    optimizer = SGLD(parameters, lr=0.01, temperature=0.5, generator=torch.Generator().manual_seed(7))
    uninterrupted = SGLD(others, lr=0.01, temperature=0.5, generator=torch.Generator().manual_seed(7))
    descend(optimizer, parameters, 3)
    optimizer.factor_ = by_hand(P)
    resumed, parameters = resume(optimizer, parameters)
    assert resumed.factor_ is None
    assert resumed.generator is not optimizer.generator
    assert set(resumed.state_dict()) == {"state", "param_groups", "generator"}
    descend(resumed, parameters, 4)
    descend(uninterrupted, others, 7)
    assert all(map(torch.equal, parameters, others))


def test_noise_comes_from_its_own_generator():
    random = torch.get_rng_state()
    parameters = quadratic()
    optimizer = SGLD(parameters, lr=0.01, generator=torch.Generator().manual_seed(8))
    torch.set_rng_state(random)
    descend(optimizer, parameters, 2)
    assert torch.equal(torch.get_rng_state(), random)
    chains = []
    for seed in (0, 0, 1):
        chains.append(quadratic())
        torch.manual_seed(seed)
        descend(SGLD(chains[-1], lr=0.01), chains[-1], 2)
    assert torch.equal(chains[0][0], chains[1][0])  # the default is seeded by the global generator
    assert not torch.equal(chains[0][0], chains[2][0])


@pytest.mark.parametrize("key", ["lr", "temperature"])
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_settings_out_of_range_are_refused(key, value):
    with pytest.raises(ValueError, match=f"SGLD: {key} must be at least 0, got {value}"):
        SGLD(quadratic(), **{"lr": 0.1, key: value})
    first, second = quadratic()
    optimizer = SGLD([first], lr=0.1)
    with pytest.raises(ValueError, match=f"SGLD: {key} must be at least 0"):
        optimizer.add_param_group({"params": [second], key: value})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_sparse_and_complex_gradients_are_refused_before_anything_moves(kind):
    parameters = quadratic()
    if kind == "sparse":
        bad = nn.Embedding(4, 2, sparse=True)
        bad(torch.tensor([1])).sum().backward()
        bad = bad.weight
    else:
        bad = nn.Parameter(torch.ones(2, dtype=torch.complex128))
        bad.grad = torch.ones_like(bad)
    optimizer = SGLD([*parameters, bad], lr=0.1)
    sum(p.sum() for p in parameters).backward()
    before, state = [p.detach().clone() for p in parameters], optimizer.generator.get_state()
    with pytest.raises(ValueError, match="SGLD: expected dense real gradients, got a torch"):
        optimizer.step()
    assert all(map(torch.equal, before, parameters))
    assert torch.equal(optimizer.generator.get_state(), state)


def test_a_state_of_another_optimizer_is_refused():
    parameters = quadratic()
    optimizer = SGLD(parameters, lr=0.1)
    state = torch.optim.SGD(parameters, lr=0.7).state_dict()
    with pytest.raises(ValueError, match=r"expected a state with the entry 'generator', got \['param_groups', 's"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.1
