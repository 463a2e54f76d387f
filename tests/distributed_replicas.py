"""Replicas: DistributedDataParallel and ZeroRedundancyOptimizer, unequal shards, groups, what is not finite."""

import copy
import functools
import warnings

import torch
import torch.distributed as dist
from distributed_helpers import (
    BATCH,
    CHAINS,
    RANK,
    STEPS,
    WORLD,
    adam,
    alone,
    assert_same,
    backward,
    build,
    data,
    raises,
    scenario,
    sgd,
    shard,
    train,
)
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from gradcond import BNP, SGLD, attach, unit_variance_init_, wrap


@scenario
def ddp_on_unequal_shards_equals_one_process():
    for chain, as_view in [("bnp", True), *((chain, False) for chain in CHAINS)]:
        model = DistributedDataParallel(build(), gradient_as_bucket_view=as_view)
        optimizer = wrap(sgd(model.parameters()), model, CHAINS[chain]())
        train(model, optimizer)
        assert_same("DDP", model, optimizer, alone(chain))
    assert optimizer._engine.states[0]["0"]["rows"] == BATCH * 36
    assert "0" in optimizer.state_dict()["gradcond"]["layers"]  # not module.0


@scenario
def one_all_reduce_per_step_serves_all_layers():
    model = DistributedDataParallel(build())
    optimizer = wrap(sgd(model.parameters()), model, CHAINS["bnp"]())
    calls, all_reduce = [], dist.all_reduce

    def counted(tensor, *args, **kwargs):
        calls.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    train(model, optimizer)
    dist.all_reduce = all_reduce
    assert len(calls) == STEPS and len(set(calls)) == 1, calls


@scenario
def closures_and_attach_equal_one_process():
    model = DistributedDataParallel(build())
    optimizer = wrap(sgd(model.parameters()), model, CHAINS["bnp"]())
    train(model, optimizer, closure=True)
    assert_same("closure", model, optimizer, alone("bnp"))
    model = DistributedDataParallel(build())
    optimizer = sgd(model.parameters())
    handle = attach(optimizer, model, CHAINS["bnp"]())
    train(model, optimizer)
    assert_same("attach", model, handle, alone("bnp"))


@scenario
def a_large_mean_leaves_the_variance_its_digits():
    """The sums are taken around the running mean, which the first step does not know yet."""
    model = DistributedDataParallel(nn.Linear(3, 1, dtype=torch.float64))
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.0), model, [BNP(decay=0.0)])
    for step, tolerance in enumerate((1e-2, 1e-8, 1e-8)):
        x = 1e4 + 1e-2 * torch.randn(
            4 * WORLD, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64
        )
        optimizer.zero_grad()
        model(x[RANK::WORLD]).sum().backward()
        optimizer.step()
        variance = optimizer._engine.states[0][""]["variance"]
        torch.testing.assert_close(variance, x.var(0, correction=0), rtol=tolerance, atol=0)


@scenario
def an_empty_chain_does_not_wait_for_others():
    model = build()
    optimizer = wrap(sgd(model.parameters()), model, [])
    if RANK == 0:
        optimizer.step(lambda: backward(model, *data(0)))


@scenario
def gradient_accumulation_equals_one_process():
    model = DistributedDataParallel(build())
    optimizer = wrap(sgd(model.parameters()), model, CHAINS["bnp"]())
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = shard(step)
        with model.no_sync():
            backward(model, x[:2], y[:2], WORLD)
        backward(model, x[2:], y[2:], WORLD)
        optimizer.step()
    assert_same("accumulation", model, optimizer, alone("bnp"))


@scenario
def compiled_passes_add_up_and_are_thrown_away():
    """Nobody sees one begin; views of buckets are built anew after the first step."""

    def make():
        torch.manual_seed(2)
        return nn.Sequential(nn.Flatten(), nn.Linear(72, 3), nn.Tanh(), nn.Linear(3, 1))

    model, single = DistributedDataParallel(make(), gradient_as_bucket_view=True), make()
    optimizer = wrap(sgd(model.parameters()), model, CHAINS["bnp"]())
    reference = wrap(sgd(single.parameters()), single, CHAINS["bnp"](), process_group=False)
    compiled = torch.compile(model, backend="eager", dynamic=False)
    for step in range(STEPS):
        x, y = data(step)
        for part in range(2):
            own = slice(2 * RANK + part, 2 * RANK + part + 1)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # dynamo's own
                backward(compiled, x[own], y[own], WORLD)
        backward(single, x[: 2 * WORLD], y[: 2 * WORLD])
        if step != 1:
            optimizer.step()
            reference.step()
        optimizer.zero_grad()
        reference.zero_grad()
    assert_same("compiled", model, optimizer, (single, reference))


