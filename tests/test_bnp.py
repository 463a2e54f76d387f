"""BNP against explicit matrices, the normalized network it imitates, and the claims about its condition numbers."""

import pytest
import torch
import torch.nn.functional as F
from cases import LAYERS, backward, build, flat, wrapped
from torch import nn
from torch.testing import assert_close

from gradcond import BNP, GradientCentralization


def explicit(layer, x, output, bias, *, decay_weight=1.0, eps_rel=1e-2, eps=1e-4):
    """M of every output unit, written out: a block-diagonal matrix over [weight, bias] in flat order."""
    weight = layer.weight
    taps = weight.shape[2:].numel()
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    groups = getattr(layer, "groups", 1)
    axis = x.dim() - 1 - (weight.dim() - 2)
    columns = x.movedim(axis, -1).reshape(-1, x.shape[axis])
    mean, variance = columns.mean(0), columns.var(0, correction=0)
    damped = variance + eps_rel * variance.max() + eps
    n = weight.numel() + (layer.bias.numel() if bias else 0)
    per_group = x.shape[axis] // groups
    rows = output.numel() // output.shape[output.dim() - 1 - (weight.dim() - 2)]
    q2 = max(per_group * taps / rows, 1.0)
    index = torch.arange(weight.numel()).view(weight.shape)
    units = (weight.shape[1] * groups) if transposed else weight.shape[0]
    dense = torch.zeros(n, n)
    for unit in range(units):
        group, within = divmod(unit, units // groups)
        channels = range(group * per_group, (group + 1) * per_group)
        block = index[group * per_group : (group + 1) * per_group, within] if transposed else index[unit]
        mu = torch.stack([mean[c] for c in channels for _ in range(taps)])
        s2 = torch.stack([damped[c] for c in channels for _ in range(taps)])
        place = block.reshape(-1)
        if bias:
            place = torch.cat([torch.tensor([weight.numel() + unit]), place])
            u = torch.eye(len(mu) + 1)
            u[0, 1:] = -mu
            p = u @ torch.diag(torch.cat([torch.ones(1), s2.rsqrt()])) / q2**0.5
            m = p @ p.mT
        else:
            m = torch.linalg.inv(torch.diag(s2) + torch.outer(mu, mu)) / q2
        dense[place[:, None], place] = m
    return dense


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layer", LAYERS)
def test_t1_m_is_the_explicit_matrix_of_every_output_unit(layer, bias):
    model, x = build(layer, bias)
    optimizer = wrapped(model, [BNP(decay=0.0)])
    backward(model, x)
    optimizer.step()
    m = optimizer.preconditioner()
    expected = explicit(model[0], x, model(x), bias)
    assert_close(m.apply(torch.eye(m.shape[0])), expected, rtol=1e-10, atol=1e-11 * expected.abs().max().item())


@pytest.mark.parametrize(("scale", "n"), [("rows", 50), ("batch", 2), (None, None)])
def test_the_scale_counts_rows_or_samples(scale, n):
    model, x = build("conv2d-groups", True)  # 2 samples of 5 x 5 positions, fan-in 2 x 9
    optimizer = wrapped(model, [BNP(scale=scale)])
    backward(model, x)
    optimizer.step()
    unscaled = wrapped(model, [BNP(scale=None)])
    backward(model, x)
    unscaled.step()
    q2 = 1.0 if n is None else max(18 / n, 1.0)
    v = torch.randn(optimizer.preconditioner().shape[0])
    assert_close(optimizer.preconditioner().apply(v) * q2, unscaled.preconditioner().apply(v))


def network():
    torch.manual_seed(3)
    conv = nn.Conv2d(2, 4, 3, padding=1, stride=2)
    return nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(4 * 9, 6), nn.Tanh(), nn.Linear(6, 3))


