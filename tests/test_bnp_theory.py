"""What BNP claims of Hessians and trajectories, measured: each test states its claim."""

import pytest
import torch
import torch.nn.functional as F
from dense import flat, moments
from torch import nn
from torch.testing import assert_close

import gradcond
from gradcond import BNP
from gradcond.curvature import GGN, Hessian, Preconditioned, exact_spectrum


def wrapped(model, lr=0.0, **settings):
    return gradcond.wrap(torch.optim.SGD(model.parameters(), lr=lr), model, [BNP(**settings)])


def preconditioner(model, loss, x, y, **settings):
    """M from the statistics of one batch."""
    optimizer = wrapped(model, decay=0.0, **settings)
    loss(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer.preconditioner()


def eigenvalues(K):
    return torch.as_tensor(exact_spectrum(K).eigenvalues)


# T2 and T10: the normalized network


def tanh_network():
    """A network at rest, on inputs of other scales and far from zero."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 3))
    x = torch.randn(40, 6) * torch.tensor([0.3, 0.5, 1.0, 2.0, 3.0, 4.0]) + torch.linspace(4, 12, 6)
    with torch.no_grad():
        model[0].weight /= 2 * x.std(0)
        model[0].bias -= model[0].weight @ x.mean(0)
    return model, x, torch.randint(0, 3, (40,))


def normalized_hessian(model, x, y, differentiate_statistics):
    """The Hessian of the net whose layers see (h - mu) / sigma~, in its own weights, at the same function."""
    layers, statistics, h = [m for m in model if isinstance(m, nn.Linear)], [], x
    for module in model:
        if isinstance(module, nn.Linear):
            mean, variance = moments(h.detach())
            statistics.append((mean, (variance + 1e-2 * variance.max() + 1e-4).sqrt()))
        h = module(h)
    z = []
    for layer, (mean, deviation) in zip(layers, statistics, strict=True):  # more rows than inputs: q = 1
        z += [layer.weight * deviation, layer.bias + layer.weight @ mean]
    shapes = [t.shape for t in z]

    def loss(vector):
        h, parts = x, vector.split([s.numel() for s in shapes])
        for i, (mean, deviation) in enumerate(statistics):
            if differentiate_statistics:
                mean, variance = moments(h)
                deviation = (variance + 1e-2 * variance.max() + 1e-4).sqrt()
            weight, bias = (parts[2 * i + j].view(shapes[2 * i + j]) for j in (0, 1))
            h = F.linear((h - mean) / deviation, weight, bias)
            h = torch.tanh(h) if i < 2 else h
        return F.cross_entropy(h, y)

    return torch.autograd.functional.hessian(loss, flat(z))


def test_t2_the_conditioned_hessian_is_that_of_the_normalized_network():
    model, x, y = tanh_network()
    m = preconditioner(model, F.cross_entropy, x, y)
    conditioned = Preconditioned(Hessian(model, F.cross_entropy, [(x, y)]), m).to_dense()
    expected = normalized_hessian(model, x, y, differentiate_statistics=False)
    assert_close(torch.as_tensor(conditioned), expected, rtol=1e-9, atol=1e-11)


def test_t10_batch_norm_and_bnp_have_alike_spectra_far_from_the_plain_one():
    model, x, y = tanh_network()
    m = preconditioner(model, F.cross_entropy, x, y)
    H = Hessian(model, F.cross_entropy, [(x, y)])
    plain, bnp = eigenvalues(H)[-1], eigenvalues(Preconditioned(H, m))[-1]
    norm = torch.linalg.eigvalsh(normalized_hessian(model, x, y, differentiate_statistics=True))[-1]
    assert plain > 5 * max(bnp, norm)
    assert 0.5 < bnp / norm < 2


# T3: affine changes of the inputs


@pytest.mark.parametrize("mode", ["none", "circular", "reflect", "replicate", "zeros"])
def test_t3_convolutions_do_not_see_affine_changes_unless_they_pad_with_zeros(mode):
    def run(affine):
        torch.manual_seed(0)
        padded = {} if mode == "none" else {"padding": 1, "padding_mode": mode}
        model = nn.Sequential(nn.Conv2d(3, 4, 3, **padded), nn.Tanh(), nn.Flatten(), nn.LazyLinear(2))
        x, y = torch.randn(12, 3, 4, 4), torch.randint(0, 2, (12,))
        model(x)
        if affine:
            scale, offset = (
                torch.tensor([0.5, 2.0, 5.0]).view(3, 1, 1),
                torch.tensor([-3.0, 1.0, 4.0]).view(3, 1, 1),
            )
            x = scale * x + offset
            with torch.no_grad():
                model[0].weight /= scale
                model[0].bias -= (model[0].weight * offset).flatten(1).sum(1)
        optimizer = wrapped(model, lr=0.1, eps=0, eps_rel=0)
        for _ in range(8):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        return model(x)

    difference = (run(False) - run(True)).abs().max()
    assert (difference < 1e-9) == (mode != "zeros")


@pytest.mark.parametrize("eps", [0.0, 1e-2])
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_t3_recurrent_networks_do_not_see_affine_changes(kind, eps):
    def run(affine):
        torch.manual_seed(0)
        rnn = kind(3, 4, num_layers=2, bidirectional=True)
        head = nn.Linear(8, 2)
        x, y = torch.randn(5, 6, 3), torch.randn(5, 6, 2)
        if affine:
            scale, offset = torch.tensor([0.5, 2.0, 5.0]), torch.tensor([-3.0, 1.0, 4.0])
            x = scale * x + offset
            with torch.no_grad():
                for suffix in ("l0", "l0_reverse"):
                    weight, bias = getattr(rnn, f"weight_ih_{suffix}"), getattr(rnn, f"bias_ih_{suffix}")
                    weight /= scale
                    bias -= weight @ offset
        optimizer = wrapped(nn.ModuleList([rnn, head]), lr=0.1, eps=eps, eps_rel=eps)
        for _ in range(8):
            optimizer.zero_grad()
            F.mse_loss(head(rnn(x)[0]), y).backward()
            optimizer.step()
        return head(rnn(x)[0])

    difference = (run(False) - run(True)).abs().max()
    assert (difference < 1e-9) == (eps == 0)


# T8 and T9: the scale q^2


def half_square(output, target):
    return (output - target).square().mean() / 2


def top(model, x, m):
    y = torch.zeros_like(model(x)).detach()
    return eigenvalues(Preconditioned(Hessian(model, half_square, [(x, y)]), m))[-1].item()


def settled(model, batches, **settings):
    """M from running statistics of many batches."""
    optimizer = wrapped(model, **settings)
    for x in batches:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    return optimizer.preconditioner()


@pytest.mark.parametrize("n", [1, 4, 30, 60, 240])
def test_t8_with_q_the_top_eigenvalue_is_of_order_one_and_without_it_grows_as_inputs_over_rows(n):
    torch.manual_seed(0)
    inputs, model = 60, nn.Linear(60, 1)
    scales = torch.logspace(-1, 1, inputs)
    batches = [2 + scales * torch.randn(n, inputs) for _ in range(max(900 // n, 10))]
    scaled = top(model, batches[0], settled(model, batches, decay=0.999, eps=0, eps_rel=0))
    unscaled = top(model, batches[0], settled(model, batches, decay=0.999, eps=0, eps_rel=0, scale=None))
    assert 0.7 < scaled < 5
    assert_close(unscaled, scaled * max(inputs / n, 1))
    assert n > 4 or unscaled > 0.5 * inputs / n


def test_t9_for_convolutions_rows_track_the_top_eigenvalue_and_samples_do_not():
    torch.manual_seed(0)
    ratios = {"rows": [], "batch": []}
    for n, channels, side in ((4, 16, 8), (4, 16, 2), (64, 4, 4), (1, 20, 4), (1, 6, 10)):
        model = nn.Conv2d(channels, 1, 3, padding=1, padding_mode="circular")
        batches = [1 + 2 * torch.randn(n, channels, side, side) for _ in range(10)]
        for scale, found in ratios.items():
            found.append(top(model, batches[0], settled(model, batches, scale=scale)))
    assert max(ratios["rows"]) < 5 * min(ratios["rows"])
    assert max(ratios["batch"]) > 20 * min(ratios["batch"])


# T26: what is left


@pytest.mark.parametrize("correlated", [True, False])
def test_t26_what_is_left_of_a_dense_block_is_the_correlation_of_its_inputs(correlated):
    torch.manual_seed(0)
    h = torch.randn(50, 8) @ torch.randn(8, 8)
    if not correlated:
        h = torch.linalg.qr(h - h.mean(0))[0]
    h = h * torch.logspace(-2, 2, 8) + torch.linspace(-5, 30, 8)
    model, y = nn.Linear(8, 2), torch.randn(50, 2)
    m = preconditioner(model, half_square, h, y, eps=0, eps_rel=0)
    G = GGN(model, half_square, [(h, y)])
    before, after = eigenvalues(G), eigenvalues(Preconditioned(G, m))
    left = torch.linalg.eigvalsh(torch.corrcoef(h.mT))
    kappa = after[-1] / after[0]
    assert_close(kappa, left[-1] / left[0], rtol=1e-6, atol=0)
    assert (kappa < 1 + 1e-9) != correlated
    assert before[-1] / before[0] > 1e3 * kappa
    expected = torch.cat([left, torch.ones(1)]).repeat(2).sort()[0] / 2  # an e column for each unit
    assert_close(after, expected, rtol=1e-7, atol=1e-9)


# T28: two biases in one direction


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_t28_two_biases_give_each_unit_a_zero_eigenvalue_in_whose_direction_nothing_moves(kind):
    torch.manual_seed(0)
    model, hidden = kind(2, 3), 3
    x, y = 1 + torch.randn(6, 5, 2), torch.randn(6, 5, 3)

    def loss(output, target):
        return F.mse_loss(output[0] if isinstance(output, tuple) else output, target)

    optimizer = wrapped(model, lr=0.5, decay=0.0)
    loss(model(x), y).backward()
    before = flat(model.parameters())
    optimizer.step()
    moved = flat(model.parameters()) - before
    optimizer.zero_grad()
    H = Hessian(model, loss, [(x, y)])
    K = Preconditioned(H, optimizer.preconditioner())
    n, units = len(before), len(model.bias_ih_l0)
    shared = units - hidden if kind is nn.GRU else units  # a gate of GRU stands between the new state's two
    directions = torch.zeros(n, shared)
    for i in range(shared):  # the biases come last, b_ih before b_hh
        directions[n - 2 * units + i, i], directions[n - units + i, i] = 1.0, -1.0
    dense, conditioned = torch.as_tensor(H.to_dense()), torch.as_tensor(K.to_dense())
    for matrix in (dense, conditioned):
        assert (matrix @ directions).abs().max() < 1e-14 * n * matrix.abs().max()
    assert (torch.linalg.eigvalsh(conditioned).abs() < 1e-12).sum() >= shared
    assert (moved @ directions).abs().max() < 1e-15
    assert moved[-1] != 0
    if kind is nn.GRU:
        apart = torch.zeros(n)
        apart[n - units - 1], apart[n - 1] = 1.0, -1.0
        assert (dense @ apart).abs().max() > 1e-5
