"""The wrapper as a torch optimizer: steps, closures, states, copies, hooks, schedulers, scaling, reports."""

import copy
import gc
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import CHAINS, backward, build, flat, wrapped
from torch import nn
from torch.nn.utils import prune
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing import assert_close

import gradcond
from gradcond import (
    BNP,
    GradientCentralization,
    MeanShiftRejection,
    RateDamping,
    WeightStandardization,
    wrap,
)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def data(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 6, generator=generator), torch.randint(0, 3, (16,), generator=generator)


def train(model, optimizer, steps, closure=False, first=0):
    for step in range(first, first + steps):
        x, y = data(step)

        def evaluate(x=x, y=y):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        if closure:
            optimizer.step(evaluate)
        else:
            evaluate()
            optimizer.step()
    return flat([p.detach() for p in model.parameters()])


BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3, nesterov=True),
    "foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
}


@pytest.mark.parametrize("base", BASES)
def test_an_empty_chain_is_bit_equal_to_the_bare_optimizer(base):
    bare, inside = network(), network()
    optimizer = wrap(BASES[base](inside.parameters()), inside, [])
    assert isinstance(optimizer, torch.optim.Optimizer)
    expected = train(bare, BASES[base](bare.parameters()), 5)
    assert torch.equal(train(inside, optimizer, 5), expected)


@pytest.mark.parametrize("chain", ["bnp", "gc", "ws", "gc+bnp"])
@pytest.mark.parametrize("base", BASES)
def test_a_closure_is_conditioned_as_a_plain_step_is(base, chain):
    plain, closed, raw = network(), network(), network()
    first = train(plain, wrap(BASES[base](plain.parameters()), plain, CHAINS[chain].chain()), 4)
    second = train(closed, wrap(BASES[base](closed.parameters()), closed, CHAINS[chain].chain()), 4, closure=True)
    assert torch.equal(first, second)
    assert not torch.allclose(first, train(raw, BASES[base](raw.parameters()), 4))


def test_lbfgs_sees_one_metric_within_a_step():
    model = network()
    optimizer = wrap(torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=6), model, [BNP()])
    x, y = data()
    losses, metrics = [], []

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        losses.append(loss.item())
        metrics.append(copy.deepcopy(optimizer._engine.states))
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert optimizer._engine.states[0]["0"]["steps"] == 3  # folded once per step, not per evaluation
    assert len(losses) > 6
    assert losses[-1] < losses[0]
    assert metrics[1][0]["0"]["steps"] == metrics[2][0]["0"]["steps"] == 1


def test_a_closure_is_evaluated_with_grad_by_optimizers_that_forget_to():
    class Careless(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure):
            loss = closure()
            for p in self.param_groups[0]["params"]:
                p -= self.param_groups[0]["lr"] * p.grad
            return loss

    model, twin = network(), network()
    careless = wrap(Careless(model.parameters(), lr=0.1), model, [BNP()])
    careful = wrap(torch.optim.SGD(twin.parameters(), lr=0.1), twin, [BNP()])
    assert_close(train(model, careless, 2, closure=True), train(twin, careful, 2, closure=True))


def test_further_arguments_of_a_step_reach_the_inner_optimizer():
    class Curved(torch.optim.SGD):
        def step(self, closure=None, curvature=1.0, *, sign=1.0):
            self.seen = curvature, sign
            return super().step(closure)

    model = network()
    optimizer = wrap(Curved(model.parameters(), lr=0.1), model, [BNP()])
    optimizer.step(None, 2.0, sign=-1.0)
    assert optimizer.seen == (2.0, -1.0)
    optimizer.step(curvature=3.0)
    assert optimizer.seen == (3.0, 1.0)


def test_a_gradient_is_conditioned_once():
    model, x = build("linear", True)
    optimizer = wrapped(model, [BNP()], lr=0.0)
    backward(model, x)
    optimizer.step()
    once = flat([p.grad for p in model.parameters()])
    optimizer.step()
    assert torch.equal(flat([p.grad for p in model.parameters()]), once)
    backward(model, x)
    optimizer.step()
    assert optimizer._engine.states[0]["0"]["steps"] == 2


