"""P^T H P for every kind of factor, against the dense product and against the step that an optimizer takes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import gradcond
from gradcond.curvature import (
    GGN,
    DiagonalFactor,
    Factor,
    Hessian,
    KroneckerFactor,
    Preconditioned,
    ProductFactor,
    condition_number,
    eigsh,
    optimizer_factor,
)

OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.03, betas=(0.0, 0.9), eps=1e-3),
    "Adam, amsgrad": lambda p: torch.optim.Adam(p, lr=0.03, betas=(0.0, 0.9), amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.03, betas=(0.0, 0.99), weight_decay=0.0),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.9, eps=1e-4),
    "RMSprop, centered": lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, lr_decay=0.0, initial_accumulator_value=0.1),
    "foreach": lambda p: torch.optim.Adam(p, lr=0.03, betas=(0.0, 0.9), foreach=True),
    "fused": lambda p: torch.optim.Adam(p, lr=0.03, betas=(0.0, 0.9), fused=True),
}


def problem():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    return model, torch.randn(12, 4) + 1, torch.arange(12) % 2


def step(optimizer, model, x, y):
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def trained(make, steps=4):
    model, x, y = problem()
    optimizer = make(model.parameters())
    for _ in range(steps):
        step(optimizer, model, x, y)
    return model, optimizer, x, y


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def positive(n, seed=0):
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(seed))
    return a @ a.mT / n + 0.1 * torch.eye(n)


def power(a, p):
    values, vectors = torch.linalg.eigh(a)
    return (vectors * values**p) @ vectors.mT


def conditioner(chain):
    def make():
        model, x, y = problem()
        optimizer = gradcond.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, chain)
        step(optimizer, model, x, y)
        M = optimizer.preconditioner()
        return model, M, M.factor(torch.eye(23))

    return make


def adaptive(name):
    def make():
        model, optimizer, *_ = trained(OPTIMIZERS[name])
        group, divisors = optimizer.param_groups[0], []
        for p in model.parameters():  # D, from the formulas
            s = optimizer.state[p]
            if "exp_avg_sq" in s:
                v = s["max_exp_avg_sq"] if group["amsgrad"] else s["exp_avg_sq"]
                v = v / (1 - group["betas"][1] ** 4)
            elif "square_avg" in s:
                v = s["square_avg"] - (s["grad_avg"] ** 2 if group["centered"] else 0)
            else:
                v = s["sum"]
            divisors.append(v.sqrt() + group["eps"])
        return model, optimizer_factor(optimizer, model), torch.diag(flat(divisors) ** -0.5)

    return make


def kronecker(p, names):
    def make():
        model = problem()[0]
        pairs, blocks = {}, []
        for seed, (name, layer) in enumerate([("0", model[0]), ("2", model[2])]):
            rows, columns = layer.weight.shape
            if names[seed] is None:
                blocks.append(torch.eye(rows * (columns + 1)))
                continue
            whole = names[seed] == "module"
            a, b = positive(rows, seed), positive(columns + whole, seed + 9)
            pairs[name if whole else f"{name}.weight"] = a, b
            dense = torch.kron(power(a, p), power(b, p))
            if whole:  # rows [weight, bias] to weight and then bias
                place = torch.arange(rows * (columns + 1)).view(rows, -1)
                order = torch.cat([place[:, :-1].flatten(), place[:, -1]])
                dense = dense[order][:, order]
            else:
                dense = torch.block_diag(dense, torch.eye(rows))
            blocks.append(dense)
        return model, KroneckerFactor(model, pairs, power=p), torch.block_diag(*blocks)

    return make


def functions():
    P = torch.randn(23, 23)
    return problem()[0], Factor(lambda z: P @ z, lambda v: P.mT @ v), P


def product():
    model, kfac, P = kronecker(-0.5, ["module", "parameter"])()
    d, Q = torch.rand(23) + 0.1, torch.randn(23, 23)
    parts = DiagonalFactor(d), kfac, Factor(lambda z: Q @ z, lambda v: Q.mT @ v)
    return model, ProductFactor(*parts), torch.diag(d) @ P @ Q


FACTORS = {
    "BNP": conditioner([gradcond.BNP()]),
    "centralized BNP": conditioner([gradcond.GradientCentralization(), gradcond.BNP()]),
    **{name: adaptive(name) for name in OPTIMIZERS},
    "K-FAC": kronecker(-0.5, ["module", "module"]),
    "Shampoo": kronecker(-0.125, ["parameter", "parameter"]),
    "one layer": kronecker(-0.25, [None, "module"]),
    "given": kronecker(1.0, ["parameter", "module"]),
    "functions": functions,
    "product": product,
}


@pytest.mark.parametrize("name", FACTORS)
def test_the_spectrum_is_that_of_the_dense_product(name):
    model, M, P = FACTORS[name]()
    _, x, y = problem()
    operator = GGN if name == "product" else Hessian
    H = operator(model, nn.CrossEntropyLoss(), [(x[:8], y[:8]), (x[8:], y[8:])])
    K = Preconditioned(H, M)
    dense = P.mT @ H.to_dense() @ P
    exact = torch.linalg.eigvalsh((dense + dense.mT) / 2)
    top = float(exact.abs().max())
    assert_close(K.to_dense(), dense, rtol=0, atol=1e-12 * top)
    assert_close(torch.linalg.eigvalsh(K.to_dense()), exact, rtol=0, atol=1e-10 * top)
    assert_close(eigsh(K, 3, tol=1e-11).eigenvalues, exact.flip(0)[:3], rtol=1e-10, atol=0)
    z = torch.randn(23)
    assert_close(M.factor(z), P @ z, rtol=1e-12, atol=1e-12 * float(P.abs().max()))
    assert_close(M.factor_transpose(z), P.mT @ z, rtol=1e-12, atol=1e-12 * float(P.abs().max()))
    assert condition_number(K).lambda_max == pytest.approx(float(exact[-1]), rel=1e-10)


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_momentum_the_step_was_the_rate_times_M_g(name, saved, tmp_path):
    model, optimizer, x, y = trained(OPTIMIZERS[name])
    before = flat(model.parameters())
    step(optimizer, model, x, y)
    moved, g = flat(model.parameters()) - before, flat(p.grad for p in model.parameters())
    state = optimizer
    if saved:
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
    P = optimizer_factor(state, model)
    lr = optimizer.param_groups[0]["lr"]
    assert_close(moved, -lr * P.factor(P.factor_transpose(g)), rtol=1e-12, atol=1e-15)
    assert P.kind in name or name in ("AdamW", "foreach", "fused")
    assert P.without_state == ()


def test_groups_names_frozen_and_unused_parameters_find_their_places():
    torch.manual_seed(0)
    model = nn.ModuleDict({"first": nn.Linear(3, 3), "unused": nn.Linear(3, 3), "last": nn.Linear(3, 3)})
    model.first.bias.requires_grad_(False)
    named = dict(model.named_parameters())
    groups = [  # not the model's order, and all of one shape
        {"params": [(name, named[name]) for name in ("last.weight", "unused.weight", "first.weight")]},
        {"params": [("last.bias", model.last.bias), ("unused.bias", model.unused.bias)], "eps": 0.5},
    ]
    optimizer = torch.optim.Adam(groups, lr=0.1, betas=(0.0, 0.9))
    model.last(model.first(torch.randn(5, 3))).square().mean().backward()
    optimizer.step()
    found = optimizer_factor(optimizer, model)
    assert found.without_state == ("unused.weight", "unused.bias")
    parts = dict(zip(["first.weight", "unused.weight", "unused.bias", "last.weight", "last.bias"],
                     found.diagonal.split([9, 9, 3, 9, 3]), strict=True))  # fmt: skip
    assert bool((parts["unused.weight"] == 1).all() and (parts["unused.bias"] == 1).all())
    for name, eps in [("first.weight", 1e-8), ("last.weight", 1e-8), ("last.bias", 0.5)]:
        assert_close(parts[name], (named[name].grad.abs().flatten() + eps) ** -0.5)
    state = optimizer.state_dict()
    assert_close(optimizer_factor(state, model).diagonal, found.diagonal)
    for group in state["param_groups"]:
        del group["param_names"]
    with pytest.raises(ValueError, match=r"2 groups and no names.*param_names"):
        optimizer_factor(state, model)


@pytest.mark.parametrize("only_trained", [False, True])
def test_a_state_of_one_group_is_in_the_models_order(only_trained):
    model, x, y = problem()
    model[0].weight.requires_grad_(False)
    chosen = [p for p in model.parameters() if p.requires_grad or not only_trained]
    optimizer = torch.optim.Adam(chosen)
    step(optimizer, model, x, y)
    saved = optimizer_factor(optimizer.state_dict(), model)
    assert len(saved.diagonal) == 11
    assert torch.equal(saved.diagonal, optimizer_factor(optimizer, model).diagonal)


def test_a_parameter_that_has_had_no_step_is_left_alone():
    model, x, y = problem()
    optimizer = torch.optim.Adagrad(model.parameters())  # has its state before the first step
    with pytest.raises(ValueError, match="at least one step"):
        optimizer_factor(optimizer, model)
    F.cross_entropy(model(x), y).backward()
    model[2].bias.grad = None
    optimizer.step()
    P = optimizer_factor(optimizer, model)
    assert P.without_state == ("2.bias",)
    assert P.diagonal[-2:].tolist() == [1, 1] and bool((P.diagonal[:-2] != 1).all())


def test_a_wrapped_optimizer_has_the_diagonal_of_the_inner_one():
    model, x, y = problem()
    optimizer = gradcond.wrap(torch.optim.Adam(model.parameters()), model, [gradcond.BNP()])
    step(optimizer, model, x, y)
    inner = optimizer_factor(optimizer.optimizer, model).diagonal
    assert torch.equal(optimizer_factor(optimizer, model).diagonal, inner)
    assert torch.equal(optimizer_factor(optimizer.state_dict(), model).diagonal, inner)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_short_precisions_keep_the_operators_dtype(dtype):
    model, x, y = problem()
    model.to(dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    step(optimizer, model, x.to(dtype), y)
    H = GGN(model, nn.CrossEntropyLoss(), [(x.to(dtype), y)])
    pairs = {"0": (positive(3).to(dtype), positive(5).to(dtype))}
    P = ProductFactor(optimizer_factor(optimizer, model), KroneckerFactor(model, pairs))
    K = Preconditioned(H, P)
    dense = P.factor(torch.eye(23, dtype=torch.float32))
    expected = dense.mT @ H.to_dense().float() @ dense
    assert K.dtype == dtype and (K @ torch.ones(23, dtype=dtype)).dtype == dtype
    error = (K.to_dense().float() - expected).abs().max() / expected.abs().max()
    assert error < 10 * torch.finfo(dtype).eps


def test_a_convolution_has_its_fan_in_as_columns():
    model = nn.Conv2d(2, 3, 2)
    a, b = positive(3), positive(9, 1)
    P = KroneckerFactor(model, {"": (a, b)})
    z = torch.randn(27)
    rows = torch.cat([z[:24].view(3, 8), z[24:, None]], 1)
    mapped = power(a, -0.5) @ rows @ power(b, -0.5)
    assert_close(P.factor(z), torch.cat([mapped[:, :8].flatten(), mapped[:, 8]]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_factors_of_low_rank_have_positive_powers(dtype):
    rows = torch.randn(2, 6).to(dtype)
    b = rows.mT @ rows  # the covariance of two samples: four eigenvalues are rounding, some below zero
    P = KroneckerFactor(nn.Linear(6, 1, bias=False), {"weight": (torch.eye(1), b)}, power=0.5)
    assert_close(P.factor(P.factor(torch.eye(6).to(dtype))), b, rtol=0, atol=1e-5 * float(b.abs().max()))


def test_factors_of_any_kind_are_taken_as_they_are():
    model = nn.Linear(3, 2, bias=False)
    a, b, z = torch.randn(2, 2), torch.randn(3, 3), torch.randn(6)
    P = KroneckerFactor(model, {"weight": (a, b)}, power=None)
    assert_close(P.factor(z), torch.kron(a, b) @ z)
    assert_close(P.factor_transpose(z), torch.kron(a, b).mT @ z)
    assert Preconditioned(torch.eye(6), P).to_dense().shape == (6, 6)


def saved_by(optimizer):
    def make(model):
        own = optimizer(model.parameters())
        step(own, model, *problem()[1:])
        return own

    return make


def broken(change):
    def make(model):
        state = copy.deepcopy(saved_by(torch.optim.Adam)(model).state_dict())
        change(state)
        return state

    return make


def two_of_one(model):
    return KroneckerFactor(model, {"0": (positive(3), positive(5)), "0.weight": (positive(3), positive(4))})


BAD = {
    "SGD": (
        saved_by(lambda p: torch.optim.SGD(p, momentum=0.9)),
        "Adagrad or AdamW.*momentum_buffer",
    ),
    "SGD without momentum": (saved_by(lambda p: torch.optim.SGD(p)), "keeps none, as SGD without momentum"),
    "other names": (
        broken(lambda s: s["param_groups"][0].update(param_names=["module." + str(i) for i in range(4)])),
        "gives its parameters other names",
    ),
    "NAdam": (saved_by(torch.optim.NAdam), "expected the state of Adam.*momentum_decay"),
    "RAdam": (saved_by(torch.optim.RAdam), "expected the state of Adam"),
    "nothing yet": (lambda model: torch.optim.Adam(model.parameters()), "at least one step"),
    "another model": (lambda model: trained(OPTIMIZERS["Adam"])[1], "none of which is the model's"),
    "a tensor": (lambda model: torch.ones(23), "or its state_dict.., got Tensor"),
    "a model's state": (lambda model: model.state_dict(), "got the keys .'0.bias'"),
    "fewer": (broken(lambda s: s["param_groups"][0]["params"].pop()), "of 4 parameters, got one of 3"),
    "another order": (
        broken(lambda s: s["param_groups"][0]["params"].reverse()),
        r"'0.weight' to have the shape \(3, 4\), got \(2,\)",
    ),
    "no eps": (saved_by(lambda p: torch.optim.Adam(p, eps=0.0, betas=(0.0, 0.0))), None),
}


@pytest.mark.parametrize("make, message", BAD.values(), ids=BAD)
def test_states_that_do_not_fit_are_told(make, message):
    model = problem()[0]
    optimizer = make(model)
    if message is None:
        for p in model.parameters():
            optimizer.state[p]["exp_avg_sq"].zero_()
        message = "Adam to divide '0.weight' by positive numbers"
    with pytest.raises(ValueError, match=message):
        optimizer_factor(optimizer, model)


def kronecker_pair(a, b, name="0", **options):
    return lambda model: KroneckerFactor(model, {name: (a, b)}, **options)


def not_adjoint(model):
    return Preconditioned(torch.eye(3), Factor(lambda z: z.flip(0) * torch.arange(3), lambda v: v))


BAD_FACTORS = {
    "no name": (kronecker_pair(torch.eye(3), torch.eye(4), name="1"), ValueError, "there are 0.weight"),
    "shape": (kronecker_pair(torch.eye(3), torch.eye(3)), ValueError, r"\(3, 3\) and \(4, 4\)"),
    "swapped": (kronecker_pair(torch.eye(4), torch.eye(3)), ValueError, r"got \(4, 4\)"),
    "two": (two_of_one, ValueError, "a second one for '0.weight'"),
    "lopsided": (kronecker_pair(torch.eye(3), torch.ones(4, 4).triu()), ValueError, "symmetric"),
    "singular": (kronecker_pair(torch.ones(3, 3), torch.eye(4)), ValueError, "positive definite.*damping"),
    "nan": (kronecker_pair(torch.eye(3), torch.full((4, 4), torch.nan)), ValueError, "finite symmetric factors"),
    "negative": (kronecker_pair(-torch.eye(3), torch.eye(4), power=2.0), ValueError, "from -1"),
    "diagonal of two axes": (lambda m: DiagonalFactor(torch.ones(2, 2)), ValueError, r"diagonal \(n,\)"),
    "whole numbers": (lambda m: DiagonalFactor(torch.ones(2).int()), ValueError, "int32"),
    "infinite": (lambda m: DiagonalFactor(torch.tensor([1.0, torch.inf])), ValueError, "finite diagonal"),
    "another length": (lambda m: DiagonalFactor(torch.ones(2)).factor(torch.ones(3)), ValueError, r"\(2,\)"),
    "no factor": (lambda m: ProductFactor(torch.eye(2)), TypeError, "factor_transpose"),
    "not adjoint": (not_adjoint, ValueError, "<P u, v> = <u, P\\^T v>"),
    "of another model": (
        lambda m: Preconditioned(torch.eye(3), KroneckerFactor(m, {})),
        ValueError,
        r"a vector \(23,\)",
    ),
}


@pytest.mark.parametrize("make, error, message", BAD_FACTORS.values(), ids=BAD_FACTORS)
def test_factors_that_are_none_are_told(make, error, message):
    with pytest.raises(error, match=message):
        make(problem()[0])


def test_a_block_that_the_factor_keeps_to_is_that_of_the_block():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    H = Hessian(model, nn.MSELoss(), [(torch.randn(9, 3), torch.randn(9, 2))])
    pairs = {
        name: (torch.diag(torch.rand(len(p)) + 1), torch.eye(p[0].numel()) + 0.1) for name, p in weights(model)
    }
    K = Preconditioned(H, KroneckerFactor(model, pairs))
    dense, first = K.to_dense(), H.slices["0.weight"]
    before = H.num_matvecs
    block = K.block(first)
    assert_close(block.to_dense(), dense[first, first])
    assert H.num_matvecs == before and isinstance(block, Preconditioned)  # no product of the whole
    part = slice(first.start, first.stop - 1)  # mixed with the rest by the factor
    assert_close(K.block(part).to_dense(), dense[part, part])
    assert H.num_matvecs > before
    with pytest.raises(ValueError, match="at least one index"):
        K.block([])


def weights(model):
    return [(name, p) for name, p in model.named_parameters() if name.endswith("weight")]
