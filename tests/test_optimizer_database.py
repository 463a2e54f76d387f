"""Every optimizer and option of torch's own database: the wrapper is bit-equal to the bare optimizer."""

import copy
import gc
import io
import pickle
import warnings
from dataclasses import dataclass
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from cases import flat
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_optimizers import OptimizerInfo, optim_db

from gradcond import BNP, ConditionedOptimizer, Conditioner, wrap


@dataclass
class Identity(Conditioner):
    """Conditions every layer with M = I."""

    def row_map(self, layer, state):
        return None


def bare(optimizer, model):
    return optimizer


def empty(optimizer, model):
    return wrap(optimizer, model, [])


def identity(optimizer, model):
    return wrap(optimizer, model, [Identity()])


PAIRS = [(empty, empty), (empty, bare), (bare, empty), (identity, identity), (identity, bare), (bare, identity)]


@dataclass(frozen=True)
class Config:
    """One way of building one optimizer, such as "Adam: amsgrad & fused"."""

    info: OptimizerInfo
    options: dict
    name: str

    def build(self, model):
        """The bare optimizer over the parameters of a model that it can train."""
        if self.info.only_supports_sparse_grads:
            return self.info.optim_cls(model[0].parameters(), **copy.deepcopy(self.options))
        try:
            return self.info.optim_cls(model.parameters(), **copy.deepcopy(self.options))
        except ValueError as error:
            assert "2D" in str(error)  # Muon
            matrices = [p for p in model.parameters() if p.dim() == 2]
            return self.info.optim_cls(matrices, **copy.deepcopy(self.options))

    @property
    def may_refuse(self):
        """May the bare optimizer raise, on CPU (capturable) and for leaves (differentiable)?"""
        return bool(self.options.get("capturable") or self.options.get("differentiable"))


def configurations():
    for info in optim_db:
        impls = [i for i in info.supported_impls if i != "fused" or "cpu" in info.supports_fused_on]
        # the inputs for a GPU are those for the CPU and the capturable ones
        for given, flag in product(info.optim_inputs_func(device="cuda"), [None, *impls]):
            name = f"{info.optim_cls.__name__}: {given.desc}" + (f" & {flag}" if flag else "")
            yield Config(info, {**given.kwargs, **({flag: True} if flag else {})}, name)


CONFIGS = {config.name: config for config in configurations()}
PLAIN = [name for name, config in CONFIGS.items() if not config.may_refuse]
DIFFERENTIABLE = [f"{name} & differentiable" for name in PLAIN if f"{name} & differentiable" in CONFIGS]
DEFAULTS = [name for name in PLAIN if name.endswith(": default")]


