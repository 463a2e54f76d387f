"""RateDamping: its formula against dense matrices, the coordinates it measures in, what it is for."""

import io
import math

import pytest
import torch
import torch.nn.functional as F
from cases import CHAINS, build, flat, wrapped
from sklearn.datasets import load_digits
from torch import nn
from torch.testing import assert_close

import gradcond
from gradcond import BNP, GradientCentralization, MeanShiftRejection, NormClipping, RateDamping
from gradcond.conditioner import RowMap, square_of
from gradcond.layers import Rows, find_layers

BEFORE = {
    "alone": lambda: [],
    "bnp": lambda: [BNP(decay=0.5)],
    "bnp+msr": lambda: [BNP(decay=0.5), MeanShiftRejection()],
    "gc-both": lambda: [GradientCentralization(side="both")],
}


class Recurrent(nn.Module):
    """Rows of several weights and of two biases, rows of one weight that three layers share."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 4)
        self.attention = nn.MultiheadAttention(4, 2)

    def forward(self, x):
        y, _ = self.lstm(x)
        return self.attention(y, y, y)[0].mean(0)


NETWORKS = {
    "conv": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 5, bias=False), nn.Linear(5, 3)
        ),
        (3, 2, 4, 4),
    ),
    "recurrent": (Recurrent, (6, 2, 3)),
}


def network(name):
    """With a unit that starts at zero."""
    torch.manual_seed(0)
    model = NETWORKS[name][0]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[:1] = 0.0
    return model


def loss(model, step, name):
    generator = torch.Generator().manual_seed(step)
    x = 1 + torch.randn(NETWORKS[name][1], generator=generator)
    return (model(x) - 1.0).square().sum()


def flat_parameters(model):
    return flat([p.detach() for p in model.parameters()])


def flat_gradient(model):
    return flat([p.grad for p in model.parameters()])


def places(model):
    """For each layer, where the row of each unit is in the flat vector: (units, row)."""
    where, start = {}, 0
    for p in model.parameters():
        where[id(p)] = start + torch.arange(p.numel()).view(p.shape)
        start += p.numel()
    found = {}
    for name, layer in find_layers(model).items():
        weight = layer.rows(layer.join([where[id(w)] for w in layer.weights]), None).weight
        biases = [layer.part(where[id(b)], -1).reshape(-1, 1) for b in layer.biases]
        found[name] = torch.cat([weight.flatten(0, 1).flatten(1), *biases], 1)
    return found


def undamped(model, optimizer):
    """P of the last step without its damping, dense."""
    state = optimizer.state_dict()["gradcond"]
    for entry in state["chain"]:
        if entry["name"] == "RateDamping":
            for layer in entry["layers"].values():
                layer["factor"] = torch.ones_like(layer["factor"])
    return gradcond.load_preconditioner(model, state).factor(torch.eye(state_size(model)))


def state_size(model):
    return sum(p.numel() for p in model.parameters())


class Reference:
    """The formula of the class, on dense matrices."""

    def __init__(self, damping, model):
        self.damping, self.model, self.t = damping, model, 0
        self.sums = {name: torch.zeros(len(rows)) for name, rows in places(model).items()}

    def step(self, p, q2, theta, raw, rates):
        """Takes in a step; `q2` and `rates` are by layer."""
        self.t += 1
        z, slope = torch.linalg.pinv(p, rtol=1e-10) @ theta, p.mT @ raw
        d = torch.ones_like(theta)
        for name, rows in places(self.model).items():
            size = z[rows].square().sum(1).clamp_min(self.damping.floor * q2[name]).sqrt()
            self.sums[name] = self.sums[name] + (rates[name] * slope[rows].norm(dim=1) / size).square()
            strength = self.damping.strength * (1 + self.damping.delay / self.t)
            d[rows] = (1 + strength * self.sums[name][:, None]).rsqrt().expand(rows.shape)
        return d

    def check(self, optimizer, p, d, raw, conditioned):
        """The gradient was conditioned with D^1/2 P P^T D^1/2, which the preconditioner shows."""
        root = d.sqrt()
        assert_close(conditioned, root * (p @ (p.mT @ (root * raw))), rtol=1e-9, atol=1e-12)
        m = optimizer.preconditioner()
        assert_close(m.apply(torch.eye(len(d))), root[:, None] * (p @ p.mT) * root, rtol=1e-9, atol=1e-12)
        assert_close(m.factor(torch.eye(len(d))), root[:, None] * p, rtol=1e-9, atol=1e-12)
        for name, state in optimizer._engine.states[-1].items():
            assert_close(state["sum"].flatten(), self.sums[name], rtol=1e-9, atol=0)


def squared_scales(model, optimizer):
    """BNP's q^2 = max(fan_in / rows, 1) by layer; 1 without BNP."""
    states = optimizer._engine.states[0] if isinstance(optimizer.conditioners[0], BNP) else {}
    layers = find_layers(model)
    return {n: max(layers[n].fan_in / states[n]["rows"], 1.0) if n in states else 1.0 for n in layers}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("before", BEFORE)
