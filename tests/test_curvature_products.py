"""Both product methods, blocks, memory, and what a product leaves behind."""

import copy
import gc
import importlib
import pickle
import random
import resource
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dense_curvature import assert_same_operator, dense_ggn, dense_hessian, problem, split
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from gradcond.curvature import (
    GGN,
    DiagonalFactor,
    EmpiricalFisher,
    Hessian,
    ModelLoss,
    MonteCarloFisher,
    Preconditioned,
    condition_number,
    diagonal,
    eigsh,
    exact_spectrum,
    frobenius_norm,
    preflight,
    spectral_density,
    trace,
    tridiagonalize,
)
from gradcond.curvature.passes import SWITCHES, Draws
from gradcond.curvature.products import Probe, Trial, probe

KINDS = [Hessian, GGN, EmpiricalFisher, MonteCarloFisher]
KIBIBYTE = 1024 if sys.platform == "darwin" else 1
METHODS = ["double_backward", "forward_over_reverse"]


@pytest.mark.parametrize("kind", KINDS)
def test_methods_agree_and_the_probe_tells(kind, monkeypatch):
    monkeypatch.setattr(kind, "_forward_costs", 0.0)  # forward mode is tried
    model, x, y = problem()
    results = []
    for method in (*METHODS, "auto"):
        H = kind(model, nn.CrossEntropyLoss(), split(x, y, [4, 2]), method=method)
        assert H.probe is None
        results.append(H.to_dense())
        assert H.probe.method in (METHODS if method == "auto" else [method])
    assert set(H.probe.seconds) == set(METHODS) and "s a batch" in repr(H)
    for result in results:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-13 * float(results[0].abs().max()))


# seconds that building the graph of double backward takes; a product with it takes 1 more, one by forward mode 0.6
@pytest.mark.parametrize(
    "keeps, building, tried", [(True, 5.0, False), (True, 0.3, True), (False, 2.0, False), (False, 0.5, True)]
)
@pytest.mark.parametrize("method", ["auto", "forward_over_reverse"])
def test_forward_mode_is_tried_where_it_may_win(method, keeps, building, tried, monkeypatch):
    """It builds as much anew in each product as double backward does once."""
    now, forwards, built = [0.0], [], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def build():
        now[0] += building

        def product(parts, batched):
            now[0] += 1
            return parts

        built.append(product)
        return product

    def forward(parts, batched):
        forwards.append(1)
        now[0] += 0.6
        return parts

    def found(costs):
        return probe(Trial(build, forward, [torch.ones(3)], keeps, costs), method, torch.float64)

    (taken, product), tried = found(2.0), tried or method != "auto"
    assert bool(forwards) == tried
    assert taken.method == ("forward_over_reverse" if tried else "double_backward")
    assert tried or product is (built[-1] if keeps else None)  # used up
    assert found(0.1)[0].method == "forward_over_reverse"


class WrongForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, g):
        return g * (1 - ctx.saved_tensors[0].tanh() ** 2)

    @staticmethod
    def jvp(ctx, t):
        return 1.01 * t * (1 - ctx.saved_tensors[0].tanh() ** 2)


class Wrong(nn.Module):
    def forward(self, x):
        return WrongForward.apply(x)


@pytest.mark.parametrize("kind, dense", [(Hessian, dense_hessian), (GGN, dense_ggn)])
def test_a_wrong_forward_derivative_is_found(kind, dense, monkeypatch):
    monkeypatch.setattr(kind, "_forward_costs", 0.0)  # forward mode is tried
    _, x, y = problem()
    model = nn.Sequential(nn.Linear(4, 4), Wrong(), nn.Linear(4, 3))
    H = kind(model, nn.CrossEntropyLoss(), split(x, y, [4, 2]))
    assert_same_operator(H, dense(model, F.cross_entropy, x, y))
    assert H.probe.method == "double_backward" and "differs" in H.probe.reason
    with pytest.raises(ValueError, match=r"forward over reverse differs .*double_backward"):
        kind(model, nn.CrossEntropyLoss(), [(x, y)], method="forward_over_reverse").to_dense()