def network(config, dtype=torch.float64):
    torch.manual_seed(0)
    first = nn.Embedding(7, 4, sparse=True) if config.info.only_supports_sparse_grads else nn.Linear(5, 4)
    return nn.Sequential(first, nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def evaluation(model, optimizer, step):
    generator = torch.Generator().manual_seed(step)
    first = model[0].weight
    y = torch.randint(3, (6,), generator=generator)
    if isinstance(model[0], nn.Embedding):
        x = torch.randint(7, (6,), generator=generator)
    else:
        x = 2 + torch.randn(6, 5, generator=generator, dtype=torch.float64).to(first.dtype)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def train(config, model, optimizer, steps, closure=False):
    """Trains the model for the steps of a range and returns its parameters and the last loss."""
    for step in steps:
        evaluate = evaluation(model, optimizer, step)
        if closure or config.info.step_requires_closure:
            loss = optimizer.step(evaluate)
        else:
            loss = evaluate()
            assert optimizer.step() is None
    return torch.cat([flat([p.detach() for p in model.parameters()]), loss.detach().reshape(1)])


def reload(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed(config, dtype, first, second):
    """Two steps with the first kind of optimizer; two more from its checkpoint with the second kind."""
    model = network(config, dtype)
    optimizer = first(config.build(model), model)
    train(config, model, optimizer, range(2))
    saved = reload({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    model = network(config, dtype)
    model.load_state_dict(saved["model"])
    optimizer = second(config.build(model), model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.load_state_dict(saved["optimizer"])
    expected = ["statistics start anew"] if (first, second) == (bare, identity) else []
    assert len(caught) == len(expected)
    assert all(text in str(w.message) for text, w in zip(expected, caught, strict=True))
    return train(config, model, optimizer, range(2, 4))


def outcome(config, run, *args):
    """What a run gives, or the kind and the text of the error that a refusing configuration raises."""
    if not config.may_refuse:
        return run(*args)
    try:
        return run(*args)
    except (AssertionError, RuntimeError) as error:
        return type(error), str(error)


def assert_same(result, expected):
    if isinstance(expected, torch.Tensor):
        assert isinstance(result, torch.Tensor), result
        assert expected.isfinite().all()
        assert torch.equal(result, expected)
    else:
        assert result == expected


def test_the_comparison_can_fail():
    with pytest.raises(AssertionError):
        assert_same(torch.ones(2), torch.tensor([1.0, 1.0 + 1e-15]))
    with pytest.raises(AssertionError):
        assert_same((RuntimeError, "a"), torch.ones(2))


def test_the_database_is_all_of_torch():
    classes = {
        c for c in vars(torch.optim).values() if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)
    }
    assert {info.optim_cls for info in optim_db} == classes - {torch.optim.Optimizer}
    assert {CONFIGS[name].info.optim_cls for name in DEFAULTS} == classes - {torch.optim.Optimizer}
    assert any("fused" in name for name in PLAIN)
    assert any("foreach" in name for name in PLAIN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_is_bit_equal_through_saving_and_loading(name, dtype):
    config = CONFIGS[name]
    expected = outcome(config, resumed, config, dtype, bare, bare)
    for first, second in PAIRS:
        if not (identity in (first, second) and config.options.get("differentiable")):  # wrap refuses, see below
            assert_same(outcome(config, resumed, config, dtype, first, second), expected)


@pytest.mark.parametrize("kind", [empty, identity])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", PLAIN)
def test_copies_do_what_those_of_the_bare_optimizer_do(name, how, kind):
    config = CONFIGS[name]

    def copied(kind):
        model = network(config)
        optimizer = kind(config.build(model), model)
        train(config, model, optimizer, range(2))
        pair = (model, optimizer)
        other, twin = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
        assert type(twin) is type(optimizer)
        try:
            return train(config, other, twin, range(2, 4))
        except AttributeError as error:
            assert config.info.step_requires_closure  # LBFGS forgets its parameters
            return str(error)

    assert_same(copied(kind), copied(bare))


@pytest.mark.parametrize("name", PLAIN)
def test_closures_are_what_they_are_for_the_bare_optimizer(name):
    config = CONFIGS[name]

    def closed(kind):
        model = network(config)
        return train(config, model, kind(config.build(model), model), range(3), closure=True)

    expected = closed(bare)
    assert_same(closed(empty), expected)
    assert_same(closed(identity), expected)


@pytest.mark.parametrize("name", [n for n in PLAIN if not CONFIGS[n].info.step_requires_closure])
def test_a_closure_is_conditioned_as_a_plain_step_is(name):
    config = CONFIGS[name]

    def run(closure, chain):
        model = network(config)
        optimizer = wrap(config.build(model), model, chain)
        return train(config, model, optimizer, range(3), closure=closure)

    conditioned = run(True, [BNP()])
    assert_same(conditioned, run(False, [BNP()]))
    if not config.info.only_supports_sparse_grads:  # nothing to condition
        assert not torch.equal(conditioned, run(True, []))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_differentiable_steps_are_differentiated_through_the_empty_wrapper(name):
    config = CONFIGS[name]
    model = network(config)
    with pytest.raises(ValueError, match="expected an optimizer with differentiable=False"):
        wrap(config.build(model), model, [Identity()])

    def derivatives(kind):
        generator = torch.Generator().manual_seed(0)
        start, grad = torch.rand(2, 5, generator=generator, dtype=torch.float64).requires_grad_().unbind()
        p = start.clone()
        p.grad = grad
        optimizer = kind(config.info.optim_cls([p, *model.parameters()], **copy.deepcopy(config.options)), model)
        optimizer.step()
        return torch.cat(
            [p, *torch.autograd.grad(p.square().sum(), [start, grad], materialize_grads=True)]
        ).detach()

    assert_same(derivatives(empty), derivatives(bare))


@pytest.mark.parametrize(
    "info",
    [i for i in optim_db if i.supports_sparse or i.only_supports_sparse_grads],
    ids=lambda i: i.optim_cls.__name__,
)
def test_sparse_gradients_pass_through_and_are_reported(info):
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Linear(4, 3))
    held = model[0] if info.only_supports_sparse_grads else model
    optimizer = wrap(info.optim_cls(held.parameters(), lr=0.1), model, [BNP()])
    model(torch.tensor([1, 2, 2])).square().sum().backward()
    sparse, dense = model[0].weight.grad, model[1].weight.grad.clone()
    values = sparse.coalesce().values().clone()
    with torch.sparse.check_sparse_tensor_invariants():  # Adagrad warns when left to choose
        optimizer.step()
    assert model[0].weight.grad is sparse
    assert torch.equal(sparse.coalesce().values(), values)
    assert "0.weight" in optimizer.report().left_alone
    assert torch.equal(model[1].weight.grad, dense) == (held is not model)


def test_a_sparse_gradient_of_a_dense_layer_passes_through():
    model = nn.Sequential(nn.Linear(4, 7), nn.Linear(4, 7))
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, [BNP()])
    x = F.embedding(torch.tensor([1, 2, 2]), model[0].weight, sparse=True)
    model[1](x).square().sum().backward()
    sparse, dense = model[0].weight.grad, model[1].weight.grad.clone()
    values = sparse.coalesce().values().clone()
    optimizer.step()
    assert model[0].weight.grad is sparse
    assert torch.equal(sparse.coalesce().values(), values)
    assert "no statistics yet" in str(optimizer.report().conditioned["0"])
    assert not torch.equal(model[1].weight.grad, dense)


def test_complex_layers_pass_through_and_are_reported():
    model = nn.Sequential(nn.Linear(3, 2, dtype=torch.complex128))
    optimizer = wrap(torch.optim.Adam(model.parameters()), model, [BNP()])
    model(torch.randn(4, 3, dtype=torch.complex128)).abs().sum().backward()
    before = model[0].weight.grad.clone()
    optimizer.step()
    assert torch.equal(model[0].weight.grad, before)
    assert "complex" in optimizer.report().left_alone["0.weight"]


HOOKS = {
    "register_step_pre_hook": [{}, {}],
    "register_step_post_hook": [{}, {}],
    "register_state_dict_pre_hook": [{}, {"prepend": True}],
    "register_state_dict_post_hook": [{}, {"prepend": True}],
    "register_load_state_dict_pre_hook": [{}, {"prepend": True}],
    "register_load_state_dict_post_hook": [{}, {"prepend": True}],
}


def test_the_table_of_hooks_is_all_of_torch():
    assert HOOKS.keys() == {n for n in dir(torch.optim.Optimizer) if n.startswith("register_") and "hook" in n}


@pytest.mark.parametrize("before", [True, False], ids=["before wrapping", "after wrapping"])
@pytest.mark.parametrize("name", DEFAULTS)
def test_hooks_run_once_and_in_the_order_of_the_bare_optimizer(name, before):
    config = CONFIGS[name]

    def recorded(kind):
        calls = []
        model = network(config)
        inner = config.build(model)
        optimizer = inner if before else kind(inner, model)
        for hook, places in HOOKS.items():
            for place in places:
                note = f"{hook} {place}"
                getattr(optimizer, hook)(lambda o, *_, n=note: calls.append((n, type(o).__name__)), **place)
        optimizer = kind(inner, model) if before else optimizer
        handles = [
            register_optimizer_step_pre_hook(lambda *_: calls.append("every pre")),
            register_optimizer_step_post_hook(lambda *_: calls.append("every post")),
        ]
        train(config, model, optimizer, range(2))
        train(config, model, optimizer, range(1), closure=True)
        optimizer.load_state_dict(optimizer.state_dict())
        train(config, model, optimizer, range(1))
        for handle in handles:
            handle.remove()
        return calls

    expected = recorded(bare)
    assert len(expected) == 4 * 6 + 8
    assert recorded(empty) == expected
    assert recorded(identity) == expected


def test_nothing_is_left_behind_by_many_steps():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=1e-3), model, [BNP()])
    x = torch.randn(4, 2)

    def alive(steps):
        for _ in range(steps):
            model(x)  # never backpropagated
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        gc.collect()
        tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
        hooks = [len(m._forward_hooks) for m in model.modules()]
        tables = [t for p in model.parameters() for t in (p._backward_hooks, p._post_accumulate_grad_hooks)]
        return tensors, hooks, [len(table or ()) for table in tables]

    assert isinstance(optimizer, ConditionedOptimizer)
    assert alive(5) == alive(1000)
