"""Weighting: any split into batches gives the matrix of the one concatenated loss; unknown weights raise."""

import functools

import pytest
import torch
import torch.nn.functional as F
from dense_curvature import assert_same_operator, ggn_of, hessian_of, split, trainable
from torch import nn

from gradcond.curvature import GGN, EmpiricalFisher, Hessian, ModelLoss

CLASS_WEIGHT = torch.tensor([0.2, 3.0, 1.0], dtype=torch.float64)


def tokens():
    """Three classes at two positions of every sample."""
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Unflatten(1, (3, 2)))


def masked(z, target):
    y, mask = target
    return (F.cross_entropy(z, y, reduction="none") * mask).sum(), mask.sum()


def weighted_samples(z, target):
    y, weight = target
    return (F.cross_entropy(z, y, reduction="none").mean(1) * weight).sum(), weight.sum()


def samples_of_model(model, batch):
    return weighted_samples(model(batch["x"]), (batch["y"], batch["weight"]))


def ratio(parts):
    return parts[0] / parts[1]


# loss_fn, how a batch is made of (x, y, mask, weight), the one concatenated loss of the output
CASES = {
    **{
        f"cross entropy, {r}": (
            nn.CrossEntropyLoss(reduction=r),
            lambda x, y, m, w: (x, y),
            lambda z, y, m, w, r=r: F.cross_entropy(z, y, reduction=r),
        )
        for r in ("mean", "sum")
    },
    **{
        f"ignored, {r}": (
            nn.CrossEntropyLoss(reduction=r, ignore_index=1),
            lambda x, y, m, w: (x, y),
            lambda z, y, m, w, r=r: F.cross_entropy(z, y, reduction=r, ignore_index=1),
        )
        for r in ("mean", "sum")
    },
    "class weights": (
        nn.CrossEntropyLoss(weight=CLASS_WEIGHT),
        lambda x, y, m, w: (x, y),
        lambda z, y, m, w: F.cross_entropy(z, y, weight=CLASS_WEIGHT),
    ),
    "token mask": (masked, lambda x, y, m, w: (x, (y, m)), lambda z, y, m, w: ratio(masked(z, (y, m)))),
    "weighted samples": (
        weighted_samples,
        lambda x, y, m, w: (x, (y, w)),
        lambda z, y, m, w: ratio(weighted_samples(z, (y, w))),
    ),
    "weighted samples, by the model": (
        ModelLoss(samples_of_model),
        lambda x, y, m, w: {"x": x, "y": y, "weight": w},
        lambda z, y, m, w: ratio(weighted_samples(z, (y, w))),
    ),
    "split by the model": (
        ModelLoss(masked, output=lambda model, batch: model(batch[1]), target=lambda batch: (batch[2], batch[3])),
        lambda x, y, m, w: ("any form", x, y, m),
        lambda z, y, m, w: ratio(masked(z, (y, m))),
    ),
}


@pytest.mark.parametrize("sizes", [[32, 8], [1, 39], [40]], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_any_split_is_the_whole(name, sizes):
    loss_fn, batch, whole = CASES[name]
    model, x, y = tokens(), torch.randn(40, 4), torch.randint(0, 3, (40, 2))
    y[:1] = torch.tensor([1, 2])  # something counts in the first batch of one
    mask, weight = (torch.rand(40, 2) < 0.7).double(), torch.rand(40)
    mask[0] = 1
    parts = [batch(*part) for part in zip(*(t.split(sizes) for t in (x, y, mask, weight)), strict=True)]
    exact = hessian_of(lambda: whole(model(x), y, mask, weight), trainable(model))
    assert_same_operator(Hessian(model, loss_fn, parts), exact)
    if name == "weighted samples, by the model":
        with pytest.raises(ValueError, match="GGN needs the loss as a function"):
            GGN(model, loss_fn, parts)
    else:
        exact = ggn_of(model(x), lambda z: whole(z, y, mask, weight), trainable(model))
        assert_same_operator(GGN(model, loss_fn, parts), exact)


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="this torch has no such loss")
@pytest.mark.parametrize("options", [{}, {"ignore_index": 1, "label_smoothing": 0.1}], ids=str)
def test_cross_entropy_with_its_own_last_layer(options):
    weight = torch.tensor([0.2, 3.0, 1.0, 0.5, 2.0])
    model, loss_fn = nn.Sequential(nn.Linear(4, 3), nn.Tanh()), nn.LinearCrossEntropyLoss(3, 5, **options)
    loss_fn.weight = weight if options else None
    x, y = torch.randn(7, 4), torch.tensor([0, 1, 1, 3, 1, 2, options.get("ignore_index", -100)])
    exact = hessian_of(lambda: loss_fn(model(x), y), trainable(model))
    assert_same_operator(Hessian(model, loss_fn, split(x, y, [5, 2])), exact)
    exact = ggn_of(model(x), lambda z: loss_fn(z, y), trainable(model))
    assert_same_operator(GGN(model, loss_fn, split(x, y, [5, 2])), exact)