def test_the_step_is_the_dense_formula(before, name):
    model, damping = network(name), RateDamping(strength=7.0, delay=2.0, floor=0.05)
    first, *others = find_layers(model).values()
    groups = [
        {"params": first.parameters(), "lr": torch.tensor(0.003), "momentum": 0.5, "dampening": 0.2},
        {"params": [p for layer in others for p in layer.parameters() if layer.name != others[-1].name]},
        {"params": others[-1].parameters(), "lr": 0.01, "momentum": 0.0, "dampening": 0.5},  # without effect
    ]
    groups[1]["params"] = list(dict.fromkeys(groups[1]["params"]))
    sgd = torch.optim.SGD(groups, lr=0.02, momentum=0.9)
    optimizer = gradcond.wrap(sgd, model, [*BEFORE[before](), damping])
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    reference = Reference(damping, model)
    for step in range(4):
        rates = dict.fromkeys((layer.name for layer in others), 0.02 * 0.5**step / (1 - 0.9))
        rates[first.name] = 0.003 * 0.5**step * (1 - 0.2) / (1 - 0.5)
        rates[others[-1].name] = 0.01 * 0.5**step
        optimizer.zero_grad()
        loss(model, step, name).backward()
        theta, raw = flat_parameters(model), flat_gradient(model)
        optimizer.step()
        p = undamped(model, optimizer)
        d = reference.step(p, squared_scales(model, optimizer), theta, raw, rates)
        reference.check(optimizer, p, d, raw, flat_gradient(model))
        scheduler.step()
    if before == "bnp" and name == "conv":
        assert max(squared_scales(model, optimizer).values()) > 1
    assert d.min() < 0.5 < d.max()


def test_evaluations_of_a_closure_share_the_p_and_d_of_the_first_one():
    model, damping = network("conv"), RateDamping(delay=2.0)
    sgd = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=4)
    optimizer = gradcond.wrap(sgd, model, [BNP(decay=0.5), damping])
    reference = Reference(damping, model)
    for step in range(2):
        thetas, raws, conditioned = [], [], []

        def closure(step=step, thetas=thetas, raws=raws, conditioned=conditioned):
            if raws:
                conditioned.append(flat_gradient(model))
            optimizer.zero_grad()
            value = loss(model, step + len(raws), "conv")
            value.backward()
            thetas.append(flat_parameters(model))
            raws.append(flat_gradient(model))
            return value

        optimizer.step(closure)
        conditioned.append(flat_gradient(model))
        assert len(raws) >= 3
        assert all(state["steps"] == step + 1 for state in optimizer._engine.states[-1].values())
        p = undamped(model, optimizer)
        rates = dict.fromkeys(find_layers(model), 0.01)
        d = reference.step(p, squared_scales(model, optimizer), thetas[0], raws[0], rates)
        for raw, after in zip(raws, conditioned, strict=True):
            reference.check(optimizer, p, d, raw, after)