def test_t2_a_step_is_gradient_descent_on_the_fixed_statistics_normalized_network_mapped_back():
    model, lr = network(), 0.05
    x, y = 2 + 3 * torch.rand(8, 2, 5, 5), torch.randint(0, 3, (8,))
    statistics = {}

    def record(module, args, output):
        axis = 1
        dims = [d for d in range(args[0].dim()) if d != axis]
        variance, mean = torch.var_mean(args[0], dims, correction=0)
        q = max(module.weight[0].numel() / (output.numel() / output.shape[1]), 1.0) ** 0.5
        statistics[module] = mean, (variance + 1e-2 * variance.max() + 1e-4).sqrt(), q

    layers = [m for m in model if hasattr(m, "weight")]
    handles = [m.register_forward_hook(record) for m in layers]
    model(x)
    for handle in handles:
        handle.remove()

    # the normalized network: a = Z (h - mu) / (q sigma) + c / q, with z = P^-1 theta
    z = []
    for m in layers:
        mean, deviation, q = statistics[m]
        shape = [1, -1] + [1] * (m.weight.dim() - 2)
        weight = m.weight.detach() * deviation.view(shape) * q
        bias = q * (m.bias.detach() + (m.weight.detach() * mean.view(shape)).flatten(1).sum(1))
        z.append((weight.requires_grad_(), bias.requires_grad_()))

    def normalized(x):
        (w0, b0), (w1, b1), (w2, b2) = z
        (m0, s0, q0), (m1, s1, q1), (m2, s2, q2) = (statistics[m] for m in layers)
        x = (F.pad(x, (1, 1, 1, 1)) - m0.view(-1, 1, 1)) / (q0 * s0.view(-1, 1, 1))
        x = torch.tanh(F.conv2d(x, w0, b0 / q0, stride=2)).flatten(1)
        x = torch.tanh(F.linear((x - m1) / (q1 * s1), w1, b1 / q1))
        return F.linear((x - m2) / (q2 * s2), w2, b2 / q2)

    assert_close(normalized(x), model(x), rtol=1e-12, atol=1e-12)
    parameters = [p for pair in z for p in pair]
    gradients = torch.autograd.grad(F.cross_entropy(normalized(x), y), parameters)
    with torch.no_grad():
        for p, g in zip(parameters, gradients, strict=True):
            p -= lr * g

    optimizer = wrapped(model, [BNP(decay=0.0)], lr=lr)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    for m, (weight, bias) in zip(layers, z, strict=True):
        mean, deviation, q = statistics[m]
        shape = [1, -1] + [1] * (m.weight.dim() - 2)
        mapped = weight / (q * deviation.view(shape))
        assert_close(m.weight, mapped, rtol=1e-12, atol=1e-14)
        assert_close(m.bias, bias / q - (mapped * mean.view(shape)).flatten(1).sum(1), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("eps", [0.0, 1e-2])
@pytest.mark.parametrize("kind", ["dense", "convolutional"])
def test_t3_without_eps_training_does_not_depend_on_the_scale_and_offset_of_inputs(kind, eps):
    def run(affine):
        torch.manual_seed(0)
        if kind == "dense":
            model, x = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), torch.randn(16, 5)
            shape = (1, -1)
        else:
            model = nn.Sequential(nn.Conv2d(5, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3))
            x, shape = torch.randn(16, 5, 4, 4), (1, -1, 1, 1)
        y = torch.randint(0, 3, (16,))
        scale, offset = torch.linspace(0.5, 4, 5), torch.linspace(-3, 5, 5)
        if affine:
            x = scale.view(shape) * x + offset.view(shape)
            with torch.no_grad():
                model[0].weight /= scale.view(shape)
                model[0].bias -= (model[0].weight * offset.view(shape)).flatten(1).sum(1)
        optimizer = wrapped(model, [BNP(eps_rel=eps, eps=eps)], lr=0.1)
        for _ in range(10):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        return model(x)

    difference = (run(False) - run(True)).abs().max()
    assert (difference < 1e-10) == (eps == 0)


def condition(a):
    values = torch.linalg.eigvalsh(a)
    return (values[-1] / values[0]).item()


def test_t17_the_rank_one_form_conditions_as_well_without_a_bias_as_bnp_does_with_one():
    torch.manual_seed(0)
    h = F.relu(torch.randn(400, 48) * torch.logspace(-0.5, 0.5, 48) + 0.5)
    kappas = {}
    for bias in (True, False):
        model = nn.Linear(48, 1, bias=bias)
        optimizer = wrapped(model, [BNP(decay=0.0, eps=0, eps_rel=0)])
        backward(model, h)
        optimizer.step()
        full = torch.cat([h, torch.ones(400, 1)], 1) if bias else h
        hessian = full.mT @ full / 400  # in the parameters' flat order, weight before bias
        p = optimizer.preconditioner().factor(torch.eye(hessian.shape[0]))
        kappas[bias] = condition(p.mT @ hessian @ p)
    h_bar, variance = h.mean(0), h.var(0, correction=0)
    scaled_only = condition((h.mT @ h / 400) / (variance.sqrt()[:, None] * variance.sqrt()))
    outlier = 1 + (h_bar.square() / variance).sum()
    assert kappas[False] < 1.5 * kappas[True]
    assert scaled_only > 5 * kappas[False]
    top = torch.linalg.eigvalsh((h.mT @ h / 400) / (variance.sqrt()[:, None] * variance.sqrt()))[-1]
    assert_close(top, outlier, rtol=0.1, atol=0)  # diagonal scaling alone leaves this one in place


