"""What the scenarios share: a network with every kind of layer, uneven shards, one process to compare with."""

import contextlib
import functools
import os
import sys

import torch
from torch import nn
from torch.testing import assert_close

from gradcond import (
    BNP,
    GradientCentralization,
    MeanShiftRejection,
    NormClipping,
    RateDamping,
    WeightCentralization,
    WeightStandardization,
    wrap,
)

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
FOLDER = sys.argv[1]
STEPS, BATCH = 4, 13
CHAINS = {
    "bnp": lambda: [BNP(decay=0.5)],
    "gc": lambda: [GradientCentralization()],
    "gc-both": lambda: [GradientCentralization(side="both")],
    "msr": lambda: [MeanShiftRejection()],
    "ws": lambda: [WeightStandardization()],
    "wc": lambda: [WeightCentralization()],
    "bnp+msr": lambda: [BNP(decay=0.5), MeanShiftRejection()],
    "clipping": lambda: [NormClipping(ratio=0.8, decay=0.5)],
    "bnp+gc+damping+clipping": lambda: [
        *[BNP(decay=0.5), GradientCentralization(), RateDamping(strength=1e6)],
        NormClipping(ratio=0.8, decay=0.5),
    ],
}
LARGEST: dict[str, float] = {}  # the largest difference from one process, by what is compared
SCENARIOS = []


def scenario(function):
    """Registers a scenario: it asserts by itself, on every rank."""
    SCENARIOS.append(function)
    return function


def build() -> nn.Sequential:
    """Every kind of layer: uneven on 2 and 4 ranks, some with fewer rows than ranks, rows that are not local."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(5, 6, 3, bias=False),
        nn.BatchNorm2d(6, momentum=0.0).eval(),
        nn.ConvTranspose2d(6, 4, 2),
        nn.Tanh(),
        nn.Conv2d(4, 6, 2, groups=2),
        nn.Flatten(),
        nn.Linear(6 * 16, 3, bias=False),
        nn.Tanh(),
        nn.Linear(3, 1),
    )


def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(BATCH, 2, 6, 6, generator=generator) * torch.tensor([0.3, 3.0]).view(2, 1, 1)
    return x + torch.tensor([2.0, -1.0]).view(2, 1, 1), torch.randn(BATCH, 1, generator=generator)


def shard(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's rows: 3 of 13, 10 of 13; 1, 3, 4, 5 of 13; on odd steps the first rank has none."""
    sizes = {1: [13], 2: [3, 10], 4: [1, 3, 4, 5]}[WORLD]
    if step % 2 and WORLD > 1:
        sizes = [0, sizes[0] + sizes[1], *sizes[2:]]
    x, y = data(step)
    return x.split(sizes)[RANK], y.split(sizes)[RANK]


def backward(model: nn.Module, x: torch.Tensor, y: torch.Tensor, ranks: int = 1) -> torch.Tensor:
    """Weighted so that the mean over ranks, which DDP and FSDP take, is the mean over the batch's rows."""
    loss = (model(x) - y).square().sum() * ranks / BATCH
    loss.backward()
    return loss.detach()


def train(model, optimizer, steps=range(STEPS), alone=False, closure=False):
    for step in steps:
        x, y = data(step) if alone else shard(step)

        def evaluate(x=x, y=y):
            optimizer.zero_grad()
            return backward(model, x, y, 1 if alone else WORLD)

        if closure:
            optimizer.step(evaluate)
        else:
            evaluate()
            optimizer.step()


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-2)


@functools.cache
def alone(chain, base=sgd, steps=range(STEPS), make=build, **options):
    """What one process does, on every rank by itself."""
    model = make()
    optimizer = wrap(base(model.parameters()), model, CHAINS[chain](), process_group=False)
    train(model, optimizer, steps, alone=True, **options)
    return model, optimizer


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local_parameters(model):
    return [(p.to_local() if hasattr(p, "to_local") else p).detach() for p in model.parameters()]


def assert_same(where, model, optimizer, expected, tolerance=1e-12):
    """Parameters, statistics and M are those of one process."""
    other, single = expected
    pairs = [(whole(a).detach(), b.detach()) for a, b in zip(model.parameters(), other.parameters(), strict=True)]
    engines = optimizer._engine, single._engine
    states, others = ([*engine.states, dict(enumerate(engine.network))] for engine in engines)
    for state, reference in zip(states, others, strict=True):
        assert state.keys() == reference.keys()
        for layer in state:
            for key, value in state[layer].items():
                if key.startswith("_"):  # is computed again
                    continue
                if isinstance(value, torch.Tensor):
                    assert value.dtype == reference[layer][key].dtype
                    pairs.append((value, reference[layer][key]))
                else:
                    assert value == reference[layer][key], (layer, key, value, reference[layer][key])
    v = torch.linspace(-1.0, 1.0, single.preconditioner().shape[0])
    pairs.append((optimizer.preconditioner().apply(v), single.preconditioner().apply(v)))
    for a, b in pairs:
        LARGEST[where] = max(LARGEST.get(where, 0.0), (a - b).abs().max().item())
        assert_close(a, b, rtol=tolerance, atol=tolerance)


@contextlib.contextmanager
def raises(kind, *words):
    try:
        yield
    except kind as error:
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError(f"expected {kind.__name__}")
