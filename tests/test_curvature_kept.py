"""The graph that is kept for a single batch sees every change of what it depends on."""

import dataclasses
import functools
import math
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dense_curvature import dense_hessian, problem
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradcond.curvature import GGN, EmpiricalFisher, Hessian, ModelLoss, MonteCarloFisher
from gradcond.curvature.snapshot import _Copy

KINDS = [Hessian, GGN, EmpiricalFisher, MonteCarloFisher]


def replace_weight(model, x, y, loss):
    model[0].weight = nn.Parameter(torch.ones(4, 4))


def load(model, x, y, loss):
    model.load_state_dict({name: 0.5 * t for name, t in model.state_dict().items()})


def to_train(model, x, y, loss):
    model.train()


@torch.no_grad()
def through_data(model, x, y, loss):
    model[3].weight.data.mul_(1.5)  # moves no version counter


@torch.no_grad()
def in_place(model, x, y, loss):
    model[0].weight.mul_(1.5)


def new_storage(model, x, y, loss):
    model[3].weight.data = 1.5 * model[3].weight.data


@torch.no_grad()
def two_swapped(model, x, y, loss):
    model[3].weight.data.copy_(model[3].weight.data.flip(1))  # the same numbers in other places


def a_buffer(model, x, y, loss):
    model[1].running_var.fill_(4.0)


def a_setting(model, x, y, loss):
    model[1].eps = 0.5


def the_input(model, x, y, loss):
    x.numpy()[0] += 1.0  # behind torch's back


def the_target(model, x, y, loss):
    y.copy_((y + 1) % 3)


def the_loss(model, x, y, loss):
    loss.label_smoothing = 0.3


def the_class_weights(model, x, y, loss):
    loss.weight.mul_(torch.tensor([1.0, 2.0, 3.0]))


def other_class_weights(model, x, y, loss):
    loss.weight = torch.tensor([1.0, 2.0, 3.0])


def the_reduction(model, x, y, loss):
    loss.reduction = "sum"


def a_module(model, x, y, loss):
    model[2] = nn.Sigmoid()


def a_hook(model, x, y, loss):
    model[0].register_forward_hook(lambda module, args, output: 2 * output)


CHANGES = {
    function.__name__: function
    for function in (
        *(replace_weight, load, to_train, through_data, in_place, new_storage, two_swapped, a_buffer, a_setting),
        *(the_input, the_target, the_loss, the_class_weights, other_class_weights),
        *(the_reduction, a_module, a_hook),
    )
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CHANGES)
def test_a_kept_graph_is_never_stale(name, kind):
    model, x, y = problem()
    loss = nn.CrossEntropyLoss(weight=torch.ones(3))

    def make():
        return kind(model, loss, [(x, y)], method="double_backward")

    H, v = make(), torch.randn(make().shape[0])
    before = H @ v
    kept = H._kept
    assert torch.equal(H @ v, before) and H._kept is kept
    CHANGES[name](model, x, y, loss)
    after = H @ v
    torch.testing.assert_close(after, make() @ v, rtol=0, atol=1e-13)
    assert H._kept is not kept
    if kind is Hessian:  # the others do not depend on everything
        assert (after - before).norm() > 1e-4 * before.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_is_kept_where_only_objects_change(kind):
    model, x, y = problem()
    data = [(x, y)]
    H = kind(model, nn.CrossEntropyLoss(), data, method="double_backward")
    v = torch.ones(H.shape[0])
    product, kept = H @ v, H._kept
    model[1].eps, data[0] = float("1e-5"), (x.clone(), y.clone())
    for _ in range(2):
        assert torch.equal(H @ v, product) and H._kept is kept
    x.numpy()[:] = 0  # of which the graph still is
    assert torch.equal(H @ v, product)
    model.load_state_dict(model.state_dict())  # the same numbers, but autograd takes them for others
    assert torch.equal(H @ v, product)
    kept = H._kept
    kept, data[0] = H._kept, (torch.ones_like(x), y)
    torch.testing.assert_close(H @ v, kind(model, nn.CrossEntropyLoss(), data) @ v, rtol=0, atol=1e-13)
    assert H._kept is not kept


SCALE = torch.ones(())


def scaled(output, target):
    return SCALE * F.cross_entropy(output, target)


def test_what_a_loss_closes_over_and_names_is_watched():
    model, x, y = problem()
    factors = {"inner": 1.0}

    def closed(output, target):
        return factors["inner"] * F.cross_entropy(output, target)

    class Held:
        factor = 1.0

        def __call__(self, output, target):
            return self.factor * F.cross_entropy(output, target)

    held, attribute = Held(), nn.Sequential(model)
    held.factor, attribute.temperature = 1.0, 1.0
    own = ModelLoss(lambda model, batch: attribute.temperature * F.cross_entropy(model(batch[0]), batch[1]))
    partial = functools.partial(lambda o, t, settings: settings[0] * F.cross_entropy(o, t), settings=[1.0])
    array, objects = np.ones(1), np.array([1.0, None])
    of_array = functools.partial(lambda o, t, a: float(a[0]) * F.cross_entropy(o, t), a=array)
    of_objects = functools.partial(lambda o, t, a: a[0] * F.cross_entropy(o, t), a=objects)
    for loss in (closed, scaled, held, own, partial, of_array, of_objects):
        H = Hessian(model, loss, [(x, y)], method="double_backward")
        v = torch.ones(H.shape[0])
        once = H @ v
        factors["inner"] = held.factor = attribute.temperature = partial.keywords["settings"][0] = 2.0
        array[0] = objects[0] = 2.0
        SCALE.fill_(2.0)
        torch.testing.assert_close(H @ v, 2 * once)
        factors["inner"] = held.factor = attribute.temperature = partial.keywords["settings"][0] = 1.0
        array[0] = objects[0] = 1.0
        SCALE.fill_(1.0)


