"""Products of peers that are wrong, or raise: each reproduced, with ours beside it against the dense matrix."""

import copy

import curvature_peers as peers
import pytest
import torch
from references import DENSE, Attention, Recurrent, Unused, assert_same, dense_hessian, error, mlp, split
from torch import nn

from gradcond import curvature

CROSS_ENTROPY = nn.CrossEntropyLoss()
BOTH = [(peer, kind) for peer in peers.MODULES for kind in DENSE if (peer, kind) != ("PyHessian", "GGN")]


def ours(kind, model, loss_fn, data):
    return getattr(curvature, kind)(model, loss_fn, data).to_dense()


def theirs(peer, kind, model, loss_fn, data):
    n = sum(p.numel() for p in peers.trainable(model))
    return peers.product(peer, kind, model, loss_fn, data)(torch.eye(n))


def classes(rows=12):
    return torch.randint(0, 3, (rows,))


@pytest.mark.parametrize("kind", DENSE)
def test_hessian_eigenthings_weights_uneven_batches_equally(kind):
    model, x, y = mlp(), torch.randn(40, 4), classes(40)
    data, dense = split(x, y, [32, 8]), DENSE[kind](model, CROSS_ENTROPY, x, y)
    unweighted = sum(DENSE[kind](model, CROSS_ENTROPY, *batch) for batch in data) / 2
    wrong = theirs("hessian-eigenthings", kind, model, CROSS_ENTROPY, data)
    assert_same(wrong, unweighted)
    assert error(wrong, dense) > 0.03
    assert_same(ours(kind, model, CROSS_ENTROPY, data), dense)


def test_hessian_eigenthings_weights_uneven_microbatches_equally():
    model, x, y = mlp(), torch.randn(10, 4), classes(10)
    operator = peers.eigenthings_operator("Hessian", model, CROSS_ENTROPY, [(x, y)], microbatch_size=8)
    dense = dense_hessian(model, CROSS_ENTROPY, x, y)
    assert error(peers.by_column(operator.matvec)(torch.eye(len(dense))), dense) > 0.03


@pytest.mark.parametrize("kind", DENSE)
def test_curvlinops_takes_ignored_targets_for_samples(kind):
    """It weights a batch by its size; the loss divides by the targets that count."""
    model, x, y = mlp(), torch.randn(16, 4), torch.tensor([1] * 7 + [0, 2, 0, 1, 2, 0, 0, 2, 0])
    loss_fn, data = nn.CrossEntropyLoss(ignore_index=1), split(x, y, [8, 8])
    dense = DENSE[kind](model, loss_fn, x, y)
    assert error(theirs("curvlinops", kind, model, loss_fn, data), dense) > 0.1
    assert_same(ours(kind, model, loss_fn, data), dense)


@pytest.mark.parametrize("peer", [peer for peer in peers.MODULES if peer != "backpack"])
def test_class_weights_on_batches_are_wrong(peer):
    model, x, y = mlp(), torch.randn(16, 4), torch.tensor([0] * 7 + [1] + [2] * 7 + [1])
    loss_fn, data = nn.CrossEntropyLoss(weight=torch.tensor([0.1, 1.0, 5.0])), split(x, y, [8, 8])
    dense = dense_hessian(model, loss_fn, x, y)
    assert error(theirs(peer, "Hessian", model, loss_fn, data), dense) > 0.1
    assert_same(ours("Hessian", model, loss_fn, data), dense)


@pytest.mark.parametrize("peer", ["PyHessian", "hessian-eigenthings"])
def test_a_sum_over_batches_is_divided(peer):
    """PyHessian divides by the samples after weighting with them, hessian-eigenthings by the batches."""
    model, x, y = mlp(), torch.randn(12, 4), classes()
    loss_fn, data = nn.CrossEntropyLoss(reduction="sum"), split(x, y, [6, 6])
    dense = dense_hessian(model, loss_fn, x, y)
    assert_same(theirs(peer, "Hessian", model, loss_fn, data), dense / 2)
    assert_same(ours("Hessian", model, loss_fn, data), dense)


NORMALIZATIONS = {
    "LayerNorm": lambda: nn.LayerNorm(5),
    "BatchNorm without running statistics": lambda: nn.BatchNorm1d(5, track_running_stats=False),
}


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_curvlinops_hessian_is_wrong_behind_normalization(name):
    """jvp(jacrev) is: torch.func drops a term of the layer's double backward."""
    model, x, y = mlp(NORMALIZATIONS[name]()), torch.randn(12, 4), classes()
    dense = dense_hessian(model, CROSS_ENTROPY, x, y)
    assert error(theirs("curvlinops", "Hessian", model, CROSS_ENTROPY, [(x, y)]), dense) > 0.01
    assert_same(ours("Hessian", model, CROSS_ENTROPY, [(x, y)]), dense)


