"""Where a peer is right we agree with it, and both with the dense matrix, to 1e-10 in float64."""

import curvature_peers as peers
import pytest
import torch
from references import DENSE, Attention, Recurrent, assert_same, dense_fisher, mlp, split
from scipy.sparse.linalg import eigsh as arpack
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradcond import curvature

BOTH = [(peer, kind) for peer in peers.MODULES for kind in DENSE if (peer, kind) != ("PyHessian", "GGN")]


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    return model


def frozen():
    model = mlp()
    model[0].weight.requires_grad_(False)
    return model


def convolution():
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.Softplus(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 3))


MODELS = {
    "mlp": (mlp, (4,)),
    "convolution": (convolution, (1, 3, 3)),
    "batch norm, eval": (lambda: mlp(nn.BatchNorm1d(5)).eval(), (4,)),
    "attention, math kernel": (Attention, (4, 4)),
    "gru": (Recurrent, (3, 4)),
    "tied": (tied, (4,)),
    "frozen": (frozen, (4,)),
}


def problem(name="mlp", rows=12):
    build, shape = MODELS[name]
    return build(), torch.randn(rows, *shape), torch.randint(0, 3, (rows,))


def written_out(product, n):
    return product(torch.eye(n))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("peer", "kind"), BOTH)
def test_products_on_even_batches(peer, kind, name):
    model, x, y = problem(name)
    loss_fn, data = nn.CrossEntropyLoss(), split(x, y, [6, 6])
    dense = DENSE[kind](model, loss_fn, x, y)
    with sdpa_kernel(SDPBackend.MATH):
        assert_same(written_out(peers.product(peer, kind, model, loss_fn, data), len(dense)), dense)
    assert_same(getattr(curvature, kind)(model, loss_fn, data).to_dense(), dense)


@pytest.mark.parametrize(("peer", "kind"), [pair for pair in BOTH if pair[0] != "hessian-eigenthings"])
def test_products_on_uneven_batches(peer, kind):
    model, x, y = problem(rows=13)
    loss_fn, data = nn.CrossEntropyLoss(), split(x, y, [1, 8, 4])
    dense = DENSE[kind](model, loss_fn, x, y)
    assert_same(written_out(peers.product(peer, kind, model, loss_fn, data), len(dense)), dense)
    assert_same(getattr(curvature, kind)(model, loss_fn, data).to_dense(), dense)


@pytest.mark.parametrize(("peer", "kind"), BOTH)
@pytest.mark.parametrize("loss", ["CrossEntropyLoss", "MSELoss", "BCEWithLogitsLoss"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses_on_one_batch(peer, kind, loss, reduction):
    model, x, y = problem()
    loss_fn = getattr(nn, loss)(reduction=reduction)
    targets = y if loss == "CrossEntropyLoss" else torch.rand(12, 3)
    dense = DENSE[kind](model, loss_fn, x, targets)
    assert_same(written_out(peers.product(peer, kind, model, loss_fn, [(x, targets)]), len(dense)), dense)
    assert_same(getattr(curvature, kind)(model, loss_fn, [(x, targets)]).to_dense(), dense)


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_eigenvalues_of_curvlinops_and_arpack(which):
    model, x, y = problem()
    exact = torch.linalg.eigvalsh(DENSE["Hessian"](model, nn.CrossEntropyLoss(), x, y))
    key = {"LA": -exact, "SA": exact, "LM": -exact.abs()}[which]
    wanted = exact[key.argsort()[:4]]
    operator = peers.curvlinops_operator("Hessian", model, nn.CrossEntropyLoss(), [(x, y)])
    theirs = torch.from_numpy(arpack(operator.to_scipy(), 4, which=which, tol=0)[0])
    ours = curvature.eigsh(curvature.Hessian(model, nn.CrossEntropyLoss(), [(x, y)]), 4, which)
    scale = exact.abs().max()
    assert ours.converged.all()
    assert ((ours.eigenvalues - wanted).abs() <= 1e-10 * scale).all()
    assert ((theirs.sort().values - wanted.sort().values).abs() <= 1e-10 * scale).all()


def test_eigenvalues_of_hessian_eigenthings_with_all_steps():
    model, x, y = problem()
    dense = DENSE["Hessian"](model, nn.CrossEntropyLoss(), x, y)
    operator = peers.eigenthings_operator("Hessian", model, nn.CrossEntropyLoss(), [(x, y)])
    lanczos = peers.load("hessian_eigenthings.algorithms").lanczos
    theirs = lanczos(operator, k=4, max_iter=len(dense), which="LA", reorthogonalize=True, seed=0)
    ours = curvature.eigsh(curvature.Hessian(model, nn.CrossEntropyLoss(), [(x, y)]), 4, "LA")
    torch.testing.assert_close(ours.eigenvalues, theirs.eigenvalues, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("kind", DENSE)
def test_trace_and_diagonal_of_backpack(kind):
    backpack, extensions = peers.load("backpack"), peers.load("backpack.extensions")
    extension = {"Hessian": extensions.DiagHessian(), "GGN": extensions.DiagGGNExact()}[kind]
    field = {"Hessian": "diag_h", "GGN": "diag_ggn_exact"}[kind]
    model, x, y = problem()
    extended, loss_fn = backpack.extend(model), backpack.extend(nn.CrossEntropyLoss())
    with backpack.backpack(extension):
        loss_fn(extended(x), y).backward()
    theirs = torch.cat([getattr(p, field).reshape(-1) for p in model.parameters()])
    A = getattr(curvature, kind)(model, nn.CrossEntropyLoss(), [(x, y)])
    n = A.shape[0]
    torch.testing.assert_close(curvature.diagonal(A, n).estimate, theirs, rtol=0, atol=1e-10)
    torch.testing.assert_close(curvature.trace(A, n).estimate, theirs.sum(), rtol=1e-10, atol=0)


def test_trace_of_hessian_eigenthings_whose_sketch_is_complete():
    model, x, y = problem()
    exact = DENSE["Hessian"](model, nn.CrossEntropyLoss(), x, y).trace()
    operator = peers.eigenthings_operator("Hessian", model, nn.CrossEntropyLoss(), [(x, y)])
    hutch = peers.load("hessian_eigenthings.algorithms").hutch_plus_plus
    theirs = hutch(operator, num_matvecs=3 * operator.size, seed=0)
    H = curvature.Hessian(model, nn.CrossEntropyLoss(), [(x, y)])
    for trace in (curvature.trace(H, H.shape[0]).estimate, torch.tensor(theirs.estimate)):
        torch.testing.assert_close(trace, exact, rtol=1e-10, atol=1e-10)


def test_empirical_fisher_of_curvlinops():
    model, x, y = problem()
    loss_fn, data = nn.CrossEntropyLoss(), split(x, y, [5, 7])
    dense = dense_fisher(model, nn.functional.cross_entropy, x, y)
    theirs = peers.curvlinops_operator("EF", model, loss_fn, data)
    assert_same(written_out(lambda v: theirs @ v, len(dense)), dense)
    assert_same(curvature.EmpiricalFisher(model, loss_fn, data).to_dense(), dense)