@scenario
def rows_of_gradients_that_were_thrown_away_do_not_count():
    """As those of a step that a gradient scaler skips: here of every other one."""
    for make in (
        DistributedDataParallel,
        functools.partial(DistributedDataParallel, gradient_as_bucket_view=True),
        fully_shard,
    ):
        model, single = make(build()), build()
        optimizer = wrap(sgd(model.parameters()), model, CHAINS["bnp"]())
        reference = wrap(sgd(single.parameters()), single, CHAINS["bnp"](), process_group=False)
        for step in range(STEPS):
            backward(model, *shard(step), WORLD)
            backward(single, *data(step))
            if step % 2:
                optimizer.step()
                reference.step()
            optimizer.zero_grad()
            reference.zero_grad()
        assert_same("thrown away", model, optimizer, (single, reference))


@scenario
def process_groups_choose_who_reduces():
    x, y = data(0)
    for group, rows in ((False, [RANK + 1] * WORLD), (dist.new_group([0, 1]), [3, 3, 3, 4])):
        model = nn.Sequential(nn.Linear(72, 1))
        if group and RANK > 1:
            with raises(TypeError, "process_group"):  # this rank is no member
                wrap(sgd(model.parameters()), model, [], process_group=group)
            continue
        optimizer = wrap(sgd(model.parameters()), model, CHAINS["bnp"](), process_group=group)
        n = RANK + 1
        backward(model, x[:n].flatten(1), y[:n])
        optimizer.step()
        assert optimizer._engine.states[0]["0"]["rows"] == rows[RANK], optimizer._engine.states
        copied = copy.deepcopy((model, optimizer))[1]
        assert copied._engine.ranks.process_group is group
    with raises(TypeError, "process_group", "'gloo'"):
        wrap(sgd(model.parameters()), model, [], process_group="gloo")


@scenario
def what_is_not_finite_raises_on_every_rank():
    for where in ("gradient", "input", "loss"):
        model = build()
        optimizer = wrap(sgd(model.parameters()), model, CHAINS["bnp"]())
        train(model, optimizer, range(1))
        before = copy.deepcopy([list(model.parameters()), optimizer._engine.states])
        x, y = data(1)
        optimizer.zero_grad()

        def closure(x=x, y=y, where=where, model=model):
            return backward(model, x, y) * (torch.nan if where == "loss" and RANK == 0 else 1.0)

        closure()
        if RANK == 0 and where == "gradient":
            model[0].weight.grad[0, 0, 0, 0] = torch.inf
        if RANK == 0 and where == "input":
            optimizer._engine.captures["0"].collected.variance[0] = torch.nan
        words = {"gradient": "0.weight", "input": "input of 0", "loss": "nan"}[where]
        with raises(ValueError, "expected", *([words] if RANK == 0 else [])):
            optimizer.step(closure if where == "loss" else None)
        after = [list(model.parameters()), optimizer._engine.states]
        assert str(before) == str(after)


@scenario
def a_model_in_batch_norm_is_known_on_ranks_without_rows():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4))
    optimizer = wrap(sgd(model.parameters()), model, CHAINS["bnp"]())
    if RANK == 0:
        (model(torch.randn(8, 3)) ** 3).sum().backward()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer._engine.states[0]["0"]["feeds_batch_norm"] is True
    assert optimizer._engine.states[0]["0"]["rows"] == 8


@scenario
def zero_redundancy_equals_plain_ddp():
    for chain in ("bnp", "ws"):
        model = DistributedDataParallel(build())
        base = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=1e-2)
        optimizer = wrap(base, model, CHAINS[chain]())
        train(model, optimizer)
        plain = DistributedDataParallel(build())
        reference = wrap(adam(plain.parameters()), plain, CHAINS[chain]())
        train(plain, reference)
        assert_same("ZeRO", model, optimizer, (plain, reference))
        optimizer.consolidate_state_dict(to=0)
        if RANK == 0:
            state = optimizer.state_dict()
            other = build()
            again = wrap(adam(other.parameters()), other, CHAINS[chain](), process_group=False)
            again.load_state_dict(state)


@scenario
def refused_models_say_what_to_do():
    model = FullyShardedDataParallel(nn.Sequential(nn.Linear(4, 4)), device_id=torch.device("cpu"))
    with raises(TypeError, "FSDP1", "fully_shard"):
        wrap(sgd(model.parameters()), model, [BNP()])
    for make in (DistributedDataParallel, fully_shard):
        with raises(TypeError, "before DistributedDataParallel or fully_shard"):
            unit_variance_init_(make(nn.Sequential(nn.Linear(4, 4))), torch.randn(5, 4))
    model = nn.Linear(4, 4)
    base = ZeroRedundancyOptimizer(model.parameters(), SGLD, lr=1e-3)
    with raises(ValueError, "expected SGLD itself", "ZeroRedundancyOptimizer"):
        wrap(base, model, [BNP()])
    model = nn.DataParallel(nn.Linear(4, 4))
    with raises(TypeError, "nn.DataParallel", "DistributedDataParallel"):
        wrap(sgd(model.parameters()), model, [BNP()])
