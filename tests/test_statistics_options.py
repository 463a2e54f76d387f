"""What BNP's moments are taken of and when: ghost rows, every k steps, staleness, large means."""

import copy

import pytest
import torch
from dense import flat
from torch import nn
from torch.testing import assert_close

import gradcond
import gradcond.inputs
from gradcond import BNP


def wrapped(model, lr=0.0, **settings):
    return gradcond.wrap(torch.optim.SGD(model.parameters(), lr=lr, momentum=0.5), model, [BNP(**settings)])


def state_of(optimizer, name=""):
    return optimizer.state_dict()["gradcond"]["chain"][0]["layers"][name]


def step(model, optimizer, *batches):
    """One step on the gradients of these micro-batches."""
    optimizer.zero_grad()
    for x in batches:
        model(x).pow(3).mean().backward()
    optimizer.step()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2))


def images(seed, n=8):
    generator = torch.Generator().manual_seed(seed)
    return 1 + torch.randn(n, 2, 4, 4, generator=generator) * torch.tensor([0.5, 2.0]).view(2, 1, 1)


def train(model, optimizer, steps):
    for seed in steps:
        step(model, optimizer, images(seed))


def dense(optimizer):
    m = optimizer.preconditioner()
    return m.apply(torch.eye(m.shape[0]))


# ghost rows


def test_the_moments_of_ghost_rows_are_those_of_all_on_average():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 1), 2 + torch.randn(20, 3) * torch.tensor([0.3, 1.0, 3.0])
    optimizer = wrapped(model, decay=0.0, ghost=4)
    draws = []
    for _ in range(600):
        step(model, optimizer, x)
        draws.append(torch.stack([state_of(optimizer)["mean"], state_of(optimizer)["variance"]]))
    draws = torch.stack(draws)
    variance = x.var(0, correction=0)
    error = draws.std(0) / len(draws) ** 0.5
    # 4 of 20 without replacement: the biased variance has this mean
    expected = torch.stack([x.mean(0), variance * 20 / 19 * 3 / 4])
    assert ((draws.mean(0) - expected).abs() < 4 * error).all()
    assert len(draws[:, 0].unique(dim=0)) > 500  # of 4845 choices


@pytest.mark.parametrize("ghost", [8, 20])
def test_as_many_ghost_rows_as_there_are_are_all_of_them(ghost):
    model = network()
    twin = copy.deepcopy(model)
    train(model, wrapped(model, 0.1), range(3))
    train(twin, wrapped(twin, 0.1, ghost=ghost), range(3))
    assert torch.equal(flat(model.parameters()), flat(twin.parameters()))


def test_the_step_is_scaled_by_all_rows_and_convolutions_draw_whole_samples():
    model, x = nn.Conv2d(2, 3, 3), images(0)
    optimizer = wrapped(model, decay=0.0, ghost=1)
    step(model, optimizer, x)
    state = state_of(optimizer)
    assert (state["rows"], state["samples"]) == (8 * 4, 8)
    means = x.mean((2, 3))
    assert any(torch.allclose(state["mean"], mean) for mean in means)


def test_linear_layers_draw_rows_of_every_leading_axis():
    model, x = nn.Linear(2, 1), torch.randn(3, 5, 2)
    optimizer = wrapped(model, decay=0.0, ghost=1)
    drawn = set()
    for _ in range(200):
        step(model, optimizer, x)
        drawn |= {i for i, row in enumerate(x.flatten(0, 1)) if torch.allclose(row, state_of(optimizer)["mean"])}
    assert drawn == set(range(15))


def test_each_call_of_a_step_draws_for_itself():
    model, x = nn.Linear(2, 1), torch.randn(50, 2)
    optimizer = wrapped(model, decay=0.0, ghost=1)
    step(model, optimizer, *[x] * 20)
    assert (state_of(optimizer)["variance"] > 0.1).all()  # of one row again and again it would be 0


