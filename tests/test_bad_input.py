"""Bad input to the library: one clear error that names what was expected, what came and what to do."""

import copy

import pytest
import torch
from cases import backward, build, flat, wrapped
from torch import nn

from gradcond import BNP, Conditioner, GradientCentralization, WeightStandardization, load_preconditioner, wrap


def model_and_optimizer():
    model = nn.Linear(3, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            lambda m, o: (m, m, []),
            TypeError,
            "expected a torch.optim.Optimizer, got Linear.*build the optimizer",
        ),
        (lambda m, o: (torch.optim.SGD, m, []), TypeError, "got the class SGD"),
        (lambda m, o: (o, o, []), TypeError, "expected a torch.nn.Module as model, got SGD"),
        (
            lambda m, o: (wrap(o, m, []), m, []),
            TypeError,
            "got a wrapped one; put all conditioners in one list",
        ),
        (
            lambda m, o: (o, m, BNP()),
            TypeError,
            r"expected a list of conditioners, such as \[BNP\(\)\], got BNP",
        ),
        (lambda m, o: (o, m, "bnp"), TypeError, "expected a list of conditioners"),
        (
            lambda m, o: (o, m, ["bnp"]),
            TypeError,
            "unknown conditioner: expected instances of .*'BNP'.*got str 'bnp'",
        ),
        (lambda m, o: (o, m, [BNP]), TypeError, "unknown conditioner: .*got the class BNP"),
        (
            lambda m, o: (o, nn.Linear(3, 2), []),
            ValueError,
            "none of the model's 2; build it from model.parameters",
        ),
    ],
)
def test_wrap_refuses(arguments, error, message):
    model, optimizer = model_and_optimizer()
    with pytest.raises(error, match=message):
        wrap(*arguments(model, optimizer))
    assert not model._forward_hooks


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_wrap_refuses_a_parameter_twice():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD([model.weight, model.weight, model.bias], lr=0.1)
    with pytest.raises(ValueError, match="expected every parameter once, but the optimizer holds 'weight' twice"):
        wrap(optimizer, model, [BNP()])


@pytest.mark.parametrize("only", ["0", ["0"]], ids=["name", "list"])
def test_wrap_refuses_names_in_place_of_a_predicate(only):
    model, optimizer = model_and_optimizer()
    with pytest.raises(TypeError, match="only to be a function of a layer's name, such as lambda"):
        wrap(optimizer, model, [BNP()], only=only)


def test_taps_that_change_after_wrap_are_refused_and_nothing_moves():
    model, x = build("conv2d", True)
    optimizer = wrapped(model, [BNP()], lr=0.1)
    backward(model, x)
    optimizer.step()
    before = flat(list(model.parameters()))
    optimizer.conditioners[0].taps = True
    with pytest.raises(ValueError, match="expected taps=False, as it was when the optimizer was wrapped, got True"):
        optimizer.step()
    assert torch.equal(flat(list(model.parameters())), before)
    optimizer.conditioners[0].taps = False
    wrapped(model, [BNP()], lr=0.1).load_state_dict(optimizer.state_dict())


def test_wrap_refuses_a_method_that_is_no_dataclass(monkeypatch):
    monkeypatch.setattr(Conditioner, "registry", dict(Conditioner.registry))

    class Plain(Conditioner):
        def row_map(self, layer, state):
            return None

    model, optimizer = model_and_optimizer()
    with pytest.raises(TypeError, match=r"dataclasses, whose fields .* got the class Plain; decorate it"):
        wrap(optimizer, model, [Plain()])


def test_wrap_refuses_a_differentiable_optimizer():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, differentiable=True)
    with pytest.raises(ValueError, match="expected an optimizer with differentiable=False"):
        wrap(optimizer, model, [BNP()])


