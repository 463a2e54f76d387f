"""Mean-shift rejection: eigenvalues, the two published forms, its initialization, what it does to patches."""

import copy

import pytest
import torch
from cases import LAYERS, backward, build, wrapped
from torch import nn
from torch.testing import assert_close

from gradcond import BNP, MeanShiftRejection, zero_mean_init_


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_each_kernel_loses_a_fraction_of_its_mean(layer, rescale):
    model, x = build(layer, True)
    optimizer = wrapped(model, [MeanShiftRejection(rejection=0.75, rescale=rescale)])
    weight, bias = backward(model, x)
    optimizer.step()
    expected = weight.clone()
    if weight.dim() > 2 and weight[0, 0].numel() > 1:
        taps = tuple(range(2, weight.dim()))
        expected = weight - 0.75 * weight.mean(taps, keepdim=True)
        expected = expected / 0.25 if rescale else expected
    assert_close(model[0].weight.grad, expected, rtol=1e-13, atol=1e-15)
    assert torch.equal(model[0].bias.grad, bias)


def matrix(chain, x):
    model = nn.Sequential(nn.Conv2d(1, 1, 3))
    optimizer = wrapped(model, chain, lr=0.0)
    backward(model, x)
    optimizer.step()
    return optimizer.preconditioner()


def test_t18_eigenvalues_and_the_two_forms():
    x, m = torch.rand(4, 1, 8, 8), 10 / 11
    form_a = matrix([MeanShiftRejection(rejection=m)], x).apply(torch.eye(10))[:9, :9]
    form_b = matrix([MeanShiftRejection(rejection=m, rescale=True)], x).apply(torch.eye(10))[:9, :9]
    values = torch.linalg.eigvalsh(form_a)
    assert_close(values, torch.tensor([1 - m] + [1.0] * 8))
    assert_close(form_b, 11 * form_a)  # (1 + k) with k = 10, m = k / (1 + k)


def test_t18_the_common_mode_of_patches_falls_by_the_rejection_and_completes_bnp():
    """Patches of covariance s^2 (rho 1 1^T + (1 - rho) I): one large mode, the patch's mean."""
    torch.manual_seed(0)
    samples = torch.randn(4000, 10) @ torch.diag(torch.tensor([3.0] + [1.0] * 9))
    patches = 5 + samples[:, :1] + samples[:, 1:]
    augmented = torch.cat([patches, torch.ones(len(patches), 1)], 1)
    hessian = augmented.mT @ augmented / len(patches)

    def values(chain):
        p = matrix(chain, patches.view(-1, 1, 3, 3)).factor(torch.eye(10)) if chain else torch.eye(10)
        return torch.linalg.eigvalsh(p.mT @ hessian @ p)

    def kappa(chain):
        spectrum = values(chain)
        return (spectrum[-1] / spectrum[0]).item()

    u, covariance = torch.ones(9) / 3, torch.cov(patches.mT, correction=0)
    common = u @ covariance @ u
    rest = (covariance.trace() - common) / 8
    best = 1 - (rest / common).item()  # the adaptive m*
    assert best == pytest.approx(1 - 1 / 82, abs=0.002)

    bnp = BNP(decay=0.0, eps=0, eps_rel=0)
    assert kappa([bnp]) < kappa([]) / 10
    assert kappa([bnp]) > 60  # all taps of a channel share mu and sigma: the correlation between taps stays
    assert kappa([bnp, MeanShiftRejection(best)]) < kappa([bnp]) / 6
    top = [values([bnp, MeanShiftRejection(m)])[-1].item() for m in (0.0, 0.5, 0.75)]
    assert top[1] / top[0] == pytest.approx(0.5, rel=0.02)  # the outlier shrinks by 1 - m
    assert top[2] / top[0] == pytest.approx(0.25, rel=0.02)


@pytest.mark.parametrize("layer", LAYERS)
def test_zero_mean_init(layer):
    model, _ = build(layer, True)
    conv = model[0]
    zero_mean_init_(model, norm=2.0)
    transposed = isinstance(conv, nn.modules.conv._ConvTransposeNd)
    weight = conv.weight.unflatten(0, (getattr(conv, "groups", 1), -1))
    rows = weight.transpose(1, 2) if transposed else weight  # (groups, out, in, *taps)
    assert_close(rows.flatten(2).norm(dim=2), torch.full(rows.shape[:2], 2.0))
    assert not conv.bias.any()
    if rows[0, 0].numel() > 1:
        averaged = rows.flatten(3).mean(3) if rows[0, 0, 0].numel() > 1 else rows.flatten(2).mean(2)
        assert averaged.abs().max() < 1e-12


def test_zero_mean_init_takes_a_generator_and_refuses_a_bad_norm():
    a, b = (nn.Conv2d(2, 3, 3) for _ in range(2))
    state = torch.get_rng_state()
    for conv in (a, b):
        zero_mean_init_(conv, generator=torch.Generator().manual_seed(5))
    assert torch.equal(a.weight, b.weight)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="norm must be positive, got -1"):
        zero_mean_init_(a, norm=-1)
    assert torch.equal(a.weight, b.weight)


def test_zero_mean_init_leaves_recurrent_layers_and_embeddings_and_refuses_lazy_ones():
    model = nn.ModuleList([nn.GRU(3, 4), nn.LSTM(3, 4), nn.Embedding(3, 4), nn.Linear(3, 4)])
    before = copy.deepcopy(model)
    zero_mean_init_(model)
    same = {n: torch.equal(p, q) for (n, p), q in zip(model.named_parameters(), before.parameters(), strict=True)}
    assert [name for name in same if not same[name]] == ["3.weight", "3.bias"]
    weight = model[3].weight.clone()
    with pytest.raises(ValueError, match="expected modules that have their shapes, got a lazy one"):
        zero_mean_init_(nn.Sequential(model[3], nn.LazyLinear(2)))
    assert torch.equal(model[3].weight, weight)


def test_a_rejection_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"rejection must be in \[0, 1\], got 1.5"):
        MeanShiftRejection(rejection=1.5)
    with pytest.raises(ValueError, match="rejection must be under 1"):
        MeanShiftRejection(rejection=1.0, rescale=True)
