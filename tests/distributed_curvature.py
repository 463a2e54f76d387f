"""What each of several processes asserts, run by torchrun: their shards together are the data of one."""

import os
import sys

import torch
from torch import nn
from torch.testing import assert_close

from gradcond import curvature

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist = torch.distributed
OPERATORS = {
    "hessian": curvature.Hessian,
    "ggn": curvature.GGN,
    "empirical": curvature.EmpiricalFisher,
}


def build() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 4))


def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Seven uneven batches, with targets that are ignored."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for rows in (5, 1, 8, 3, 9, 2, 4):
        target = torch.randint(0, 4, (rows,), generator=generator)
        target[rows // 2] = 1
        target[0] = -100 if rows > 1 else 2
        batches.append((torch.randn(rows, 5, generator=generator), target))
    return batches


def shard() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Unequal: the first process has nothing, the last most of the batches."""
    sizes = {2: [0, 7], 3: [0, 2, 5], 4: [0, 1, 4, 2]}[WORLD]
    start = sum(sizes[:RANK])
    return data()[start : start + sizes[RANK]]


def pair(kind: str, loss=None, **options):
    """The operator of this process's shard, and that of one process with all data."""
    model, loss = build(), loss or nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 3.0]))
    together = OPERATORS[kind](model, loss, shard(), **options)
    return together, OPERATORS[kind](model, loss, data(), process_group=False, **options)


def same_everywhere(tensor: torch.Tensor) -> None:
    everyone = [torch.empty_like(tensor) for _ in range(WORLD)]
    dist.all_gather(everyone, tensor.contiguous())
    assert all(torch.equal(other, tensor) for other in everyone)


def products_equal_those_of_one_process():
    for kind in OPERATORS:
        for method in ("double_backward", "forward_over_reverse"):
            together, alone = pair(kind, method=method)
            dense = alone.to_dense()
            assert_close(together.to_dense(), dense, rtol=0, atol=1e-12 * float(dense.abs().max()))
            assert_close(together.loss(), alone.loss(), rtol=1e-12, atol=0)
            assert_close(together.gradient(), alone.gradient(), rtol=0, atol=1e-12)


def sums_and_weights_are_added_up_too():
    together, alone = pair("hessian", nn.CrossEntropyLoss(reduction="sum"))
    v = torch.linspace(-1, 1, together.shape[0])
    assert_close(together @ v, alone @ v, rtol=0, atol=1e-11)
    plain = lambda output, target: nn.functional.cross_entropy(output, target, reduction="sum")  # noqa: E731
    together, alone = pair("hessian", plain, weight_fn=lambda batch: len(batch[1]) ** 0.5)
    assert_close(together @ v, alone @ v, rtol=0, atol=1e-11)


def every_estimate_is_that_of_one_process():
    together, alone = pair("ggn", method="double_backward")
    for estimate in (
        lambda A: curvature.eigsh(A, 3).eigenvalues,
        lambda A: curvature.spectral_density(A, 20, 2).nodes,
        lambda A: curvature.trace(A, 10).estimate,
        lambda A: torch.tensor(curvature.condition_number(A).lambda_max),
    ):
        own = estimate(together)
        same_everywhere(own)
        assert_close(own, estimate(alone), rtol=1e-9, atol=1e-9)


def one_all_reduce_a_product():
    together, _ = pair("hessian")
    v = torch.ones(together.shape[0])
    together @ v  # the first one also asks whether the processes agree
    calls, original = [], dist.all_reduce
    dist.all_reduce = lambda tensor, **options: (calls.append(tensor.numel()), original(tensor, **options))[1]
    try:
        together @ v
    finally:
        dist.all_reduce = original
    assert len(calls) == 1 and calls[0] <= together.shape[0] + 4


def an_error_on_one_process_ends_all():
    model, batches = build(), data()[RANK : RANK + 1]
    if RANK == 1:
        batches[0][0][0] = torch.nan
    H = curvature.Hessian(model, nn.CrossEntropyLoss(), batches)
    try:
        H @ torch.ones(H.shape[0])
    except ValueError as error:
        assert RANK == 1 and "finite loss" in str(error)
    except RuntimeError as error:
        assert RANK != 1 and "on 1 other processes" in str(error)
    else:
        raise AssertionError("no error")


def different_parameters_are_refused():
    model = build()
    if RANK == 0:
        with torch.no_grad():
            model[0].weight += 1
    H = curvature.Hessian(model, nn.CrossEntropyLoss(), data()[:1])
    try:
        H @ torch.ones(H.shape[0])
    except ValueError as error:
        assert "same parameters on every process" in str(error)
    else:
        raise AssertionError("no error")


def uneven_batches_of_unknown_weight_are_refused():
    batches = [data()[RANK]]  # even on each process, uneven over all
    H = curvature.Hessian(build(), lambda output, target: nn.functional.cross_entropy(output, target), batches)
    try:
        H @ torch.ones(H.shape[0])
    except ValueError as error:
        assert "uneven batches" in str(error)
    else:
        raise AssertionError("no error")


def no_data_anywhere_is_told():
    H = curvature.Hessian(build(), nn.CrossEntropyLoss(), [])
    try:
        H @ torch.ones(H.shape[0])
    except ValueError as error:
        assert "at least one batch" in str(error)
    else:
        raise AssertionError("no error")


SCENARIOS = [
    products_equal_those_of_one_process,
    sums_and_weights_are_added_up_too,
    every_estimate_is_that_of_one_process,
    one_all_reduce_a_product,
    an_error_on_one_process_ends_all,
    different_parameters_are_refused,
    uneven_batches_of_unknown_weight_are_refused,
    no_data_anywhere_is_told,
]

if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    chosen = sys.argv[1:]
    for scenario in SCENARIOS:
        if not chosen or scenario.__name__ in chosen:
            scenario()
            dist.barrier()
            if RANK == 0:
                print(f"PASS {scenario.__name__}", flush=True)
    dist.destroy_process_group()
    if RANK == 0:
        print(f"all scenarios passed on {WORLD} processes")
