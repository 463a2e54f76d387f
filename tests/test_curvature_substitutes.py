"""Operations computed by other steps keep their values, and have the derivatives of what is written out."""

import pytest
import torch
import torch.nn.functional as F
from dense_curvature import assert_same_operator, dense_ggn, dense_hessian
from torch import nn

from gradcond.curvature import GGN, EmpiricalFisher, Hessian, MonteCarloFisher
from gradcond.curvature.substitutes import Substituted

KINDS = [Hessian, GGN, EmpiricalFisher, MonteCarloFisher]
METHODS = ["double_backward", "forward_over_reverse"]
ITEMS, STARTS = torch.tensor([3, 1, 0, 0, 4, 5, 1, 0]), torch.tensor([0, 3, 3, 7])
ROWS = {
    "equal length": {"input": ITEMS.view(4, 2)},
    "bags, one empty": {"input": ITEMS, "offsets": STARTS},
    "small integers": {"input": ITEMS.int(), "offsets": STARTS.int()},
    "last offset": {"input": ITEMS, "offsets": torch.tensor([0, 3, 3, 7, 8]), "include_last_offset": True},
    "padding": {"input": ITEMS, "offsets": STARTS, "padding_idx": 0},
    "padding, from the end": {"input": ITEMS, "offsets": STARTS, "padding_idx": -6},
}


@pytest.mark.parametrize("mode", ["sum", "mean", "max", "weighted"])
@pytest.mark.parametrize("name", ROWS)
def test_bags(name, mode):
    weight, options = torch.randn(6, 3, requires_grad=True), ROWS[name] | {"mode": mode}
    if mode == "weighted":
        options |= {"mode": "sum", "per_sample_weights": torch.rand_like(options["input"], dtype=torch.double)}
    expected = F.embedding_bag(weight=weight, **options)
    with Substituted():
        found = F.embedding_bag(weight=weight, **options)
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad((z**3).sum(), weight)[0] for z in (found, expected)]
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("inplace", [False, True])
def test_hard_sigmoid(inplace):
    x = torch.linspace(-5, 5, 21)
    expected, own = F.hardsigmoid(x), x.clone()
    with Substituted():
        found = F.hardsigmoid(own, inplace=inplace)
    torch.testing.assert_close(found, expected)
    assert (found is own) == inplace and torch.equal(own, found if inplace else x)


class Mean(nn.Module):
    """A bag of words, written out."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return self.weight[x].mean(1)


class Gate(nn.Module):
    def forward(self, x):
        return (x / 6 + 0.5).clamp(0, 1)


def words(layer):
    return nn.Sequential(layer, nn.Flatten(), nn.Tanh(), nn.LazyLinear(3))


def gated(layer):
    return nn.Sequential(nn.Embedding(6, 4), nn.Flatten(), nn.Linear(8, 4), layer, nn.Linear(4, 3))


# the model, its layer, and one that has derivatives
LAYERS = {
    "sparse": (words, lambda: nn.Embedding(6, 2, sparse=True), lambda m: nn.Embedding(6, 2, _weight=m.weight)),
    "by counts": (
        words,
        lambda: nn.Embedding(6, 2, scale_grad_by_freq=True),
        lambda m: nn.Embedding(6, 2, _weight=m.weight),
    ),
    "bag": (words, lambda: nn.EmbeddingBag(6, 2), lambda m: Mean(m.weight)),
    "sparse bag": (words, lambda: nn.EmbeddingBag(6, 2, sparse=True), lambda m: Mean(m.weight)),
    "gate": (gated, nn.Hardsigmoid, lambda m: Gate()),
}


@pytest.mark.parametrize("method", [*METHODS, "auto"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYERS)
def test_models(name, kind, method):
    build, make, written_out = LAYERS[name]
    model, x, y = build(make()), torch.randint(0, 6, (7, 2)), torch.randint(0, 3, (7,))
    model(x)
    place, twin = 0 if build is words else 3, nn.Sequential(*model)
    twin[place] = written_out(model[place])
    H = kind(model, nn.CrossEntropyLoss(), [(x, y)], method=method)
    if kind in (Hessian, GGN):
        exact = {Hessian: dense_hessian, GGN: dense_ggn}[kind](twin, F.cross_entropy, x, y)
    else:
        exact = kind(twin, nn.CrossEntropyLoss(), [(x, y)], method="double_backward").to_dense()
    assert_same_operator(H, exact)