@pytest.mark.parametrize("between", ["nothing", "relu in place", "batch norm in eval", "group norm"])
def test_the_plain_form_is_used_where_batch_norm_follows_directly_and_only_there(between):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 4, 3, bias=False)
            self.norm = nn.GroupNorm(2, 4) if between == "group norm" else nn.BatchNorm2d(4)
            self.act = nn.ReLU(inplace=True)

        def forward(self, x):
            x = self.conv(x)
            return self.norm(self.act(x) if between == "relu in place" else x)

    model = Block()
    if between == "batch norm in eval":
        model.norm.eval()
    x = 1 + torch.rand(4, 2, 5, 5)
    optimizer = wrapped(model, [BNP(decay=0.0)])
    for _ in range(2):  # the form found at the first step is kept
        backward(model, x)
        optimizer.step()
    m = optimizer.preconditioner().apply(torch.eye(sum(p.numel() for p in model.parameters())))
    block = m[:18, :18]
    assert torch.equal(block, torch.diag(block.diagonal())) == (between == "nothing")
    assert ("batch norm follows" in str(optimizer.report())) == (between == "nothing")
    if between == "nothing":
        variance = x.var((0, 2, 3), correction=0)
        damped = (variance + 1e-2 * variance.max() + 1e-4).repeat_interleave(9)
        assert_close(block.diagonal(), 1 / damped)  # 18 inputs a row, 36 rows: q = 1


def test_batch_norm_over_another_axis_than_the_units_is_not_one_that_follows():
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.BatchNorm1d(3))  # its channels are the positions
    optimizer = wrapped(model, [BNP()])
    backward(model, torch.randn(6, 3, 4))
    optimizer.step()
    assert optimizer.report().conditioned == {"0": ["BNP (bias-free, rank one, 1 step)"]}


@pytest.mark.parametrize("late", ["unfrozen", "skipped"])
def test_batch_norm_is_found_behind_a_layer_that_joins_later(late):
    model = nn.Sequential(
        nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4)
    )
    optimizer = wrapped(model, [BNP()])
    for t in range(3):
        model[2].weight.requires_grad_(t > 0 or late == "skipped")
        optimizer.zero_grad()
        (model if t > 0 or late == "unfrozen" else model[:2])(torch.randn(6, 3)).pow(3).mean().backward()
        optimizer.step()
    assert [texts[0].count("batch norm follows") for texts in optimizer.report().conditioned.values()] == [1, 1]
    assert not optimizer._engine.probe.handles  # nobody asks any more


