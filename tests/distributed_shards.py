"""Shards: FSDP2, whose parameters and gradients are DTensors, uneven ones and empty ones among them."""

import copy

import torch
from distributed_helpers import (
    CHAINS,
    STEPS,
    WORLD,
    alone,
    assert_same,
    backward,
    build,
    data,
    local_parameters,
    scenario,
    sgd,
    shard,
    train,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from gradcond import SGLD, wrap


def sharded(make=build, each_layer=False, **options):
    model = make()
    if each_layer:
        for module in model:
            if list(module.parameters()):
                fully_shard(module, **options)
    return fully_shard(model, **options)


def linear():
    torch.manual_seed(3)
    return nn.Linear(72, 8), nn.Tanh(), nn.Linear(8, 4, bias=False), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 1)


@scenario
def fsdp2_equals_one_process():
    for chain, each_layer in [*((chain, False) for chain in CHAINS), ("bnp", True), ("ws", True)]:
        model, reference = sharded(each_layer=each_layer), alone(chain)
        optimizer = wrap(sgd(model.parameters()), model, CHAINS[chain]())
        train(model, optimizer)
        assert_same(f"FSDP2 {chain}", model, optimizer, reference)
        with torch.no_grad():
            model(data(0)[0])  # leaves the root's parameters gathered
        assert optimizer.state_dict()["gradcond"]["layers"] == reference[1].state_dict()["gradcond"]["layers"]
        assert optimizer.report().conditioned == reference[1].report().conditioned


def accumulate(model, optimizer, alone=False):
    """Two backward passes per step, onto the conditioned gradients of the steps before."""
    for step in range(STEPS):
        x, y = data(step) if alone else shard(step)
        for part, last in ((slice(2), False), (slice(2, None), True)):
            if not alone:
                model.set_requires_gradient_sync(last)
            backward(model, x[part], y[part], 1 if alone else WORLD)
        optimizer.step()


@scenario
def fsdp2_accumulates_and_shards_other_axes():
    def make():
        return nn.Sequential(nn.Flatten(), *linear())

    other_dtype = MixedPrecisionPolicy(reduce_dtype=torch.float32)  # what is not reduced yet lies elsewhere
    for options in (
        *({}, {"each_layer": True}, {"shard_placement_fn": lambda p: Shard(p.dim() - 1)}),
        {"mp_policy": other_dtype},
    ):
        for chain in ("bnp", "ws"):
            model, single = sharded(make, **options), make()
            optimizer = wrap(sgd(model.parameters()), model, CHAINS[chain]())
            reference = wrap(sgd(single.parameters()), single, CHAINS[chain](), process_group=False)
            accumulate(model, optimizer)
            accumulate(single, reference, alone=True)
            if "mp_policy" in options:
                assert_same("FSDP2 float32 accumulation", model, optimizer, (single, reference), 1e-5)
            else:
                assert_same("FSDP2 accumulation", model, optimizer, (single, reference))


@scenario
def fsdp2_keeps_statistics_in_float32_under_mixed_precision():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(lambda: nn.Sequential(nn.Flatten(), *linear()).float(), mp_policy=policy)
    optimizer = wrap(sgd(model.parameters()), model, CHAINS["bnp"]())
    x, y = (t.float() for t in shard(0))
    backward(model, x, y, WORLD)
    optimizer.step()
    state = optimizer._engine.states[0]["1"]
    rows = data(0)[0].float().bfloat16().flatten(1).double()
    assert state["mean"].dtype == state["variance"].dtype == torch.float32
    assert_close(state["mean"].double(), rows.mean(0), rtol=1e-6, atol=1e-6)
    assert_close(state["variance"].double(), rows.var(0, correction=0), rtol=1e-5, atol=1e-6)


@scenario
def tensor_parallelism_equals_one_process():
    """All ranks see the same rows: those of one process."""

    def make():
        torch.manual_seed(3)
        return nn.Sequential(nn.Flatten(), nn.Linear(72, 8), nn.Tanh(), nn.Linear(8, 1))

    mesh = init_device_mesh("cpu", (WORLD,))
    for chain in ("bnp", "gc-both", "ws", "bnp+gc+damping+clipping"):
        model, single = parallelize_module(make(), mesh, {"1": ColwiseParallel(), "3": RowwiseParallel()}), make()
        optimizer, reference = (
            wrap(sgd(m.parameters()), m, CHAINS[chain](), process_group=False) for m in (model, single)
        )
        train(model, optimizer, alone=True)
        train(single, reference, alone=True)
        assert_same(f"tensor parallelism {chain}", model, optimizer, (single, reference))


@scenario
def noise_is_that_of_one_process():
    def sgld(model):
        return SGLD(model.parameters(), lr=1e-4, generator=torch.Generator().manual_seed(7))

    single = build()
    reference = wrap(sgld(single), single, CHAINS["bnp"](), process_group=False)
    train(single, reference, alone=True)
    for make in (DistributedDataParallel, fully_shard):
        model = make(build())
        optimizer = wrap(sgld(model), model, CHAINS["bnp"]())
        train(model, optimizer)
        assert_same("SGLD", model, optimizer, (single, reference))


@scenario
def a_step_of_zero_gradients_changes_nothing():
    torch.manual_seed(1)
    for chain in CHAINS:
        model = sharded()
        optimizer = wrap(sgd(model.parameters()), model, CHAINS[chain]())
        before = copy.deepcopy(local_parameters(model))
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()
        assert all(torch.equal(a, b) for a, b in zip(before, local_parameters(model), strict=True)), chain
        assert not any(optimizer._engine.states)
        train(model, optimizer)
        assert_same("zero gradients", model, optimizer, alone(chain))
