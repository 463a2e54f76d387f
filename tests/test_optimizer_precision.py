"""Scaled losses, autocast and accumulation give the statistics and steps of the plain run."""

import pytest
import torch
import torch.nn.functional as F
from cases import flat
from torch import nn
from torch.testing import assert_close

from gradcond import BNP, GradientCentralization, MeanShiftRejection, wrap

BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd-foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adam-fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "adagrad-fused": lambda p: torch.optim.Adagrad(p, lr=0.01, fused=True),
}
CHAINS = {
    "bnp": lambda: [BNP(decay=0.9)],
    "bnp-now": lambda: [BNP(decay=0.0)],
    "bnp+msr+gc": lambda: [BNP(decay=0.9), MeanShiftRejection(), GradientCentralization(side="output")],
}
NETWORKS = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), (6,)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)), (2, 4, 4)),
    "grouped": (
        lambda: nn.Sequential(nn.Conv1d(4, 6, 2, groups=2), nn.Tanh(), nn.Conv1d(6, 3, 2), nn.Flatten()),
        (4, 3),
    ),
}


def build(network, chain, base="sgd", dtype=torch.float64):
    torch.manual_seed(0)
    model = NETWORKS[network][0]().to(dtype)
    return model, wrap(BASES[base](model.parameters()), model, CHAINS[chain]())


def batch(network, step, size=12, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    x = 1 + torch.randn(size, *NETWORKS[network][1], generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(3, (size,), generator=generator)


def statistics(optimizer):
    """All that a checkpoint holds of the chain."""
    return [entry["layers"] for entry in optimizer.state_dict()["gradcond"]["chain"]]


def parameters(model):
    return flat([p.detach() for p in model.parameters()])


def scaled_run(base, chain, scale, clip, overflows=(), zeroed=lambda optimizer: optimizer.zero_grad()):
    """Six float32 steps, with steps before some of them whose gradients overflow."""
    model, optimizer = build("conv", chain, base, torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3, enabled=scale > 1)
    for step in range(6):
        for broken in [True, False] if step in overflows else [False]:
            x, y = batch("conv", step + 10 * broken, dtype=torch.float32)
            zeroed(optimizer)
            loss = scaler.scale(F.cross_entropy(model(x), y))
            (loss * float("inf") if broken else loss).backward()
            if clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
    return parameters(model), statistics(optimizer), scaler.get_scale()


@pytest.mark.parametrize("clip", [False, True], ids=["", "clipped"])
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("base", BASES)
def test_a_scaled_run_is_bit_equal_to_the_plain_one(base, chain, clip):
    plain, plain_statistics, _ = scaled_run(base, chain, 1.0, clip)
    scaled, scaled_statistics, scale = scaled_run(base, chain, 2.0**10, clip)
    assert scale == 2.0**12  # it has grown twice
    assert torch.equal(scaled, plain)
    assert_close(scaled_statistics, plain_statistics, rtol=0, atol=0)


@pytest.mark.parametrize("zeroed", ["to none", "in place"])
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("base", BASES)
def test_a_skipped_step_leaves_no_trace(base, chain, zeroed):
    def zero(optimizer):
        optimizer.zero_grad(set_to_none=zeroed == "to none")

    plain, plain_statistics, _ = scaled_run(base, chain, 1.0, False)
    scaled, scaled_statistics, scale = scaled_run(base, chain, 2.0**10, False, overflows=(0, 2, 5), zeroed=zero)
    assert scale < 2.0**10
    assert torch.equal(scaled, plain)
    assert_close(scaled_statistics, plain_statistics, rtol=0, atol=0)


def test_overflowing_inputs_of_a_skipped_step_are_forgotten():
    model, optimizer = build("linear", "bnp")
    x, y = batch("linear", 0)
    F.cross_entropy(model(x * float("inf")), y).backward()
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert_close(statistics(optimizer)[0]["0"]["mean"], x.mean(0))


@pytest.mark.parametrize("between", ["nothing", "scaled in place", "replaced"])
def test_gradients_changed_between_micro_batches_are_still_one_accumulation(between):
    model, optimizer = build("linear", "bnp-now")
    x, y = batch("linear", 0)
    F.cross_entropy(model(x[:5]), y[:5]).backward()
    for p in model.parameters():
        if between == "scaled in place":
            p.grad.mul_(0.5)
        elif between == "replaced":
            p.grad = p.grad / 2
    F.cross_entropy(model(x[5:]), y[5:]).backward()
    optimizer.step()
    state = statistics(optimizer)[0]["0"]
    assert state["rows"] == 12
    assert_close(state["mean"], x.mean(0))


def test_a_gradient_put_together_by_hand_counts_the_rows_of_all_its_parts():
    model, optimizer = build("linear", "bnp-now")
    x, y = batch("linear", 0)
    total = [torch.zeros_like(p) for p in model.parameters()]
    for row, target in zip(x.split(1), y.split(1), strict=True):  # clipped one by one, as for privacy
        optimizer.zero_grad()
        F.cross_entropy(model(row), target).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        total = [t + p.grad for t, p in zip(total, model.parameters(), strict=True)]
    for p, t in zip(model.parameters(), total, strict=True):
        p.grad = t
    optimizer.step()
    state = statistics(optimizer)[0]["0"]
    assert state["rows"] == 12
    assert_close(state["mean"], x.mean(0))


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_statistics_in_float32(network, chain, dtype):
    def run(enabled):
        model, optimizer = build(network, chain, dtype=torch.float32)
        for step in range(4):
            x, y = batch(network, step, dtype=torch.float32)
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype, enabled=enabled):
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        return parameters(model), statistics(optimizer)

    (result, found), (expected, wanted) = run(True), run(False)
    assert not torch.equal(result, expected)
    tolerance = 4 * torch.finfo(dtype).eps
    assert_close(result, expected, rtol=tolerance, atol=tolerance)
    assert_close(found, wanted, rtol=tolerance, atol=tolerance)  # the dtypes, too
    kept = {key: v.dtype for layers in found for s in layers.values() for key, v in s.items() if torch.is_tensor(v)}
    exact = dict.fromkeys(("exact_mean", "exact_variance", "shift"), torch.float64)
    assert kept == {"mean": torch.float32, "variance": torch.float32, **exact}


SIZES = {
    "halves": [6, 6],
    "thirds": [4, 4, 4],
    "single rows": [1] * 12,
    "uneven": [1, 7, 4],
    "with an empty one": [5, 0, 7],
}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("network", NETWORKS)
def test_micro_batches_are_one_batch(network, chain, sizes):
    def run(sizes):
        model, optimizer = build(network, chain)
        for step in range(3):
            x, y = batch(network, step)
            optimizer.zero_grad()
            for part, target in zip(x.split(sizes), y.split(sizes), strict=True):
                (F.cross_entropy(model(part), target, reduction="sum") / len(x)).backward()
            optimizer.step()
        return flat([p.grad for p in model.parameters()]), parameters(model), statistics(optimizer)

    assert_close(run(SIZES[sizes]), run([12]), rtol=1e-10, atol=1e-12)