def dense(layer, method):
    """A linear map of rows as a matrix."""
    shape = (layer.groups, layer.units, layer.inputs // layer.groups, *layer.kernel)
    n = math.prod(shape)
    eye = torch.eye(n + layer.units * layer.groups)
    mapped = method(Rows(eye[:, :n].view(-1, *shape), eye[:, n:].view(-1, *shape[:2])))
    return torch.cat([mapped.weight.flatten(1), mapped.bias.flatten(1)], 1).mT


def row_map_of(model, x, chain):
    """A layer's P after a step, with the layer."""
    optimizer = wrapped(model, chain, lr=0.01)
    (model(x) ** 3).mean().backward()
    optimizer.step()
    blocks = optimizer.preconditioner().blocks
    return (blocks[0][0], blocks[0][1]) if blocks else None


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "bias-free"])
@pytest.mark.parametrize("layer", ["linear", "conv1d", "conv2d-groups", "transposed2d"])
@pytest.mark.parametrize("chain", CHAINS)
def test_inverse_is_the_pseudo_inverse_of_p(chain, layer, bias):
    model, x = build(layer, bias)
    found = row_map_of(model, x, CHAINS[chain].chain())
    if found is None:  # nobody takes it
        assert chain in ("wc", "none") or chain.startswith(("msr", "gc-conv"))
        return
    shape, row_map = found
    p, inverse = dense(shape, row_map.factor), dense(shape, row_map.inverse)
    close = dict(rtol=1e-10, atol=1e-11 * max(p.abs().max().item(), inverse.abs().max().item()))
    assert_close(p @ inverse @ p, p, **close)
    assert_close(inverse @ p @ inverse, inverse, **close)
    if not {"bnp", "gc"} <= {*chain.split("+")}:  # there it is a solution z of P z = theta, not the shortest one
        assert_close(inverse, torch.linalg.pinv(p, rtol=1e-10), **close)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "bias-free"])
@pytest.mark.parametrize("layer", ["linear", "conv2d-groups", "transposed2d"])
def test_weights_of_a_constant_input_have_no_coordinate(layer, bias):
    model, x = build(layer, bias)
    x.select(1, 0).fill_(2.0)
    shape, row_map = row_map_of(model, x, [BNP(eps_rel=0.0, eps=0.0)])
    p, inverse = dense(shape, row_map.factor), dense(shape, row_map.inverse)
    assert int((p == 0).all(0).sum()) == shape.units * shape.kernel_size
    assert_close(inverse, torch.linalg.pinv(p, rtol=1e-10), rtol=1e-10, atol=1e-10)
    theta, gradient = (random_rows(model, shape, bias) for _ in range(2))
    assert_squares(row_map, theta, gradient)


def random_rows(model, layer, bias, change=lambda t: t):
    weight = change(torch.randn(layer.weight.shape))
    return layer.rows(weight, change(torch.randn(layer.units * layer.groups)) if bias else None)


def assert_squares(row_map, theta, gradient, **close):
    size, slope, scale = row_map.squares(theta, gradient)
    assert scale == row_map.scale
    assert_close(size, square_of(row_map.inverse(theta)), **close)
    assert_close(slope, square_of(row_map.factor_transpose(gradient)), **close)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "bias-free"])
@pytest.mark.parametrize("options", [{}, {"taps": True}], ids=["tied", "taps"])
@pytest.mark.parametrize(
    "layer", ["linear", "linear-one-unit", "conv1d", "conv2d", "conv2d-groups", "conv3d", "transposed2d"]
)
def test_squares_are_the_lengths_of_rows(layer, options, bias):
    model, x = build(layer, bias)
    shape, row_map = row_map_of(model, x, [BNP(**options)])
    assert isinstance(row_map, RowMap)
    for change in (torch.clone, channels_last):
        theta, gradient = (random_rows(model, shape, bias, change) for _ in range(2))
        assert_squares(row_map, theta, gradient, rtol=1e-12, atol=0)
        assert_squares(row_map, theta, random_rows(model, shape, bias), rtol=1e-12, atol=0)
    low = [Rows(*(t if t is None else t.float() for t in rows)) for rows in (theta, gradient)]
    assert_close(row_map.squares(*low), row_map.squares(theta, gradient), rtol=1e-5, atol=0, check_dtype=False)


