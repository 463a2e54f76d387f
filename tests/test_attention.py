"""nn.MultiheadAttention: its projections against dense matrices, the heads' output computed by hand."""

import math

import pytest
import torch
from dense import check, places, units_of
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import gradcond
from gradcond import BNP


@torch.no_grad()
def heads(module, query, key, value, mask=None):
    """What the output projection is applied to, for (batch, steps, features)."""
    n = module.embed_dim
    if module._qkv_same_embed_dim:
        weights = module.in_proj_weight.split(n)
    else:
        weights = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
    biases = (0.0,) * 3 if module.in_proj_bias is None else module.in_proj_bias.split(n)
    q, k, v = (x @ w.mT + b for x, w, b in zip((query, key, value), weights, biases, strict=True))
    if module.bias_k is not None:
        k, v = (torch.cat([t, b.expand(len(t), 1, n)], 1) for t, b in ((k, module.bias_k), (v, module.bias_v)))
    if module.add_zero_attn:
        k, v = (torch.cat([t, t.new_zeros(len(t), 1, n)], 1) for t in (k, v))
    q, k, v = (t.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.mT / math.sqrt(n // module.num_heads)
    if mask is not None:
        scores = scores.masked_fill(mask, -math.inf)
    return (torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2)


def units(module, query, key, value, out):
    """Every unit of the four projections."""
    index, n = places(module), module.embed_dim
    found = []
    for i, (name, x) in enumerate((("q", query), ("k", key), ("v", value))):
        if module._qkv_same_embed_dim:
            weight = index["in_proj_weight"][i * n : (i + 1) * n]
        else:
            weight = index[f"{name}_proj_weight"]
        bias = [] if module.in_proj_bias is None else [index["in_proj_bias"][i * n : (i + 1) * n]]
        found += units_of(weight, bias, x.flatten(0, -2))
    bias = [] if module.out_proj.bias is None else [index["out_proj.bias"]]
    return found + units_of(index["out_proj.weight"], bias, out.flatten(0, -2))


def inputs(module, batch=3):
    def x(steps, features):
        return 1 + torch.randn(batch, steps, features) * torch.linspace(0.5, 2, features)

    return x(4, module.embed_dim), x(5, module.kdim), x(5, module.vdim)


def build(**options):
    torch.manual_seed(2)
    module = nn.MultiheadAttention(6, options.pop("num_heads", 2), **options)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))  # biases start at zero
    return module


CASES = {
    "plain": {},
    "one-head": {"num_heads": 1},
    "bias-free": {"bias": False},
    "sizes": {"kdim": 4, "vdim": 3},
    "sizes-bias-free": {"kdim": 4, "vdim": 6, "bias": False},
    "bias-kv": {"add_bias_kv": True, "add_zero_attn": True},
}


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "fused"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch-first", "batch-second"])
@pytest.mark.parametrize("case", CASES)
def test_the_four_projections_are_dense_matrices_of_their_inputs(case, batch_first, need_weights):
    module = build(batch_first=batch_first, **CASES[case])
    q, k, v = inputs(module)
    out = heads(module, q, k, v)
    args = (q, k, v) if batch_first else tuple(x.transpose(0, 1).contiguous() for x in (q, k, v))
    y = module(*args, need_weights=need_weights)[0]
    assert_close(y if batch_first else y.transpose(0, 1), module.out_proj(out))  # the reference is its function
    loss = lambda: (module(*args, need_weights=need_weights)[0] - 1).pow(2).mean()  # noqa: E731
    optimizer = check(module, loss, units(module, q, k, v, out))
    report = optimizer.report()
    assert list(report.conditioned) == ["query", "key", "value", "out_proj"]
    extra = ["bias_k", "bias_v"] if case == "bias-kv" else []
    assert report.left_alone == dict.fromkeys(extra, "it is in no row of MultiheadAttention")


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "fused"])
def test_masks_enter_by_the_heads_output(need_weights):
    module = build(batch_first=True)
    x, _, _ = inputs(module)
    mask = torch.ones(4, 4).triu(1).bool()
    out = heads(module, x, x, x, mask)
    loss = lambda: module(x, x, x, attn_mask=mask, need_weights=need_weights)[0].pow(3).mean()  # noqa: E731
    check(module, loss, units(module, x, x, x, out))


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "fused"])
def test_without_a_batch_axis_and_by_keywords(need_weights):
    module = build()
    q, k, v = inputs(module, 1)
    call = dict(query=q[0], key=k[0], value=v[0], need_weights=need_weights)
    check(module, lambda: module(**call)[0].pow(3).mean(), units(module, q, k, v, heads(module, q, k, v)))