def live():
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_memory(kind, method):
    model, x, y = problem()
    gc.collect()
    empty = live()
    gc.disable()  # nothing may wait for the collector
    try:
        H = kind(model, nn.CrossEntropyLoss(), [(x, y)], method=method)
        v = torch.ones(H.shape[0])
        for _ in range(5):
            H @ v
        gc.collect()
        objects, tensors = len(gc.get_objects()), live()
        for _ in range(100):
            H @ v
        assert live() == tensors
        gc.collect()
        assert len(gc.get_objects()) - objects < 100  # fewer than one a product
        H.release()
        assert H._kept is None
        H @ v
        del H
        assert live() <= empty + 1  # v
    finally:
        gc.enable()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batches", [1, 2])
def test_memory_of_graphs(batches, method):
    rows = 20_000
    model, x, y = (
        nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)),
        torch.randn(rows, 4),
        torch.zeros(rows),
    )
    H = Hessian(model, nn.CrossEntropyLoss(), split(x, y.long(), rows // batches), method=method)
    v = torch.ones(H.shape[0])
    H @ v
    H @ v
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(30):
        H @ v
    # in kibibytes (bytes on a Mac): the activations of one layer in each product would be 30 x 2.5 MB
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / KIBIBYTE < 30_000


@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_memory_of_a_product_is_a_few_vectors(kind, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "analysis"))
    peak_bytes = importlib.import_module("step_timing").peak_bytes
    model = nn.Sequential(nn.Linear(300, 400), nn.Tanh(), nn.Linear(400, 300), nn.Tanh(), nn.Linear(300, 3))
    batches = [(torch.randn(2, 300), torch.zeros(2).long()) for _ in range(2)]

    def vectors(H, v):
        return peak_bytes(lambda: H @ v) / (H.shape[0] * v.element_size())

    kept = kind(model, nn.CrossEntropyLoss(), batches[:1], method="double_backward")
    v = torch.ones(kept.shape[0])
    for _ in range(2):
        assert vectors(kept, v) < 2.2  # the result, and the parts it is made of
    assert vectors(kept, torch.stack([v, v], 1)[:, :1]) < 2.7
    assert vectors(kept, torch.ones(len(v), 4)) < 6.8  # one product at a time
    assert vectors(kind(model, nn.CrossEntropyLoss(), batches, method="double_backward"), v) < 2.7
    first = 3.3 if kind is GGN else 5.3  # forward mode tried, perhaps taken
    monkeypatch.setattr(kind, "_forward_costs", 0.0)
    assert vectors(kind(model, nn.CrossEntropyLoss(), batches), v) < first
    H = kind(model, nn.CrossEntropyLoss(), batches)
    assert peak_bytes(H.check_deterministic) / (H.shape[0] * v.element_size()) < first + 1.1


@pytest.mark.parametrize("kind, activations", [(Hessian, 25.2), (GGN, 23.2)])
def test_graphs_of_several_batches_are_freed_as_they_are_used(kind, activations, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "analysis"))
    peak_bytes = importlib.import_module("step_timing").peak_bytes
    monkeypatch.setattr(kind, "_forward_costs", 1e9)  # forward mode cannot win
    model = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(16, 16), nn.Tanh())))
    batches = [(torch.randn(4000, 16), torch.zeros(4000).long()) for _ in range(2)]
    H = kind(model, nn.CrossEntropyLoss(), batches)
    v = torch.ones(H.shape[0])
    for _ in range(2):  # the trial of the first one, too
        assert peak_bytes(lambda: H @ v) / batches[0][0].nbytes < activations  # twelve layers, a copy of the batch
    if kind is GGN:
        H = kind(model, nn.CrossEntropyLoss(), batches, method="forward_over_reverse")
        H @ v
        assert peak_bytes(lambda: H @ v) / batches[0][0].nbytes < 15.3


def test_what_the_first_product_tries_it_uses(monkeypatch):
    model, x, y = problem()
    passes = []
    model.register_forward_hook(lambda *args: passes.append(1))
    monkeypatch.setattr(Hessian, "_forward_costs", 1e9)  # forward mode cannot win
    H = Hessian(model, nn.CrossEntropyLoss(), [(x, y)])
    product = H @ torch.ones(H.shape[0])
    assert len(passes) == 1 and list(H.probe.seconds) == ["double_backward"]
    torch.testing.assert_close(product, dense_hessian(model, F.cross_entropy, x, y).sum(1), rtol=0, atol=1e-13)


