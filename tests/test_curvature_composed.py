"""Sums, multiples, shifts and sub-blocks of operators against the same on dense matrices."""

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import nn
from torch.testing import assert_close

from gradcond.curvature import (
    GGN,
    Block,
    Combination,
    DiagonalFactor,
    Hessian,
    Operator,
    Preconditioned,
    eigsh,
    trace,
)

N = 7


class Hidden(Operator):
    """A matrix that shows its products alone, and remembers how many columns came at once."""

    def __init__(self, a):
        super().__init__(len(a), a.dtype, a.device)
        self.a, self.widths = a, []

    def _columns(self, V):
        self.widths.append(V.shape[1])
        return self.a.to(V.dtype) @ V


def symmetric(seed, n=N, dtype=torch.float64):
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return (a + a.mT) / 2


def scipy_operator(b):
    return scipy.sparse.linalg.aslinearoperator(b.numpy())


EXPRESSIONS = {  # of operators A and B, and of the matrices a and b
    "sum": (lambda A, B: A + B, lambda a, b: a + b),
    "difference": (lambda A, B: A - B, lambda a, b: a - b),
    "multiple": (lambda A, B: 3 * A, lambda a, b: 3 * a),
    "multiple from the right": (lambda A, B: A * np.float64(0.5), lambda a, b: 0.5 * a),
    "multiple by NumPy": (lambda A, B: np.float64(0.5) * A, lambda a, b: 0.5 * a),
    "multiple by a tensor": (lambda A, B: torch.tensor(2.0) * A, lambda a, b: 2 * a),
    "quotient": (lambda A, B: A / 4, lambda a, b: a / 4),
    "negative": (lambda A, B: -A, lambda a, b: -a),
    "shift": (lambda A, B: A.shift(-2.5), lambda a, b: a - 2.5 * torch.eye(N)),
    "nested": (lambda A, B: 2 * ((A - B / 3).shift(1.0) + A), lambda a, b: 4 * a - 2 * b / 3 + 2 * torch.eye(N)),
    "builtin sum": (lambda A, B: sum([A, B, A]), lambda a, b: 2 * a + b),
    "nothing left": (lambda A, B: A - A, lambda a, b: 0 * a),
    "tensor on the right": (lambda A, B: A - B.a, lambda a, b: a - b),
    "tensor on the left": (lambda A, B: B.a - A, lambda a, b: b - a),
    "array on the right": (lambda A, B: A + B.a.numpy(), lambda a, b: a + b),
    "array on the left": (lambda A, B: B.a.numpy() - A, lambda a, b: b - a),
    "SciPy on the right": (lambda A, B: A + scipy_operator(B.a), lambda a, b: a + b),
    "SciPy on the left": (lambda A, B: scipy_operator(B.a) - A, lambda a, b: b - a),
    "sparse on the left": (lambda A, B: scipy.sparse.csr_array(B.a.numpy()) + A, lambda a, b: a + b),
    "block": (lambda A, B: (A + B).block([5, 0, 3]), lambda a, b: (a + b)[[5, 0, 3]][:, [5, 0, 3]]),
}


@pytest.mark.parametrize("of_operators, of_matrices", EXPRESSIONS.values(), ids=EXPRESSIONS)
def test_composition_is_that_of_the_dense_matrices(of_operators, of_matrices):
    a, b = symmetric(0), symmetric(1)
    C, c = of_operators(Hidden(a), Hidden(b)), of_matrices(a, b)
    v, V = torch.randn(len(c)), torch.randn(len(c), 3)
    tolerance = dict(rtol=0, atol=1e-14 * float(a.norm() + b.norm()))
    assert isinstance(C, Operator) and C.shape == tuple(c.shape)
    assert_close(C @ v, c @ v, **tolerance)
    assert_close(C @ V, c @ V, **tolerance)
    assert C.num_matvecs == 4
    assert_close(C.to_dense(chunk=2), c, **tolerance)
    assert_close(torch.from_numpy(C.to_scipy() @ V.numpy()), c @ V, **tolerance)