@pytest.mark.parametrize("rows", [1, 2, 4, 60])
def test_t27_total_variance_is_right_at_every_batch_size(rows):
    model = nn.Linear(1, 1)
    optimizer = wrapped(model, [BNP(decay=0.99)], lr=0.0)
    generator = torch.Generator().manual_seed(0)
    averaged = []
    for step in range(6000 // min(rows, 4)):
        backward(model, 2 + 3 * torch.randn(rows, 1, generator=generator))
        optimizer.step()
        if step > 500:
            averaged.append(optimizer._engine.states[0][""]["variance"].item())
    measured = torch.tensor(averaged).mean().item()
    assert abs(measured / 9 - 1) < 0.12  # the average of biased batch variances would be 0, 4.5, 6.75, 8.85
    assert abs(measured / 9 - 1) < abs((rows - 1) / rows - 1) or rows == 60


def test_the_variance_survives_a_large_mean_in_float32():
    model = nn.Linear(3, 1).float()
    optimizer = wrapped(model, [BNP(decay=0.9)], lr=0.0)
    for _ in range(20):
        backward(model, 1e4 + 1e-2 * torch.randn(256, 3, dtype=torch.float32))
        optimizer.step()
    variance = optimizer._engine.states[0][""]["variance"]
    assert_close(variance, torch.full_like(variance, 1e-4), rtol=0.1, atol=0)
    assert variance.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_statistics_of_short_floats_are_float32(dtype):
    model = nn.Linear(2, 1).to(dtype)
    optimizer = wrapped(model, [BNP(decay=0.0)], lr=0.0)
    x = torch.stack([torch.ones(70000), torch.full((70000,), 3.0)], 1).to(dtype)  # a sum past either range
    model(x).mean().backward()
    optimizer.step()
    state = optimizer._engine.states[0][""]
    assert state["mean"].dtype == state["variance"].dtype == torch.float32
    assert_close(state["mean"], torch.tensor([1.0, 3.0], dtype=torch.float32), rtol=1e-6, atol=0)


@pytest.mark.parametrize("start", ["debias", "first_batch", "paper"])
def test_the_averages_follow_their_start(start):
    model, decay = nn.Linear(2, 1), 0.8
    optimizer = wrapped(model, [BNP(decay=decay, start=start)], lr=0.0)
    mean, variance = torch.zeros(2), torch.ones(2)
    for step in range(1, 5):
        x = torch.randn(3, 2)
        backward(model, x)
        optimizer.step()
        a = {"debias": (1 - decay) / (1 - decay**step), "paper": 1 - decay}.get(start, 1 - decay if step > 1 else 1)
        d = x.mean(0) - mean
        mean, variance = mean + a * d, (1 - a) * variance + a * x.var(0, correction=0) + a * (1 - a) * d**2
        state = optimizer._engine.states[0][""]
        assert_close(state["mean"], mean)
        assert_close(state["variance"], variance)
        assert state["steps"] == step


def test_micro_batches_count_as_their_union():
    model, x = build("conv1d", True)
    one, two = wrapped(model, [BNP()], lr=0.0), None
    (model(x) ** 3).sum().backward()
    one.step()
    expected = one.preconditioner()
    gradient = flat([p.grad for p in model.parameters()])
    one.zero_grad()
    two = wrapped(model, [BNP()], lr=0.0)
    for part in x.split(1):
        (model(part) ** 3).sum().backward()
    two.step()
    v = torch.randn(expected.shape[0])
    assert_close(two.preconditioner().apply(v), expected.apply(v), rtol=1e-12, atol=1e-12)
    assert_close(flat([p.grad for p in model.parameters()]), gradient, rtol=1e-12, atol=1e-10)


def test_a_frozen_bias_takes_the_form_without_bias():
    model, x = build("linear", True)
    model[0].bias.requires_grad_(False)
    optimizer = wrapped(model, [BNP(decay=0.0)])
    backward_only = (model(x) ** 3).mean()
    backward_only.backward()
    optimizer.step()
    m = optimizer.preconditioner()
    assert_close(m.apply(torch.eye(20)), explicit(model[0], x, model(x), bias=False))
    assert "it is frozen" in str(optimizer.report())


def test_a_constant_input_without_eps_rests():
    model = nn.Linear(2, 1)
    x = torch.stack([torch.randn(8), torch.full((8,), 3.0)], 1)
    optimizer = wrapped(model, [BNP(decay=0.0, eps=0, eps_rel=0)])
    backward(model, x)
    optimizer.step()
    assert model.weight.grad[0, 1] == 0
    assert model.weight.isfinite().all()


def test_chains_are_nested_changes_of_variables():
    model, x = build("conv2d", True)

    def dense(chain):
        optimizer = wrapped(model, chain, lr=0.0)
        backward(model, x)
        optimizer.step()
        m = optimizer.preconditioner()
        return m.factor(torch.eye(m.shape[0])), m.apply(torch.eye(m.shape[0]))

    p_bnp, m_bnp = dense([BNP()])
    c, _ = dense([GradientCentralization()])
    p, m = dense([GradientCentralization(), BNP()])
    assert_close(p, c @ p_bnp)
    assert_close(m, c @ m_bnp @ c.mT)


@pytest.mark.parametrize(
    "settings",
    [
        *({"decay": 1.0}, {"decay": -0.1}, {"eps": -1.0}, {"scale": "row"}, {"start": "zero"}),
        *({"ghost": 0}, {"ghost": 2.5}, {"every": 0}),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=f"BNP: .*{next(iter(settings))}.*got"):
        BNP(**settings)


def test_a_setting_out_of_range_between_steps_is_refused_and_changes_nothing():
    model = nn.Linear(3, 2)
    optimizer = wrapped(model, [BNP()])
    for _ in range(2):
        model(torch.randn(4, 3)).sum().backward()
        optimizer.step()
    before = str((optimizer.state_dict(), model.state_dict()))
    optimizer.conditioners[0].decay = 2.0
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 2.0"):
        optimizer.step()
    optimizer.conditioners[0].decay = 0.99
    assert str((optimizer.state_dict(), model.state_dict())) == before