def test_storages_can_still_be_resized():
    """As a view of NumPy's would forbid for ever."""
    model, x, y = problem()
    H = Hessian(model, nn.CrossEntropyLoss(), [(x, y)], method="double_backward")
    for _ in range(2):
        H @ torch.ones(H.shape[0])
    assert all(t.untyped_storage().resizable() for t in (*model.parameters(), *model.buffers(), x, y))


@pytest.mark.parametrize("kind", KINDS)
def test_copies_leave_the_graph_behind(kind):
    model, x, y = problem()
    H = kind(model, nn.CrossEntropyLoss(), [(x, y)], method="double_backward")
    v = torch.ones(H.shape[0])
    product = H @ v
    for twin in (copy.deepcopy(H), copy.copy(H), pickle.loads(pickle.dumps(H))):
        assert twin._kept is None and H._kept is not None
        torch.testing.assert_close(twin @ v, product, rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_blocks(kind, method):
    model, x, y = problem()
    H = kind(model, nn.CrossEntropyLoss(), split(x, y, [4, 2]), method=method)
    dense, V = H.to_dense(), torch.randn(H.shape[0], 2)
    assert list(H.slices) == H.names and H.slices["3.bias"] == slice(H.shape[0] - 3, H.shape[0])
    for pattern in (["0.*"], ["*.weight"], ["3.bias", "1.*"], ["*"]):
        block = H.block(*pattern)
        rows = torch.cat([torch.arange(H.shape[0])[H.slices[name]] for name in block.names])
        torch.testing.assert_close(block @ V[rows], dense[rows][:, rows] @ V[rows], rtol=0, atol=1e-13)
    assert H.num_matvecs == len(dense) and block.num_matvecs == 2
    with pytest.raises(ValueError, match=r"no parameter matches 'fc\*'; expected .*'0.weight', '0.bias'"):
        H.block("0.*", "fc*")


@pytest.mark.parametrize("kind", KINDS)
def test_the_block_of_an_index_is_that_of_names_where_it_can_be(kind):
    model, x, y = problem()
    H = kind(model, nn.CrossEntropyLoss(), [(x, y)], chunk=3)
    dense, weight, bias = H.to_dense(), H.slices["0.weight"], H.slices["3.bias"]
    whole = torch.cat([torch.arange(H.shape[0])[own] for own in (weight, bias)])
    cases = {"whole": (whole, True), "permuted": (whole.flip(0), False), "part": (whole[1:], False)}
    for index, by_names in cases.values():
        block = H.block(index)
        assert hasattr(block, "names") == by_names and block.chunk == 3
        torch.testing.assert_close(block.to_dense(), dense[index][:, index], rtol=0, atol=1e-13)
    assert H.block(whole).names == ["0.weight", "3.bias"]


@pytest.mark.parametrize("method", METHODS)
def test_a_block_costs_what_it_needs(method):
    ran = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            ran.append(1)
            return g.clone()

        @staticmethod
        def jvp(ctx, t):
            return t.clone()

    class Watch(nn.Module):
        def forward(self, x):
            return Watched.apply(x)

    _, x, y = problem()
    model = nn.Sequential(nn.Linear(4, 4), Watch(), nn.Linear(4, 3))
    H = Hessian(model, nn.CrossEntropyLoss(), [(x, y)], method=method)
    last = H.block("2.*")
    last @ torch.ones(last.shape[0])
    assert not ran
    H @ torch.ones(H.shape[0])
    assert ran


class Interrupts(nn.Module):
    """Raises in the middle of the forward pass, of the first or of the second backward pass."""

    def __init__(self, where, error):
        super().__init__()
        self.where, self.error, self.calls = where, error, 0

    def forward(self, x):
        if self.where == "forward":
            raise self.error
        outer = self

        class Identity(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, g):
                if outer.where == "backward":
                    raise outer.error
                return Second.apply(g)

        class Second(torch.autograd.Function):
            @staticmethod
            def forward(ctx, g):
                return g.clone()

            @staticmethod
            def backward(ctx, g):
                raise outer.error

        return Identity.apply(x)


def everything(model, data):
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    return (
        [t.clone() for t in tensors],
        [(p.requires_grad, p._backward_hooks) for p in model.parameters()],
        [module.training for module in model.modules()],
        (torch.get_rng_state(), data.generator.get_state(), torch.tensor(np.random.get_state()[1].astype(int))),
        (random.getstate(), torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()),
        (torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.autograd.forward_ad._current_level),
    )


@pytest.mark.parametrize("error", [KeyboardInterrupt("stop"), RuntimeError("fails")], ids=["interrupt", "error"])
@pytest.mark.parametrize("where", [None, "forward", "backward", "second backward"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_changed(kind, method, where, error):
    layers = [nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)]
    model = nn.Sequential(*layers[:3], *([] if where is None else [Interrupts(where, error)]), layers[3])
    model[0].register_forward_hook(lambda module, args, output: output + random.random() + np.random.rand())
    x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
    nn.CrossEntropyLoss()(nn.Sequential(*layers)(x), y).backward()
    layers[0].weight.register_hook(lambda g: g)
    data = DataLoader(TensorDataset(x, y), 4, shuffle=True, generator=torch.Generator().manual_seed(3))
    H = kind(model, nn.CrossEntropyLoss(), data, method=method)
    before = everything(model, data)
    if where is None:
        v = torch.ones(H.shape[0])
        assert torch.equal(H @ v, H @ v)  # the same masks and order every time
    else:
        with pytest.raises(type(error)):
            H @ torch.ones(H.shape[0])
    after = everything(model, data)
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
    assert after[1:3] == before[1:3] and all(map(torch.equal, after[3], before[3])) and after[4:] == before[4:]
    assert H._kept is None


class DrawsInBackward(torch.autograd.Function):
    """The second backward pass draws, as a layer that is computed again there does."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return DrawsInSecond.apply(g)


class DrawsInSecond(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g):
        return g.clone()

    @staticmethod
    def backward(ctx, g):
        return g * (random.random() + np.random.randn() + torch.rand(()))


def hessian_that_draws():
    class Draw(nn.Module):
        def forward(self, x):
            return DrawsInBackward.apply(x)

    _, x, y = problem()
    model = nn.Sequential(nn.Linear(4, 4), Draw(), nn.Tanh(), nn.Linear(4, 3))
    return Hessian(model, nn.CrossEntropyLoss(), [(x, y)], method="double_backward")


def test_a_kept_graph_that_draws_repeats_itself():
    H = hessian_that_draws()
    v = torch.ones(H.shape[0])
    np.random.randn()  # leaves a second number waiting
    before = random.getstate(), str(np.random.get_state(legacy=False)), torch.get_rng_state().tolist()
    product, kept = H @ v, H._kept
    for _ in range(4):
        assert torch.equal(H @ v, product) and H._kept is kept
    after = random.getstate(), str(np.random.get_state(legacy=False)), torch.get_rng_state().tolist()
    assert after == before


@pytest.mark.parametrize("batches", [1, 2, 3])
def test_several_columns_by_forward_mode_see_the_same_draws(batches):
    class Depth(nn.Module):
        def forward(self, x):
            return (random.random() + np.random.rand()) * x

    _, x, y = problem()
    model = nn.Sequential(nn.Linear(4, 4), Depth(), nn.Linear(4, 3))
    G = GGN(model, nn.CrossEntropyLoss(), split(x, y, 6 // batches))
    G.probe = Probe("double_backward", "long enough to try others", {"double_backward": 0.01})
    V = torch.randn(G.shape[0], 4)
    before = random.getstate(), str(np.random.get_state(legacy=False))
    expected = torch.stack([G @ v for v in V.unbind(1)], 1)
    for G._way, G._tried in ((None, 0), (0, 4), (1, 4)):
        torch.testing.assert_close(G @ V, expected)
        assert (random.getstate(), str(np.random.get_state(legacy=False))) == before


class Recomputed(nn.Module):
    def forward(self, x):
        q = x[None, None]
        return checkpoint(lambda x: x * F.scaled_dot_product_attention(q, q, q)[0, 0], x, use_reentrant=False)


class Hooked(nn.Module):
    def forward(self, x):
        x = x.tanh()
        x.register_hook(lambda g: g)
        return x


class Looks(DrawsInBackward):
    @staticmethod
    def backward(ctx, g):
        return LooksInSecond.apply(g)


class LooksInSecond(DrawsInSecond):
    @staticmethod
    def backward(ctx, g):
        return g * (1 + torch.backends.cuda.flash_sdp_enabled())


class Own(nn.Module):
    def forward(self, x):
        return Looks.apply(x)


@pytest.mark.parametrize("layer, quiet", [(nn.Tanh, True), (Recomputed, False), (Hooked, False), (Own, False)])
def test_what_runs_python_keeps_its_surroundings(layer, quiet):
    _, x, y = problem()
    H = Hessian(nn.Sequential(nn.Linear(4, 4), layer(), nn.Linear(4, 3)), nn.CrossEntropyLoss(), [(x, y)])
    v = torch.ones(H.shape[0])
    first = H @ v
    for _ in range(3):
        torch.testing.assert_close(H @ v, first, rtol=0, atol=0)
    assert (H._kept.quiet, H._kept.draws) == (quiet, False)


def test_a_profiler_is_left_alone():
    H = Hessian(*problem()[:1], nn.CrossEntropyLoss(), [problem()[1:]])
    v, seen = torch.ones(H.shape[0]), []
    H @ v
    sys.setprofile(lambda *event: seen.append(event))
    try:
        H @ v
        assert sys.getprofile() is not None
    finally:
        sys.setprofile(None)
    assert seen and not H._kept.quiet


def noisy(output, target):
    return (1 + np.random.rand() + random.random()) * F.cross_entropy(output, target)


def test_a_block_that_draws_nothing_says_nothing_of_the_others():
    H = hessian_that_draws()
    v, last = torch.ones(H.shape[0], 1), ([3], torch.ones(3, 1))  # the last bias
    H @ v
    for _ in range(2):
        H._together([last])
    before = random.getstate(), str(np.random.get_state(legacy=False))
    first = H @ v
    assert torch.equal(H @ v, first)
    assert (random.getstate(), str(np.random.get_state(legacy=False))) == before


@pytest.mark.parametrize("generator", ["MT19937", "PCG64", "Philox", "SFC64"])
def test_every_generator_of_numpy_is_put_back(generator):
    own = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(getattr(np.random, generator)(7))
        np.random.randn()  # leaves a second number waiting
        H = Hessian(*problem()[:1], noisy, [problem()[1:]])
        before, twin = np.random.get_state(legacy=False), Draws()
        H @ torch.ones(H.shape[0])
        assert str(np.random.get_state(legacy=False)) == str(before) and twin.unmoved()
        numbers = np.random.randn(700)
        assert not twin.unmoved()
        twin.restore()
        assert np.array_equal(np.random.randn(700), numbers)
    finally:
        np.random.set_bit_generator(own)


def test_the_generator_of_a_sampler_in_batches_is_put_back():
    model, x, y = problem(8)
    data, own = TensorDataset(x, y), torch.Generator().manual_seed(3)
    sampler = BatchSampler(RandomSampler(data, generator=own), 4, drop_last=False)
    before = own.get_state()
    for kind in KINDS:
        H = kind(model, nn.CrossEntropyLoss(), DataLoader(data, batch_sampler=sampler))
        v = torch.ones(H.shape[0])
        assert torch.equal(H @ v, H @ v) and torch.equal(own.get_state(), before)


def test_switches_stand_as_the_user_left_them():
    model, x, y = problem()
    H = Hessian(model, nn.CrossEntropyLoss(), [(x, y)], method="double_backward")
    found = [get() for get, _, _ in SWITCHES]
    try:
        for i, (_, put, wanted) in enumerate(SWITCHES):
            put(wanted if i % 2 else not wanted)
        left = [get() for get, _, _ in SWITCHES]
        for _ in range(2):
            H @ torch.ones(H.shape[0])
            assert [get() for get, _, _ in SWITCHES] == left
    finally:
        for (_, put, _), value in zip(SWITCHES, found, strict=True):
            put(value)


def test_an_interrupted_product_with_a_kept_graph_leaves_it_right(monkeypatch):
    model, x, y = problem()
    H = Hessian(model, nn.CrossEntropyLoss(), [(x, y)], method="double_backward")
    v = torch.ones(H.shape[0])
    product = H @ v

    def stops(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.autograd, "grad", stops)
        H @ v
    assert torch.equal(H @ v, product)


def test_bad_options():
    model, x, y = problem()
    with pytest.raises(ValueError, match=r"expected method in .*got 'reverse'"):
        Hessian(model, nn.CrossEntropyLoss(), [(x, y)], method="reverse")
    with pytest.raises(ValueError, match=r"chunk must be None or .*, got 0"):
        Hessian(model, nn.CrossEntropyLoss(), [(x, y)], chunk=0)
    with pytest.raises(ValueError, match="output="):
        ModelLoss(lambda model, batch: 0, target=lambda batch: batch)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_hooks_of_modules_are_left_out(kind, method):
    model, x, y = problem()
    expected = kind(model, nn.CrossEntropyLoss(), [(x, y)]).to_dense()
    calls = []

    def halve(module, grad_input, grad_output):
        calls.append(module)
        return tuple(g / 2 for g in grad_input)

    model[3].register_full_backward_hook(halve)
    model[3].register_full_backward_pre_hook(lambda module, grad_output: (calls.append(module), grad_output)[1])
    H = kind(model, nn.CrossEntropyLoss(), [(x, y)], method=method)
    assert_same_operator(H, expected)
    kept = H._kept
    assert_same_operator(H, expected)
    assert H._kept is kept and not calls
    F.cross_entropy(model(x), y).backward()
    assert len(calls) == 2  # they are back


@pytest.mark.parametrize("kind", KINDS)
def test_another_default_device(kind):
    model, x, y = problem()
    data = [(x[:4], y[:4]), (x[4:], y[4:])]

    def found():
        H = kind(model, nn.CrossEntropyLoss(), data, method="double_backward")
        K = Preconditioned(H, DiagonalFactor(torch.full((43,), 0.5, device="cpu")))
        numbers = [
            *(eigsh(K, 2).eigenvalues, spectral_density(H, 5, 2).density, spectral_density(H).cdf),
            *(trace(H, 30).estimate, trace(H, 6, method="xtrace").estimate, diagonal(H, 9).std_error),
            *(frobenius_norm(H, 9).interval()[0], exact_spectrum(H).eigenvalues, H.block("0.*").to_dense()),
            *(K.block(H.slices["0.bias"]).to_dense(), tridiagonalize(H, steps=3).alphas),
        ]
        return numbers, condition_number(H).kappa_lower_bound, preflight(H).noise

    expected = found()
    with torch.device("meta"):  # as set_default_device("cuda") does where the model is elsewhere
        there = found()
    torch.testing.assert_close(there, expected)


def test_estimates_within_autocast():
    model, x, y = problem(40)
    G = GGN(model.float(), nn.CrossEntropyLoss(), [(x.float(), y)], method="double_backward")
    exact = eigsh(G, 2).eigenvalues
    with torch.autocast("cpu", torch.bfloat16):
        pairs = eigsh(G, 2, tol=2e-2)
        assert condition_number(G).lambda_max == pytest.approx(float(exact[0]), rel=2e-2)
    assert pairs.converged.all()
    torch.testing.assert_close(pairs.eigenvalues, exact, rtol=2e-2, atol=0)
    Q = pairs.eigenvectors
    torch.testing.assert_close(Q.mT @ Q, torch.eye(2, dtype=Q.dtype), rtol=0, atol=1e-5)


def cut_a_layer(model):
    model[3] = nn.Linear(4, 2)


def remove_a_layer(model):
    del model[3]


def freeze(model):
    model[0].requires_grad_(False)


def shorten(model):
    model.float()


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("change", [cut_a_layer, remove_a_layer, freeze, shorten])
def test_other_parameters_ask_for_another_operator(change, batches):
    model, x, y = problem()
    H = Hessian(model, nn.CrossEntropyLoss(), batches * [(x, y)])
    H @ torch.ones(H.shape[0])
    change(model)
    with pytest.raises(ValueError, match=r"'\d\.weight' is gone, frozen, .*make a new operator"):
        H @ torch.ones(H.shape[0])


def test_an_output_without_tensors_is_told():
    model, x, y = problem()
    hidden = ModelLoss(
        lambda output, target: F.cross_entropy(output.logits, target),
        output=lambda model, batch: types.SimpleNamespace(logits=model(batch[0])),
        target=lambda batch: batch[1],
    )
    with pytest.raises(ValueError, match=r"got SimpleNamespace; .*output="):
        GGN(model, hidden, [(x, y)]).to_dense()


def test_other_samples_are_other_products():
    model, x, y = problem()
    M = MonteCarloFisher(model, nn.CrossEntropyLoss(), [(x, y)])
    v = torch.ones(M.shape[0])
    once = M @ v
    M.seed = 1
    assert not torch.allclose(M @ v, once)
    M.seed, M.mc_samples = 0, 5
    assert not torch.allclose(M @ v, once)
    M.mc_samples = 1
    torch.testing.assert_close(M @ v, once)