def test_curvlinops_hessian_is_wrong_behind_instance_norm():
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.InstanceNorm1d(3, affine=True), nn.Tanh(), nn.Flatten())
    model, x, y = nn.Sequential(*model, nn.Linear(12, 3)), torch.randn(6, 2, 5), classes(6)
    dense = dense_hessian(model, CROSS_ENTROPY, x, y)
    assert error(theirs("curvlinops", "Hessian", model, CROSS_ENTROPY, [(x, y)]), dense) > 0.01
    assert_same(ours("Hessian", model, CROSS_ENTROPY, [(x, y)]), dense)


def test_curvlinops_hessian_raises_on_group_norm():
    model, x, y = mlp(nn.GroupNorm(1, 5)), torch.randn(12, 4), classes()
    with pytest.raises(NotImplementedError, match="native_group_norm_backward"):
        theirs("curvlinops", "Hessian", model, CROSS_ENTROPY, [(x, y)])
    assert_same(ours("Hessian", model, CROSS_ENTROPY, [(x, y)]), dense_hessian(model, CROSS_ENTROPY, x, y))


class NormalizedByFormula(nn.Module):
    """What weight_norm makes of a linear layer, its parameters in the same order."""

    def __init__(self, layer):
        super().__init__()
        direction = layer.weight.detach()
        self.bias = nn.Parameter(layer.bias.detach().clone())
        self.length = nn.Parameter(direction.norm(dim=1, keepdim=True))
        self.direction = nn.Parameter(direction.clone())

    def forward(self, x):
        weight = self.direction * (self.length / self.direction.norm(dim=1, keepdim=True))
        return nn.functional.linear(x, weight, self.bias)


@pytest.mark.parametrize("peer", peers.MODULES)
def test_hessians_behind_weight_normalization_are_wrong_or_raise(peer):
    """The second derivative of torch's kernel is wrong, and forward mode has none; we differentiate the formula."""
    model, x, y = mlp(), torch.randn(12, 4), classes()
    dense = dense_hessian(nn.Sequential(NormalizedByFormula(model[0]), *model[1:]), CROSS_ENTROPY, x, y)
    nn.utils.parametrizations.weight_norm(model[0])
    assert_same(ours("Hessian", model, CROSS_ENTROPY, [(x, y)]), dense)
    if peer == "curvlinops":
        with pytest.raises(NotImplementedError, match="forward AD with _weight_norm_interface"):
            theirs(peer, "Hessian", model, CROSS_ENTROPY, [(x, y)])
    else:
        assert error(theirs(peer, "Hessian", model, CROSS_ENTROPY, [(x, y)]), dense) > 0.03


@pytest.mark.parametrize(
    ("peer", "kind"), [("curvlinops", "Hessian"), ("curvlinops", "GGN"), ("hessian-eigenthings", "GGN")]
)
def test_batch_norm_in_training_raises(peer, kind):
    model, x, y = mlp(nn.BatchNorm1d(5)), torch.randn(12, 4), classes()
    with pytest.raises(RuntimeError, match="in-place operation"):
        theirs(peer, kind, model, CROSS_ENTROPY, [(x, y)])
    dense = DENSE[kind](copy.deepcopy(model), CROSS_ENTROPY, x, y)
    assert_same(ours(kind, model, CROSS_ENTROPY, [(x, y)]), dense)


def test_pyhessian_switches_the_model_to_eval_and_leaves_gradients():
    model, x, y = mlp(nn.BatchNorm1d(5)), torch.randn(12, 4), classes()
    dense = dense_hessian(copy.deepcopy(model), CROSS_ENTROPY, x, y)
    assert_same(ours("Hessian", model, CROSS_ENTROPY, [(x, y)]), dense)
    assert model.training and all(p.grad is None for p in model.parameters())
    wrong = theirs("PyHessian", "Hessian", model, CROSS_ENTROPY, [(x, y)])
    assert error(wrong, dense) > 0.05
    assert not model.training and all(p.grad is not None for p in model.parameters())


def test_hessian_eigenthings_moves_running_statistics():
    model, x, y = mlp(nn.BatchNorm1d(5)), torch.randn(12, 4), classes()
    ours("Hessian", model, CROSS_ENTROPY, [(x, y)])
    assert not model[1].running_mean.any() and model[1].num_batches_tracked == 0
    theirs("hessian-eigenthings", "Hessian", model, CROSS_ENTROPY, [(x, y)])
    assert model[1].running_mean.any()


def test_pyhessian_doubles_on_top_of_gradients_that_are_left():
    model, x, y = mlp(), torch.randn(12, 4), classes()
    dense = dense_hessian(model, CROSS_ENTROPY, x, y)
    assert_same(theirs("PyHessian", "Hessian", model, CROSS_ENTROPY, [(x, y)]), dense)
    assert_same(theirs("PyHessian", "Hessian", model, CROSS_ENTROPY, [(x, y)]), 2 * dense)
    assert_same(ours("Hessian", model, CROSS_ENTROPY, [(x, y)]), dense)


