"""Whose rows count: attention, lazy and parametrized modules, averages of the model, compiled models and steps."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import backward, build, flat, wrapped
from test_optimizer import data, network, train
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from gradcond import BNP, GradientCentralization, load_preconditioner, wrap


def state(optimizer, name):
    return optimizer._engine.states[0][name]


def test_attention_is_conditioned_where_its_inputs_are_seen_and_reported_elsewhere():
    model = nn.TransformerEncoderLayer(8, 2, dim_feedforward=12, dropout=0.0, batch_first=True)
    optimizer = wrapped(model, [BNP(decay=0.0)], lr=0.01)
    x = torch.randn(3, 5, 8) + 1
    seen = {}
    model.linear1.register_forward_hook(lambda m, a, o: seen.update(x=a[0].detach()))
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        raw = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()  # no warning: warnings are errors here
    assert_close(state(optimizer, "linear1")["mean"], seen["x"].mean((0, 1)))
    assert state(optimizer, "linear1")["rows"] == 15
    report = optimizer.report()
    projections = {f"self_attn.{name}" for name in ("query", "key", "value", "out_proj")}
    assert set(report.conditioned) == projections | {"linear1", "linear2"}
    assert torch.equal(model.norm1.weight.grad, raw["norm1.weight"])
    for name in ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "self_attn.out_proj.bias"):
        assert not torch.equal(model.get_parameter(name).grad, raw[name])
    model.eval()
    with torch.no_grad():
        assert model(x).isfinite().all()


def test_what_needs_no_inputs_conditions_the_output_projection_too():
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    optimizer = wrapped(model, [GradientCentralization()], lr=0.01)
    x = torch.randn(3, 5, 8)
    model(x, x, x)[0].square().sum().backward()
    optimizer.step()
    assert model.out_proj.weight.grad.mean(1).abs().max() < 1e-15
    assert "out_proj" in optimizer.report().conditioned


def test_lazy_modules_join_after_their_first_pass():
    model = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(8, 3) + 2
    optimizer = wrapped(model, [BNP(decay=0.0)], lr=0.01)
    assert "lazy" in optimizer.report().left_alone["0.weight"]
    model(x).square().sum().backward()
    with pytest.warns(UserWarning, match="none of its inputs were seen"):
        optimizer.step()
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()
    assert_close(state(optimizer, "0")["mean"], x.mean(0))
    assert list(optimizer.report().conditioned) == ["0", "2"]
    assert len(model[0]._forward_hooks) == 1


@pytest.mark.parametrize("kind", ["parametrized", "weight_norm", "spectral_norm"])
def test_computed_weights_are_left_alone_and_reported(kind):
    parametrizations = nn.utils.parametrizations
    layer = nn.Linear(4, 3)
    if kind == "parametrized":
        nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())
    else:
        getattr(parametrizations, kind)(layer)
    model = nn.Sequential(layer, nn.Linear(3, 2))
    optimizer = wrapped(model, [BNP(), GradientCentralization()], lr=0.01)
    raw = backward(model, torch.randn(5, 4))
    names = [name for name, _ in model.named_parameters()]
    optimizer.step()
    left_alone = optimizer.report().left_alone
    for name, gradient in zip(names, raw, strict=True):
        if name.startswith("0."):
            assert torch.equal(model.get_parameter(name).grad, gradient)
            assert name in left_alone
    assert list(optimizer.report().conditioned) == ["1"]


def test_an_average_of_the_model_does_not_feed_the_statistics():
    model = network()
    optimizer = wrapped(model, [BNP(decay=0.0)], lr=0.0)
    average = torch.optim.swa_utils.AveragedModel(model)
    x, _ = data()
    for module, inputs in ((model, x), (average, 100 * x)):
        module(inputs).square().sum().backward()
    average.update_parameters(model)
    optimizer.step()
    assert_close(state(optimizer, "0")["mean"], x.mean(0))
    assert copy.deepcopy(average) is not None


def test_a_compiled_model_is_traced_once_and_in_one_graph():
    eager, compiled = network(), network()
    bare, optimizer = (wrap(torch.optim.SGD(m.parameters(), lr=0.1), m, [BNP()]) for m in (eager, compiled))
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(compiled, backend=counter, fullgraph=True)
    for step in range(5):
        x, y = data(step)
        for model, forward, opt in ((eager, eager, bare), (compiled, run, optimizer)):
            model.zero_grad()
            F.cross_entropy(forward(x), y).backward()
            opt.step()
    assert counter.frame_count == 1
    assert_close(flat(list(compiled.parameters())), flat(list(eager.parameters())))
    assert state(optimizer, "0")["steps"] == 5


def test_layers_of_a_compiled_model_are_called_as_before_it_was_compiled():
    eager, compiled = network(), torch.compile(network(), backend="aot_eager")
    bare, optimizer = (wrap(torch.optim.SGD(m.parameters(), lr=0.1), m, [BNP()]) for m in (eager, compiled))
    for step in range(3):
        x, y = data(step)
        for model, opt in ((eager, bare), (compiled, optimizer)):
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
    assert_close(flat(list(compiled.parameters())), flat(list(eager.parameters())))
    P = load_preconditioner(eager, optimizer.state_dict())
    v = torch.ones(sum(p.numel() for p in eager.parameters()))
    assert_close(P.apply(v), bare.preconditioner().apply(v))
    bare.load_state_dict(optimizer.state_dict())


def test_a_compiled_pass_whose_step_a_scaler_skips_counts_nothing():
    model, x = build("linear", True)
    optimizer = wrapped(model, [BNP(decay=0.0)], lr=0.0)
    forward = torch.compile(model, backend="aot_eager", fullgraph=True)
    (forward(100 * x) ** 3).mean().backward()
    optimizer.zero_grad()  # and no step
    for part in (x[:2], x[2:]):
        (forward(part) ** 3).mean().backward()
    optimizer.step()
    assert state(optimizer, "0")["rows"] == 6
    assert_close(state(optimizer, "0")["mean"], x.mean(0))


def test_a_compiled_layer_that_is_unfrozen_joins():
    model = network()
    model[0].requires_grad_(False)
    optimizer = wrapped(model, [BNP()], lr=0.1)
    forward = torch.compile(model, backend="aot_eager")
    for step in range(4):
        model[0].requires_grad_(step > 1)
        optimizer.zero_grad()
        forward(data(step)[0]).square().sum().backward()
        optimizer.step()
    assert state(optimizer, "0")["steps"] == 2
    assert state(optimizer, "2")["steps"] == 4


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, where dynamo traces SGD
def test_a_compiled_step_is_the_eager_step():
    eager, compiled = network(), network()
    expected = train(eager, wrapped(eager, [BNP(), GradientCentralization()], lr=0.1), 6)
    optimizer = wrapped(compiled, [BNP(), GradientCentralization()], lr=0.1)
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(optimizer.step, backend=counter)
    compiled_by = []
    for i in range(6):
        x, y = data(i)
        optimizer.zero_grad()
        F.cross_entropy(compiled(x), y).backward()
        step()
        compiled_by.append(counter.frame_count)
    assert_close(flat([p.detach() for p in compiled.parameters()]), expected)
    assert compiled_by[1:] == [compiled_by[1]] * 5  # nothing is compiled again from step to step


@pytest.mark.parametrize("forward", ["grad", "vmap", "functional_call"])
def test_function_transforms_of_a_hooked_model_work_and_count_nothing(forward):
    model, x = build("linear", True)
    optimizer = wrapped(model, [BNP(decay=0.0)], lr=0.0)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, row):
        return torch.func.functional_call(model, parameters, (100 * row,)).square().sum()

    if forward == "grad":
        torch.func.grad(loss)(parameters, x)
    elif forward == "vmap":
        torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    else:
        loss({k: v.clone().requires_grad_() for k, v in parameters.items()}, x).backward()
    backward(model, x)
    optimizer.step()
    assert_close(state(optimizer, "0")["mean"], x.mean(0))
    assert state(optimizer, "0")["rows"] == 6


@pytest.mark.parametrize("how", ["replaced", "in place"])
def test_per_sample_gradients_are_conditioned_by_a_pass_over_other_inputs(how):
    model, x = build("linear", True)
    optimizer = wrapped(model, [BNP(decay=0.0, scale=None)], lr=0.1)
    public = torch.randn(4, x.shape[1]) + 1

    def loss(parameters, row):
        return torch.func.functional_call(model, parameters, (row,)).pow(3).sum()

    model(public).sum().backward()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for name, p in model.named_parameters():
        clipped = per_sample[name].clamp(-1, 1).mean(0)
        if how == "replaced":
            p.grad = clipped.clone()
        else:
            p.grad.copy_(clipped)
    expected = flat([per_sample[name].clamp(-1, 1).mean(0) for name in parameters])
    optimizer.step()
    assert_close(state(optimizer, "0")["mean"], public.mean(0))
    assert state(optimizer, "0")["rows"] == 4
    assert_close(flat([p.grad for p in model.parameters()]), optimizer.preconditioner().apply(expected))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("way", ["export", "strict export", "trace"])
def test_a_model_exported_in_training_mode_is_the_bare_model_and_trains_on(way):
    hooked, bare = network(), network()
    optimizers = [wrapped(model, [BNP()], lr=0.1) for model in (hooked, bare)]
    x, y = data()

    def nodes(model):
        if way == "trace":
            return [node.kind() for node in torch.jit.trace(model, x).inlined_graph.nodes()]
        return [str(n.target) for n in torch.export.export(model, (x,), strict=way != "export").graph.nodes]

    for step in range(3):
        for model, optimizer in zip((hooked, bare), optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        if step == 1:
            assert nodes(hooked) == nodes(network())
    assert torch.equal(flat(list(hooked.parameters())), flat(list(bare.parameters())))
