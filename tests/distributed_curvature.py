"""What each of several processes asserts, run by torchrun: their shards together are the data of one."""

import os
import sys
import time

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close

from gradcond import curvature

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist = torch.distributed
OPERATORS = {
    "hessian": curvature.Hessian,
    "ggn": curvature.GGN,
    "empirical": curvature.EmpiricalFisher,
    "monte carlo": curvature.MonteCarloFisher,
}
F = nn.functional


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


def same_products(together, alone) -> None:
    V = torch.randn(together.shape[0], 6, generator=torch.Generator().manual_seed(2))
    exact = alone @ V
    assert_close(together @ V, exact, rtol=0, atol=1e-12 * float(exact.abs().max()))


def products_equal_those_of_one_process():
    for kind in OPERATORS:
        for method in ("double_backward", "forward_over_reverse"):
            together, alone = pair(kind, method=method)
            same_products(together, alone)
            assert_close(together.loss(), alone.loss(), rtol=1e-12, atol=0)
            assert_close(together.gradient(), alone.gradient(), rtol=0, atol=1e-12)


def sums_and_weights_are_added_up_too():
    together, alone = pair("hessian", nn.CrossEntropyLoss(reduction="sum"))
    v = torch.linspace(-1, 1, together.shape[0])
    assert_close(together @ v, alone @ v, rtol=0, atol=1e-11)
    plain = lambda output, target: F.cross_entropy(output, target, reduction="sum")  # noqa: E731
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


def blocks_side_by_side_are_those_of_one_process():
    together, alone = pair("hessian", method="double_backward")
    names = ("0.*", "3.*")
    found = curvature.each_block({name: together.block(name) for name in names}, lambda B: B.to_dense())
    for name in names:
        exact = alone.block(name).to_dense()
        assert_close(found[name], exact, rtol=0, atol=1e-12 * float(exact.abs().max()))
        same_everywhere(found[name])


def one_block_twice_is_not_mixed_up():
    """Two functions of the same block ask in the order of their threads, another one on each process."""
    together, alone = pair("hessian", method="double_backward")
    P = curvature.DiagonalFactor(torch.linspace(0.1, 3, alone.block("0.*").shape[0]))
    blocks = {"after": curvature.Preconditioned(together.block("0.*"), P), "before": together.block("0.*")}

    def dense(block):
        time.sleep(0.1 * ((block is blocks["after"]) == (RANK == 0)))
        return block.to_dense()

    found, exact = curvature.each_block(blocks, dense), alone.block("0.*").to_dense()
    assert_close(found["before"], exact, rtol=0, atol=1e-12 * float(exact.abs().max()))
    exact = P.factor_transpose(P.factor_transpose(exact).mT)
    assert_close(found["after"], exact, rtol=0, atol=1e-12 * float(exact.abs().max()))


def part(rows: list[torch.Tensor], sizes: list[int]) -> list[tuple[torch.Tensor, ...]]:
    """This process's rows of the data of all, in batches of at most three."""
    own = [tensor.split(sizes)[RANK] for tensor in rows]
    return [batch for batch in zip(*(tensor.split(3) for tensor in own), strict=True) if len(batch[0])]


def samples_are_those_of_one_process():
    x, logits = torch.randn(2, 21, 5, generator=torch.Generator().manual_seed(1)).unbind()
    cases = {F.mse_loss: logits[:, :4], F.binary_cross_entropy_with_logits: logits[:, :4].sigmoid()}
    cases[F.cross_entropy] = logits[:, :4].softmax(1)
    for sizes in {2: [[8, 13], [21, 0]], 4: [[5, 0, 7, 9], [0, 20, 1, 0]]}[WORLD]:
        for loss, y in cases.items():
            options = {"mc_samples": 3, "seed": -5}
            together = curvature.MonteCarloFisher(build(), loss, part([x, y], sizes), **options)
            alone = curvature.MonteCarloFisher(build(), loss, [(x, y)], process_group=False, **options)
            same_products(together, alone)