@pytest.mark.parametrize(("peer", "kind"), BOTH)
def test_attention_raises_in_every_peer(peer, kind):
    """Torch's fused kernel has no second derivative and no forward mode; we run its math kernel."""
    model, x, y = Attention(), torch.randn(6, 4, 4), classes(6)
    with pytest.raises((NotImplementedError, RuntimeError), match="flash_attention_for_cpu"):
        theirs(peer, kind, model, CROSS_ENTROPY, [(x, y)])
    assert_same(ours(kind, model, CROSS_ENTROPY, [(x, y)]), DENSE[kind](model, CROSS_ENTROPY, x, y))


def test_encoder_layer_in_eval_mode_raises_in_forward_mode():
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 4, batch_first=True), nn.Flatten(), nn.Linear(12, 3))
    model, x, y = model.eval(), torch.randn(6, 3, 4), classes(6)
    for peer in ("curvlinops", "hessian-eigenthings"):
        with pytest.raises(NotImplementedError, match="_transformer_encoder_layer_fwd"):
            theirs(peer, "GGN", model, CROSS_ENTROPY, [(x, y)])
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        dense = DENSE["GGN"](model, CROSS_ENTROPY, x, y)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    assert_same(ours("GGN", model, CROSS_ENTROPY, [(x, y)]), dense)


@pytest.mark.parametrize(
    ("peer", "kind"), [("curvlinops", "Hessian"), ("curvlinops", "GGN"), ("hessian-eigenthings", "GGN")]
)
def test_lstm_in_float32_raises_in_forward_mode(peer, kind):
    model, x, y = Recurrent(nn.LSTM).float(), torch.randn(6, 3, 4).float(), classes(6)
    n = sum(p.numel() for p in model.parameters())
    with pytest.raises(NotImplementedError, match="mkldnn_rnn_layer"):
        peers.product(peer, kind, model, CROSS_ENTROPY, [(x, y)])(torch.ones(n).float())
    dense = DENSE[kind](copy.deepcopy(model).double(), CROSS_ENTROPY, x.double(), y)
    assert_same(ours(kind, model, CROSS_ENTROPY, [(x, y)]), dense, relative=1e-5)


@pytest.mark.parametrize(
    ("peer", "kind", "message"),
    [
        ("curvlinops", "Hessian", "expanded size"),
        ("curvlinops", "GGN", "expanded size"),
        ("hessian-eigenthings", "Hessian", "not have been used in the graph"),
        ("PyHessian", "Hessian", "Expected output to be a torch.Tensor"),
    ],
)
def test_an_unused_parameter_raises(peer, kind, message):
    model, x, y = Unused(), torch.randn(12, 4), classes()
    with pytest.raises((RuntimeError, AssertionError), match=message):
        theirs(peer, kind, model, CROSS_ENTROPY, [(x, y)])
    assert_same(ours(kind, model, CROSS_ENTROPY, [(x, y)]), DENSE[kind](model, CROSS_ENTROPY, x, y))


def test_curvlinops_wants_a_module_as_loss():
    model, x, y = mlp(), torch.randn(12, 4), classes()
    with pytest.raises(AttributeError, match="reduction"):
        theirs("curvlinops", "Hessian", model, nn.functional.cross_entropy, [(x, y)])
    dense = dense_hessian(model, CROSS_ENTROPY, x, y)
    assert_same(ours("Hessian", model, nn.functional.cross_entropy, split(x, y, [9, 3])), dense)


def test_hessian_eigenthings_takes_active_dropout():
    """Two products of one vector differ by half their size and more; we say which layer it is."""
    model, x, y = mlp(nn.Dropout(0.5)), torch.randn(12, 4), classes()
    operator = peers.eigenthings_operator("Hessian", model, CROSS_ENTROPY, [(x, y)])
    v = torch.randn(operator.size)
    assert (operator.matvec(v) - operator.matvec(v)).norm() > 0.2 * operator.matvec(v).norm()
    peers.load("hessian_eigenthings.algorithms").lanczos(operator, k=1)
    with pytest.raises(ValueError, match="dropout is active in '1'"):
        curvature.eigsh(curvature.Hessian(model, CROSS_ENTROPY, [(x, y)]), 1)


def test_finite_differences_of_hessian_eigenthings_lose_digits_with_the_norm_of_the_vector():
    model, x, y = mlp().float(), torch.randn(12, 4).float(), classes()
    dense = dense_hessian(copy.deepcopy(model).double(), CROSS_ENTROPY, x.double(), y)
    operator = peers.eigenthings_operator("Hessian", model, CROSS_ENTROPY, [(x, y)], method="finite_difference")
    signs = torch.randint(0, 2, (operator.size,)).float() * 2 - 1

    def relative(v, product):
        return float((product.double() - dense @ v.double()).norm() / (dense @ v.double()).norm())

    assert relative(signs, operator.matvec(signs)) > 1e-4
    assert relative(signs, curvature.Hessian(model, CROSS_ENTROPY, [(x, y)]) @ signs) < 1e-6
