"""A conditioned step reads no number from a tensor: on a GPU, the host never waits for it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradcond
from gradcond import BNP, GradientCentralization, MeanShiftRejection, NormClipping, RateDamping

CHAINS = {
    "bnp": lambda: [BNP()],
    "bnp-every-step": lambda: [BNP(decay=0.0, eps=0.0)],
    "bnp-taps": lambda: [BNP(taps=True)],
    "bnp-ghost": lambda: [BNP(ghost=2)],
    "bnp+msr": lambda: [BNP(), MeanShiftRejection()],
    "gc": lambda: [GradientCentralization()],
    "bnp+damping+clipping": lambda: [BNP(), RateDamping(), NormClipping()],
    "bnp+msr+damping+clipping": lambda: [BNP(), MeanShiftRejection(), RateDamping(), NormClipping()],
}
WAITS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "unique_dim", "_unique2"}


class NeverWait(TorchDispatchMode):
    """Raises where the host would need a tensor's values; of tolist() and numpy(), which skip dispatch, not."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in WAITS, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "read",
    [torch.Tensor.item, bool, float, torch.nonzero, lambda x: x[x > 0], lambda x: x.equal(x)],
)
def test_reading_a_number_is_noticed(read):
    with pytest.raises(AssertionError, match="waits for the device"), NeverWait():
        read(torch.ones(()))


def convolutions(bias):
    return nn.Sequential(
        *[nn.Conv2d(2, 4, 3, bias=bias), nn.ReLU(), nn.Conv2d(4, 4, 2, groups=2, bias=bias), nn.GroupNorm(2, 4)],
        *[nn.ConvTranspose2d(4, 3, 2, bias=bias), nn.Flatten(), nn.Linear(48, 5, bias=bias)],
    )


def perceptron(bias):
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 6, bias=bias), nn.ReLU(), nn.Linear(6, 5, bias=bias))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "bias-free"])
@pytest.mark.parametrize(
    "build, chain",
    [*((convolutions, chain) for chain in CHAINS), (perceptron, "bnp"), (perceptron, "bnp-every-step")],
)
def test_a_step_reads_no_number(build, chain, bias, monkeypatch):
    model = build(bias)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    optimizer = gradcond.wrap(sgd, model, CHAINS[chain](), check_finite=False)
    # on a CPU the moments of inputs look for means far from zero, by a number; this is the kernel for elsewhere
    monkeypatch.setattr(gradcond.moments, "_is_plain", lambda x: False)
    x, y = torch.randn(4, 2, 6, 6), torch.randint(5, (4,))
    before = [p.detach().clone() for p in model.parameters()]
    for name in ("tolist", "numpy", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, None)
    with NeverWait():
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    monkeypatch.undo()
    assert not any(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    assert any(any(state.values()) for state in optimizer._engine.states) or chain == "gc"
