"""Data-parallel training with torch's own DistributedDataParallel, and proof that it equals one process.

    torchrun --nproc_per_node=2 examples/distributed.py

Every process takes its share of each batch of scikit-learn's digits, of unequal size; gradcond brings the input
statistics of all of them together. At the end each trains the same network alone, on the whole batches, and the
two are compared, in float64.
"""

import argparse
import os
import sys
from collections.abc import Sequence

import digits
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gradcond

BATCH = 31  # odd: no two shares are equal


def train(model: nn.Module, lr: float, steps: int, rank: int, world: int) -> gradcond.ConditionedOptimizer:
    """Trains on this process's share of every batch; a world of one has them whole."""
    x, y, _, _ = digits.split()
    optimizer = gradcond.wrap(
        torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9),
        model,
        [gradcond.BNP()],
        process_group=None if world > 1 else False,
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = torch.randperm(len(x), generator=generator)[:BATCH]
        share = batch.tensor_split(world)[rank]
        optimizer.zero_grad()
        losses = nn.functional.cross_entropy(model(x[share].double()), y[share], reduction="sum")
        (losses * world / BATCH).backward()  # DDP takes the mean over processes: this makes it that over rows
        optimizer.step()
    return optimizer


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """On the test images."""
    _, _, x, y = digits.split()
    return (model(x.double()).argmax(1) == y).double().mean().item()


def flat(model: nn.Module) -> Tensor:
    """All parameters in one vector."""
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def main(argv: Sequence[str] | None = None) -> int:
    """Trains twice and compares; returns the exit status."""
    parser = argparse.ArgumentParser(description="Training on several processes that equals training on one.")
    parser.add_argument("--lr", type=float, default=0.3, help="learning rate")
    parser.add_argument("--steps", type=int, default=100, help="training steps")
    args = parser.parse_args(argv)
    if "RANK" not in os.environ:
        parser.error("expected to be started by torchrun: torchrun --nproc_per_node=2 examples/distributed.py")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)
    model, single = digits.build_model().double(), digits.build_model().double()
    single.load_state_dict(model.state_dict())
    optimizer = train(DistributedDataParallel(model), args.lr, args.steps, rank, world)
    train(single, args.lr, args.steps, 0, 1)

    difference = (flat(model) - flat(single)).abs().max()
    dist.all_reduce(difference, op=dist.ReduceOp.MAX)
    if rank == 0:
        print(optimizer.report())
        print(f"test accuracy: {accuracy(model):.1%} on {world} processes, {accuracy(single):.1%} on one")
        print(f"largest difference of a parameter, any process: {difference:.1e}")
    dist.destroy_process_group()
    return int(difference > 1e-6)


if __name__ == "__main__":
    sys.exit(main())