def test_the_preconditioner_is_a_snapshot():
    model, x = build("conv2d", True)
    optimizer = wrapped(model, [BNP(decay=0.0)], lr=0.0)
    backward(model, x)
    optimizer.step()
    m = optimizer.preconditioner()
    v = torch.randn(m.shape[0])
    before = m.apply(v)
    backward(model, 3 * x + 1)
    optimizer.step()
    assert torch.equal(m.apply(v), before)
    assert not torch.allclose(optimizer.preconditioner().apply(v), before)


def test_m_is_the_identity_on_what_no_conditioner_touches():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[2].weight.requires_grad_(False)
    optimizer = wrapped(model, [BNP()])
    backward_through = model(torch.randn(5, 3)).square().sum()
    backward_through.backward()
    optimizer.step()
    m = optimizer.preconditioner()
    n = 12 + 4 + 4 + 4 + 2
    dense = m.apply(torch.eye(n))
    assert m.shape == (n, n)
    assert torch.equal(dense[16:], torch.eye(n)[16:])
    assert not torch.equal(dense[:16, :16], torch.eye(16))
    with pytest.raises(ValueError, match=r"expected a vector \(26,\) or vectors \(26, k\).*got \(25,\)"):
        m.apply(torch.zeros(25))


def roundtrip(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_states_load_across_bare_and_wrapped():
    model = network()
    optimizer = wrap(torch.optim.Adam(model.parameters(), lr=0.01), model, [BNP()])
    train(model, optimizer, 3)
    state = roundtrip(optimizer.state_dict())
    bare = torch.optim.Adam(model.parameters(), lr=0.5)
    bare.load_state_dict(state)
    assert bare.param_groups[0]["lr"] == 0.01
    again = wrap(torch.optim.Adam(model.parameters(), lr=0.5), model, [BNP()])
    with pytest.warns(UserWarning, match="bare optimizer"):
        again.load_state_dict(roundtrip(bare.state_dict()))
    assert again.param_groups[0]["lr"] == 0.01
    assert again.param_groups is again.optimizer.param_groups
    assert again.state is again.optimizer.state


def test_settings_are_saved_and_may_change_between_steps():
    model = network()
    optimizer = wrapped(model, [BNP(decay=0.5), GradientCentralization()])
    optimizer.conditioners[0].decay = 0.25
    train(model, optimizer, 2)
    again = wrapped(model, [BNP(), GradientCentralization()])
    again.load_state_dict(state_dict=roundtrip(optimizer.state_dict()))
    assert again.conditioners[0].decay == 0.25
    assert_close(again.preconditioner().apply(torch.ones(83)), optimizer.preconditioner().apply(torch.ones(83)))


@pytest.mark.parametrize("chain", CHAINS)
def test_the_preconditioner_of_a_checkpoint_is_that_of_the_optimizer(chain):
    model, x = build("conv2d-groups", True)
    optimizer = wrapped(model, CHAINS[chain].chain(), lr=1e-3)
    backward(model, x)
    optimizer.step()
    other = copy.deepcopy(model)
    m = gradcond.load_preconditioner(other, roundtrip(optimizer.state_dict()))
    v = torch.randn(m.shape[0], 2)
    assert torch.equal(m.apply(v), optimizer.preconditioner().apply(v))
    assert torch.equal(m.factor(v), optimizer.preconditioner().factor(v))


def test_a_bias_that_is_frozen_since_the_last_step_is_no_part_of_the_preconditioner():
    model, x = build("linear", True)
    optimizer = wrapped(model, [BNP()], lr=0.1)
    backward(model, x)
    optimizer.step()
    model[0].bias.requires_grad_(False)
    m = optimizer.preconditioner()
    state = roundtrip(optimizer.state_dict())
    assert torch.equal(gradcond.load_preconditioner(model, state).factor(torch.eye(20)), m.factor(torch.eye(20)))
    assert_close(m.factor(m.factor_transpose(torch.eye(20))), m.apply(torch.eye(20)))
    mean, variance = x.mean(0), x.var(0, correction=0)
    metric = torch.diag(variance + 1e-2 * variance.max() + 1e-4) + torch.outer(mean, mean)
    assert_close(m.apply(torch.eye(20))[:5, :5], metric.inverse())  # what the coming step will use


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("chain", ["bnp", "gc", "ws", "none"])
def test_copies_train_on_by_themselves(how, chain):
    model = network()
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model, CHAINS[chain].chain())
    torch.optim.lr_scheduler.StepLR(optimizer, 5)  # patches `step` on the instance
    train(model, optimizer, 2)
    pair = (model, optimizer)
    other, twin = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert twin._engine.model is other
    assert twin.optimizer.param_groups[0]["params"][0] is other[0].weight
    expected = train(model, optimizer, 3, first=2)
    assert torch.equal(train(other, twin, 3, first=2), expected)
    assert len(other[0]._forward_hooks) == len(model[0]._forward_hooks)


