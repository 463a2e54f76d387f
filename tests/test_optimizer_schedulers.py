"""Every scheduler of torch moves a wrapped optimizer as it moves the bare one."""

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from cases import flat
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from gradcond import wrap
from gradcond.conditioner import Conditioner


@dataclass
class Identity(Conditioner):
    """Conditions every layer with M = I; it has no settings."""

    def settings(self):
        return {}

    def row_map(self, layer, state):
        return None


def chained(optimizer):
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(optimizer, 0.9), lr_scheduler.StepLR(optimizer, 2)], optimizer
    )


def sequential(optimizer):
    warm_up = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    decay = lr_scheduler.ExponentialLR(optimizer, 0.8)
    return lr_scheduler.SequentialLR(optimizer, [warm_up, decay], milestones=[3])


SCHEDULERS = {
    lr_scheduler.LambdaLR: lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    lr_scheduler.MultiplicativeLR: lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    lr_scheduler.StepLR: lambda o: lr_scheduler.StepLR(o, 2),
    lr_scheduler.MultiStepLR: lambda o: lr_scheduler.MultiStepLR(o, [1, 3, 5]),
    lr_scheduler.ConstantLR: lambda o: lr_scheduler.ConstantLR(o, 0.5, total_iters=3),
    lr_scheduler.LinearLR: lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=5),
    lr_scheduler.ExponentialLR: lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    lr_scheduler.SequentialLR: sequential,
    lr_scheduler.PolynomialLR: lambda o: lr_scheduler.PolynomialLR(o, total_iters=9, power=2.0),
    lr_scheduler.CosineAnnealingLR: lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    lr_scheduler.ChainedScheduler: chained,
    lr_scheduler.ReduceLROnPlateau: lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    lr_scheduler.CyclicLR: lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    lr_scheduler.CosineAnnealingWarmRestarts: lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    lr_scheduler.OneCycleLR: lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
    SWALR: lambda o: SWALR(o, swa_lr=0.01, anneal_epochs=3),
}
BASES = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "tensor-lr": lambda p: torch.optim.SGD(p, lr=torch.tensor(0.05), momentum=0.9),
    "betas": lambda p: torch.optim.AdamW(p, lr=0.05),
    "betas-tensor-lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.05)),
}
MOVED = ("lr", "momentum", "betas")


def on_bare(base, model, make):
    return base, make(base)


def on_wrapper(base, model, make):
    optimizer = wrap(base, model, [Identity()])
    return optimizer, make(optimizer)


def on_base_before_wrapping(base, model, make):
    schedule = make(base)
    return wrap(base, model, [Identity()]), schedule


def build(base, scheduler, where):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "weight_decay": 0.1}]
    return model, *where(BASES[base](groups), model, SCHEDULERS[scheduler])


def train(model, optimizer, schedule, steps):
    """Trains and returns all that a schedule moves, as plain numbers, with the parameters."""
    seen = []
    for step in steps:
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(5) % 2).backward()
        optimizer.step()
        schedule.step(*[1.0] if isinstance(schedule, lr_scheduler.ReduceLROnPlateau) else [])
        seen += [copy.deepcopy([group.get(key) for key in MOVED]) for group in optimizer.param_groups]
        seen.append(flat([p.detach() for p in model.parameters()]).tolist())
    return seen


def run(base, scheduler, where):
    """Four steps, a load of everything into new objects, five more."""
    first = build(base, scheduler, where)
    seen = train(*first, range(4))
    second = build(base, scheduler, where)
    for new, old in zip(second, first, strict=True):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    return seen + train(*second, range(4, 9))


def test_the_table_of_schedulers_is_all_of_torch():
    classes = {
        c for c in vars(lr_scheduler).values() if isinstance(c, type) and issubclass(c, lr_scheduler.LRScheduler)
    }
    assert SCHEDULERS.keys() == classes - {lr_scheduler.LRScheduler, lr_scheduler._LRScheduler} | {SWALR}


@pytest.mark.parametrize("where", [on_wrapper, on_base_before_wrapping])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda c: c.__name__)
def test_schedules_are_those_of_the_bare_optimizer(scheduler, base, where):
    expected = run(base, scheduler, on_bare)
    assert len({str(moved) for moved in expected[::3]}) > 1  # something is moved
    assert run(base, scheduler, where) == expected
