"""Eigenpairs in bounded memory, in blocks, from earlier vectors: certified, complete and cheap."""

import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh as arpack
from scipy.special import gammainc
from test_curvature_krylov import Diagonal, matrix, spectra

from gradcond.curvature import eigsh, memory, tridiagonalize
from gradcond.curvature.basis import Basis
from gradcond.curvature.krylov import Krylov
from gradcond.curvature.lanczos import Lanczos
from gradcond.curvature.operators import Products, generator_from
from gradcond.curvature.wanted import hiding_chance

OUTLIERS = torch.tensor([9.0, 7, 6, 5.5, 5, 4, 3.5, 3, 2.8, 2.6, 2.4, 2.2], dtype=torch.float64)


def problem_e(n):
    """Twelve outliers beside a bulk that is dense near zero."""
    return Diagonal(torch.cat([OUTLIERS, torch.rand(n - 12) ** 6 * 2 - 0.2]))


def two_ended(n):
    """The same outliers at both ends."""
    return Diagonal(torch.cat([OUTLIERS, -OUTLIERS / 2, 0.2 * torch.randn(n - 24)]))


def extreme(eigenvalues, k, which):
    """The k values asked for, from all of them."""
    ascending = eigenvalues.sort()[0]
    if which == "BE":
        return torch.cat([ascending.flip(0)[: k - k // 2], ascending[: k // 2]])
    if which == "LM":
        return ascending[ascending.abs().argsort(descending=True)][:k]
    return (ascending.flip(0) if which == "LA" else ascending)[:k]


def random_case(random):
    """A spectrum, a number of pairs and options, all drawn."""
    n = int(random.integers(1, 61))
    k = int(random.integers(1, n + 1)) if random.random() < 0.5 else min(n, int(random.integers(1, 7)))
    families = {name: values[:n] for name, values in spectra(60).items()}
    families["duplicated"] = torch.cat([torch.tensor([40.0, 40, 20, 20, 10, 10]), torch.linspace(-1, 1, 60)])[:n]
    eigenvalues = families[random.choice(list(families))].clone()
    dtype = [torch.float64, torch.float32][random.integers(2)]
    options = {"block": int(random.choice([1, 1, 2, 4]))}
    if random.random() < 0.4:
        options["max_vectors"] = k + 2 * options["block"] + 4 + int(random.integers(20))
    A = matrix(eigenvalues, dtype)
    if random.random() < 0.3:
        perturbed = A.double() + 0.01 * matrix(torch.randn(n))
        options["start"] = torch.linalg.eigh(perturbed)[1][:, : int(random.integers(1, k + 1))].to(dtype)
    return A, k, str(random.choice(["LA", "SA", "LM", "BE"])), options


@pytest.mark.parametrize("seed", range(4))
def test_random_cases_are_certified_and_complete(seed):
    random = np.random.default_rng(seed)
    torch.manual_seed(seed)
    for _ in range(40):
        A, k, which, options = random_case(random)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            pairs = eigsh(A, k, which, **options)
        exact = torch.linalg.eigvalsh(A.double())
        scale = float(exact.abs().max())
        rounding = 8 * torch.finfo(A.dtype).eps * scale
        values, residuals = pairs.eigenvalues.double(), pairs.residuals.double()
        assert ((values[:, None] - exact).abs().min(1)[0] <= residuals + rounding).all()
        assert (residuals[pairs.converged] <= 1e-6 * scale + rounding).all()
        if pairs.converged.all():
            wanted = extreme(exact, k, which)
            error = values.abs() - wanted.abs() if which == "LM" else values - wanted
            assert error.abs().max() <= 2e-6 * scale + rounding, (which, k, options)


@pytest.mark.parametrize("k", [1, 5, 10])
def test_fewer_products_than_arpack(k):
    theirs, ours = 0, 0
    for seed in range(3):
        A = problem_e(50000)
        arpack(A.to_scipy(), k, which="LA", tol=1e-6, v0=torch.randn(50000).numpy())
        theirs, A.num_matvecs = theirs + A.num_matvecs, 0
        pairs = eigsh(A, k, seed=seed)
        torch.testing.assert_close(pairs.eigenvalues, OUTLIERS[:k], rtol=0, atol=1e-9)
        assert pairs.converged.all() and pairs.num_matvecs == A.num_matvecs
        ours += pairs.num_matvecs - k  # the certifying products apart
    assert ours <= 0.95 * theirs


@contextmanager
def sizes_of_the_basis(monkeypatch):
    sizes, append = [], Basis.append

    def recorded(self, vectors):
        append(self, vectors)
        sizes.append(self.size)

    with monkeypatch.context() as patch:
        patch.setattr(Basis, "append", recorded)
        yield sizes


@pytest.mark.parametrize("which", ["LA", "BE", "LM"])
@pytest.mark.parametrize("block", [1, 2])
def test_a_bounded_basis_takes_few_products_more(monkeypatch, which, block):
    A, k = two_ended(5000), 5
    free = eigsh(A, k, which, block=block, tol=1e-5)
    bound = k + 2 * block + 8
    with sizes_of_the_basis(monkeypatch) as sizes:
        pairs = eigsh(A, k, which, block=block, tol=1e-5, max_vectors=bound)
    assert max(sizes) <= bound < free.num_matvecs - k
    torch.testing.assert_close(pairs.eigenvalues, extreme(A.entries, k, which), rtol=0, atol=1e-7)
    assert pairs.converged.all() and pairs.num_matvecs <= 1.5 * free.num_matvecs


def test_both_ends_take_one_run():
    A = two_ended(5000)
    pairs, ends = eigsh(A, 5, "BE"), [eigsh(A, 3, "LA"), eigsh(A, 2, "SA")]
    torch.testing.assert_close(pairs.eigenvalues, torch.cat([end.eigenvalues for end in ends]))
    assert pairs.num_matvecs < sum(end.num_matvecs for end in ends)


def perturbed(size):
    eigenvalues = torch.cat([OUTLIERS, 2 * torch.rand(388) ** 6 - 0.2])
    A, E = matrix(eigenvalues), matrix(torch.linspace(-1, 1, 400))
    return A, A + size * E


@pytest.mark.parametrize("tol", [1e-2, 1e-6])
def test_pairs_left_out_by_a_look_are_no_asymmetry(tol):
    for seed in range(5):
        assert eigsh(matrix(torch.randn(120)), 5, tol=tol, seed=seed).converged.all()


@pytest.mark.parametrize("k, tol, ratio", [(1, 1e-2, 0.5), (1, 1e-3, 0.6), (5, 1e-3, 0.95)])
def test_earlier_vectors_save_products(k, tol, ratio):
    A, changed = perturbed(0.02)
    earlier = eigsh(A, k, tol=tol)
    cold, warm = eigsh(changed, k, tol=tol), eigsh(changed, k, tol=tol, start=earlier)
    assert warm.converged.all() and warm.num_matvecs <= ratio * cold.num_matvecs
    exact = torch.linalg.eigvalsh(changed).flip(0)[:k]
    assert (warm.eigenvalues - exact).abs().max() <= tol * exact[0]


def test_earlier_vectors_hide_nothing():
    A, _ = perturbed(0)
    vectors = torch.linalg.eigh(A)[1].flip(1)[:, :3]
    u = torch.linalg.eigh(A)[1][:, 200]
    above = A + 20 * torch.outer(u, u)  # a new largest eigenvalue, orthogonal to all that is given
    assert eigsh(above, 3, start=vectors).eigenvalues[0] > 19
    double = A + (9 - u @ A @ u) * torch.outer(u, u)
    torch.testing.assert_close(eigsh(double, 3, start=vectors).eigenvalues, torch.tensor([9.0, 9, 7]))


def test_a_block_sees_copies_in_any_dimension():
    entries = torch.cat([torch.tensor([9.0, 9, 9, 7, 7, 6]), torch.rand(6000) - 0.5])
    widths = []

    class Recording(Diagonal):
        def _columns(self, V):
            widths.append(V.shape[1])
            return super()._columns(V)

    pairs = eigsh(Recording(entries), 6, block=3)
    torch.testing.assert_close(pairs.eigenvalues, entries[:6], rtol=0, atol=1e-10)
    assert set(widths) == {3, 6} and pairs.num_matvecs == sum(widths)


@pytest.mark.parametrize("seed", range(4))
def test_copies_are_looked_for(seed):
    entries = torch.cat([torch.tensor([9.0, 9, 7, 7, 6, 5, 4]), torch.rand(2000) - 0.5])
    pairs = eigsh(Diagonal(entries), 4, seed=seed)
    torch.testing.assert_close(pairs.eigenvalues, entries[:4], rtol=0, atol=1e-10)
    assert pairs.converged.all()


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
def test_pairs_follow_a_factor_and_a_shift(which):
    A, k = matrix(torch.randn(60)), 4
    pairs = eigsh(A, k, which)
    for factor in (1e-12, 1e12):
        scaled = eigsh(factor * A, k, which)
        torch.testing.assert_close(scaled.eigenvalues / factor, pairs.eigenvalues, rtol=1e-8, atol=0)
        assert scaled.num_matvecs == pairs.num_matvecs
    if which != "LM":
        shifted = eigsh(A + 3 * torch.eye(60), k, which)
        torch.testing.assert_close(shifted.eigenvalues - 3, pairs.eigenvalues, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("name", ["random", "clustered", "rank 5", "identity", "multiple", "zero", "outliers"])
def test_the_decomposition_outlives_blocks_and_restarts(name, block, dtype, tolerance):
    eigenvalues = spectra(60)[name]
    A = matrix(eigenvalues, dtype)
    space = Krylov(
        Products(A), Basis(60, dtype, A.device), generator_from(0), breakdown=64 * torch.finfo(dtype).eps
    )

    def check():
        Q, P, dense = torch.cat(space.basis.parts).double().mT, space.pending.mT, A.double()
        both = torch.cat([Q, P], 1)
        scale = float(eigenvalues.abs().max())
        assert (both.mT @ both - torch.eye(both.shape[1])).abs().max() <= tolerance
        rest = dense @ Q - Q @ torch.as_tensor(space.T) - P @ torch.as_tensor(space.C).mT
        assert rest.abs().max() <= tolerance * scale
        # Cauchy: the j-th Ritz value from either end lies within the j-th eigenvalues
        ritz, exact = torch.as_tensor(space.eigh()[0]), eigenvalues.sort()[0]
        slack = tolerance * scale
        assert (ritz >= exact[: space.size] - slack).all() and (ritz <= exact[60 - space.size :] + slack).all()

    for _ in range(3):
        for _ in range(6):
            if not len(space.pending):
                space.add_random(block)
            space.expand(len(space.pending))
        check()
        space.restart(space.eigh()[1][:, -4:])
        check()
    for _ in range(60):
        if not len(space.pending):
            space.add_random(block)
        if not len(space.pending):
            break
        space.expand(1)
    check()
    assert space.size == 60


def test_a_block_of_nearly_parallel_products_stays_orthogonal():
    A = Diagonal(torch.cat([torch.tensor([1e8]), torch.randn(59)]))
    space = Krylov(Products(A), Basis(60, torch.float64, A.device), generator_from(0), breakdown=1e-14)
    space.add_random(3)
    for _ in range(3):
        space.expand(3)
    both = torch.cat([*space.basis.parts, space.pending])
    assert (both @ both.mT - torch.eye(len(both))).abs().max() <= 1e-12


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", ["random", "clustered", "rank 5", "identity"])
def test_orthogonality_after_300_steps(name, dtype, tolerance):
    T = tridiagonalize(matrix(spectra(400)[name], dtype), steps=300)
    Q = T.basis.double()
    assert (Q.mT @ Q - torch.eye(300)).abs().max() <= tolerance
    if name == "rank 5":
        assert (T.eigh()[0].abs() > 1e-4).sum() == 5


def transfers(monkeypatch, call):
    """How often ``call`` reads a number from a tensor."""
    count = []
    with monkeypatch.context() as patch:
        for name in ("cpu", "tolist", "item", "__float__", "__bool__", "__int__", "nonzero"):
            original = getattr(torch.Tensor, name)
            patch.setattr(torch.Tensor, name, lambda *a, f=original, **k: (count.append(1), f(*a, **k))[1])
        call()
    return len(count)


def test_a_step_reads_from_the_device_at_most_twice(monkeypatch):
    products = Products(Diagonal(torch.rand(500)))
    lanczos = Lanczos(products, torch.randn(500), generator=generator_from(0))
    lanczos.step()
    assert 1 <= transfers(monkeypatch, lanczos.step) <= 2
    for block in (1, 3):
        space = Krylov(products, Basis(500, torch.float64, products.device), generator_from(0), breakdown=1e-14)
        space.add_random(block)
        space.expand(block)
        assert 1 <= transfers(monkeypatch, lambda space=space, block=block: space.expand(block)) <= 2


def test_the_chance_that_an_eigenvalue_hides():
    # one complete equation, (a - point) x_0 + b x_1 = 0
    T, coupling = np.array([[1.0, 0.5], [0.5, 2.0]]), np.array([[0.0], [0.3]])
    expected = gammainc(0.5, 1000 / (2 * (1 + ((4 - 1) / 0.5) ** 2)))
    assert hiding_chance(T, coupling, 1, 4.0, 1000) == pytest.approx(expected)
    assert hiding_chance(T[:1, :1], np.array([[0.3]]), 1, 4.0, 10) == pytest.approx(gammainc(0.5, 5))


@pytest.mark.parametrize("width", [1, 2])
def test_what_is_there_does_not_count_as_absent(width):
    # where the eigenvalue exists, the bound on its chance to hide is a p-value: at most p with probability p
    n, chances = 200, []
    entries = torch.cat([torch.tensor([3.0]), torch.linspace(-1, 1, n - 1)])
    for seed in range(150):
        products = Products(Diagonal(entries))
        space = Krylov(products, Basis(n, torch.float64, products.device), generator_from(seed), breakdown=1e-14)
        space.add_random(width)
        for _ in range(4):
            space.expand(width)
        chances.append(hiding_chance(space.T, space.C, width, 3.0, n))
    for p in (0.05, 0.2, 0.5):
        assert np.mean(np.array(chances) <= p) <= p + 3 * (p * (1 - p) / 150) ** 0.5
    assert min(chances) < 0.2  # and it is no empty bound


def test_where_the_basis_is_kept_changes_nothing():
    A = matrix(torch.randn(50))
    here, there = eigsh(A, 3), eigsh(A, 3, basis_device="cpu")
    assert all(torch.equal(getattr(here, f), getattr(there, f)) for f in ("eigenvalues", "eigenvectors"))


def test_the_basis_goes_where_it_fits(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    free = {cuda: 1000, cpu: 10000}
    monkeypatch.setattr(memory, "available", lambda device: free[device])
    assert memory.placement([cuda, cpu], 10, 100, 5, 20) == (cuda, 20)
    assert memory.placement([cuda, cpu], 10, 100, 5, 200) == (cuda, 70)
    assert memory.placement([cuda, cpu], 10, 100, 90, 200) == (cpu, 200)
    with pytest.raises(MemoryError, match=r"9\.41e-06 GiB, but 9\.31e-07 GiB are free on cuda and 9\.31e-06 GiB"):
        memory.placement([cuda, cpu], 10, 100, 1000, 1000)


def test_a_basis_that_cannot_fit_is_refused_before_any_product(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 2**20)
    A = Diagonal(torch.rand(20000))
    with pytest.raises(MemoryError, match=r"7 vectors of 0.000149 GiB .* need 0.00\d* GiB"):
        eigsh(A, 5)
    assert A.num_matvecs == 0
    monkeypatch.setattr(memory, "available", lambda device: 5 * 2**20)
    assert eigsh(A, 1, tol=0.1, max_matvecs=50).converged.all()  # as many vectors as there is room for


def test_the_basis_is_no_longer_than_it_may_be():
    basis = Basis(100, torch.float32, torch.device("cpu"), 40)
    for _ in range(40):
        basis.append(torch.randn(1, 100))
    assert sum(len(segment) for segment in basis._segments) == 40


def test_a_tolerance_below_rounding_is_not_reached_and_nothing_breaks():
    for name in ("clustered", "multiple", "random"):
        A = matrix(spectra(60)[name], torch.float32)
        with pytest.warns(UserWarning, match="not converged"):
            pairs = eigsh(A, 4, tol=1e-12)
        assert (pairs.residuals <= 1e-5 * spectra(60)[name].abs().max()).all()


def test_free_memory_is_known():
    assert 2**20 < memory.available(torch.device("cpu")) < 2**50
    assert memory.available(torch.device("meta")) is None


def test_a_short_basis_that_runs_out_of_products_says_so():
    with pytest.warns(UserWarning, match="raise max_matvecs, max_vectors or tol"):
        pairs = eigsh(matrix(torch.rand(300)), 3, max_vectors=6, max_matvecs=40)
    assert not pairs.converged.all() and pairs.num_matvecs <= 40


@pytest.mark.parametrize("bounds", [{"max_vectors": 6}, {"max_matvecs": 24}])
def test_a_search_for_copies_that_ends_early_says_so(bounds):
    A = matrix(torch.arange(1.0, 31.0).repeat_interleave(2))
    with pytest.warns(UserWarning, match="copies of the 4 eigenvalues found are not ruled out"):
        pairs = eigsh(A, 4, tol=0.03, **bounds)
    assert pairs.converged.all()


def test_bfloat16_operators():
    class Half(Diagonal):
        def _columns(self, V):
            return super()._columns(V).bfloat16().float()

    entries = torch.cat([torch.tensor([40.0, 20, 10]), torch.linspace(-1, 1, 400)]).bfloat16()
    pairs = eigsh(Half(entries), 3, tol=0.02)
    assert pairs.eigenvalues.dtype == torch.float32 and pairs.converged.all()
    torch.testing.assert_close(pairs.eigenvalues, torch.tensor([40.0, 20, 10]).float(), rtol=0, atol=0.2)


REFUSED = {
    "tolerance": ({"tol": float("nan")}, ValueError, "tol must not be negative, got nan"),
    "block": ({"block": 0}, ValueError, "block must be at least 1, got 0"),
    "vectors": ({"max_vectors": 3}, ValueError, "max_vectors must be at least 4, k \\+ 2 block, got 3"),
    "rows": ({"start": torch.ones(4, 2)}, ValueError, r"shape \(9, j\), got \(4, 2\)"),
    "vector": ({"start": torch.ones(9)}, ValueError, "vectors are columns"),
    "zero": ({"start": torch.zeros(9, 2)}, ValueError, "finite and not zero"),
    "nan": ({"start": torch.full((9, 1), torch.nan)}, ValueError, "finite and not zero"),
    "array": ({"start": np.ones((9, 1))}, TypeError, "tensor or Eigenpairs, got ndarray"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    options, error, message = REFUSED[name]
    A = Diagonal(torch.rand(9))
    with pytest.raises(error, match=message):
        eigsh(A, 2, **options)
    assert A.num_matvecs == 0