def samples_follow_the_data_when_they_change():
    batches = data()
    own = batches[RANK : RANK + 1]  # a single batch: its graph is kept
    together = curvature.MonteCarloFisher(build(), nn.CrossEntropyLoss(), own, method="double_backward")
    for first in (0, 5, 3):  # the first process takes other batches, and the draws of all after it move
        if RANK == 0:
            own[:] = [batches[first]]
        everything = [batches[first], *batches[1:WORLD]]
        alone = curvature.MonteCarloFisher(build(), nn.CrossEntropyLoss(), everything, process_group=False)
        for _ in range(2):
            same_products(together, alone)


class Growing:
    """Data that are a batch more in every pass."""

    def __init__(self):
        self.passes = 0

    def __iter__(self):
        self.passes += RANK == 0
        return iter(data()[: 1 + self.passes])


def samples_of_unlike_processes_are_refused():
    for batches, seed, message in ((Growing(), 0, "the same data in every pass"), (data(), RANK, "seed")):
        M = curvature.MonteCarloFisher(build(), nn.CrossEntropyLoss(), batches, seed=seed)
        try:
            M @ torch.ones(M.shape[0])
        except ValueError as error:
            assert message in str(error)
        else:
            raise AssertionError("no error")


def one_all_reduce_a_product():
    for kind, extra in (("hessian", 4), ("monte carlo", 5)):
        together, _ = pair(kind)
        v = torch.ones(together.shape[0])
        together @ v  # the first one also asks whether the processes agree
        calls, reduce, gather = [], dist.all_reduce, dist.all_gather_object
        dist.all_reduce = lambda tensor, **options: (calls.append(tensor.numel()), reduce(tensor, **options))[1]  # noqa: B023
        dist.all_gather_object = None
        try:
            together @ v
        finally:
            dist.all_reduce, dist.all_gather_object = reduce, gather
        assert len(calls) == 1 and calls[0] <= together.shape[0] + extra


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


def an_error_before_the_first_batch_ends_all():
    model = build()
    H = curvature.Hessian(model, nn.CrossEntropyLoss(), data()[:1])
    model[0].weight.requires_grad_(RANK != 1)
    for _ in range(2):
        try:
            H @ torch.ones(H.shape[0])
        except ValueError as error:
            assert RANK == 1 and "'0.weight' is gone, frozen" in str(error)
        except RuntimeError as error:
            assert RANK != 1 and "on 1 other processes" in str(error)
        else:
            raise AssertionError("no error")
    model[0].weight.requires_grad_(True)
    H @ torch.ones(H.shape[0])


def different_matrices_are_refused():
    mean, total = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")
    cases = {
        "expected the same kind": (OPERATORS["hessian" if RANK else "ggn"], mean),
        "got means and sums": (curvature.Hessian, mean if RANK else total),
    }
    for message, (kind, loss) in cases.items():
        H = kind(build(), loss, data()[:1])
        try:
            H @ torch.ones(H.shape[0])
        except ValueError as error:
            assert message in str(error)
        else:
            raise AssertionError("no error")


def uneven_batches_of_unknown_weight_are_refused():
    batches = [data()[RANK]]  # even on each process, uneven over all
    H = curvature.Hessian(build(), lambda output, target: F.cross_entropy(output, target), batches)
    try:
        H @ torch.ones(H.shape[0])
    except ValueError as error:
        assert "uneven batches" in str(error)
    else:
        raise AssertionError("no error")


def sharded_parameters_are_refused():
    try:
        curvature.Hessian(fully_shard(build()), nn.CrossEntropyLoss(), data()[:1])
    except TypeError as error:
        assert "'0.weight' is sharded" in str(error)
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
    blocks_side_by_side_are_those_of_one_process,
    one_block_twice_is_not_mixed_up,
    samples_are_those_of_one_process,
    samples_follow_the_data_when_they_change,
    samples_of_unlike_processes_are_refused,
    one_all_reduce_a_product,
    an_error_on_one_process_ends_all,
    an_error_before_the_first_batch_ends_all,
    different_matrices_are_refused,
    different_parameters_are_refused,
    uneven_batches_of_unknown_weight_are_refused,
    sharded_parameters_are_refused,
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
    if RANK == 0:
        print(f"all scenarios passed on {WORLD} processes", flush=True)
    os._exit(0)  # the interpreter's own end may meet a thread of torch, and abort
