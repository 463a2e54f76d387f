"""The problem that every trainer is given, the plain loop that it must equal, and the comparison of the two."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import gradcond
from gradcond import BNP, MeanShiftRejection, WeightStandardization

BATCHES, BATCH_SIZE = 8, 6  # of one epoch

CHAINS = {
    "bnp": lambda: [BNP(decay=0.8)],
    "bnp+msr+ws": lambda: [BNP(decay=0.8), MeanShiftRejection(), WeightStandardization()],
    "none": lambda: [],
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Dropout(0.0), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 3)
    )


def dataset():
    """Inputs whose channels are far from mean 0 and variance 1."""
    generator = torch.Generator().manual_seed(1)
    n = BATCHES * BATCH_SIZE
    x = torch.randn(n, 2, 6, generator=generator) * torch.tensor([[1.0], [2.0]]) + torch.tensor([[1.0], [-2.0]])
    return torch.utils.data.TensorDataset(x, torch.randint(0, 3, (n,), generator=generator))


def loader():
    return torch.utils.data.DataLoader(dataset(), batch_size=BATCH_SIZE)


def optimizer_and_scheduler(model, conditioners, lr=0.05):
    base = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-3)
    optimizer = gradcond.wrap(base, model, conditioners)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)


def train(model, optimizer, scheduler, batches, *, loss=None, accumulate=1, clip=None):
    """The loop that people write by hand: the scheduler steps after each optimizer step."""
    loss = loss or (lambda batch: F.cross_entropy(model(batch[0]), batch[1]))
    model.train()
    for i, batch in enumerate(batches, 1):
        (loss(batch) / accumulate).backward()
        if i % accumulate == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()


def plain(chain, *, epochs=2, **options):
    """A model and its optimizer after the hand-written loop."""
    model = network()
    optimizer, scheduler = optimizer_and_scheduler(model, CHAINS[chain]())
    train(model, optimizer, scheduler, list(loader()) * epochs, **options)
    return model, optimizer


def assert_same(actual, expected, **tolerance):
    """Two pairs (model, optimizer) agree: parameters, momentum, rates, and gradcond's statistics.

    The names of the layers may differ by a prefix, where a trainer's module holds the model.
    """
    for (model, optimizer), (other, twin) in [(actual, expected)]:
        assert_close(list(model.parameters()), list(other.parameters()), **tolerance)
        state, saved = optimizer.state_dict(), twin.state_dict()
        assert_close(state["state"], saved["state"], **tolerance)
        rates, others = ([group["lr"] for group in s["param_groups"]] for s in (state, saved))
        assert rates == others
        statistics, others = (_statistics(s["gradcond"]) for s in (state, saved))
        assert len(statistics) == len(others)
        assert_close(statistics, others, **tolerance)


def _statistics(state):
    """Every number that the chain keeps, in the order of the layers."""
    layers = [layer for entry in state["chain"] for layer in entry["layers"].values()]
    return [value for layer in layers for _, value in sorted(layer.items())]