@pytest.mark.parametrize("taps", [False, True])
@pytest.mark.parametrize("layer", ["linear", "conv", "transposed"])
def test_ghost_rows_count_for_all_rows_of_their_call(layer, taps):
    build = {"linear": nn.Linear, "conv": nn.Conv1d, "transposed": nn.ConvTranspose1d}[layer]
    model, positions = (build(1, 1), ()) if layer == "linear" else (build(1, 1, 2), (3,))
    optimizer = wrapped(model, decay=0.0, ghost=1, taps=taps)
    step(model, optimizer, torch.zeros(1, 1, *positions), torch.full((3, 1, *positions), 4.0))
    state = state_of(optimizer)
    assert_close(state["mean"], torch.full_like(state["mean"], 3.0))  # a quarter of the rows are 0
    assert_close(state["variance"], torch.full_like(state["mean"], 3.0))


@pytest.mark.parametrize("settings", [{"ghost": 2}, {"ghost": 2, "taps": True}, {"ghost": 3, "every": 2}], ids=str)
def test_draws_repeat_resume_and_leave_the_global_generator_alone(settings):
    model = network()
    twin = copy.deepcopy(model)
    optimizer, other = wrapped(model, 0.1, **settings), wrapped(twin, 0.1, **settings)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(model, optimizer, range(3))
    assert torch.equal(torch.rand(3), expected)
    train(twin, other, range(3))
    assert torch.equal(flat(model.parameters()), flat(twin.parameters()))
    third = copy.deepcopy(model)
    resumed = wrapped(third, 0.1, **settings)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(3, 6))
    train(third, resumed, range(3, 6))
    assert torch.equal(flat(model.parameters()), flat(third.parameters()))


# every k steps


@pytest.mark.parametrize("k", [1, 2, 3])
def test_moments_are_taken_at_steps_1_and_1_plus_k_and_at_no_other(k, monkeypatch):
    taken = []
    one, several = gradcond.inputs.channel_moments, gradcond.inputs.moments_of_matrices
    monkeypatch.setattr(gradcond.inputs, "channel_moments", lambda x, axis: (taken.append(x), one(x, axis))[1])
    monkeypatch.setattr(gradcond.inputs, "moments_of_matrices", lambda xs: (taken.extend(xs), several(xs))[1])
    model = network()
    optimizer, before = wrapped(model, 0.01, every=k), None
    for t in range(1, 8):
        taken.clear()
        step(model, optimizer, images(t))
        due = (t - 1) % k == 0
        assert len(taken) == (2 if due else 0)
        now = dense(optimizer)
        assert (before is None or not torch.equal(now, before)) == due
        assert state_of(optimizer, "0")["steps"] == (t - 1) // k + 1
        before = now


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("start", [1, 2, 3])
def test_resumed_in_the_middle_of_a_cycle_is_uninterrupted(k, start):
    model = network()
    optimizer = wrapped(model, 0.1, every=k)
    train(model, optimizer, range(start))
    resumed = copy.deepcopy(model)
    other = wrapped(resumed, 0.1, every=k)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(start, start + 6))
    train(resumed, other, range(start, start + 6))
    assert torch.equal(flat(model.parameters()), flat(resumed.parameters()))
    assert torch.equal(dense(optimizer), dense(other))


def test_micro_batches_of_a_step_that_is_due_count_as_their_union():
    model = network()
    twin = copy.deepcopy(model)
    optimizer, other = wrapped(model, 0.1, every=2), wrapped(twin, 0.1, every=2)
    for t in range(5):
        x = images(t)
        step(model, optimizer, x)
        other.zero_grad()
        for part in x.chunk(4):
            (twin(part).pow(3).mean() / 4).backward()
        other.step()
        assert state_of(optimizer, "3")["rows"] == state_of(other, "3")["rows"] == 8
    assert_close(flat(model.parameters()), flat(twin.parameters()), rtol=1e-11, atol=1e-12)


