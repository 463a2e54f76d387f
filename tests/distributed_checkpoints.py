"""Checkpoints by torch.distributed.checkpoint, read on another number of processes than they were saved on."""

import copy

import torch
import torch.distributed.checkpoint as dcp
from distributed_helpers import (
    CHAINS,
    FOLDER,
    WORLD,
    adam,
    alone,
    assert_same,
    build,
    local_parameters,
    scenario,
    sgd,
    train,
)
from distributed_shards import sharded
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

from gradcond import attach, wrap


def plain(parameters):
    """Nothing in its state: torch's functions step it once, on zero gradients, to find that out."""
    return torch.optim.SGD(parameters, lr=1e-3)


KINDS = [("bnp", sgd), ("bnp", adam), ("ws", plain)]
START = {2: 0, 4: 2, 1: 4}[WORLD]  # saved by 2 processes at step 2, by 4 at step 4, read by one


def entries(model, optimizer, handle=None):
    """The three entries of a checkpoint; the last one is gradcond's own."""
    parameters, state = get_state_dict(model, optimizer)
    return {"model": parameters, "optimizer": state, "gradcond": (handle or optimizer).conditioning}


@scenario
def checkpoints_go_on_as_if_nothing_had_happened():
    for chain, base in KINDS:
        for engine in ("fsdp", "ddp"):
            name = f"{FOLDER}/{engine}-{chain}-{base.__name__}"
            model = build() if WORLD == 1 else sharded() if engine == "fsdp" else DistributedDataParallel(build())
            optimizer = wrap(base(model.parameters()), model, CHAINS[chain]())
            if START:
                with torch.no_grad():  # to be overwritten
                    for p in local_parameters(model):
                        p *= 3
                state = entries(model, optimizer)
                assert not any(optimizer._engine.states), "a step that was none has left statistics"
                dcp.load(state, checkpoint_id=f"{name}-{START}")
                set_state_dict(
                    model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
                )
                assert_same("checkpoint", model, optimizer, alone(chain, base, range(START)))
            train(model, optimizer, range(START, START + 2))
            if WORLD > 1:
                dcp.save(entries(model, optimizer), checkpoint_id=f"{name}-{START + 2}")
            optimizer.zero_grad()
            before = copy.deepcopy([local_parameters(model), optimizer._engine.states])
            entries(model, optimizer)  # without gradients: a step of nothing, where the state is empty
            assert str(before) == str([local_parameters(model), optimizer._engine.states])
            assert_same("checkpoint", model, optimizer, alone(chain, base, range(START + 2)))


@scenario
def an_attachment_is_saved_and_loaded_too():
    for step in (0, 2) if WORLD > 1 else ():
        model = sharded()
        optimizer = adam(model.parameters())
        handle = attach(optimizer, model, CHAINS["bnp"]())
        name = f"{FOLDER}/attached-{WORLD}"
        if step:
            state = entries(model, optimizer, handle)
            dcp.load(state, checkpoint_id=name)
            set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        train(model, optimizer, range(step, step + 2))
        assert_same("attached", model, handle, alone("bnp", adam, range(step + 2)))
        if not step:
            dcp.save(entries(model, optimizer, handle), checkpoint_id=name)