def test_a_mean_over_lengths_is_of_unknown_weight():
    model = nn.Sequential(nn.Linear(3, 4), nn.LogSoftmax(-1))
    loss_fn = functools.partial(F.ctc_loss, input_lengths=torch.tensor([6, 6]), target_lengths=torch.tensor([3, 1]))
    x, y = torch.randn(6, 2, 3), torch.tensor([[1, 2, 3], [2, 1, 1]])
    torch.testing.assert_close(Hessian(model, loss_fn, [(x, y)]).loss(), loss_fn(model(x), y).detach())
    with pytest.raises(ValueError, match="known terms"):
        EmpiricalFisher(model, loss_fn, [(x, y)]) @ torch.ones(16)


def each_masked(z, target):
    y, mask = target
    return F.cross_entropy(z, y, reduction="none") * mask, mask


@pytest.mark.parametrize("kind", [Hessian, GGN, EmpiricalFisher])
@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss, masked, each_masked], ids=lambda loss: loss.__name__)
def test_weights_in_half_precision_add_up(loss_fn, kind):
    model, x, y = nn.Linear(4, 3).bfloat16(), torch.randn(8, 4).bfloat16(), torch.randint(0, 3, (8,))
    target = y, torch.ones(8).bfloat16()
    if loss_fn is nn.CrossEntropyLoss:
        loss_fn, target = loss_fn(weight=CLASS_WEIGHT.bfloat16()), y
    elif kind is EmpiricalFisher:
        loss_fn = each_masked
    once = kind(model, loss_fn, [(x, target)]).to_dense()
    torch.testing.assert_close(kind(model, loss_fn, [(x, target)] * 300).to_dense(), once)


X, Y = torch.randn(4, 4).double(), torch.randint(0, 3, (4, 2))
LABELS = torch.tensor([[0, 1], [2, -100], [0, 1], [2, 1]])
UNEVEN = {
    "rows": (lambda z, y: F.cross_entropy(z, y), split(X, Y, [3, 1])),
    "ignored labels": (lambda z, y: F.cross_entropy(z, y, ignore_index=-100), split(X, LABELS, [2, 2])),
    "boolean mask": (
        lambda z, t: F.cross_entropy(z, t["y"]),
        [(X[:2], {"y": Y[:2], "m": LABELS[:2] > 0}), (X[2:], {"y": Y[2:], "m": LABELS[2:] < 0})],
    ),
    "mask": (
        ModelLoss(lambda model, batch: model(batch["x"]).mean()),
        [{"x": X, "attention_mask": torch.ones(4, 2)}, {"x": X, "attention_mask": torch.zeros(4, 2)}],
    ),
    "lengths": (
        ModelLoss(lambda model, batch: model(batch[0]).mean()),
        [(X, torch.ones(4, 2)), (X, torch.ones(4, 3))],
    ),
}


@pytest.mark.parametrize("name", UNEVEN)
def test_unknown_weights_raise(name):
    loss_fn, data = UNEVEN[name]
    H = Hessian(tokens(), loss_fn, data)
    with pytest.raises(ValueError, match=r"unknown weighting on uneven .*numerator, denominator.*weight_fn"):
        H @ torch.ones(H.shape[0])
    Hessian(tokens(), loss_fn, data[:1]).loss()  # one batch weighs what it weighs
    Hessian(tokens(), loss_fn, data, weight_fn=lambda batch: 1.0).loss()


RETURNED = {
    "denominator with a graph": (lambda z, y: (z.sum(), z.sum()), "denominator that is one number, constant"),
    "a model's tuple": (lambda z, y: (z.sum(), z.detach()), r"one number, .*got shape \(4, 3, 2\)"),
    "a loss with a log": (lambda z, y: (z.sum(), {"accuracy": 1.0}), "one number, .*got dict; .* the loss alone"),
    "text": (lambda z, y: "loss", "scalar tensor, got str"),
}


@pytest.mark.parametrize("name", RETURNED)
def test_refused(name):
    loss_fn, message = RETURNED[name]
    with pytest.raises(ValueError, match=message):
        Hessian(tokens(), loss_fn, [(X, Y)]).loss()


@pytest.mark.parametrize("loss", [nn.MSELoss, None, ModelLoss(nn.MSELoss)], ids=["class", "none", "class inside"])
def test_a_loss_that_is_no_function_is_told_at_once(loss):
    with pytest.raises(TypeError, match=r"expected a loss, .* make an object, such as CrossEntropyLoss\(\)"):
        Hessian(nn.Linear(2, 1), loss, [(torch.ones(1, 2), torch.ones(1, 1))])


def test_the_type_also_decorates_and_calls():
    @ModelLoss
    def loss(model, batch):
        return model(batch).square().mean()

    model = nn.Linear(4, 3)
    assert loss(model, X) == model(X).square().mean()
    assert_same_operator(Hessian(model, loss, [X]), hessian_of(lambda: loss(model, X), trainable(model)))