@pytest.mark.parametrize("where", ["gradient", "input"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("chain", [[BNP()], [GradientCentralization()], [WeightStandardization()]])
def test_what_is_not_finite_is_refused_and_changes_nothing(chain, value, where):
    model, x = build("conv2d", True)
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model, copy.deepcopy(chain))
    twin_model, twin = copy.deepcopy((model, optimizer))

    bad = x.clone()
    if where == "input":
        bad[0, 0, 0, 0] = value
    model.zero_grad()
    model(bad).mean().backward()
    if where == "gradient":
        model[0].weight.grad[0, 0, 0, 0] = value
    before = flat([p.detach() for p in model.parameters()])
    with pytest.raises(
        ValueError, match=r"expected finite gradients, got nan or inf in .*0.*Lower the learning rate"
    ):
        optimizer.step()
    assert torch.equal(flat([p.detach() for p in model.parameters()]), before)
    assert not optimizer.state

    for m, o in ((model, optimizer), (twin_model, twin)):  # and the next step is as if it had not been
        backward(m, 0.1 * x)
        o.step()
    assert torch.equal(flat(list(model.parameters())), flat(list(twin_model.parameters())))
    assert str(optimizer.state_dict()) == str(twin.state_dict())


def test_a_closure_whose_loss_is_not_finite_is_refused():
    model, optimizer = model_and_optimizer()
    optimizer = wrap(optimizer, model, [BNP()])
    before = model.weight.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(4, 3)).sum() * float("nan")
        loss.backward()
        return loss

    with pytest.raises(ValueError, match="expected a finite loss from the closure, got nan"):
        optimizer.step(closure)
    assert torch.equal(model.weight, before)


def saved(chain):
    model, x = build("linear", True)
    optimizer = wrapped(model, chain)
    backward(model, x)
    optimizer.step()
    return copy.deepcopy(optimizer.state_dict())


def change(state, path, value):
    *parents, last = path
    for key in parents:
        state = state[key]
    state[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("gradcond", "format"), 99, "expected a gradcond state of format 1, got 99"),
        (
            ("gradcond", "chain", 0, "name"),
            "GC",
            r"is of the chain \['GC'\], this optimizer has \['BNP'\]; wrap",
        ),
        (("gradcond", "layers"), {"7": True}, "holds layer '7', which this model does not have"),
        (("gradcond", "chain", 0, "settings", "decay"), 1.5, r"BNP: decay must be in \[0, 1\), got 1.5"),
        (("gradcond", "chain", 0, "settings", "decoy"), 0.5, "BNP has no hyper-parameter 'decoy'; it has"),
        (
            ("gradcond", "chain", 0, "layers", "0", "mean"),
            torch.zeros(1),
            r"BNP: mean of layer '0' must have shape \(5,\), got \(1,\)",
        ),
    ],
)
def test_a_state_of_another_chain_or_model_is_refused_and_changes_nothing(path, value, message):
    state = saved([BNP()])
    change(state, path, value)
    state["param_groups"][0]["lr"] = 123.0
    model, x = build("linear", True)
    optimizer = wrapped(model, [BNP()])
    backward(model, x)
    optimizer.step()
    before = str(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert str(optimizer.state_dict()) == before


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"state": {}, "param_groups": []},
            r"entry 'gradcond', got the keys \['param_groups', 'state'\]; save",
        ),
        (
            {
                "gradcond": {
                    "format": 1,
                    "layers": {},
                    "chain": [{"name": "os.system", "settings": {}, "layers": {}}],
                }
            },
            "unknown conditioner 'os.system'; known are .*'BNP'",
        ),
        ({"gradcond": {"format": 1, "layers": {"9": True}, "chain": []}}, "holds layer '9'"),
    ],
)
def test_load_preconditioner_refuses(state, message):
    with pytest.raises(ValueError, match=message):
        load_preconditioner(nn.Linear(2, 2), state)


def test_a_preconditioner_needs_the_parameters_it_was_made_for():
    state = saved([BNP()])
    model, _ = build("linear", True)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="layer '0' was conditioned while it was trained, and is frozen now"):
        load_preconditioner(model, state)
