"""torch_geometric's GCNConv against the dense matrix of what its adjacency aggregates."""

import copy
import pathlib
import warnings

import pytest
import torch
from dense import check, flat, places, units_of
from torch import nn
from torch.testing import assert_close

import gradcond
from gradcond import BNP

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it scripts a class on import
    geometric = pytest.importorskip("torch_geometric.nn", reason="torch_geometric is not installed")

NODES = 7


def graph():
    """Features, edges from left to right and back, and their weights."""
    torch.manual_seed(0)
    edges = torch.rand(NODES, NODES).triu(1) > 0.5
    edges = (edges | edges.mT).nonzero().mT
    return 2 + torch.randn(NODES, 4) * torch.arange(1.0, 5.0), edges, torch.rand(edges.shape[1])


def adjacency(edges, weights, *, normalize=True, add_self_loops=True, improved=False):
    """A, written out: D^-1/2 (A + I) D^-1/2, or 2 I where improved (I without weights, as it does)."""
    a = torch.zeros(NODES, NODES)
    a[edges[1], edges[0]] = torch.ones(edges.shape[1]) if weights is None else weights
    if not normalize:
        return a
    if add_self_loops:
        a = a + torch.eye(NODES) * (2 if improved and weights is not None else 1)
    degree = a.sum(1)
    root = torch.where(degree > 0, degree.rsqrt(), 0.0)
    return root[:, None] * a * root


def convolution(**options):
    torch.manual_seed(1)
    module = geometric.GCNConv(4, 3, **options)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1)
    return module.double()


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"cached": True},
        {"improved": True},
        {"add_self_loops": False},
        {"normalize": False},
        {"node_dim": 0},
    ],
    ids=str,
)
def test_it_is_the_dense_matrix_of_its_aggregated_rows(options, weighted):
    module = convolution(**options)
    x, edges, weights = graph()
    args = (x, edges, weights) if weighted else (x, edges)
    known = {k: v for k, v in options.items() if k in ("normalize", "add_self_loops", "improved")}
    rows = adjacency(edges, weights if weighted else None, **known) @ x
    bias = 0.0 if module.bias is None else module.bias
    assert_close(module(*args), rows @ module.lin.weight.mT + bias)  # the reference is its function
    index = places(module)
    units = units_of(index["lin.weight"], [index["bias"]] if module.bias is not None else [], rows)
    optimizer = check(module, lambda: module(*args).pow(3).mean(), units)
    report = optimizer.report()
    assert list(report.conditioned) == [""]
    assert not report.left_alone


def test_sparse_adjacencies_and_keywords():
    module = convolution(normalize=False)
    x, edges, weights = graph()
    a = adjacency(edges, weights)
    index = places(module)
    units = units_of(index["lin.weight"], [index["bias"]], a @ x)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse")  # CSR is in beta
        sparse = a.to_sparse_csr()
    check(module, lambda: module(x=x, edge_index=sparse).pow(3).mean(), units)


def test_several_graphs_in_one_step_count_as_their_union():
    module = convolution()
    x, edges, weights = graph()
    parts = [(x, edges, weights), (3 - x, edges, None)]
    rows = torch.cat([adjacency(edges, w) @ features for features, edges, w in parts])
    index = places(module)
    units = units_of(index["lin.weight"], [index["bias"]], rows)
    check(module, lambda: sum(module(*part).pow(3).mean() for part in parts), units)


def test_a_network_trains_as_without_observers_and_other_convolutions_keep_their_linears():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = geometric.GCNConv(4, 5, cached=True), geometric.GCNConv(5, 3)
            self.attention = geometric.GATConv(3, 2)

        def forward(self, x, edges):
            return self.attention(torch.tanh(self.second(torch.tanh(self.first(x, edges)), edges)), edges)

    model = Network().double()
    x, edges, _ = graph()
    bare = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, bare)]
    optimizers[0] = gradcond.wrap(optimizers[0], model, [BNP(center=False, standardize=False, scale=None)])
    report = optimizers[0].report()
    assert list(report.conditioned) == ["first", "second"]
    assert "GATConv has no adapter" in report.left_alone.values()
    for m, optimizer in zip((model, bare), optimizers, strict=True):
        torch.manual_seed(2)
        for _ in range(3):
            optimizer.zero_grad()
            m(x, edges).pow(2).mean().backward()
            optimizer.step()
    assert_close(flat(model.parameters()), flat(bare.parameters()))  # M = I: what is observed changes nothing
    assert "3 steps" in str(optimizers[0].report().conditioned["second"])


def test_gradcond_does_not_import_it():
    for path in pathlib.Path(gradcond.__file__).parent.rglob("*.py"):
        assert "import torch_geometric" not in path.read_text()
        assert "from torch_geometric" not in path.read_text()
