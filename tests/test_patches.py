"""BNP(taps=True): moments of what each tap meets. The sweep against unfolded columns is in test_layers.py."""

import copy

import pytest
import torch
from dense import check, conv_units, flat
from torch import nn
from torch.testing import assert_close

import gradcond
from gradcond import BNP


def wrapped(model, lr=1.0, **settings):
    return gradcond.wrap(torch.optim.SGD(model.parameters(), lr=lr), model, [BNP(taps=True, **settings)])


def state_of(optimizer, name=""):
    return optimizer.state_dict()["gradcond"]["chain"][0]["layers"][name]


def step(model, optimizer, x):
    optimizer.zero_grad()
    model(x).pow(3).mean().backward()
    optimizer.step()


def inputs(*shape):
    column = [-1] + [1] * (len(shape) - 2)
    return torch.linspace(1, 3, shape[1]).view(column) + torch.randn(shape) * torch.logspace(-0.5, 0.5, shape[-1])


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_around_a_circle_every_tap_meets_every_position(kind):
    dims = int(kind.__name__[4])
    model = kind(2, 3, 3, padding=1, padding_mode="circular")
    tied = copy.deepcopy(model)
    x = inputs(4, 2, *[4] * dims)
    step(model, optimizer := wrapped(model, decay=0.0), x)
    other = gradcond.wrap(torch.optim.SGD(tied.parameters(), lr=1.0), tied, [BNP(decay=0.0)])
    step(tied, other, x)
    assert_close(flat(model.parameters()), flat(tied.parameters()))
    mean = state_of(other)["mean"]
    assert_close(state_of(optimizer)["mean"], mean.repeat_interleave(3**dims))


def test_zero_padding_pulls_the_border_taps_to_zero():
    model = nn.Conv1d(1, 1, 3, padding=1)
    step(model, optimizer := wrapped(model, decay=0.0), torch.full((2, 1, 4), 8.0))
    assert_close(state_of(optimizer)["mean"], torch.tensor([6.0, 8.0, 6.0]))
    assert_close(state_of(optimizer)["variance"], torch.tensor([12.0, 0.0, 12.0]))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 2, 1),
        nn.Conv2d(3, 2, 1, padding=1),
        nn.Conv2d(3, 2, 1, stride=2),
        nn.ConvTranspose2d(3, 2, 1),
        nn.ConvTranspose2d(3, 2, 1, stride=2, padding=1),
    ],
    ids=str,
)
def test_a_kernel_of_one_tap_meets_the_padding_and_only_every_stride(conv):
    conv = conv.double()
    x = inputs(3, 3, 5, 4)
    check(conv, lambda: conv(x).pow(3).mean(), conv_units(conv, x, taps=True), taps=True)


def test_an_output_size_that_the_call_asks_for_crops_less():
    up = nn.ConvTranspose1d(1, 1, 3, stride=2, padding=1)  # tap 2 of input i makes output 2 i + 1
    optimizer = wrapped(up, decay=0.0)
    up(torch.tensor([[[0.0, 1.0, 5.0]]]), output_size=[6]).sum().backward()
    optimizer.step()
    assert_close(state_of(optimizer)["mean"], torch.tensor([3.0, 2.0, 2.0]))


def test_linear_layers_have_one_number_per_input_all_the_same():
    model, x = nn.Linear(3, 2), inputs(6, 3)
    twin = copy.deepcopy(model)
    step(model, wrapped(model), x)
    step(twin, gradcond.wrap(torch.optim.SGD(twin.parameters(), lr=1.0), twin, [BNP()]), x)
    assert torch.equal(model.weight, twin.weight)


@pytest.mark.parametrize("layer", ["Conv2d", "ConvTranspose2d"])
def test_micro_batches_count_as_their_union(layer):
    x = inputs(6, 2, 5, 5)
    results = []
    for parts in (1, 3):
        torch.manual_seed(1)
        model = getattr(nn, layer)(2, 3, 3, stride=2, padding=1)
        optimizer = wrapped(model, decay=0.0)
        for part in x.chunk(parts):
            (model(part).pow(3).mean() / parts).backward()
        optimizer.step()
        results.append(torch.cat([flat(model.parameters()), state_of(optimizer)["variance"]]))
    assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


def test_micro_batches_of_other_sizes_weigh_by_their_patches():
    model = nn.Conv1d(1, 1, 2, stride=2)
    optimizer = wrapped(model, decay=0.0)
    for x in ([[0.0, 1.0, 7.0]], [[2.0, 3.0, 4.0, 5.0]]):  # patches (0, 1), and (2, 3), (4, 5)
        model(torch.tensor([x])).pow(3).sum().backward()
    optimizer.step()
    assert_close(state_of(optimizer)["mean"], torch.tensor([2.0, 3.0]))
    assert_close(state_of(optimizer)["variance"], torch.tensor([8.0, 8.0]) / 3)


def test_resumed_is_uninterrupted():
    def train(model, optimizer, steps):
        for seed in steps:
            torch.manual_seed(seed)
            step(model, optimizer, inputs(3, 2, 5, 5))

    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.ConvTranspose2d(3, 2, 2))
    optimizer = wrapped(model, lr=0.01)
    train(model, optimizer, range(3))
    resumed = copy.deepcopy(model)
    other = wrapped(resumed, lr=1.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(3, 6))
    train(resumed, other, range(3, 6))
    assert torch.equal(flat(model.parameters()), flat(resumed.parameters()))
    assert torch.equal(state_of(optimizer, "0")["variance"], state_of(other, "0")["variance"])


def test_a_state_with_tied_taps_is_refused():
    model = nn.Conv2d(2, 3, 3)
    tied = gradcond.wrap(torch.optim.SGD(model.parameters(), lr=1.0), model, [BNP()])
    step(model, tied, inputs(3, 2, 5, 5))
    with pytest.raises(ValueError, match=r"is of BNP\(taps=False\), this optimizer has True"):
        wrapped(model).load_state_dict(tied.state_dict())


def test_taps_cannot_be_changed_on_the_way():
    model = nn.Conv1d(2, 3, 3)
    step(model, optimizer := wrapped(model), inputs(4, 2, 5))
    before = copy.deepcopy((model.state_dict(), state_of(optimizer)))
    optimizer.conditioners[0].taps = False
    with pytest.raises(ValueError, match="taps=True, as it was when"):
        step(model, optimizer, inputs(4, 2, 5))
    assert_close((dict(model.state_dict()), state_of(optimizer)), (dict(before[0]), before[1]), rtol=0, atol=0)
    optimizer.conditioners[0].taps = True
    step(model, optimizer, inputs(4, 2, 5))


def test_variances_survive_a_large_mean_in_float32():
    model = nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect").float()
    x = (1e4 + 1e-2 * torch.randn(16, 2, 6, 6)).float()
    step(model, optimizer := wrapped(model, lr=0.0, decay=0.0), x)
    columns = nn.functional.unfold(nn.functional.pad(x.double(), (1, 1, 1, 1), mode="reflect"), 3)
    expected = columns.movedim(1, 0).flatten(1).var(1, correction=0)
    assert_close(state_of(optimizer)["variance"].double(), expected, rtol=0.01, atol=0)