def channels_last(tensor):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return tensor.contiguous(memory_format=formats.get(tensor.dim(), torch.contiguous_format))


def test_a_saved_preconditioner_has_the_damping():
    model = network("conv")
    optimizer = wrapped(model, [BNP(), RateDamping()], lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        loss(model, step, "conv").backward()
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = gradcond.load_preconditioner(network("conv"), torch.load(file, weights_only=True))
    v = torch.randn(state_size(model))
    assert torch.equal(loaded.apply(v), optimizer.preconditioner().apply(v))
    assert not torch.equal(loaded.apply(v), undamped(model, optimizer) @ (undamped(model, optimizer).mT @ v))


def trained(lr, damping, steps=4, dtype=torch.float64):
    model = network("conv").to(dtype)
    optimizer = wrapped(model, [BNP(), damping] if damping else [BNP()], lr=lr)
    for step in range(steps):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        x = 1 + torch.randn(NETWORKS["conv"][1], generator=generator)
        (model(x.to(dtype)) - 1.0).square().sum().backward()
        optimizer.step()
    return flat_parameters(model), optimizer


def test_at_large_rates_steps_do_not_depend_on_the_rate():
    start = flat_parameters(network("conv"))
    (a, _), (b, _), (c, _) = (trained(lr, RateDamping(delay=1.0)) for lr in (1e-4, 1e8, 1e10))
    assert_close(b - start, c - start, rtol=1e-8, atol=1e-10)
    assert (b - start).norm() > 100 * (a - start).norm()


def test_without_strength_it_is_the_identity():
    (a, optimizer), (b, _) = trained(0.01, RateDamping(strength=0.0)), trained(0.01, None)
    assert torch.equal(a, b)
    assert all(bool((state["factor"] == 1).all()) for state in optimizer._engine.states[-1].values())


@pytest.mark.parametrize("before", BEFORE)
def test_with_little_strength_it_is_next_to_the_identity(before):
    def step(chain):
        model = network("recurrent")
        optimizer = wrapped(model, chain, lr=0.01)
        loss(model, 0, "recurrent").backward()
        optimizer.step()
        return flat_gradient(model), optimizer.preconditioner()

    (bare, m), (damped, other) = step(BEFORE[before]()), step([*BEFORE[before](), RateDamping(strength=1e-14)])
    assert_close(damped, bare, rtol=1e-6, atol=1e-9)
    assert_close(other.apply(bare), m.apply(bare), rtol=1e-6, atol=1e-9)


def test_a_unit_at_zero_moves_and_its_floor_says_how_far():
    model = nn.Linear(3, 2, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = wrapped(model, [RateDamping(strength=3.0, delay=0.0, floor=0.25)], lr=1.0)
    model.weight.grad = torch.tensor([[0.0, 0.0, 0.5], [0.0, 0.0, 0.0]])
    optimizer.step()  # rho = 0.5 / 0.25^1/2 = 1, and D = 1/2
    assert_close(model.weight.detach(), torch.tensor([[0.0, 0.0, -0.25], [0.0, 0.0, 0.0]]), rtol=1e-14, atol=0)
    model.weight.grad = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    nn.init.zeros_(model.weight)
    optimizer = wrapped(model, [RateDamping(floor=0.0)], lr=1.0)
    optimizer.step()
    assert bool(model.weight.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_of_half_precision_are_kept_in_float32(dtype):
    model = nn.Linear(3, 2, bias=False).to(dtype)
    optimizer = wrapped(model, [GradientCentralization(), RateDamping()], lr=1e-2)
    nn.init.ones_(model.weight)
    for _ in range(20):
        model.weight.grad = torch.tensor([[1e-3, -1e-3, 0.0], [1.0, -1.0, 0.0]]).to(dtype)
        optimizer.step()
    state = optimizer._engine.states[-1][""]
    assert state["sum"].dtype == state["factor"].dtype == torch.float32
    assert state["sum"][0, 0] > 0
    small, large = trained(1e-3, RateDamping(), dtype=dtype), trained(1e-3, RateDamping())
    for name, state in small[1]._engine.states[-1].items():
        exact = large[1]._engine.states[-1][name]["sum"]
        assert_close(state["sum"].double(), exact, rtol=0.2, atol=1e-3 * exact.max().item())


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    return torch.tensor(data.data / 16), torch.tensor(data.target)


def error(digits, lr, chain, seed=0):
    """The loss over all digits after 150 steps of batches of 8."""
    x, y = digits
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = wrapped(model, chain, lr=lr)
    for _ in range(150):
        drawn = torch.randint(len(x), (8,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[drawn]), y[drawn]).backward()
        if not all(bool(p.grad.isfinite().all()) for p in model.parameters()):
            return math.inf
        optimizer.step()
    with torch.no_grad():
        value = F.cross_entropy(model(x), y).item()
    return value if math.isfinite(value) else math.inf


def test_it_trains_at_rates_where_the_chain_before_it_diverges(digits):
    """From 2.3 on; measured over 4 seeds: 0.25 to 0.44 with it, over 80 without it."""
    damped = [error(digits, 2.0**k, [BNP(), RateDamping()]) for k in (-2, 0, 2, 4, 6)]
    assert max(damped) < 0.6
    assert min(error(digits, 2.0**k, [BNP()]) for k in (4, 6)) > 10


WRONG = {
    "first": (lambda: [RateDamping(), BNP()], "at most one RateDamping, behind the other conditioners"),
    "twice": (lambda: [BNP(), RateDamping(), RateDamping()], "got BNP, RateDamping, RateDamping; change the order"),
    "behind": (lambda: [NormClipping(), RateDamping()], "at most one NormClipping, behind that"),
}


@pytest.mark.parametrize("chain", WRONG)
def test_chains_in_another_order_are_refused(chain):
    make, words = WRONG[chain]
    with pytest.raises(ValueError, match=words):
        wrapped(nn.Linear(2, 1), make())


def test_groups_without_a_rate_are_refused():
    class Rateless(torch.optim.SGD):
        def __init__(self, parameters):
            super().__init__(parameters)
            for group in self.param_groups:
                del group["lr"]

    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="learning rate 'lr', which RateDamping goes by, got a Rateless"):
        gradcond.wrap(Rateless(model.parameters()), model, [BNP(), RateDamping()])
    gradcond.wrap(Rateless(model.parameters()), model, [BNP()])


@pytest.mark.parametrize("key", ["strength", "delay", "floor"])
@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_settings_out_of_range_are_refused(key, value):
    with pytest.raises(ValueError, match="RateDamping: strength, delay and floor must not be negative"):
        RateDamping(**{key: value})


@pytest.mark.parametrize("chain", [[], [BNP()]], ids=str)
def test_momentum_of_one_is_refused_and_changes_nothing(chain):
    model = nn.Linear(3, 2)
    optimizer = gradcond.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, [*chain, RateDamping()])
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    before = str((optimizer.state_dict()["gradcond"], model.state_dict()))
    optimizer.param_groups[0]["momentum"] = 1.0
    model(torch.randn(4, 3)).sum().backward()
    with pytest.raises(ValueError, match=r"expected momentum below 1 .* got 1.0"):
        optimizer.step()
    assert str((optimizer.state_dict()["gradcond"], model.state_dict())) == before


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_units_is_reported():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 0))
    optimizer = gradcond.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, [BNP(), RateDamping()])
    x = torch.randn(4, 3)
    for _ in range(3):
        optimizer.zero_grad()
        (model[0](x).sum() + model[1](x).sum()).backward()
        optimizer.step()
    assert "no units" in str(optimizer.report())
