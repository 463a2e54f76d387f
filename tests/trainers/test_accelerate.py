"""Accelerate wraps the wrapper again, and loads its state into itself when it prepares it."""

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from loops import BATCHES, CHAINS, assert_same, loader, network, optimizer_and_scheduler, plain


@pytest.fixture(autouse=True)
def fresh_state():
    """Accelerate keeps its settings in singletons."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Run:
    """A model, an optimizer, a scheduler and a loader as `Accelerator.prepare` returns them."""

    def __init__(self, chain, accumulate=1, **options):
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate, **options)
        model = network()
        optimizer, scheduler = optimizer_and_scheduler(model, CHAINS[chain]())
        self.wrapped = optimizer
        prepared = self.accelerator.prepare(model, optimizer, loader(), scheduler)
        self.model, self.optimizer, self.loader, self.scheduler = prepared

    def train(self, epochs=1, clip=None):
        self.model.train()
        for _ in range(epochs):
            for x, y in self.loader:
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(F.cross_entropy(self.model(x), y))
                    if clip is not None and self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
        return self.accelerator.unwrap_model(self.model), self.wrapped


@pytest.mark.parametrize("chain", CHAINS)
def test_equals_the_plain_loop(chain):
    assert_same(Run(chain).train(epochs=2), plain(chain))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_accumulation_and_clipping_equal_the_plain_loop(accumulate, clip):
    actual = Run("bnp", accumulate).train(epochs=2, clip=clip)
    assert_same(actual, plain("bnp", accumulate=accumulate, clip=clip))


@pytest.mark.parametrize("chain", CHAINS)
def test_resumed_from_its_saved_state_equals_uninterrupted(tmp_path, chain):
    first = Run(chain)
    first.train()
    first.accelerator.save_state(tmp_path)
    second = Run(chain)
    second.accelerator.load_state(tmp_path)
    assert_same(second.train(), first.train(), rtol=0, atol=0)


def test_bfloat16_autocast_equals_the_plain_loop_under_autocast():
    model = network()
    optimizer, scheduler = optimizer_and_scheduler(model, CHAINS["bnp"]())
    for x, y in list(loader()) * 2:
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x)
        F.cross_entropy(output.float(), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    actual = Run("bnp", mixed_precision="bf16").train(epochs=2)
    assert_same(actual, (model, optimizer))
    assert actual[1]._engine.states[0]["0"]["steps"] == 2 * BATCHES
