"""Models that other tools crash on, by both product methods, against the dense double-backward matrix."""

import copy
import tempfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dense_curvature import assert_same_operator, ggn_of, hessian_of, jacobian, trainable
from torch import distributed, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint

from gradcond.curvature import (
    GGN,
    DiagonalFactor,
    EmpiricalFisher,
    Hessian,
    ModelLoss,
    MonteCarloFisher,
    Preconditioned,
    eigsh,
)
from gradcond.curvature.passes import batches


class Lambda(nn.Module):
    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.function(self, x)


def mlp(*middle, out=3):
    return nn.Sequential(nn.Linear(4, 4), *middle, nn.Tanh(), nn.Linear(4, out))


def fused_attention(m, x):
    q, k, v = m.qkv(x).view(*x.shape[:2], 3, 2, 2).permute(2, 0, 3, 1, 4)
    return m.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).flatten(1))


def scaled(m, x):
    return m.inner(x) + m.shift  # the shift is linear in the output


def with_parameter(module, **parameters):
    for name, value in parameters.items():
        module.register_parameter(name, nn.Parameter(value))
    return module


def with_scalars():
    model = Lambda(lambda m, x: m.inner(x) * m.temperature.exp(), inner=mlp())
    return with_parameter(model, temperature=torch.tensor(0.5), unused=torch.tensor(1.0), empty=torch.empty(0, 3))


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    return model


def shared():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())
    return nn.Sequential(nn.Sequential(model, nn.Linear(4, 4)), nn.Sequential(model, nn.Linear(4, 3)))


def frozen():
    model = mlp(nn.Tanh(), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    return model


def image_norm(norm):
    return nn.Sequential(nn.Conv2d(2, 4, 2), norm, nn.Softplus(), nn.Flatten(), nn.Linear(16, 3))


def recurrent(kind):
    return Lambda(lambda m, x: m.out(m.cell(x)[0][:, -1]), cell=kind(4, 3, batch_first=True), out=nn.Linear(3, 3))


def transformer():
    return nn.Sequential(
        nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True), nn.Flatten(), nn.Linear(12, 3)
    )


def attention():
    module = nn.MultiheadAttention(4, 2, batch_first=True)
    return Lambda(
        lambda m, x: m.out(m.inner(x, x, x, need_weights=False)[0].mean(1)), inner=module, out=nn.Linear(4, 3)
    )


def checkpointed():
    return Lambda(lambda m, x: checkpoint(m.inner, x, use_reentrant=False), inner=mlp())


NORMS = {
    "layer norm": (lambda: mlp(nn.LayerNorm(4)), (4,)),
    "instance norm": (lambda: image_norm(nn.InstanceNorm2d(4, affine=True)), (2, 3, 3)),
    "group norm": (lambda: image_norm(nn.GroupNorm(2, 4)), (2, 3, 3)),
    "batch norm, train": (lambda: mlp(nn.BatchNorm1d(4)), (4,)),
    "batch norm, eval": (lambda: mlp(nn.BatchNorm1d(4)).eval(), (4,)),
}
MODELS = {
    **NORMS,
    "fused attention": (lambda: Lambda(fused_attention, qkv=nn.Linear(4, 12), out=nn.Linear(12, 3)), (3, 4)),
    "encoder, train": (transformer, (3, 4)),
    "encoder, eval": (lambda: transformer().eval(), (3, 4)),
    "multi-head attention": (attention, (3, 4)),
    "lstm": (lambda: recurrent(nn.LSTM), (3, 4)),
    "gru": (lambda: recurrent(nn.GRU), (3, 4)),
    "unused": (lambda: with_parameter(mlp(), nothing=torch.ones(3)), (4,)),
    "tied": (tied, (4,)),
    "shared module": (shared, (4,)),
    "frozen": (frozen, (4,)),
    "linear in the loss": (lambda: with_parameter(Lambda(scaled, inner=mlp()), shift=torch.zeros(3)), (4,)),
    "scalars and empty": (with_scalars, (4,)),
    "dropout off": (lambda: mlp(nn.Dropout(0.5)).eval(), (4,)),
    "compiled": (lambda: torch.compile(mlp(), backend="eager"), (4,)),
    "checkpointed": (checkpointed, (4,)),
    "data parallel": (lambda: nn.DataParallel(mlp()), (4,)),
    "spectral norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 3)),
        (4,),
    ),
}


