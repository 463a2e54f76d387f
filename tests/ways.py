"""Ways to take a step, ordinary and not: what is done faster where it can be must be the same in all of them."""

import copy

import torch
from torch import nn
from torch.utils._pytree import tree_leaves


def network(bias=True, dtype=None):
    torch.manual_seed(0)
    layers = nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 5, bias=bias), nn.ReLU(), nn.Linear(5, 2)
    return nn.Sequential(*layers).to(dtype)


def said_by(kind, monkeypatch):
    """What the calls of its `step_` have returned, from now on."""
    said, step_ = [], kind.step_

    def told(self, *args):
        said.append(step_(self, *args))
        return said[-1]

    monkeypatch.setattr(kind, "step_", told)
    return said


def assert_same(one, other):
    one, other = tree_leaves(one), tree_leaves(other)
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def batch(t, rows=4):
    return torch.randn(rows, 12, generator=torch.Generator().manual_seed(t)) * 2 + 1


def ordinary(model, optimizer, t):
    model(batch(t)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def batches_of_changing_size(model, optimizer, t):
    model(batch(t, rows=1 + t % 3 * 6)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def accumulated_and_clipped(model, optimizer, t):
    for i in range(3):
        (model(batch(10 * t + i)).square().mean() / 3).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


def by_closure(model, optimizer, t):
    def closure():
        optimizer.zero_grad()
        loss = model(batch(t)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)


def put_together_by_the_caller(model, optimizer, t):
    parts = []
    for i in range(2):
        optimizer.zero_grad()
        model(batch(10 * t + i)).square().mean().backward()
        parts.append([p.grad for p in model.parameters()])
    for p, one, other in zip(model.parameters(), *parts, strict=True):
        p.grad = one + other
    optimizer.step()
    optimizer.zero_grad()


def stepped_twice(model, optimizer, t):
    model(batch(t)).square().mean().backward()
    optimizer.step()
    optimizer.step()  # with the gradients that are conditioned already
    optimizer.zero_grad()


def stepped_twice_with_one_buffer(model, optimizer, t):
    model(batch(t)).square().mean().backward()
    own = [p for p in model.parameters() if p.grad is not None]
    parts = torch.cat([p.grad.flatten() for p in own]).split([p.numel() for p in own])
    for p, part in zip(own, parts, strict=True):
        p.grad = part.view(p.shape)  # views of one tensor, whose versions are the same
    optimizer.step()
    optimizer.step()
    optimizer.zero_grad()


def a_layer_left_out_now_and_then(model, optimizer, t):
    output = model(batch(t)) if t % 2 else model[:3](batch(t))
    output.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def the_first_layer_last_of_all(model, optimizer, t):
    output = model(batch(t)) if t > 1 else model[2:](batch(t)[:, :5])
    output.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def sparse_now_and_then(model, optimizer, t):
    model(batch(t)).square().mean().backward()
    weight = next(model.parameters())
    if t % 3 == 2:
        weight.grad = weight.grad.to_sparse()
    optimizer.step()
    optimizer.zero_grad()


def frozen_now_and_then(model, optimizer, t):
    model[2].bias.requires_grad_(t % 2 == 1)
    ordinary(model, optimizer, t)


def saved_and_loaded(model, optimizer, t):
    ordinary(model, optimizer, t)
    if t == 4:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def started_over(model, optimizer, t):
    ordinary(model, optimizer, t)
    if t == 4:
        optimizer.load_state_dict(optimizer.fresh)


def settings_that_change(model, optimizer, t):
    optimizer.conditioners[0].eps_rel = 0.01 * (1 + t % 3)
    optimizer.conditioners[0].decay = 0.9 - 0.1 * (t % 2)
    optimizer.conditioners[-1].strength = t % 3  # of no meaning to BNP
    optimizer.conditioners[-1].floor = 0.01 * (t % 2)
    optimizer.param_groups[0]["lr"] = 0.01 * t
    ordinary(model, optimizer, t)


WAYS = [
    ordinary,
    batches_of_changing_size,
    accumulated_and_clipped,
    by_closure,
    put_together_by_the_caller,
    stepped_twice,
    stepped_twice_with_one_buffer,
    a_layer_left_out_now_and_then,
    the_first_layer_last_of_all,
    sparse_now_and_then,
    frozen_now_and_then,
    saved_and_loaded,
    started_over,
    settings_that_change,
]
