"""Which rows count: those that made the gradient of a step, each once, whatever else was computed on the way."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from cases import backward, build, flat, wrapped
from test_optimizer import data, network
from torch import nn
from torch.testing import assert_close

from gradcond import BNP, NormClipping


def test_rows_that_are_backpropagated_twice_count_once():
    model, x = build("linear", True)
    optimizer = wrapped(model, [BNP(decay=0.0)], lr=0.0)
    loss = (model(x) ** 3).mean()
    loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()
    assert optimizer._engine.states[0]["0"]["rows"] == 6


@pytest.mark.parametrize("how", ["thrown away", "added", "put together", "of the step before"])
@pytest.mark.parametrize("chain", [[BNP(decay=0.0)], [BNP(decay=0.0), NormClipping()]], ids=len)
def test_rows_of_a_graph_that_is_kept_make_its_next_gradient_too(how, chain):
    model, x = build("linear", True)
    optimizer = wrapped(model, chain, lr=0.0)
    y = model(x)
    for _ in range(2 if how == "of the step before" else 1):  # the second one may be taken at one go
        y[:, 0].sum().backward(retain_graph=True)
        if how == "of the step before":
            optimizer.step()
    first = [p.grad.clone() for p in model.parameters()]
    optimizer.zero_grad()
    model(10 * x[:1]).sum().backward()  # another pass, of a gradient that nobody wants
    optimizer.zero_grad(set_to_none=False)
    (y[:, 1] ** 2).sum().backward()
    if how in ("added", "put together"):
        for p, g in zip(model.parameters(), first, strict=True):
            p.grad = p.grad.add_(g) if how == "added" else p.grad + g
    optimizer.step()
    rows = torch.cat([x, 10 * x[:1]]) if how == "put together" else x  # of all gradients that may be in it
    state = optimizer._engine.states[0]["0"]
    assert_close((state["mean"], state["variance"]), (rows.mean(0), rows.var(0, correction=0)))
    assert state["rows"] == len(rows)


def test_a_copied_model_does_not_feed_the_statistics():
    model, x = build("linear", True)
    optimizer = wrapped(model, [BNP(decay=0.0)], lr=0.0)
    average = copy.deepcopy(model)
    pickle.loads(pickle.dumps(model))
    backward(model, x)
    backward(average, 100 * x)
    optimizer.step()
    assert_close(optimizer._engine.states[0]["0"]["mean"], x.mean(0))


def test_a_shared_module_sees_all_its_calls():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    optimizer = wrapped(model, [BNP(decay=0.0)], lr=0.0)
    x = torch.randn(6, 4) + 1
    backward(model, x)
    optimizer.step()
    rows = torch.cat([x, torch.tanh(layer(x)).detach()])
    state = optimizer._engine.states[0]["0"]
    assert_close(state["mean"], rows.mean(0))
    assert_close(state["variance"], rows.var(0, correction=0))
    assert state["rows"] == 12


@pytest.mark.parametrize(
    "what",
    [
        "gradient of the input",
        "Hessian",
        "Hessian forward",
        "gradient returned",
        "functional call",
        "functional call of parameters",
    ],
)
def test_derivatives_that_leave_no_gradient_do_not_count(what):
    from gradcond.curvature import Hessian

    model, x = build("linear", True)
    optimizer = wrapped(model, [BNP(decay=0.0)], lr=0.0)

    def elsewhere():
        y = (100 * x).requires_grad_()
        if what == "gradient of the input":
            torch.autograd.grad((model(y) ** 3).mean(), y)
        elif what == "gradient returned":
            torch.autograd.grad((model(y) ** 3).mean(), list(model.parameters()))
        elif what.startswith("functional call"):
            kind = nn.Parameter if what.endswith("parameters") else torch.Tensor.requires_grad_
            others = {name: kind(p.detach().clone()) for name, p in model.named_parameters()}
            (torch.func.functional_call(model, others, y) ** 3).mean().backward()
        else:
            method = "forward_over_reverse" if what == "Hessian forward" else "double_backward"
            H = Hessian(model, nn.MSELoss(), [(y.detach(), torch.zeros(6, 4))], method=method)
            H @ torch.ones(H.shape[0])

    elsewhere()
    backward(model, x)
    elsewhere()
    optimizer.step()
    state = optimizer._engine.states[0]["0"]
    assert state["rows"] == 6
    assert_close(state["mean"], x.mean(0))


def test_other_parameters_in_the_place_of_the_model_s_count_nothing():
    model, x = build("linear", True)
    optimizer = wrapped(model, [BNP(decay=0.0)], lr=0.0)
    others = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
    y = model(x)
    (y.sum() + torch.func.functional_call(model, others, 9 + x).sum()).backward()
    optimizer.step()
    state = optimizer._engine.states[0]["0"]
    assert state["rows"] == 6
    assert_close(state["mean"], x.mean(0))


@pytest.mark.parametrize("penalty_first", [True, False])
@pytest.mark.parametrize("order", [1, 2])
def test_rows_of_a_penalty_on_derivatives_count_whenever_it_was_computed(penalty_first, order):
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    optimizer = wrapped(model, [BNP(decay=0.0)], lr=0.0)
    x, boundary = torch.randn(7, 3, dtype=torch.double, requires_grad=True), 9 + torch.randn(4, 3).double()

    def penalty():
        slopes = model(x).sum()
        for _ in range(order):
            (slopes,) = torch.autograd.grad(slopes.sum(), x, create_graph=True)
        return slopes.square().sum()

    terms = [penalty, lambda: model(boundary).sum()]
    sum(term() for term in (terms if penalty_first else reversed(terms))).backward()
    optimizer.step()
    rows = torch.cat([x.detach(), boundary])
    first, last = (optimizer._engine.states[0][name] for name in "02")
    assert first["rows"] == last["rows"] == 11
    assert_close(first["mean"], rows.mean(0))
    assert_close(last["mean"], model[:2](rows).mean(0).detach())


@pytest.mark.parametrize("method", ["double_backward", "forward_over_reverse"])
def test_a_curvature_product_between_forward_and_backward_counts_nothing(method):
    from gradcond.curvature import Hessian

    model, x = build("linear", True)
    optimizer = wrapped(model, [BNP(decay=0.0)], lr=0.0)
    H = Hessian(model, nn.MSELoss(), [(100 * x, torch.zeros(6, 4, dtype=x.dtype))], method=method)
    loss = (model(x) ** 3).mean()
    H @ torch.ones(H.shape[0], dtype=H.dtype)
    loss.backward()
    optimizer.step()
    state = optimizer._engine.states[0]["0"]
    assert state["rows"] == 6
    assert_close(state["mean"], x.mean(0))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_counts_rows_once(reentrant):
    from torch.utils.checkpoint import checkpoint

    model = network()
    optimizer = wrapped(model, [BNP(decay=0.0)], lr=0.0)
    x = data()[0].requires_grad_()
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    optimizer.step()
    state = optimizer._engine.states[0]["0"]
    assert state["rows"] == 16
    assert_close(state["mean"], x.detach().mean(0))


def test_a_gradient_without_a_forward_pass_goes_through_with_one_warning():
    model, x = build("linear", True)
    optimizer = wrapped(model, [BNP()], lr=0.0)
    (F.linear(x, model[0].weight, model[0].bias) ** 3).mean().backward()
    raw = flat([p.grad.clone() for p in model.parameters()])
    with pytest.warns(UserWarning, match="none of its inputs were seen"):
        optimizer.step()
    assert torch.equal(flat([p.grad for p in model.parameters()]), raw)
    model.zero_grad()
    (F.linear(x, model[0].weight, model[0].bias) ** 3).mean().backward()
    optimizer.step()  # no second warning: warnings are errors here


def test_keyword_calls_and_in_place_activations_are_seen():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True))
    optimizer = wrapped(model, [BNP(decay=0.0)], lr=0.0)
    x = torch.randn(8, 4)
    model[1](model[0](input=x)).sum().backward()
    optimizer.step()
    assert_close(optimizer._engine.states[0]["0"]["mean"], x.mean(0))


def test_empty_batches_do_no_harm():
    model, x = build("conv2d", True)
    optimizer = wrapped(model, [BNP(decay=0.0)], lr=0.0)
    (model(x).square().sum() + model(x[:0]).sum()).backward()
    optimizer.step()
    assert_close(optimizer._engine.states[0]["0"]["mean"], x.mean((0, 2, 3)))