def dense(kind, model, output, loss):
    """The matrix of loss(output()), with the attention that has second derivatives; buffers are put back."""
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    torch.backends.mha.set_fastpath_enabled(False)
    with sdpa_kernel(SDPBackend.MATH):
        if kind is Hessian:
            matrix = hessian_of(lambda: loss(output()), trainable(model))
        else:
            matrix = ggn_of(output(), loss, trainable(model))
    torch.backends.mha.set_fastpath_enabled(True)
    for name, b in model.named_buffers():
        b.copy_(buffers[name])
    return matrix


# (model, operator) where torch has no forward derivative: "auto" falls back and says so, asking for it raises
NO_FORWARD = {
    ("group norm", Hessian),
    *(("checkpointed", kind) for kind in (Hessian, GGN)),
    *(("spectral norm", kind) for kind in (Hessian, GGN)),
}


@pytest.mark.parametrize("method", ["double_backward", "forward_over_reverse"])
@pytest.mark.parametrize("kind", [Hessian, GGN])
@pytest.mark.parametrize("name", MODELS)
def test_models(name, kind, method, monkeypatch):
    build, shape = MODELS[name]
    model, x, y = build(), torch.randn(5, *shape), torch.randint(0, 3, (5,))
    exact = dense(kind, model, lambda: model(x), lambda z: F.cross_entropy(z, y))
    data = [(x, y)]
    if method == "forward_over_reverse" and (name, kind) in NO_FORWARD:
        with pytest.raises(RuntimeError):
            kind(model, nn.CrossEntropyLoss(), data, method=method).to_dense()
        method = "auto"
        monkeypatch.setattr(kind, "_forward_costs", 0.0)  # forward mode is tried
    H = kind(model, nn.CrossEntropyLoss(), data, method=method)
    before = [(t, t.clone()) for t in (*model.parameters(), *model.buffers())]
    assert_same_operator(H, exact)
    for t, (own, value) in zip((*model.parameters(), *model.buffers()), before, strict=True):
        assert t is own and torch.equal(t, value)
    if method == "auto":
        assert H.probe.method == "double_backward" and "no forward mode" in repr(H)


