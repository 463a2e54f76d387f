"""Empirical and Monte-Carlo Fisher products against explicit gradients, GGN and standard errors."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dense_curvature import assert_same_operator, jacobian, split, trainable
from torch import nn

from gradcond.curvature import GGN, EmpiricalFisher, Hessian, ModelLoss, MonteCarloFisher

WEIGHT = torch.tensor([0.2, 3.0, 1.0], dtype=torch.float64)


def mlp():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))


def positions():
    """Three classes at two positions of every sample."""
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Unflatten(1, (3, 2)))


def weighted(gradients, weights, total):
    return gradients.mT @ (weights[:, None] * gradients) / total


def each(z, y, **options):
    return F.cross_entropy(z, y, reduction="none", **options).reshape(-1)


CLASSES = torch.tensor([0, 1, 1, 2, 1, 2, 0, 1])
TOKENS = torch.stack([CLASSES, CLASSES.flip(0)], 1)
REAL = torch.linspace(0, 1, 24, dtype=torch.float64).view(8, 3)
# loss, target, the losses of the data, their weights, and what divides the sum
EMPIRICAL = {
    "mean": (nn.CrossEntropyLoss(), CLASSES, each, torch.ones(8), 8),
    "sum": (functools.partial(F.cross_entropy, reduction="sum"), CLASSES, each, torch.ones(8), 1),
    "smoothing": (
        *(nn.CrossEntropyLoss(label_smoothing=0.2), CLASSES, functools.partial(each, label_smoothing=0.2)),
        *(torch.ones(8), 8),
    ),
    "class weights": (
        *(nn.CrossEntropyLoss(weight=WEIGHT), CLASSES, each, WEIGHT[CLASSES], WEIGHT[CLASSES].sum()),
    ),
    "class weights, sum": (
        *(nn.CrossEntropyLoss(weight=WEIGHT, reduction="sum"), CLASSES, each, WEIGHT[CLASSES], 1),
    ),
    "ignored": (nn.CrossEntropyLoss(ignore_index=1), CLASSES, each, (CLASSES != 1).double(), 4),
    "tokens, ignored": (
        *(nn.CrossEntropyLoss(ignore_index=1), TOKENS, each),
        *((TOKENS != 1).double().view(-1), (TOKENS != 1).sum()),
    ),
    "probabilities": (nn.CrossEntropyLoss(), REAL.softmax(1), each, torch.ones(8), 8),
    "squares": (nn.MSELoss(), REAL, lambda z, y: ((z - y) ** 2).mean(1), torch.ones(8), 8),
    "squares, sum": (nn.MSELoss(reduction="sum"), REAL, lambda z, y: ((z - y) ** 2).sum(1), torch.ones(8), 1),
    "bits": (
        nn.BCEWithLogitsLoss(pos_weight=WEIGHT),
        REAL,
        lambda z, y: F.binary_cross_entropy_with_logits(z, y, pos_weight=WEIGHT, reduction="none").mean(1),
        torch.ones(8),
        8,
    ),
}


@pytest.mark.parametrize("sizes", [[6, 2], [1, 4, 3], [0, 8]], ids=str)
@pytest.mark.parametrize("name", EMPIRICAL)
def test_empirical_fisher(name, sizes):
    loss_fn, y, losses, weights, total = EMPIRICAL[name]
    model, x = positions() if y is TOKENS else mlp(), torch.randn(8, 4)
    exact = weighted(jacobian(losses(model(x), y), trainable(model)), weights.double(), total)
    assert_same_operator(EmpiricalFisher(model, loss_fn, split(x, y, sizes)), exact)


def test_empirical_fisher_of_any_loss_with_known_terms():
    model, x, y = mlp(), torch.randn(8, 4), torch.rand(8, 3)
    w = torch.rand(8)

    def terms(model, batch):
        x, y, w = batch
        return w * ((model(x) - y) ** 4).sum(1), w

    data = list(zip(x.split([5, 3]), y.split([5, 3]), w.split([5, 3]), strict=True))
    E = EmpiricalFisher(model, ModelLoss(terms), data)
    gradients = jacobian(((model(x) - y) ** 4).sum(1), trainable(model))
    assert_same_operator(E, weighted(gradients, w, w.sum()))
    mean = (w * ((model(x) - y) ** 4).sum(1)).sum() / w.sum()
    torch.testing.assert_close(Hessian(model, ModelLoss(terms), data).loss(), mean.detach())
    with pytest.raises(ValueError, match=r"known terms.*\(N,\)"):
        EmpiricalFisher(model, lambda z, y: (z - y).square().mean(), split(x, y, [8])).to_dense()


@pytest.mark.parametrize("kind", [EmpiricalFisher, GGN, MonteCarloFisher])
def test_weight_fn_multiplies_the_batches(kind):
    model, x = mlp(), torch.randn(8, 4)
    batches = split(x, CLASSES, [5, 3])
    each = [kind(model, F.cross_entropy, [batch]).to_dense() for batch in batches]
    weight = {5: 1.0, 3: 3.0}
    both = kind(model, F.cross_entropy, batches, weight_fn=lambda batch: weight[len(batch[1])])
    if kind is MonteCarloFisher:  # its draws go on where those of the first batch ended
        doubled = MonteCarloFisher(model, F.cross_entropy, batches).to_dense() * 8
        each[1] = (doubled - 5 * each[0]) / 3
    assert_same_operator(both, (each[0] + 3 * each[1]) / 4)


LIKELIHOODS = {name: EMPIRICAL[name][:2] for name in EMPIRICAL if name not in ("class weights, sum",)} | {
    "weights, smoothing, ignored": (
        nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=1, label_smoothing=0.3),
        CLASSES,
    ),
    "weighted probabilities": (nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.3), REAL.softmax(1)),
    "weighted bits": (nn.BCEWithLogitsLoss(weight=WEIGHT, pos_weight=WEIGHT.flip(0)), REAL),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_monte_carlo_fisher_averages_to_the_ggn(name):
    loss_fn, y = LIKELIHOODS[name]
    model, x = positions() if y is TOKENS else mlp(), torch.randn(8, 4)
    data = split(x, y, [5, 3])
    exact = GGN(model, loss_fn, data).to_dense()
    v = torch.randn(exact.shape[0])

    def forms(count, mc_samples):
        options = {"mc_samples": mc_samples, "method": "double_backward"}
        return torch.stack(
            [v @ (MonteCarloFisher(model, loss_fn, data, seed=s, **options) @ v) for s in range(count)]
        )

    draws = forms(60, 20)
    error = draws.std() / len(draws) ** 0.5
    assert (draws.mean() - v @ exact @ v).abs() <= 3.5 * error <= 0.35 * v @ exact @ v
    # the standard error falls as the root of the samples
    assert 0.6 <= forms(60, 1).std() / draws.std() / 20**0.5 <= 1.6


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_monte_carlo_fisher_is_one_matrix(name):
    loss_fn, y = LIKELIHOODS[name]
    model, x = positions() if y is TOKENS else mlp(), torch.randn(8, 4)
    state = torch.get_rng_state()
    M = MonteCarloFisher(model, loss_fn, split(x, y, [5, 3]), mc_samples=2, seed=1)
    dense = M.to_dense()
    v = torch.randn(len(dense))
    torch.testing.assert_close(M @ v, dense @ v)
    assert_same_operator(MonteCarloFisher(model, loss_fn, [(x, y)], mc_samples=2, seed=1), dense)  # any split
    other = MonteCarloFisher(model, loss_fn, [(x, y)], mc_samples=2, seed=2).to_dense()
    assert (other - dense).norm() > 1e-2 * dense.norm()
    values = torch.linalg.eigvalsh(dense)
    assert values.min() >= -1e-13 * values.max()
    torch.set_rng_state(state)


@pytest.mark.parametrize("sizes", [[1, 4, 3], [2, 1, 5], [1] * 8, [7, 1], [5, 0, 3]], ids=str)
@pytest.mark.parametrize("name", ["mean", "squares", "probabilities"])
def test_samples_are_those_of_any_split(name, sizes):
    loss_fn, y = LIKELIHOODS[name]
    model, x = mlp(), torch.randn(8, 4)
    exact = MonteCarloFisher(model, loss_fn, [(x, y)], mc_samples=3).to_dense()
    assert_same_operator(MonteCarloFisher(model, loss_fn, split(x, y, sizes), mc_samples=3), exact)


def test_a_loss_in_between_draws_nothing():
    model, data = mlp(), split(torch.randn(8, 4), CLASSES, [5, 3])
    M = MonteCarloFisher(model, F.cross_entropy, data)
    v = torch.ones(M.shape[0])
    once = M @ v
    M.loss(), M.gradient()
    assert torch.equal(M @ v, once)


def test_every_integer_is_a_seed_of_its_own():
    model, data = mlp(), [(torch.randn(8, 4), REAL)]
    seeds = [0, 1, -1, 2**64 - 1, 2**64, -(2**70), np.int64(7)]
    products = [MonteCarloFisher(model, F.mse_loss, data, seed=s) @ torch.ones(35) for s in seeds]
    assert len({tuple(product.tolist()) for product in products}) == len(seeds)
    with pytest.raises(TypeError, match="'float' object cannot be interpreted as an integer"):
        MonteCarloFisher(model, F.mse_loss, data, seed=0.5)


@pytest.mark.filterwarnings("ignore:Using a target size")  # torch's own
def test_targets_without_a_draw_of_their_own_are_refused():
    model, x = mlp(), torch.randn(8, 4)
    with pytest.raises(ValueError, match=r"shape of the outputs, \(8, 3\), got \(8, 1\)"):
        MonteCarloFisher(model, F.mse_loss, [(x, torch.zeros(8, 1))]).to_dense()
    with pytest.raises(TypeError, match="expected a tensor as target, got list"):
        MonteCarloFisher(model, F.cross_entropy, [(x, [0, 1, 2])]).to_dense()


REFUSED = {
    "no likelihood": (nn.SmoothL1Loss(), {}, "likelihood .*cross_entropy"),
    "unknown": (lambda z, y: (z - y).mean(), {}, "likelihood"),
    "log-probabilities": (nn.NLLLoss(), {}, "likelihood"),
    "no sample": (nn.MSELoss(), {"mc_samples": 0}, "mc_samples >= 1, got 0"),
    "no output": (ModelLoss(lambda model, batch: model(batch).mean()), {}, "MonteCarloFisher needs"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    loss_fn, options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        MonteCarloFisher(mlp(), loss_fn, [(torch.randn(2, 4), torch.randn(2, 3))], **options)