def test_every_may_be_changed_on_the_way():
    model = network()
    optimizer = wrapped(model, 0.01, every=100)
    train(model, optimizer, range(3))
    assert state_of(optimizer, "0")["steps"] == 1
    optimizer.conditioners[0].every = 1
    train(model, optimizer, range(3, 6))
    assert state_of(optimizer, "0")["steps"] >= 3


# staleness


def staleness(optimizer, name=""):
    """As the report gives it."""
    (text,) = optimizer.report().conditioned[name]
    return float(text.split("staleness ")[1].split(",")[0].rstrip(")"))


@pytest.mark.parametrize("n", [4, 25, 100])
def test_staleness_is_the_error_of_a_mean_for_rows_of_one_distribution(n):
    torch.manual_seed(0)
    model, values = nn.Linear(40, 1), []
    optimizer = wrapped(model, eps=0, eps_rel=0)
    for t in range(60):
        step(model, optimizer, 3 + 2 * torch.randn(n, 40))
        if t > 20:
            values.append(staleness(optimizer))
    average = sum(values) / len(values)
    assert abs(average * n**0.5 - 1) < 0.15


def test_staleness_tells_of_a_shift_of_the_inputs_and_calms_down():
    torch.manual_seed(0)
    model = nn.Linear(40, 1)
    optimizer = wrapped(model, decay=0.9)
    step(model, optimizer, torch.randn(64, 40))
    assert "staleness" not in str(optimizer.report())  # there was nothing to compare with
    for _ in range(30):
        step(model, optimizer, torch.randn(64, 40))
    assert staleness(optimizer) < 0.3
    step(model, optimizer, 5 + torch.randn(64, 40))
    assert staleness(optimizer) > 2  # 5 deviations, by then a part of the variance
    for _ in range(80):
        step(model, optimizer, 5 + torch.randn(64, 40))
    assert staleness(optimizer) < 0.3


# large means


@pytest.mark.parametrize("settings", [{}, {"every": 3}, {"ghost": 200}, {"taps": True}], ids=str)
@pytest.mark.parametrize("layer", ["linear", "conv1d", "conv2d", "transposed", "channels-last"])
def test_a_mean_of_1e4_leaves_a_deviation_of_1e_2_its_variance_in_float32(layer, settings):
    torch.manual_seed(0)
    model, shape = {
        "linear": (nn.Linear(3, 1), (256, 3)),
        "conv1d": (nn.Conv1d(3, 1, 2), (256, 3, 5)),
        "conv2d": (nn.Conv2d(3, 1, 1), (256, 3, 5, 5)),
        "transposed": (nn.ConvTranspose2d(3, 1, 2), (256, 3, 4, 4)),
        "channels-last": (nn.Conv2d(3, 1, 2), (256, 3, 5, 5)),
    }[layer]
    model = model.float()
    optimizer = wrapped(model, decay=0.5, **settings)
    for _ in range(4):
        x = (1e4 + 1e-2 * torch.randn(shape)).float()
        step(model, optimizer, x.to(memory_format=torch.channels_last) if layer == "channels-last" else x)
    variance = state_of(optimizer)["variance"].double()
    # numbers near 1e4 are 2^-10 apart, which adds 2^-20 / 12; the rest is sampling
    n = min(settings.get("ghost", 256), 256) * x[0, 0].numel()
    assert_close(variance, torch.full_like(variance, 1e-4), rtol=0.002 + 4 * (2 / n) ** 0.5, atol=0)


@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_one_step_has_the_variance_of_its_own_rows_to_a_percent(layer):
    torch.manual_seed(0)
    model = (nn.Linear(3, 1) if layer == "linear" else nn.Conv2d(3, 1, 2)).float()
    optimizer = wrapped(model, decay=0.0)
    for mean in (1e4, -1e4, 0.0):
        x = (mean + 1e-2 * torch.randn((512, 3) if layer == "linear" else (32, 3, 6, 6))).float()
        step(model, optimizer, x)
        expected = x.double().movedim(1, 0).flatten(1).var(1, correction=0)
        assert_close(state_of(optimizer)["variance"].double(), expected, rtol=0.01, atol=0)