@pytest.mark.parametrize("how", ["batch first", "batch second", "by itself"])
def test_sequences_are_the_samples_and_steps_the_rows(how):
    module = build(batch_first=how == "batch first")
    batch = 1 if how == "by itself" else 3
    x, _, _ = inputs(module, batch)
    x = {"batch first": x, "batch second": x.transpose(0, 1), "by itself": x[0]}[how]
    optimizer = gradcond.wrap(torch.optim.SGD(module.parameters(), lr=1.0), module, [BNP()])
    module(x, x, x)[0].pow(3).mean().backward()
    optimizer.step()
    for state in optimizer.state_dict()["gradcond"]["chain"][0]["layers"].values():
        assert (state["samples"], state["rows"]) == (batch, 4 * batch)


def test_calls_of_one_step_count_as_one():
    module = build(batch_first=True)
    parts = [inputs(module), inputs(module)]
    whole = [torch.cat(pair) for pair in zip(*parts, strict=True)]
    loss = lambda: sum(module(*part)[0].pow(3).mean() for part in parts)  # noqa: E731
    check(module, loss, units(module, *whole, heads(module, *whole)))


def test_a_transformer_encoder_is_conditioned_throughout():
    layer = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    optimizer = gradcond.wrap(torch.optim.SGD(model.parameters(), lr=0.01), model, [BNP()])
    model(torch.randn(3, 4, 6)).pow(3).mean().backward()
    optimizer.step()
    report = optimizer.report()
    parts = ["self_attn.query", "self_attn.key", "self_attn.value", "self_attn.out_proj", "linear1", "linear2"]
    assert sorted(report.conditioned) == sorted(f"layers.{i}.{part}" for i in range(2) for part in parts)
    assert all("1 step" in text for texts in report.conditioned.values() for text in texts)
    assert set(report.left_alone.values()) == {"LayerNorm has no adapter"}


def test_a_frozen_output_projection_leaves_the_others_conditioned():
    module = build(batch_first=True)
    module.out_proj.requires_grad_(False)
    q, k, v = inputs(module)
    index, n = places(module), module.embed_dim
    rows = [
        unit
        for i, x in enumerate((q, k, v))
        for unit in units_of(
            index["in_proj_weight"][i * n : (i + 1) * n],
            [index["in_proj_bias"][i * n : (i + 1) * n]],
            x.flatten(0, -2),
        )
    ]
    check(module, lambda: module(q, k, v)[0].pow(3).mean(), rows)


class Residual(nn.MultiheadAttention):
    def forward(self, query, key, value):
        y, weights = super().forward(query, key, value)
        return query + y, weights


def test_of_a_subclass_that_goes_on_the_output_projection_goes_through_as_it_is():
    model = nn.ModuleList([nn.Linear(4, 4), Residual(4, 2)])  # the way back from the sum leads to the Linear
    optimizer = gradcond.wrap(torch.optim.SGD(model.parameters(), lr=1.0), model, [BNP()])
    x = model[0](torch.randn(3, 4, 4))
    model[1](x, x, x)[0].pow(3).mean().backward()
    with pytest.warns(UserWarning, match=r"layer '1.out_proj' has a gradient, but none of its inputs were seen"):
        optimizer.step()
    found = optimizer.report().conditioned
    assert [name for name, (text,) in found.items() if "1 step" in text] == ["0", "1.query", "1.key", "1.value"]


class FirstStep(nn.MultiheadAttention):
    def forward(self, query, key, value):
        y, weights = super().forward(query, key, value)
        return y[:, :1], weights


def test_a_subclass_may_put_out_a_part():
    torch.manual_seed(2)
    module = FirstStep(6, 2, batch_first=True)
    q, k, v = inputs(module)
    check(module, lambda: module(q, k, v)[0].pow(3).mean(), units(module, q, k, v, heads(module, q, k, v)))


def test_under_activation_checkpointing_the_output_projection_goes_through_as_it_is():
    module = build(batch_first=True)
    q, k, v = inputs(module)
    optimizer = gradcond.wrap(torch.optim.SGD(module.parameters(), lr=1.0), module, [BNP(decay=0.0)])
    checkpoint(lambda x: module(x, k, v)[0], q, use_reentrant=False).pow(3).mean().backward()
    raw = module.out_proj.weight.grad.clone()
    with pytest.warns(UserWarning, match=r"layer 'out_proj' has a gradient, but none of its inputs were seen"):
        optimizer.step()
    assert torch.equal(module.out_proj.weight.grad, raw)
    assert "no statistics yet" in str(optimizer.report().conditioned["out_proj"])
    assert "1 step" in str(optimizer.report().conditioned["query"])
