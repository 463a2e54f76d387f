"""Data-dependent initialization: unit variances in the order of execution, and nothing else changed."""

import math

import pytest
import torch
from cases import LAYERS, build
from torch import nn
from torch.testing import assert_close

from gradcond import unit_variance_init_


class Residual(nn.Module):
    """Defined against the order in which it runs; the last layers see a sum, the branches one input."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 3)
        self.narrow = nn.Linear(8, 4)
        self.widen = nn.Linear(4, 8)
        self.gate = nn.Linear(8, 8)
        self.stem = nn.Linear(5, 8)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.widen(self.narrow(x).relu())
        return self.head(x * self.gate(x).sigmoid())


def conv_net():
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3, groups=2, bias=False),
        nn.Dropout(0.5),
        nn.ConvTranspose2d(6, 4, 2, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4 * 64, 3),
    )


def transformer():
    model = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model.self_attn.out_proj.requires_grad_(False)  # used without a call
    return model


MODELS = {
    "plain": (lambda: nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 2)), (16, 5)),
    "residual": (Residual, (16, 5)),
    "conv": (conv_net, (3, 2, 6, 6)),
    "transformer": (transformer, (4, 5, 8)),
}


def variances(model, x):
    """Of the layers' outputs, in eval mode, measured from outside."""
    found, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            keep = lambda _, args, output, name=name: found.__setitem__(name, output.var(correction=0))  # noqa: E731
            handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        model.eval()(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", MODELS)
def test_every_output_has_variance_one(name):
    make, shape = MODELS[name]
    model, x = make(), 3 + 5 * torch.randn(shape)
    before = {key: p.clone() for key, p in model.named_parameters()}
    called = variances(model, x)
    assert all(abs(value - 1) > 1e-3 for value in called.values())
    factors = unit_variance_init_(model, x)
    assert list(factors) == list(called)  # the order of execution
    for key, variance in variances(model, x).items():
        assert abs(variance - 1) < 1e-10, key
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, before[key] * factors.get(key.rpartition(".")[0], 1.0)), key


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_is_divided_by_the_deviation_of_its_output(layer, bias):
    model, x = build(layer, bias)
    output = model(x).detach()
    factors = unit_variance_init_(model, x)
    deviation = (output - output.mean()).square().mean().sqrt()
    assert factors == {"0": pytest.approx(1 / deviation.item(), rel=1e-12)}
    assert_close(model(x), output / deviation)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_neither_underflow_nor_overflow(scale):
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4)).float()
    nn.init.normal_(model[0].weight, std=scale)
    x = torch.randn(32, 4, dtype=torch.float32)
    unit_variance_init_(model, x)
    assert_close(model[0](x).var(correction=0).item(), 1.0, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, x = nn.Linear(20, 30, dtype=dtype), torch.randn(50, 20, dtype=dtype)
    unit_variance_init_(model, x)
    assert_close(model(x).float().var(correction=0).item(), 1.0, rtol=0.02, atol=0)


def test_the_second_time_changes_nothing_more():
    model, x = Residual(), torch.randn(16, 5)
    unit_variance_init_(model, x)
    for factor in unit_variance_init_(model, x).values():
        assert factor == pytest.approx(1, rel=1e-12)


def test_the_first_call_of_a_shared_module_decides():
    cell = nn.Linear(4, 4)
    model, x = nn.Sequential(cell, nn.Tanh(), cell, nn.Linear(4, 2)), torch.randn(16, 4)
    assert list(unit_variance_init_(model, x)) == ["0", "3"]
    assert_close(cell(x).var(correction=0), torch.tensor(1.0))
    assert_close(model(x).var(correction=0), torch.tensor(1.0))  # behind the second call, too


class Noisy(nn.Module):
    """Counts its calls in a buffer and drops out whatever its mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        self.last = x.mean().view(1)
        return nn.functional.dropout(x, 0.1) * self.calls


def test_nothing_else_is_touched():
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), Noisy(), nn.Linear(8, 3))
    model[0].next = model[3]  # a module that two others hold
    x = torch.randn(16, 5, requires_grad=True)
    model(x).sum().backward()
    model[1].eval()
    gradients = [p.grad for p in model.parameters()]
    copies = [g.clone() for g in gradients]
    buffers = {key: (b, b.clone()) for key, b in model.named_buffers()}
    modes = [m.training for m in model.modules()]
    inputs, random = x.detach().clone(), torch.get_rng_state()

    unit_variance_init_(model, x)

    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(x, inputs)
    for key, buffer in model.named_buffers():
        assert buffer is buffers[key][0], key
        assert torch.equal(buffer, buffers[key][1]), key
    for parameter, gradient, copy in zip(model.parameters(), gradients, copies, strict=True):
        assert parameter.grad is gradient
        assert torch.equal(gradient, copy)
        assert parameter.requires_grad
    assert not any(m._forward_hooks for m in model.modules())


def test_it_is_deterministic_and_dropout_is_off():
    results = []
    for seed in range(2):
        torch.manual_seed(0)
        model, x = conv_net(), torch.randn(3, 2, 6, 6)
        torch.manual_seed(seed)
        factors = unit_variance_init_(model, x)
        results.append((factors, [p.detach() for p in model.parameters()]))
    assert results[0][0] == results[1][0]
    assert all(map(torch.equal, results[0][1], results[1][1]))


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, left, right, *, scale=1.0):
        return scale * (self.left(left) + self.right(right))


@pytest.mark.parametrize("kind", ["tuple", "list", "dict"])
def test_batches_of_several_inputs(kind):
    model, left, right = Sum(), torch.randn(9, 3), torch.randn(9, 2)
    batches = {"tuple": (left, right), "list": [left, right], "dict": {"right": right, "left": left, "scale": 2.0}}
    unit_variance_init_(model, batches[kind])
    for output in (model.left(left), model.right(right)):
        assert_close(output.var(correction=0), torch.tensor(1.0))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padding_of_a_transformer_does_not_count():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1)
    x, padded = torch.randn(3, 5, 4), torch.arange(5) >= torch.tensor([[3], [5], [1]])
    outputs = []
    unit_variance_init_(model, {"src": x, "src_key_padding_mask": padded})  # in eval mode it packs the sequences
    model.eval().layers[0].linear1.register_forward_hook(lambda m, args, y: outputs.append(torch.cat(y.unbind())))
    with torch.no_grad():
        model(x, src_key_padding_mask=padded)
    assert outputs[0].shape == (9, 8)
    assert_close(outputs[0].var(correction=0), torch.tensor(1.0))


def test_frozen_and_tied_layers_keep_their_weights():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.requires_grad_(False)
    model[3].weight = model[2].weight
    before = [p.clone() for p in model.parameters()]
    x = torch.randn(16, 4)
    assert list(unit_variance_init_(model, x)) == ["1"]
    assert not model[0].weight.requires_grad
    after = list(model.parameters())
    for i in (0, 1, 4, 5, 6):
        assert torch.equal(before[i], after[i])
    assert_close(model[:2](x).var(correction=0), torch.tensor(1.0))


def test_layers_that_are_never_called_are_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model[1].unused = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match=r"never called on this batch keep their weights: 1\.unused") as caught:
        assert list(unit_variance_init_(model, torch.randn(8, 4))) == ["0"]
    assert caught[0].filename == __file__


class Standardized(nn.Linear):
    def forward(self, x):
        weight = self.weight - self.weight.mean(1, keepdim=True)
        return nn.functional.linear(x, weight / weight.norm(dim=1, keepdim=True))


class Failing(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        raise self.error


def constant(module, value):
    nn.init.constant_(module.weight, value)
    return module


FAILURES = {
    "zero-weight": (lambda: constant(nn.Linear(8, 3), 0.0), ValueError, r"layer '2'.*\(weight zero\)"),
    "constant": (lambda: nn.Linear(8, 3).requires_grad_(), ValueError, "layer '3'.*standard deviation 0 "),
    "nan": (lambda: constant(nn.Linear(8, 3), math.nan), ValueError, r"standard deviation nan \(weight not finite"),
    "inf": (lambda: constant(nn.Linear(8, 3), math.inf), ValueError, "standard deviation nan"),
    "standardized": (lambda: Standardized(8, 3), ValueError, r"layer '2' \(Standardized\) to scale with"),
    "model": (lambda: Failing(RuntimeError("of the model")), RuntimeError, "of the model"),
    "interrupt": (lambda: Failing(KeyboardInterrupt("stop")), KeyboardInterrupt, "stop"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_errors_leave_everything_as_it_was(case):
    make, error, message = FAILURES[case]
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), make())
    if case == "constant":
        model.append(nn.Linear(3, 1, bias=False))
        nn.init.constant_(model[2].bias, 1.0)
        model.insert(3, nn.Hardtanh(100.0, 101.0))  # only the value 100 goes on
        message = message.replace("'3'", "'4'")
    model[0].eval()
    before = [p.clone() for p in model.parameters()]
    x, random = torch.randn(16, 4), torch.get_rng_state()
    with pytest.raises(error, match=message):
        unit_variance_init_(model, x)
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert_close(parameter, value, rtol=0, atol=0, equal_nan=True)
    assert [m.training for m in model.modules()][:2] == [True, False]
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_hooks for m in model.modules())


def test_a_constant_is_told_from_its_rounding():
    model = nn.Linear(100, 1)
    with pytest.raises(ValueError, match="expected outputs of layer '' that vary"):
        unit_variance_init_(model, torch.full((37, 100), 0.1))


def test_other_inputs_are_refused():
    model = nn.Linear(4, 4)
    with pytest.raises(TypeError, match=r"expected a tensor, a tuple or list .* got str; put"):
        unit_variance_init_(model, "batch")
    with pytest.raises(ValueError, match="expected outputs of layer '' that vary"):
        unit_variance_init_(model, torch.empty(0, 4))
    with pytest.raises(ValueError, match="expected modules that have their shapes, got a lazy one"):
        unit_variance_init_(nn.Sequential(nn.LazyLinear(3)), torch.randn(2, 4))
    model = nn.Sequential(nn.Identity())
    model[0].unused = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"none of \['0.unused'\] ran"):
        unit_variance_init_(model, torch.randn(2, 4))
    assert unit_variance_init_(nn.ReLU(), torch.randn(2, 4)) == {}


def test_a_deep_network_whose_activations_vanish_trains_after_it():
    def final_loss(scaled):
        torch.manual_seed(0)
        layers = [layer for _ in range(10) for layer in (nn.Linear(24, 24), nn.ReLU())]
        model, x = nn.Sequential(*layers, nn.Linear(24, 1)), torch.randn(64, 24)
        y = x[:, :1] * x[:, 1:2]
        if scaled:
            unit_variance_init_(model, x)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.003, momentum=0.9)
        for _ in range(150):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
        return loss.item() / y.var(correction=0).item()

    assert final_loss(scaled=False) > 0.95  # it learns the mean
    assert final_loss(scaled=True) < 0.3
