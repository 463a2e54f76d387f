"""Hessian and GGN products against dense double-backward matrices of the one concatenated loss."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from dense_curvature import assert_same_operator, dense_ggn, dense_hessian, split
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from gradcond.curvature import GGN, Hessian


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.out(self.lstm(x)[0][:, -1])


class Partly(nn.Module):
    """Unused, frozen and tied parameters."""

    def __init__(self):
        super().__init__()
        self.unused, self.first, self.second = nn.Linear(2, 2), nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.frozen, self.out = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.frozen(self.second(self.first(x).tanh()).tanh()))


def mlp(*middle):
    return nn.Sequential(nn.Linear(4, 4), *middle, nn.Tanh(), nn.Linear(4, 3))


def encoder():
    layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 3))


MODELS = {
    "mlp": (mlp, (4,), True),
    "layer norm": (lambda: mlp(nn.LayerNorm(4)), (4,), True),
    "group norm": (lambda: mlp(nn.GroupNorm(2, 4)), (4,), True),
    "batch norm, eval": (lambda: mlp(nn.BatchNorm1d(4)).eval(), (4,), True),
    "batch norm, train": (lambda: mlp(nn.BatchNorm1d(4)), (4,), False),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.Softplus(), nn.Flatten(), nn.Linear(8, 3)),
        (1, 3, 3),
        True,
    ),
    "attention": (Attention, (3, 4), True),
    "encoder, train": (encoder, (3, 4), True),
    "encoder, eval": (lambda: encoder().eval(), (3, 4), True),
    "lstm": (Recurrent, (3, 4), True),
    "unused, frozen, tied": (Partly, (4,), True),
    "linear in its parameters": (lambda: nn.Linear(4, 3), (4,), True),
    "bare data parallel": (lambda: nn.DataParallel(mlp()), (4,), True),
}


@pytest.mark.parametrize("kind, dense", [(Hessian, dense_hessian), (GGN, dense_ggn)])
@pytest.mark.parametrize("name", MODELS)
def test_models(name, kind, dense):
    build, shape, splits = MODELS[name]
    model, x, y = build(), torch.randn(7, *shape), torch.randint(0, 3, (7,))
    data = split(x, y, [4, 1, 2] if splits else [7])
    assert_same_operator(kind(model, nn.CrossEntropyLoss(), data), dense(model, F.cross_entropy, x, y))


def classes(*shape):
    return torch.randint(0, 3, shape)


WEIGHT = torch.tensor([0.2, 3.0, 1.0], dtype=torch.float64)
IGNORED = torch.tensor([0, 1, 1, 1, 1, 2, 0, 1])
REDUCTIONS = ("mean", "sum")
LOSSES = {
    **{f"cross entropy, {r}": (nn.CrossEntropyLoss(reduction=r), classes(8)) for r in REDUCTIONS},
    **{f"ignore_index, {r}": (nn.CrossEntropyLoss(ignore_index=1, reduction=r), IGNORED) for r in REDUCTIONS},
    "class weights": (nn.CrossEntropyLoss(weight=WEIGHT), classes(8)),
    "weights, smoothing, ignored": (
        nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=1, label_smoothing=0.1),
        IGNORED,
    ),
    "probabilities": (nn.CrossEntropyLoss(weight=WEIGHT), torch.rand(8, 3).softmax(1).double()),
    "functional": (F.cross_entropy, classes(8)),
    "partial": (functools.partial(F.cross_entropy, ignore_index=1, weight=WEIGHT), IGNORED),
    "mse": (nn.MSELoss(), torch.randn(8, 3).double()),
    "functional mse, sum": (functools.partial(F.mse_loss, reduction="sum"), torch.randn(8, 3).double()),
    "smooth l1": (nn.SmoothL1Loss(), torch.randn(8, 3).double()),
    "huber": (nn.HuberLoss(delta=0.3), torch.randn(8, 3).double()),
    "bce with logits": (nn.BCEWithLogitsLoss(pos_weight=WEIGHT), torch.rand(8, 3).double()),
    "kl, batchmean": (nn.KLDivLoss(reduction="batchmean"), torch.rand(8, 3).softmax(1).double()),
    "one loss a sample": (nn.MultiLabelSoftMarginLoss(weight=WEIGHT), torch.rand(8, 3).double()),
}


@pytest.mark.parametrize("sizes", [[6, 2], [1, 7], [1, 4, 3]], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_on_uneven_batches(name, sizes):
    loss_fn, target = LOSSES[name]
    model, x = mlp(), torch.randn(8, 4)
    data = split(x, target, sizes)  # with [1, 4, 3] the second batch of IGNORED is ignored altogether
    assert_same_operator(Hessian(model, loss_fn, data), dense_hessian(model, loss_fn, x, target))
    assert_same_operator(GGN(model, loss_fn, data), dense_ggn(model, loss_fn, x, target))


@pytest.mark.parametrize(
    "loss_fn", [nn.NLLLoss(weight=WEIGHT, ignore_index=2), nn.CrossEntropyLoss(ignore_index=2)]
)
@pytest.mark.parametrize("kind, dense", [(Hessian, dense_hessian), (GGN, dense_ggn)])
def test_targets_with_positions(kind, dense, loss_fn):
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.LogSoftmax(1))
    x, y = torch.randn(5, 2, 4), torch.randint(0, 3, (5, 3))
    assert_same_operator(kind(model, loss_fn, split(x, y, [4, 1])), dense(model, loss_fn, x, y))


def masked(output, target):
    kept = target != 1
    return F.cross_entropy(output[kept], target[kept], reduction="sum"), kept.sum()


def test_numerator_and_denominator():
    model, x = mlp(), torch.randn(8, 4)
    H = Hessian(model, masked, split(x, IGNORED, [5, 3]))
    assert_same_operator(H, dense_hessian(model, nn.CrossEntropyLoss(ignore_index=1), x, IGNORED))


def test_weight_fn_and_batches_that_weigh_nothing():
    model, x = mlp(), torch.randn(8, 4)
    loss_fn = functools.partial(F.cross_entropy, ignore_index=1)
    data = split(x, IGNORED, [1, 4, 3])  # the mean over the second batch alone is nan
    H = Hessian(model, lambda z, y: loss_fn(z, y), data, weight_fn=lambda batch: (batch[1] != 1).sum())
    assert_same_operator(H, dense_hessian(model, loss_fn, x, IGNORED))


def plain(output, target):
    return ((output - target) ** 4).mean()


def test_plain_loss_is_a_mean_over_equal_batches_and_refused_on_uneven_ones():
    model, x, y = mlp(), torch.randn(8, 4), torch.randn(8, 3)
    assert_same_operator(Hessian(model, plain, split(x, y, [4, 4])), dense_hessian(model, plain, x, y))
    with pytest.raises(ValueError, match=r"numerator, denominator.*weight_fn"):
        Hessian(model, plain, split(x, y, [5, 3])).to_dense()


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x, scale):
        h = self.body(x).tanh() * scale
        return {"a": self.a(h), "b": (self.b(h), h.detach())}


def two_losses(output, target):
    return F.cross_entropy(output["a"], target) + output["b"][0].square().mean()


def test_named_inputs_and_several_outputs():
    model, x, y = TwoHeads(), torch.randn(6, 4), torch.randint(0, 3, (6,))
    data = [({"x": x, "scale": torch.tensor(2.0)}, y)]

    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            out = self.inner(x, torch.tensor(2.0))
            return torch.cat([out["a"], out["b"][0]], 1)

    def joined_loss(z, y):
        return two_losses({"a": z[:, :3], "b": (z[:, 3:],)}, y)

    assert_same_operator(Hessian(model, two_losses, data), dense_hessian(Joined(), joined_loss, x, y))
    assert_same_operator(GGN(model, two_losses, data), dense_ggn(Joined(), joined_loss, x, y))


@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_products_and_counts(kind):
    model, x, y = mlp(), torch.randn(6, 4), torch.randint(0, 3, (6,))
    H = kind(model, nn.CrossEntropyLoss(), split(x, y, [4, 2]))
    V = torch.randn(H.shape[0], 3)
    together = H @ V
    assert H.num_matvecs == 3
    torch.testing.assert_close(together[:, 1], H @ V[:, 1])
    assert H.num_matvecs == 4
    torch.testing.assert_close(torch.from_numpy(H.to_scipy() @ V.numpy()), together)
    assert (H @ V[:, :0]).shape == (H.shape[0], 0)
    with torch.no_grad():
        torch.testing.assert_close(H @ V, together)


def test_a_loss_linear_in_the_output():
    model, x, y = mlp(), torch.randn(6, 4), torch.randn(6, 3)
    linear = split(x, y, [3, 3])

    def loss_fn(z, y):
        return (z * y).mean()

    assert_same_operator(Hessian(model, loss_fn, linear), dense_hessian(model, loss_fn, x, y))
    assert not GGN(model, loss_fn, linear).to_dense().any()
    assert not Hessian(nn.Linear(4, 3), loss_fn, linear).to_dense().any()


def test_loss_and_gradient():
    model, x, y = mlp(), torch.randn(6, 4), torch.randint(0, 3, (6,))
    H = Hessian(model, nn.CrossEntropyLoss(), split(x, y, [5, 1]))
    loss = F.cross_entropy(model(x), y)
    torch.testing.assert_close(H.loss(), loss.detach())
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(H.gradient(), torch.cat([g.reshape(-1) for g in gradient]))


def test_ggn_of_a_convex_loss_is_positive_semidefinite():
    model, x, y = mlp(), torch.randn(6, 4), torch.randint(0, 3, (6,))
    values = torch.linalg.eigvalsh(GGN(model, nn.CrossEntropyLoss(), [(x, y)]).to_dense())
    assert values.min() >= -1e-14 * values.max()
    assert torch.linalg.eigvalsh(Hessian(model, nn.CrossEntropyLoss(), [(x, y)]).to_dense()).min() < -1e-3


def test_half_precision_model_takes_float32_vectors():
    model, x, y = mlp(), torch.randn(6, 4), torch.randint(0, 3, (6,))
    exact = dense_hessian(model, F.cross_entropy, x, y)
    H = Hessian(model.bfloat16(), nn.CrossEntropyLoss(), [(x.bfloat16(), y)])
    v = torch.randn(H.shape[0])
    assert (H @ v.float()).dtype == torch.float32 and (H @ v.bfloat16()).dtype == torch.bfloat16
    assert ((H @ v.float()) - exact @ v).norm() <= 0.05 * exact.norm() * v.norm()


def test_one_shot_data_is_read_into_a_list():
    model, x, y = mlp(), torch.randn(6, 4), torch.randint(0, 3, (6,))
    H = Hessian(model, nn.CrossEntropyLoss(), (batch for batch in split(x, y, [4, 2])))
    v = torch.ones(H.shape[0])
    torch.testing.assert_close(H @ v, H @ v, rtol=0, atol=0)
    assert_same_operator(H, dense_hessian(model, F.cross_entropy, x, y))


@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_nothing_is_left_changed(kind):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    model[1].eval()
    x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
    nn.CrossEntropyLoss()(model(x), y).backward()
    own = torch.Generator().manual_seed(3)
    data = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True, generator=own)
    model[1].train()
    before = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()]
    states = torch.get_rng_state(), own.get_state()
    fast = torch.backends.mha.get_fastpath_enabled()
    H = kind(model, nn.CrossEntropyLoss(), data)
    torch.testing.assert_close(H @ torch.ones(H.shape[0]), H @ torch.ones(H.shape[0]), rtol=0, atol=0)
    after = model.state_dict(), [p.grad for p in model.parameters()]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), states[0]) and torch.equal(own.get_state(), states[1])
    assert [m.training for m in model.modules()] == [True] * 5
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_switches_are_put_back_after_an_error():
    def fails(output, target):
        raise RuntimeError("loss")

    state = torch.get_rng_state()
    H = Hessian(mlp(), fails, [(torch.randn(2, 4), torch.zeros(2))])
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="loss") as caught:
        H @ torch.ones(H.shape[0])
    assert caught.value is not None and torch.equal(torch.get_rng_state(), state)
    assert torch.backends.mha.get_fastpath_enabled() and torch.backends.cuda.flash_sdp_enabled()


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def partly_compiled(model):
    return nn.Sequential(torch.compile(model[0], backend="aot_eager"), *model[1:])


WRAPPERS = {
    "checkpointing": Checkpointed,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled inside": partly_compiled,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_models(name):
    model, x, y = mlp(), torch.randn(6, 4), torch.randint(0, 3, (6,))
    H = Hessian(WRAPPERS[name](model), nn.CrossEntropyLoss(), [(x, y)])
    assert_same_operator(H, dense_hessian(model, F.cross_entropy, x, y))


def test_gradient_hooks_do_not_enter_and_stay():
    model, x, y = mlp(), torch.randn(6, 4), torch.randint(0, 3, (6,))
    exact = dense_hessian(model, F.cross_entropy, x, y)
    model[0].weight.register_hook(lambda g: 0 * g)
    assert_same_operator(Hessian(model, nn.CrossEntropyLoss(), [(x, y)]), exact)
    F.cross_entropy(model(x), y).backward()
    assert model[0].weight.grad.norm() == 0 < model[0].bias.grad.norm()


def test_the_parameters_are_those_of_the_moment():
    model, x, y = mlp(), torch.randn(6, 4), torch.randint(0, 3, (6,))
    H = Hessian(model, nn.CrossEntropyLoss(), [(x, y)])
    H @ torch.ones(H.shape[0])
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert_same_operator(H, dense_hessian(model, F.cross_entropy, x, y))


X, Y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
REFUSED = {
    "frozen": (lambda: Hessian(mlp().requires_grad_(False), plain, [(X, Y)]), "none requires grad"),
    "no batch": (lambda: Hessian(mlp(), plain, []), "at least one batch"),
    "no batch from a generator": (lambda: Hessian(mlp(), plain, iter(())).loss(), "at least one batch"),
    "not pairs": (lambda: Hessian(mlp(), plain, [X]).loss(), r"\(input, target\), got Tensor as batch 0"),
    "not finite": (
        lambda: Hessian(mlp(), F.cross_entropy, [(X.double(), Y), (X.double() / 0, Y)]).loss(),
        "finite loss, got nan on batch 1",
    ),
    "all ignored": (
        lambda: Hessian(mlp(), nn.CrossEntropyLoss(ignore_index=9), [(X.double(), Y * 0 + 9)]).loss(),
        "positive total weight",
    ),
    "not scalar": (lambda: Hessian(mlp(), lambda z, y: z, [(X.double(), Y)]).loss(), r"scalar .*\(6, 3\)"),
    "unreduced": (
        lambda: Hessian(mlp(), nn.CrossEntropyLoss(reduction="none"), [(X.double(), Y)]).loss(),
        "scalar",
    ),
    "detached": (lambda: GGN(mlp(), lambda z, y: z.detach().sum(), [(X.double(), Y)]).to_dense(), "detached"),
    "short vector": (lambda: Hessian(mlp(), plain, [(X, Y)]) @ torch.ones(3), r"shape \(35,\) or \(35, k\), got"),
    "integers": (lambda: Hessian(mlp(), plain, [(X, Y)]) @ torch.ones(35).long(), "float64 vector .*int64"),
    "single precision": (lambda: Hessian(mlp(), plain, [(X, Y)]) @ torch.ones(35).float(), "torch.float64"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_wrong_kinds():
    with pytest.raises(TypeError, match="Module"):
        Hessian(lambda x: x, plain, [(X, Y)])
    with pytest.raises(TypeError, match="to_scipy"):
        Hessian(mlp(), plain, [(X, Y)]) @ [1.0]


RANDOM = {
    "dropout": (lambda: mlp(nn.Dropout(0.5)), False, "dropout is active in '1'"),
    "batch norm on shuffled batches": (lambda: mlp(nn.BatchNorm1d(4)), True, "'1' .* normalizes by batches"),
}


@pytest.mark.parametrize("own", [True, False], ids=["own generator", "global generator"])
@pytest.mark.parametrize("name", RANDOM)
def test_random_operators_are_caught(name, own):
    build, shuffle, message = RANDOM[name]
    dataset = TensorDataset(torch.randn(12, 4), torch.randint(0, 3, (12,)))
    loader = DataLoader(dataset, 4, shuffle=shuffle, generator=torch.Generator() if own else None)
    H = Hessian(build(), nn.CrossEntropyLoss(), loader)
    with pytest.raises(ValueError, match=message):
        H.check_deterministic()


def test_the_determinism_check_passes_and_costs_two_products_once():
    loader = DataLoader(TensorDataset(torch.randn(12, 4), torch.randint(0, 3, (12,))), 4, shuffle=True)
    H = Hessian(mlp(nn.BatchNorm1d(4), nn.Dropout()).eval(), nn.CrossEntropyLoss(), loader)
    assert H.check_deterministic() < 1e-13 and H.num_matvecs == 2
    H.check_deterministic()
    assert H.num_matvecs == 2