def test_scipy_gets_products_with_any_of_its_vectors():
    a = symmetric(0)
    A, V = Hidden(a).to_scipy(), np.random.default_rng(0).standard_normal((N, 3))
    V.setflags(write=False)
    for own in (V, V[::-1], V[:, ::-1], np.asfortranarray(V), V[:, 0], V - 2j * V[::-1]):
        np.testing.assert_allclose(A @ own, a.numpy() @ own, rtol=0, atol=1e-14 * float(a.norm()) * N)


def test_what_occurs_twice_is_multiplied_once():
    A, B = Hidden(symmetric(0)), Hidden(symmetric(1))
    C = 2 * (A + B) - (A.shift(1.0) - B) / 2
    C @ torch.randn(N, 3)
    assert (C.num_matvecs, A.num_matvecs, B.num_matvecs) == (3, 3, 3)
    (A - A + B) @ torch.randn(N)
    assert (A.num_matvecs, B.num_matvecs) == (3, 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_hessian_and_gauss_newton_of_a_model_compose(dtype):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    data = [(torch.randn(6, 3).to(dtype), torch.arange(6) % 2)]
    H, G = Hessian(model, nn.CrossEntropyLoss(), data), GGN(model, nn.CrossEntropyLoss(), data)
    residual = H - G
    assert (residual.shape, residual.dtype) == (H.shape, dtype)
    expected = H.to_dense().double() - G.to_dense().double()
    error = (residual.to_dense().double() - expected).abs().max()
    assert error <= 4 * torch.finfo(dtype).eps * expected.abs().max()
    assert residual.to_dense().abs().max() > 0.1 * H.to_dense().abs().max()
    if dtype != torch.bfloat16:
        shifted = eigsh(H.shift(2.0), 3, tol=1e-5).eigenvalues - 2
        assert_close(shifted, eigsh(H, 3, tol=1e-5).eigenvalues, rtol=0, atol=1e-5)


INDICES = {
    "slice": slice(2, 6),
    "stepped": slice(None, None, 3),
    "one": slice(6, 7),
    "all": slice(None),
    "list": [4, 1, -1],
    "tensor": torch.tensor([3, 0]),
    "array": np.array([3, 0]),
    "mask": torch.arange(N) % 2 == 0,
}


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_a_block_is_the_principal_submatrix(index):
    a = symmetric(2)
    where = torch.arange(N)[index]
    expected = a[where][:, where]
    for B in (Hidden(a).block(index), Block(a, index), Block(scipy_operator(a), index)):
        assert_close(B.to_dense(), expected, rtol=0, atol=1e-14)
    values, inner = torch.linalg.eigvalsh(a), torch.linalg.eigvalsh(expected)
    m = len(inner)
    assert bool((values[:m] <= inner + 1e-12).all() and (inner <= values[N - m :] + 1e-12).all())


def test_blocks_of_blocks_and_of_preconditioned_operators():
    a, p = symmetric(3), torch.randn(N, N)

    class Map:
        def factor(self, z):
            return p @ z

        def factor_transpose(self, v):
            return p.mT @ v

    A = Hidden(a)
    assert_close(A.block(slice(1, 6)).block([3, 0]).to_dense(), a[[4, 1]][:, [4, 1]])
    k = p.mT @ a @ p
    assert_close(Preconditioned(A, Map()).block(slice(2, 5)).to_dense(), k[2:5, 2:5])
    assert_close(Preconditioned(2 * A, Map()).to_dense(), 2 * k)
    part = A.block(slice(2, 5))
    assert float(trace(part, num_matvecs=3).estimate) == pytest.approx(float(a[2:5, 2:5].trace()))
    assert part.num_matvecs == 3


def test_chunks_bound_the_columns_of_one_product():
    A, B = Hidden(symmetric(0)), Hidden(symmetric(1))
    V = torch.randn(N, 7)
    A.chunk = 3
    assert_close(A @ V, A.a @ V, rtol=0, atol=1e-14)
    assert A.widths == [3, 3, 1] and A.num_matvecs == 7
    A @ V[:, 0], A @ V[:, :0]
    assert A.widths[3:] == [1]
    C = (A + B).block(slice(0, 4))
    assert C.chunk == 3
    assert_close(C @ V[:4], (A.a + B.a)[:4, :4] @ V[:4], rtol=0, atol=1e-14)
    assert B.widths == [3, 3, 1] and C.num_matvecs == 7
    C.chunk = None  # of the block alone: the sum inside keeps its own
    C.to_dense()
    assert B.widths[3:] == [3, 1] and max(A.widths) == 3
    for bad in (0, -1, 2.0):
        with pytest.raises(ValueError, match="chunk must be None or"):
            A.chunk = bad
    assert A.chunk == 3


COMPOSED = {
    "sum": lambda H: H + torch.eye(8),
    "block": lambda H: H.block([0, 1, 5]),
    "preconditioned": lambda H: Preconditioned(H - H / 3, DiagonalFactor(torch.ones(8))),
}


@pytest.mark.parametrize("compose", COMPOSED.values(), ids=COMPOSED)
def test_composed_operators_check_that_their_parts_repeat(compose):
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))
    H = Hessian(model, nn.CrossEntropyLoss(), [(torch.randn(6, 3), torch.arange(6) % 2)])
    C = compose(H)
    assert H.num_matvecs == 0
    with pytest.raises(ValueError, match="dropout is active"):
        eigsh(C, 1)
    model.eval()
    before = H.num_matvecs, C.num_matvecs
    for _ in range(2):
        assert eigsh(C, 1).converged.all()
    # the check is of H, and done once; beyond it a product of C is one of H
    assert H.num_matvecs - before[0] == C.num_matvecs - before[1] + 2