def test_a_model_that_is_pickled_whole_needs_no_gradcond():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, [BNP()])
    saved = pickle.dumps(model)
    assert b"gradcond" not in saved
    x, other = torch.randn(6, 4), pickle.loads(saved)
    again = wrap(torch.optim.SGD(other.parameters(), lr=0.1), other, [BNP()])
    for own, own_optimizer in ((model, optimizer), (other, again)):
        own(x).square().sum().backward()
        own_optimizer.step()
    assert torch.equal(flat(list(other.parameters())), flat(list(model.parameters())))
    assert len(other[0]._forward_hooks) == 1


def test_hooks_go_with_the_wrapper():
    model = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3))
    optimizer = wrapped(model, [BNP()])
    assert all(len(m._forward_hooks) == 1 for m in model)
    backward(model, torch.randn(4, 2, 5, 5))
    optimizer.step()
    assert [len(m._forward_hooks) for m in model] == [1, 0]  # batch norm has been found
    assert len(model[0].weight._post_accumulate_grad_hooks) == 1
    del optimizer
    gc.collect()
    assert [len(m._forward_hooks) for m in model] == [0, 0]
    assert not model[0].weight._post_accumulate_grad_hooks
    wrapped(model, [GradientCentralization()])
    assert [len(m._forward_hooks) for m in model] == [0, 0]


def test_step_hooks_run_once_and_in_torch_s_order():
    model = network()
    optimizer = wrapped(model, [BNP()])
    optimizer._patch_step_function()  # what torch does to every optimizer that it builds
    calls = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append(0)),
        optimizer.register_step_pre_hook(lambda *_: calls.append(1)),
        optimizer.register_step_post_hook(lambda *_: calls.append(2)),
        register_optimizer_step_post_hook(lambda *_: calls.append(5)),
    ]
    train(model, optimizer, 1)
    for handle in handles:
        handle.remove()
    assert calls == [0, 1, 2, 5]


