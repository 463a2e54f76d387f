"""attach: conditioning by hooks equals the wrapper, survives what hooks meet, and tells when it was bypassed."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from cases import CHAINS, backward, flat
from test_optimizer import BASES, data, network, train
from torch import nn
from torch.testing import assert_close

from gradcond import BNP, GradientCentralization, WeightStandardization, attach, wrap


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("chain", ["bnp", "gc", "ws", "bnp+gc"])
@pytest.mark.parametrize("base", BASES)
def test_it_is_bit_equal_to_the_wrapper(base, chain, closure):
    model, twin = network(), network()
    wrapped = train(model, wrap(BASES[base](model.parameters()), model, CHAINS[chain].chain()), 4, closure=closure)
    optimizer = BASES[base](twin.parameters())
    handle = attach(optimizer, twin, CHAINS[chain].chain())
    assert torch.equal(train(twin, optimizer, 4, closure=closure), wrapped)
    handle.check()
    v = torch.randn(handle.preconditioner().shape[0])
    assert handle.preconditioner().apply(v).isfinite().all()


@pytest.mark.parametrize("keyword", [False, True])
def test_lbfgs_and_closures_by_keyword(keyword):
    model, twin = network(), network()
    x, y = data()

    def run(m, optimizer):
        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(m(x), y)
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure=closure) if keyword else optimizer.step(closure)
        return flat([p.detach() for p in m.parameters()])

    expected = run(model, wrap(torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4), model, [BNP()]))
    optimizer = torch.optim.LBFGS(twin.parameters(), lr=0.5, max_iter=4)
    attach(optimizer, twin, [BNP()])
    assert torch.equal(run(twin, optimizer), expected)


@pytest.mark.parametrize("front", [wrap, attach])
def test_a_bare_state_starts_the_statistics_anew(front):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = copy.deepcopy(optimizer.state_dict())
    handle = front(optimizer, model, [BNP()])
    owner = handle if front is wrap else optimizer
    train(model, owner, 3)
    with pytest.warns(UserWarning, match="of a bare optimizer: gradcond's statistics start anew"):
        owner.load_state_dict(state)
    assert "no statistics yet" in str(handle.report())


def test_remove_leaves_a_bare_optimizer():
    model, twin = network(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hooks = {name: len(value) for name, value in vars(optimizer).items() if name.endswith("hooks")}
    handle = attach(optimizer, model, [BNP()])
    train(model, optimizer, 1)
    handle.remove()
    assert {name: len(value) for name, value in vars(optimizer).items() if name.endswith("hooks")} == hooks
    assert not any(m._forward_hooks for m in model)
    assert not model[0].weight._post_accumulate_grad_hooks
    twin.load_state_dict(model.state_dict())
    expected = train(twin, torch.optim.SGD(twin.parameters(), lr=0.1), 2)
    assert torch.equal(train(model, optimizer, 2), expected)
    with pytest.raises(RuntimeError, match=r"remove\(\) has been called; attach again"):
        handle.check()


@pytest.mark.parametrize("how", ["copy", "inner function"])
def test_check_tells_when_a_step_ran_unconditioned(how):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = attach(optimizer, model, [BNP()])
    train(model, optimizer, 2)
    handle.check()
    backward(model, data()[0])
    if how == "copy":
        stray = torch.optim.SGD(model.parameters(), lr=0.1)
        stray.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        stray.step()
    else:
        torch.optim.SGD.step.__wrapped__(optimizer)
    with pytest.raises(RuntimeError, match="the weight of layer '0' has changed since the last conditioned step"):
        handle.check()


def test_a_subclass_that_calls_its_parent_is_conditioned_once():
    torch.optim.SGD(nn.Linear(1, 1).parameters())  # patches SGD.step, so that the hooks run twice in a step below

    class Child(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    model, twin = network(), network()
    optimizer = Child(model.parameters(), lr=0.1)
    attach(optimizer, model, [BNP()])
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    expected = train(twin, wrap(torch.optim.SGD(twin.parameters(), lr=0.1), twin, [BNP()]), 3)
    assert torch.equal(train(model, optimizer, 3), expected)
    assert len(calls) == 6


@pytest.mark.parametrize("chain", ["bnp", "ws"])
def test_resumed_is_uninterrupted(chain):
    model, twin = network(), network(seed=5)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    attach(optimizer, model, CHAINS[chain].chain())
    train(model, optimizer, 3)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    expected = train(model, optimizer, 3, first=3)
    twin.load_state_dict(weights)
    again = torch.optim.Adam(twin.parameters(), lr=7.0)
    attach(again, twin, CHAINS[chain].chain())
    again.load_state_dict(state)
    assert torch.equal(train(twin, again, 3, first=3), expected)
    torch.optim.Adam(twin.parameters()).load_state_dict(state)  # a bare optimizer loads it, too


def test_a_state_of_another_chain_is_refused():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(optimizer, model, [BNP()])
    state = optimizer.state_dict()
    other = torch.optim.SGD(model.parameters(), lr=0.5)
    attach(other, model, [GradientCentralization()])
    with pytest.raises(
        ValueError, match=r"of the chain \['BNP'\], this optimizer has \['GradientCentralization'\]"
    ):
        other.load_state_dict(state)
    assert other.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("chain", ["bnp", "bnp+msr+damping+clipping"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_and_a_step_that_overflows(fused, chain):
    def run(enabled):
        model = network().float()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
        attach(optimizer, model, CHAINS[chain].chain())
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        for step in range(4):
            x, y = data(step)
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(x.float()), y)).backward()
            scaler.step(optimizer)
            scaler.update()
        return model, optimizer, scaler

    (model, optimizer, scaler), (plain, _, _) = run(True), run(False)
    assert_close(flat(list(model.parameters())), flat(list(plain.parameters())))
    before = flat([p.detach() for p in model.parameters()])
    optimizer.zero_grad()
    (scaler.scale(F.cross_entropy(model(data()[0].float()), data()[1])) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(flat([p.detach() for p in model.parameters()]), before)


@pytest.mark.parametrize("fused", [False, True])
def test_a_first_step_that_overflows_is_skipped(fused):
    model = network().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    handle = attach(optimizer, model, [WeightStandardization(), BNP()])
    scaler = torch.amp.GradScaler("cpu", init_scale=float(2**127))
    before = flat([p.detach() for p in model.parameters()])
    scaler.scale(1e6 * F.cross_entropy(model(data()[0].float()), data()[1])).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(flat([p.detach() for p in model.parameters()]), before)
    assert not any(handle._engine.states)


@pytest.mark.parametrize("front", [attach, wrap])
def test_only_takes_the_modules_that_it_names(front):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = front(optimizer, model, [GradientCentralization()], only=lambda name: name == "2")
    raw = backward(model, data()[0])
    (handle if front is wrap else optimizer).step()
    assert torch.equal(model[0].weight.grad, raw[0])
    assert model[2].weight.grad.mean(1).abs().max() < 1e-15
    assert handle.report().left_alone["0.weight"] == "GradientCentralization: left out by only="
    assert list(handle.report().conditioned) == ["2"]


def test_an_error_in_a_step_leaves_the_next_one_conditioned():
    model, twin = network(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(optimizer, model, [WeightStandardization(), BNP()])

    def broken():
        raise KeyError("data")

    with pytest.raises(KeyError):
        optimizer.step(broken)
    reference = wrap(torch.optim.SGD(twin.parameters(), lr=0.1), twin, [WeightStandardization(), BNP()])
    assert torch.equal(train(model, optimizer, 2), train(twin, reference, 2))


def test_a_wrapped_optimizer_is_refused():
    model = network()
    with pytest.raises(TypeError, match="got a wrapped one"):
        attach(wrap(torch.optim.SGD(model.parameters()), model, []), model, [BNP()])


@pytest.mark.parametrize("front", [wrap, attach])
def test_an_optimizer_is_conditioned_once(front):
    models = nn.ModuleList([network(), network()])
    optimizer = torch.optim.SGD(models.parameters(), lr=0.1)
    handle = attach(optimizer, models[0], [BNP()])
    with pytest.raises(ValueError, match="condition twice"):
        front(optimizer, models[1], [BNP()])  # the second one's state would take the first one's place
    handle.remove()
    front(optimizer, models, [BNP()])