SETTINGS = types.SimpleNamespace(factor=1.0)


class Scaled(nn.Module):
    """Reads a global, and an object that it holds."""

    def __init__(self):
        super().__init__()
        self.own = types.SimpleNamespace(factor=1.0)

    def forward(self, x):
        return SETTINGS.factor * self.own.factor * x


def of_object(output, target):
    return SETTINGS.factor * F.cross_entropy(output, target)


def inside(output, target):
    return sum(SETTINGS.factor * term for term in F.cross_entropy(output, target, reduction="none")) / len(target)


def of_module(output, target):
    return types.factor * F.cross_entropy(output, target)  # a setting of an imported module


@pytest.mark.parametrize("depth", [0, 3])
@pytest.mark.parametrize("loss", [of_object, inside, of_module, F.cross_entropy], ids=lambda loss: loss.__name__)
def test_settings_anywhere_are_watched(loss, depth, monkeypatch):
    model, x, y = problem()
    scaled = Scaled()
    model.append(functools.reduce(lambda inner, _: nn.Sequential(inner), range(depth), scaled))
    monkeypatch.setattr(types, "factor", 1.0, raising=False)
    for place in (scaled.own, SETTINGS, types):
        H = Hessian(model, loss, [(x, y)], method="double_backward")
        v = torch.ones(H.shape[0])
        assert torch.equal(H @ v, H @ v)
        monkeypatch.setattr(place, "factor", 1.5)
        expected = Hessian(model, loss, [(x, y)], method="double_backward") @ v
        assert torch.equal(H @ v, expected)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_tensors_are_watched(layout):
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.register_buffer("edges", torch.eye(6).to_sparse(layout=layout))

        def forward(self, x):
            return torch.sparse.mm(self.edges, self.layer(x))

    model, x, y = Graph(), torch.randn(6, 4), torch.randint(0, 3, (6,))
    H = Hessian(model, nn.CrossEntropyLoss(), [(x, y)], method="double_backward")
    v = torch.ones(H.shape[0])
    once, kept = H @ v, H._kept
    assert torch.equal(H @ v, once) and H._kept is kept
    model.edges.values().mul_(2) if layout != torch.sparse_coo else model.edges._values().mul_(2)
    torch.testing.assert_close(H @ v, Hessian(model, nn.CrossEntropyLoss(), [(x, y)]) @ v)
    assert H._kept is not kept


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.bool, torch.complex64])
def test_the_copy_of_a_tensor(dtype):
    t = torch.tensor([1.0, math.nan, -0.0, 2.0]).to(dtype)
    held, same = _Copy(t), t.clone()
    assert held.bytes and held.holds(t) and held.holds(same)
    same.untyped_storage().resize_(2)
    assert not held.holds(same)
    t.untyped_storage().resize_(0)
    assert not held.holds(t)
    assert not _Copy(torch.ones(2, 3).mT).bytes and _Copy(torch.ones(2, 3).mT).holds(torch.ones(2, 3).mT)
    assert _Copy(torch.ones(0)).holds(torch.ones(0))


@dataclasses.dataclass
class Batch:
    x: torch.Tensor


@dataclasses.dataclass(slots=True)
class Slotted:
    x: torch.Tensor


@pytest.mark.parametrize("nest", [list, tuple, lambda own: dict(enumerate(own))], ids=["list", "tuple", "dict"])
@pytest.mark.parametrize("kind", [Batch, Slotted])
def test_objects_in_batches_are_watched(kind, nest):
    model, x, y = problem()
    batch = kind(x)
    loss = ModelLoss(lambda model, pair: F.cross_entropy(model(pair[0][0].x), pair[1]))
    H = Hessian(model, loss, [(nest([batch]), y)], method="double_backward")
    v = torch.randn(H.shape[0])
    once, kept = H @ v, H._kept
    assert torch.equal(H @ v, once) and H._kept is kept
    batch.x = 2 * x
    torch.testing.assert_close(H @ v, dense_hessian(model, F.cross_entropy, 2 * x, y) @ v)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("form", [torch.jit.script, torch.fx.symbolic_trace])
@pytest.mark.parametrize("change", [to_train, through_data, in_place, a_buffer])
def test_models_in_other_forms_are_watched(form, change):
    class Layers(list):
        """The model's, by number."""

        train = staticmethod(lambda: model.train())

    model, x, y = problem()
    model = form(model)
    H = Hessian(model, F.cross_entropy, [(x, y)], method="double_backward")
    v = torch.randn(H.shape[0])
    once, kept = H @ v, H._kept
    assert torch.equal(H @ v, once) and H._kept is kept
    change(Layers(model.children()), x, y, None)
    torch.testing.assert_close(H @ v, Hessian(model, F.cross_entropy, [(x, y)]) @ v, rtol=0, atol=1e-13)
    assert H._kept is not kept


def test_a_loader_of_one_batch_is_read_again():
    model, x, y = problem()
    inputs = TensorDataset(x, y)
    H = Hessian(model, nn.CrossEntropyLoss(), DataLoader(inputs, 6), method="double_backward")
    v = torch.ones(H.shape[0])
    once, kept = H @ v, H._kept
    assert torch.equal(H @ v, once) and H._kept is kept
    x.mul_(2)
    torch.testing.assert_close(H @ v, dense_hessian(model, F.cross_entropy, x, y) @ v)