@pytest.mark.parametrize("where", ["wrapper", "base"])
@pytest.mark.parametrize("scheduler", ["StepLR", "OneCycleLR", "CosineAnnealingLR", "ReduceLROnPlateau"])
def test_schedulers_move_the_same_rates_as_on_the_bare_optimizer(scheduler, where):
    make = {
        "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
        "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.2, total_steps=12),
        "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 6),
        "ReduceLROnPlateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    }[scheduler]

    def run(inside):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule = make(optimizer) if inside and where == "base" else None
        optimizer = wrap(optimizer, model, []) if inside else optimizer
        schedule = schedule or make(optimizer)
        seen = []
        for step in range(8):
            train(model, optimizer, 1, first=step)
            schedule.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
            if step == 3:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
        return seen, flat([p.detach() for p in model.parameters()])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (rates, parameters), (bare_rates, bare_parameters) = run(True), run(False)
    assert rates == bare_rates
    assert torch.equal(parameters, bare_parameters)


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_sees_unscaled_gradients_and_skips_overflowing_steps(fused):
    def run(scale):
        model = network().float()
        base = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
        optimizer = wrap(base, model, [BNP()])
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scale)
        for step in range(4):
            x, y = data(step)
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(x.float()), y)).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        return model, optimizer, scaler

    (scaled, optimizer, scaler), (plain, _, _) = run(True), run(False)
    assert_close(flat(list(scaled.parameters())), flat(list(plain.parameters())))
    before = flat([p.detach() for p in scaled.parameters()])
    optimizer.zero_grad()
    (scaler.scale(F.cross_entropy(scaled(data()[0].float()), data()[1])) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(flat([p.detach() for p in scaled.parameters()]), before)


def test_groups_can_be_switched_off_and_added():
    model = network()
    base = torch.optim.SGD([{"params": model[0].parameters(), "gradcond": False}], lr=0.0)
    optimizer = wrap(base, model, [GradientCentralization()])
    raw = backward(model, data()[0])
    optimizer.step()
    assert torch.equal(model[0].weight.grad, raw[0])
    assert "gradcond=False" in optimizer.report().left_alone["0.weight"]
    assert "does not hold it" in optimizer.report().left_alone["2.weight"]
    optimizer.add_param_group({"params": model[2].parameters()})
    backward(model, data()[0])
    optimizer.step()
    assert model[2].weight.grad.mean(1).abs().max() < 1e-15
    assert "2" in optimizer.report().conditioned


def test_layers_that_are_exchanged_and_added_join():
    model, x = network(), data()[0]
    optimizer = wrapped(model, [BNP(decay=0.0), RateDamping()], lr=0.01)
    train(model, optimizer, 2)
    old, kept = model[2], optimizer._engine.states[0]["0"]
    model[2] = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))
    optimizer.add_param_group({"params": model[2].parameters()})
    optimizer.zero_grad()
    hidden = model[:2](x).detach()
    model(x).square().sum().backward()
    optimizer.step()
    states = optimizer._engine.states[0]
    assert states["0"] is kept and kept["steps"] == 3
    assert list(optimizer.report().conditioned) == ["0", "2.0", "2.2"] and not optimizer.report().left_alone
    assert not old._forward_hooks
    assert_close(states["2.0"]["mean"], hidden.mean(0))
    assert states["2.2"]["rows"] == len(x)


def test_a_report_of_layers_that_came_before_their_group_is_right():
    model = network()
    optimizer = wrapped(model, [BNP()], lr=0.01)
    head = nn.Linear(8, 3)
    optimizer.add_param_group({"params": head.parameters()})
    model[2] = head
    assert list(optimizer.report().conditioned) == ["0", "2"]
    train(model, optimizer, 1)
    assert optimizer._engine.states[0]["2"]["steps"] == 1


def test_a_layer_that_is_pruned_leaves_and_comes_back():
    model = network()
    optimizer = wrapped(model, [BNP(), RateDamping()], lr=0.01)
    train(model, optimizer, 2)
    prune.l1_unstructured(model[0], "weight", 0.5)
    train(model, optimizer, 2)
    assert list(optimizer.report().conditioned) == ["2"]
    assert "computed" in optimizer.report().left_alone["0.weight_orig"]
    other = network(seed=5)
    prune.identity(other[0], "weight")
    other.load_state_dict(model.state_dict())
    resumed = wrapped(other, [BNP(), RateDamping()], lr=0.01)
    resumed.load_state_dict(roundtrip(optimizer.state_dict()))
    assert torch.equal(train(model, optimizer, 2), train(other, resumed, 2))
    prune.remove(model[0], "weight")
    with pytest.warns(UserWarning, match="layer '0' has a gradient, but none of its inputs were seen"):
        train(model, optimizer, 1)
    train(model, optimizer, 2)
    assert optimizer._engine.states[0]["0"]["steps"] == 2


def test_a_layer_that_is_cut_down_starts_anew():
    model = network()
    optimizer = wrapped(model, [BNP(), RateDamping()], lr=0.01)
    train(model, optimizer, 2)
    model[0].weight, model[0].bias = (nn.Parameter(p.detach()[:5]) for p in (model[0].weight, model[0].bias))
    model[2].weight = nn.Parameter(model[2].weight.detach()[:, :5])
    optimizer.param_groups[0]["params"] = list(model.parameters())
    optimizer.report()
    train(model, optimizer, 2)
    assert optimizer._engine.states[0]["2"]["mean"].shape == (5,)
    assert {state["steps"] for states in optimizer._engine.states for state in states.values()} == {2}


