"""Products of several columns: one by one, in one vectorized backward pass, or by forward mode; which is taken."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from dense_curvature import assert_same_operator, dense_ggn, problem
from torch import nn

from gradcond.curvature import GGN, EmpiricalFisher, Hessian, ModelLoss, MonteCarloFisher, products
from gradcond.curvature.products import Probe, fastest_together

KINDS = [Hessian, GGN, EmpiricalFisher, MonteCarloFisher]
WAYS = [(kind, "double_backward", way) for kind in KINDS for way in (None, 0)]
WAYS += [(GGN, "double_backward", 1), (GGN, "forward_over_reverse", None), (GGN, "forward_over_reverse", 0)]


def taking(H, method, way, seconds=0.01):
    """The operator, once it has chosen."""
    H.probe, H._way, H._tried = Probe(method, "for the test", {method: seconds}), way, math.inf
    return H


@pytest.mark.parametrize("chunk", [1, 2, 100])
@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("kind, method, way", WAYS)
def test_columns(kind, method, way, batches, chunk):
    model, x, y = problem()
    data = list(zip(x.chunk(batches), y.chunk(batches), strict=True))
    H = taking(kind(model, nn.CrossEntropyLoss(), data, chunk=chunk), method, way)
    V = torch.randn(H.shape[0], 5)
    one_by_one = torch.stack([H @ v for v in V.unbind(1)], 1)
    torch.testing.assert_close(H @ V, one_by_one, rtol=0, atol=1e-13)
    assert H.num_matvecs == 10
    B = H.block("3.*", "0.bias")
    own = torch.cat([torch.arange(H.shape[0])[H.slices[name]] for name in B.names])
    W = torch.zeros_like(V)
    W[own] = V[own]
    torch.testing.assert_close(taking(B, method, way) @ V[own], (H @ W)[own], rtol=0, atol=1e-13)


class Several(nn.Module):
    """Outputs that do not depend on the parameters between those that do, and a parameter without use."""

    def __init__(self):
        super().__init__()
        self.a, self.unused, self.b = nn.Linear(4, 3), nn.Linear(2, 2), nn.Linear(4, 3)

    def forward(self, x):
        return {"x": x, "parts": (self.a(x).tanh(), torch.ones(3), self.b(x))}


@pytest.mark.parametrize("method, way", [("double_backward", 1), ("forward_over_reverse", 0)])
def test_forward_mode_of_nested_outputs(method, way):
    model, x, y = Several(), torch.randn(6, 4), torch.randint(0, 3, (6,))

    def loss(output, target):
        first, _, second = output["parts"]
        return F.cross_entropy(first * second, target, reduction="sum"), len(target)

    G = taking(GGN(model, loss, [(x, y)]), method, way)
    one_by_one = torch.stack([G @ v for v in torch.eye(G.shape[0])], 1)
    torch.testing.assert_close(G.to_dense(), one_by_one, rtol=0, atol=1e-13)
    assert one_by_one.count_nonzero() > 300


def test_forward_mode_sees_what_has_changed():
    model, x, y = problem()
    data = [(x, y)]
    G = taking(GGN(model, nn.CrossEntropyLoss(), data), "double_backward", 1)
    V = torch.randn(G.shape[0], 3)
    G @ V
    with torch.no_grad():
        model[0].weight.mul_(2)
        model[1].running_mean.add_(1)
        x.mul_(0.5)
    assert_same_operator(G, dense_ggn(model, F.cross_entropy, x, y))


class WrongForward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.tanh()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx, g):
        return g * (1 - ctx.saved_tensors[0] ** 2)

    @staticmethod
    def jvp(ctx, t):
        return 1.01 * t * (1 - ctx.saved_tensors[0] ** 2)


class Custom(nn.Module):
    def forward(self, x):
        return WrongForward.apply(x)


def only_forward(monkeypatch):
    """The vectorized backward pass is no way; forward mode is the fastest where it is one at all."""
    monkeypatch.setattr(products, "FASTER", math.inf)
    plain = GGN._ways
    monkeypatch.setattr(GGN, "_ways", lambda self, product: plain(self, product)[-1:])
    monkeypatch.setattr(products, "SHORT", 0.0)


@pytest.mark.parametrize("between, taken", [(nn.Tanh(), 0), (Custom(), None), (nn.Dropout(), None)])
def test_forward_mode_is_taken_where_it_agrees(between, taken, monkeypatch):
    """Of unit vectors for the last layer the wrong derivative would not show: the trial takes random ones."""
    only_forward(monkeypatch)
    _, x, y = problem()
    G = GGN(nn.Sequential(nn.Linear(4, 4), between, nn.Linear(4, 3)), nn.CrossEntropyLoss(), [(x, y)])
    G.probe = Probe("double_backward", "for the test", {"double_backward": 0.01})
    last = torch.eye(G.shape[0])[:, -2:]
    one_by_one = torch.stack([G @ v for v in last.unbind(1)], 1)
    torch.testing.assert_close(G @ last, one_by_one, rtol=0, atol=1e-13)
    assert G._way == taken and G._tried == 2


def clocked(now, seconds, result):
    def product(parts, batched):
        now[0] += seconds if batched else 1.0
        if result is None:
            raise ValueError("no such tensors here")
        return [result * part for part in parts]

    return product


@pytest.mark.parametrize(
    "ways, taken",
    [
        ([(2.0, 2.0), (1.9, 2.0)], 1),
        ([(1.8, 2.0), (1.9, 2.0)], 0),
        ([(2.3, 2.0), (2.9, 2.0)], None),  # no more than a quarter is saved
        ([(1.8, 2.1), (1.9, 2.0)], 1),
        ([(1.8, None), (1.9, 2.0)], 1),
        ([(1.8, None), (1.9, math.nan)], None),
    ],
)
def test_the_fastest_way_that_agrees(ways, taken, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(products.time, "perf_counter", lambda: now[0])
    options = [clocked(now, *way) for way in ways]
    stacked = [torch.randn(3, 2, 2), torch.randn(3, 5)]
    assert fastest_together(clocked(now, 0.0, 2.0), options, stacked, torch.float64) == taken


@pytest.mark.parametrize(
    "kind, seconds, tried", [(Hessian, 0.01, 3), (Hessian, 0.1, 0), (GGN, 0.1, 3), (GGN, 0.3, 0)]
)
def test_several_columns_are_tried_in_one_pass_where_that_may_save_time(kind, seconds, tried):
    """A pass with several takes the activations of several."""
    model, x, y = problem()
    H = kind(model, nn.CrossEntropyLoss(), [(x, y)])
    H.probe = Probe("double_backward", "for the test", {"double_backward": seconds})
    H @ torch.randn(H.shape[0], 3)
    assert H._tried == tried


@pytest.mark.parametrize("seconds, ways", [(1e-4, 1), (0.01, 2)])
def test_forward_mode_is_no_way_for_short_products(seconds, ways):
    model, x, y = problem()
    G = taking(GGN(model, nn.CrossEntropyLoss(), [(x, y)]), "double_backward", None, seconds)
    assert len(G._ways(lambda parts, batched: parts)) == ways


def test_a_model_loss_goes_forward_from_its_own_output():
    model, x, y = problem()
    loss = ModelLoss(F.cross_entropy, lambda model, batch: model(batch["x"]), lambda batch: batch["y"])
    G = taking(GGN(model, loss, [{"x": x, "y": y}]), "double_backward", 1)
    assert_same_operator(G, dense_ggn(model, F.cross_entropy, x, y))
    assert functools.reduce(max, G.to_dense().diagonal().tolist()) > 0