BAD = {
    "size": (lambda A: A + torch.eye(3), ValueError, r"shape \(7, 7\) and \(3, 3\)"),
    "dtype": (lambda A: A + torch.eye(N, dtype=torch.float32), ValueError, "dtype torch.float64 and torch.float32"),
    "device": (lambda A: A + Hidden(torch.eye(N, device="meta")), ValueError, "device cpu and meta"),
    "not symmetric": (lambda A: A + torch.ones(N, N).triu(), ValueError, "symmetric"),
    "not square": (lambda A: A + torch.ones(N, 2), ValueError, "square"),
    "plus a number": (lambda A: A + 2.0, TypeError, "the number 2.0; A.shift"),
    "times an operator": (lambda A: A * A, TypeError, "number to multiply by, got Hidden"),
    "times a vector": (lambda A: torch.ones(N) * A, TypeError, "number"),
    "complex": (lambda A: 1j * A, TypeError, "real number"),
    "NaN": (lambda A: float("nan") * A, ValueError, "finite number"),
    "shift by text": (lambda A: A.shift("1"), TypeError, "number"),
    "by zero": (lambda A: A / 0, ZeroDivisionError, "zero"),
    "block of nothing": (lambda A: A.block([]), ValueError, "at least one index"),
    "block outside": (lambda A: A.block([N]), ValueError, "whole numbers below 7"),
    "block twice": (lambda A: A.block([1, 1]), ValueError, "none twice"),
    "block by a short mask": (lambda A: A.block(torch.tensor([True])), ValueError, r"mask \(7,\)"),
    "block by names": (lambda A: A.block("bias"), ValueError, "whole numbers"),
    "block by floats": (lambda A: A.block(torch.ones(2)), ValueError, "whole numbers"),
}


@pytest.mark.parametrize("make, error, message", BAD.values(), ids=BAD)
def test_what_cannot_be_composed_is_told(make, error, message):
    A = Hidden(symmetric(0))
    with pytest.raises(error, match=message):
        make(A)
    assert A.num_matvecs == 0


def test_a_combination_is_written_out_as_its_terms():
    A = Combination([(2, symmetric(0)), (1, symmetric(1))], shift=3)
    assert_close(A.to_dense(), 2 * symmetric(0) + symmetric(1) + 3 * torch.eye(N))