def test_frozen_layers_join_when_they_are_unfrozen():
    model = network()
    model[0].requires_grad_(False)
    optimizer = wrapped(model, [BNP()], lr=0.1)
    train(model, optimizer, 2)
    assert "it is frozen" in str(optimizer.report())
    model[0].requires_grad_(True)
    train(model, optimizer, 1)
    assert optimizer._engine.states[0]["0"]["steps"] == 1
    assert optimizer._engine.states[0]["2"]["steps"] == 3


def test_what_is_known_of_a_layer_is_saved_while_it_is_frozen():
    model = network()
    optimizer = wrapped(model, [BNP(), RateDamping()], lr=0.1)
    train(model, optimizer, 3)
    model[0].requires_grad_(False)
    train(model, optimizer, 2, first=3)
    resumed = network(seed=5)
    resumed[0].requires_grad_(False)
    resumed.load_state_dict(model.state_dict())
    other = wrapped(resumed, [BNP(), RateDamping()], lr=0.1)
    other.load_state_dict(roundtrip(optimizer.state_dict()))
    for m in (model, resumed):
        m[0].requires_grad_(True)
    assert torch.equal(train(model, optimizer, 3, first=5), train(resumed, other, 3, first=5))
    state = optimizer.state_dict()
    state["gradcond"]["chain"][0]["layers"]["7"] = state["gradcond"]["chain"][0]["layers"]["0"]
    with pytest.raises(ValueError, match="holds layer '7'"):
        other.load_state_dict(state)


def test_shared_weights_and_other_modules_are_left_alone_and_reported():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5), "norm": nn.LayerNorm(4)})
    model["head"].weight = model["embed"].weight
    optimizer = wrapped(model, [BNP()], lr=0.1)
    model["head"](model["norm"](model["embed"](torch.arange(5)))).square().sum().backward()
    raw = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), raw, strict=True))
    left_alone = optimizer.report().left_alone
    assert left_alone["head.weight"] == "it is shared by several modules"
    assert left_alone["head.bias"] == "a parameter beside it is shared by several modules"
    assert left_alone["norm.weight"] == "LayerNorm has no adapter"


def test_a_compiled_model_gives_the_eager_result():
    eager, compiled = network(), network()
    optimizers = [wrapped(m, [BNP()], lr=0.1) for m in (eager, compiled)]
    run = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    for step in range(3):
        x, y = data(step)
        for model, forward, optimizer in ((eager, eager, optimizers[0]), (compiled, run, optimizers[1])):
            model.zero_grad()
            F.cross_entropy(forward(x), y).backward()
            optimizer.step()
    assert_close(flat(list(compiled.parameters())), flat(list(eager.parameters())))


def test_the_report_is_a_table():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    chain = [BNP(), MeanShiftRejection(), WeightStandardization()]
    text = str(wrapped(model, chain).report())
    assert "no statistics yet" in text
    assert "MeanShiftRejection" in text.splitlines()[2]
    assert "MeanShiftRejection" not in text.splitlines()[3]
    assert "1.weight    BatchNorm2d has no adapter" in text
    assert "at the first step" in text


def test_groups_that_are_replaced_are_replaced_in_the_inner_optimizer():
    model = network()
    optimizer = wrapped(model, [BNP()], lr=0.1)
    optimizer.param_groups = [{**optimizer.param_groups[0], "lr": 0.0}]
    assert optimizer.optimizer.param_groups is optimizer.param_groups
    before = flat([p.detach() for p in model.parameters()]).clone()
    assert torch.equal(train(model, optimizer, 1), before)


def test_unknown_attributes_are_the_inner_optimizers():
    model = network()
    optimizer = wrapped(model, [])
    optimizer.optimizer.custom = 5
    assert optimizer.custom == 5
    optimizer.custom = 6  # lands where the inner optimizer reads it
    assert optimizer.optimizer.custom == 6
    optimizer.label = "mine"
    assert not hasattr(optimizer.optimizer, "label")
    with pytest.raises(AttributeError):
        optimizer.missing  # noqa: B018
    assert "SGD" in repr(optimizer)
    assert not optimizer._step_supports_amp_scaling