@pytest.mark.parametrize("method", ["double_backward", "forward_over_reverse"])
@pytest.mark.parametrize("kind", [EmpiricalFisher, MonteCarloFisher])
@pytest.mark.parametrize("name", NORMS)
def test_fisher_behind_normalization(name, kind, method):
    build, shape = NORMS[name]
    model, x, y = build(), torch.randn(5, *shape), torch.randint(0, 3, (5,))
    F_op = kind(model, nn.CrossEntropyLoss(), [(x, y)], method=method)
    z = model(x)
    if kind is MonteCarloFisher:  # the documented draw: one uniform number a datum, through the distribution
        uniform = torch.from_numpy(np.random.Generator(np.random.Philox(key=0)).random((5, 1)))
        y = (z.softmax(1).cumsum(1) < uniform).sum(1)
    J = jacobian(F.cross_entropy(z, y, reduction="none"), trainable(model))
    assert_same_operator(F_op, J.mT @ J / 5)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("method", ["double_backward", "forward_over_reverse"])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("normalize", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
def test_weight_normalization_has_the_derivatives_of_its_formula(normalize, dim, method):
    model, x, y = mlp(), torch.randn(5, 4), torch.randint(0, 3, (5,))
    normalize(model[0], dim=dim)
    names = dict(model.named_parameters())
    g, v = (next(p for p in names.values() if p.shape == shape) for shape in ([(4, 1), (1, 4)][dim], (4, 4)))

    def loss():
        weight = v * g / v.norm(dim=1 - dim, keepdim=True)
        return F.cross_entropy(model[2](F.linear(x, weight, model[0].bias).tanh()), y)

    H = Hessian(model, nn.CrossEntropyLoss(), [(x, y)], method=method)
    assert_same_operator(H, hessian_of(loss, trainable(model)))


@pytest.fixture
def group():
    with tempfile.NamedTemporaryFile() as file:
        distributed.init_process_group("gloo", init_method=f"file://{file.name}.store", rank=0, world_size=1)
        yield
        distributed.destroy_process_group()


@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_distributed_data_parallel(kind, group):
    inner, x, y = mlp(), torch.randn(5, 4), torch.randint(0, 3, (5,))
    exact = dense(kind, inner, lambda: inner(x), lambda z: F.cross_entropy(z, y))
    model = nn.parallel.DistributedDataParallel(inner)
    assert_same_operator(kind(model, nn.CrossEntropyLoss(), [(x, y)]), exact)
    F.cross_entropy(model(x), y).backward()  # its reducer was not disturbed
    assert inner[0].weight.grad.norm() > 0


class LanguageModel(nn.Module):
    """Takes and returns what the models of Hugging Face do."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 4), nn.Linear(4, 6)

    def forward(self, input_ids, labels=None):
        logits = self.head(self.embedding(input_ids).tanh())
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return Output(loss=loss, logits=logits)


class Output(OrderedDict):
    """A dict with attributes."""

    @property
    def loss(self):
        return self["loss"]

    @property
    def logits(self):
        return self["logits"]


def token_batches(sizes, ignored):
    ids, labels = torch.randint(0, 6, (sum(sizes), 3)), torch.randint(0, 6, (sum(sizes), 3))
    labels.view(-1)[:ignored] = -100
    whole = {"input_ids": ids, "labels": labels}
    parts = zip(ids.split(sizes), labels.split(sizes), strict=True)
    return whole, [{"input_ids": i, "labels": k} for i, k in parts]


SPLIT = ModelLoss(
    nn.CrossEntropyLoss(),
    output=lambda model, batch: model(batch["input_ids"]).logits.flatten(0, 1),
    target=lambda batch: batch["labels"].flatten(),
)


@pytest.mark.parametrize("sizes, ignored", [([3, 1], 4), ([2, 2], 4)])
def test_models_that_compute_their_loss(sizes, ignored):
    model = LanguageModel()
    whole, data = token_batches(sizes, ignored)
    exact = hessian_of(lambda: model(**whole).loss, trainable(model))
    own = ModelLoss(lambda model, batch: model(**batch))
    H = Hessian(model, own, data, weight_fn=lambda batch: (batch["labels"] != -100).sum())
    assert_same_operator(H, exact)
    assert_same_operator(Hessian(model, SPLIT, data), exact)
    with pytest.raises(ValueError, match=r"numerator, denominator.*weight_fn"):
        Hessian(model, own, data).loss()
    with pytest.raises(ValueError, match=r"GGN needs .*output="):
        GGN(model, own, data)
    logits = model(whole["input_ids"]).logits.flatten(0, 1)
    ggn = ggn_of(logits, lambda z: F.cross_entropy(z, whole["labels"].flatten()), trainable(model))
    assert_same_operator(GGN(model, SPLIT, data), ggn)
    with pytest.raises(ValueError, match="scalar tensor, got NoneType"):
        Hessian(model, own, [{"input_ids": whole["input_ids"]}]).loss()


def residual(model, batch):
    """U'' = -sin(x) with its boundary values: derivatives of the network inside the loss."""
    x = batch.requires_grad_()
    u = model(x)
    slope = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
    bend = torch.autograd.grad(slope.sum(), x, create_graph=True)[0]
    return ((bend + x.sin()) ** 2).mean() + model(torch.zeros(1, 1)).square().sum()


@pytest.mark.parametrize("method", ["double_backward", "forward_over_reverse", "auto"])
def test_physics_informed_loss(method):
    model, x = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)), torch.rand(6, 1)
    H = Hessian(model, ModelLoss(residual), list(x.split(3)), method=method)
    assert_same_operator(H, hessian_of(lambda: residual(model, x.clone()), trainable(model)))
    assert not x.requires_grad


@pytest.mark.parametrize("kind", [Hessian, GGN, EmpiricalFisher, MonteCarloFisher])
def test_half_precision(kind):
    model, x, y = mlp(), torch.randn(6, 4).bfloat16(), torch.randint(0, 3, (6,))
    exact = kind(model.bfloat16().double(), nn.CrossEntropyLoss(), [(x.double(), y)]).to_dense()
    for method in ("double_backward", "forward_over_reverse"):
        H = kind(model.bfloat16(), nn.CrossEntropyLoss(), [(x, y)], method=method)
        assert (H.to_dense().double() - exact).norm() <= 0.05 * exact.norm()


def test_what_moves_its_own_tensors_is_moved_by_itself():
    class Graph:
        def __init__(self, nodes):
            self.nodes = nodes

        def to(self, device):
            return Graph(self.nodes.to(device))

    packed, meta = pack_sequence([torch.randn(3, 2), torch.randn(2, 2)]), torch.device("meta")
    for input in (packed, {"x": packed}):
        moved, _ = next(batches([(input, torch.zeros(2))], meta, True))
        moved = moved["x"] if isinstance(moved, dict) else moved
        assert moved.data.device == meta and moved.batch_sizes.device.type == "cpu"
    (graph, y), *_ = batches([(Graph(torch.ones(2)), torch.zeros(2))], meta, True)
    assert graph.nodes.device == y.device == meta


def standardizing(m, x):
    return m.inner(x.sub_(0.3).div_(1.5))


def one_based(output, target):
    return F.cross_entropy(output, target.sub_(1))


@pytest.mark.parametrize("sizes", [[6], [4, 2]], ids=str)
@pytest.mark.parametrize("method", ["auto", "double_backward", "forward_over_reverse"])
@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_models_and_losses_that_write_to_the_batch(kind, method, sizes):
    model, x, y = Lambda(standardizing, inner=mlp()), torch.randn(6, 4), torch.randint(1, 4, (6,))
    exact = dense(kind, model, lambda: model(x.clone()), lambda z: one_based(z, y.clone()))
    parts = list(zip(x.clone().split(sizes), y.clone().split(sizes), strict=True))
    weighted = {"weight_fn": lambda batch: len(batch[1]), "method": method}
    assert_same_operator(kind(model, one_based, parts, **weighted), exact)
    own = ModelLoss(one_based, output=lambda model, batch: model(batch[0]), target=lambda batch: batch[1])
    assert_same_operator(kind(model, own, parts, **weighted), exact)
    assert torch.equal(torch.cat([part[0] for part in parts]), x)
    assert torch.equal(torch.cat([part[1] for part in parts]), y)


class Centered(nn.Module):
    """Follows the mean of the outputs, as the loss of DINO does."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, z, y):
        self.mean.lerp_(z.detach().mean(0), 0.5)
        return F.cross_entropy((z - self.mean) ** 2, y)


@pytest.mark.parametrize("method", ["auto", "double_backward", "forward_over_reverse"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_a_loss_that_follows_the_outputs_is_left_as_it_was(kind, count, method):
    model, loss, x, y = mlp(), Centered(), torch.randn(6, 4), torch.randint(0, 3, (6,))
    parts = list(zip(x.chunk(count), y.chunk(count), strict=True))
    exact = sum(
        dense(kind, model, lambda x=x: model(x), lambda z, y=y: copy.deepcopy(loss)(z, y)) for x, y in parts
    )
    assert_same_operator(kind(model, loss, parts, method=method), exact / count)
    assert not loss.mean.any()


class Long(nn.LayerNorm):
    """A normalization that stays in float32, as those of half-precision models often do."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


@pytest.mark.parametrize("form", ["mixed", "frozen", "autocast"])
@pytest.mark.parametrize("seed", range(3))
def test_products_are_as_exact_as_the_shortest_dtype_within(form, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(8, 8), Long(8), nn.Tanh())))
    x, y = torch.randn(64, 8).bfloat16(), torch.randint(0, 8, (64,))
    for layer in model:
        layer.to(torch.float32 if form == "autocast" or isinstance(layer, Long) else torch.bfloat16)
        layer.requires_grad_(form != "frozen" or isinstance(layer, Long))
    twin = copy.deepcopy(model).double()
    exact = eigsh(Hessian(twin, nn.CrossEntropyLoss(), [(x.double(), y)]), 3).eigenvalues
    H = Hessian(model, nn.CrossEntropyLoss(), [(x.to(model[0].weight.dtype), y)], method="double_backward")
    P = DiagonalFactor(torch.ones(H.shape[0]).float())
    with torch.autocast("cpu", torch.bfloat16, enabled=form == "autocast"):
        for A in (H, H.block("1.*"), H.block([0, 3]), H.shift(1.0), 2 * H, Preconditioned(H, P)):
            assert (A.dtype, A.precision) == (torch.float32, torch.bfloat16)
        found = eigsh(H, 3, tol=0.05)
    assert found.converged.all()
    assert float(found.eigenvalues[0]) == pytest.approx(float(exact[0]), rel=0.03)
    assert Hessian(twin, nn.CrossEntropyLoss(), [(x.double(), y)]).precision == torch.float64


class Once(torch.autograd.Function):
    """A tanh whose backward cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g * (1 - ctx.saved_tensors[0].tanh() ** 2)


@pytest.mark.parametrize("method", ["auto", "double_backward"])
@pytest.mark.parametrize("kind", [Hessian, GGN, EmpiricalFisher, MonteCarloFisher])
def test_what_has_no_second_derivative_is_refused(kind, method):
    """Of such a function torch takes the second derivative for zero."""
    model = nn.Sequential(nn.Linear(3, 4), Lambda(lambda _, x: Once.apply(x)), nn.Linear(4, 2))
    x, y = torch.randn(5, 3), torch.randint(0, 2, (5,))
    H = kind(model, nn.CrossEntropyLoss(), [(x, y)], method=method)
    with pytest.raises(ValueError, match="one of the model's or the loss's has no second derivative"):
        H @ torch.ones(H.shape[0])
    above = H.block("2.*")  # nothing of it goes through that function
    alone = kind(model[2], nn.CrossEntropyLoss(), [(model[:2](x).detach(), y)])
    torch.testing.assert_close(above.to_dense(), alone.to_dense())


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_embeddings_that_shorten_their_rows_are_left_as_they_are(kind, count):
    model = nn.Sequential(nn.Embedding(6, 4, max_norm=0.5), nn.Flatten(), nn.Linear(8, 3))
    x, y = torch.randint(0, 6, (8, 2)), torch.randint(0, 3, (8,))
    H = kind(model, nn.CrossEntropyLoss(), list(zip(x.chunk(count), y.chunk(count), strict=True)))
    before = model[0].weight.detach().clone()
    dense = H.to_dense()
    assert torch.equal(model[0].weight, before) and before.norm(dim=1).max() > 0.5
    model(torch.arange(6).view(3, 2))  # now they are short
    assert model[0].weight.norm(dim=1).max() < 0.5 + 1e-6
    torch.testing.assert_close(dense, H.to_dense())
