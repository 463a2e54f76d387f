"""The laws of design: every conditioner and chain on every layer type, with and without bias."""

import copy
import io

import pytest
import torch
from cases import CHAINS, LAYERS, backward, build, flat, stepped, wrapped
from torch.testing import assert_close

from gradcond import Conditioner

ALL = pytest.mark.parametrize(
    ("chain", "layer", "bias"),
    [(c, layer, b) for c in CHAINS for layer in LAYERS for b in (True, False)],
)


def test_every_conditioner_has_a_row():
    used = {type(c) for case in CHAINS.values() for c in case.chain()}
    assert {c for c in Conditioner.registry.values() if c.__module__.startswith("gradcond.")} - used == set()


@ALL
def test_m_is_linear_symmetric_semidefinite_and_the_square_of_its_factor(chain, layer, bias):
    _, m, _, _ = stepped(chain, layer, bias)
    n = m.shape[0]
    eye = torch.eye(n)
    dense, factor = m.apply(eye), m.factor(eye)
    tolerance = dict(rtol=1e-12, atol=1e-13 * dense.abs().max().item())
    g = torch.randn(n, 3)
    assert_close(m.apply(g), dense @ g, **tolerance)  # linear, in (n, k) form
    assert_close(m.apply(g[:, :1]), dense @ g[:, :1], **tolerance)  # k = 1 included
    assert_close(m @ g[:, 0], dense @ g[:, 0], **tolerance)  # and in (n,) form
    assert_close(dense, dense.mT, **tolerance)
    assert_close(m.factor_transpose(eye), factor.mT, **tolerance)
    assert_close(factor @ factor.mT, dense, **tolerance)
    assert torch.linalg.eigvalsh(dense).min() >= -1e-13 * dense.abs().max()
    if CHAINS[chain].is_projection:
        assert_close(dense @ dense, dense, **tolerance)


@ALL
def test_the_step_is_m_times_the_gradient(chain, layer, bias):
    _, m, raw, conditioned = stepped(chain, layer, bias)
    assert_close(conditioned, m.apply(raw), rtol=1e-12, atol=1e-13 * conditioned.abs().max().item())
    assert conditioned @ raw >= 0


@pytest.mark.parametrize("chain", CHAINS)
def test_weights_move_by_the_conditioned_gradient(chain):
    model, x = build("conv2d", True)
    before = flat(list(model.parameters())).detach().clone()
    optimizer = wrapped(model, CHAINS[chain].chain())
    backward(model, x)
    optimizer.step()
    after = flat(list(model.parameters())).detach()
    moved_back = any(type(c).retract_ is not Conditioner.retract_ for c in CHAINS[chain].chain())
    gradient = flat([p.grad for p in model.parameters()])
    assert torch.equal(after, before - gradient) != moved_back


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chain", CHAINS)
def test_dtype_and_strides_are_kept(chain, dtype):
    model, x = build("conv2d-groups", True)
    other = copy.deepcopy(model).to(dtype).to(memory_format=torch.channels_last)
    for m, inputs in ((model, x), (other, x.to(dtype).to(memory_format=torch.channels_last))):
        optimizer = wrapped(m, CHAINS[chain].chain())
        backward(m, inputs)
        strides = [p.grad.stride() for p in m.parameters()]
        addresses = [p.grad.data_ptr() for p in m.parameters()]
        optimizer.step()
        assert [p.grad.stride() for p in m.parameters()] == strides
        assert [p.grad.data_ptr() for p in m.parameters()] == addresses
        assert all(p.grad.dtype == p.dtype for p in m.parameters())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert_close(q.grad.double(), p.grad, rtol=0, atol=tolerance * p.grad.abs().max().item())
    v = torch.randn(sum(p.numel() for p in other.parameters()), dtype=dtype)
    m = optimizer.preconditioner()
    assert m.apply(v).dtype == m.factor(v).dtype == m.factor_transpose(v).dtype == dtype


@ALL
def test_no_statistics_yet_is_the_identity(chain, layer, bias):
    model, _ = build(layer, bias)
    conditioners = CHAINS[chain].chain()
    m = wrapped(model, conditioners).preconditioner()
    z = torch.randn(m.shape[0])
    without = wrapped(model, [c for c in conditioners if not c.uses_inputs]).preconditioner()
    assert torch.equal(m.apply(z), without.apply(z))
    assert torch.equal(m.factor(z), without.factor(z))


@pytest.mark.parametrize("layer", ["linear", "conv2d-groups", "transposed2d"])
@pytest.mark.parametrize("chain", CHAINS)
def test_resumed_is_uninterrupted(chain, layer):
    def run(model, optimizer, steps):
        for step in steps:
            torch.manual_seed(step)
            backward(model, x + torch.randn_like(x))
            optimizer.step()

    model, x = build(layer, True)
    optimizer = wrapped(model, CHAINS[chain].chain(), lr=0.01)
    run(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    run(model, optimizer, range(3, 6))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, _ = build(layer, True, seed=1)
    resumed.load_state_dict(saved["model"])
    again = wrapped(resumed, CHAINS[chain].chain(), lr=7.0)
    again.load_state_dict(saved["optimizer"])
    run(resumed, again, range(3, 6))
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
    assert_same_state(optimizer.state_dict()["gradcond"], again.state_dict()["gradcond"])


@pytest.mark.parametrize("chain", CHAINS)
def test_passes_in_eval_mode_or_without_grad_leave_the_state_as_it_is(chain):
    model, x = build("conv2d", True)
    optimizer = wrapped(model, CHAINS[chain].chain(), lr=0.01)
    twin = copy.deepcopy(optimizer)
    for opt in (optimizer, twin):
        module = opt._engine.model
        for step in range(3):
            module.zero_grad()
            if opt is optimizer:
                with torch.no_grad():
                    module(x + 100)
                with torch.inference_mode():
                    module(x - 100)
                module.eval()
                module(x * 100).sum().backward()  # in eval mode
                module.zero_grad()
                module.train()
                module(x * 1000).sum()  # never backpropagated
            (module(x + step) ** 3).mean().backward()
            opt.step()
    assert_same_state(optimizer.state_dict()["gradcond"], twin.state_dict()["gradcond"])


def assert_same_state(a, b):
    """Bit-identical nested states; the test below shows it failing."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_state(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same_state(x, y)
    else:
        assert a == b


def test_the_comparison_of_states_can_fail():
    with pytest.raises(AssertionError):
        assert_same_state({"a": [torch.zeros(2)]}, {"a": [torch.tensor([0.0, 1e-300])]})
