"""NormClipping: lengths and factors against dense matrices, one fold per step, state that comes and goes."""

import copy
import io
import math
import pickle

import pytest
import torch
from cases import flat
from torch import nn
from torch.testing import assert_close

import gradcond
from gradcond import BNP, SGLD, MeanShiftRejection, NormClipping, RateDamping

BEFORE = {
    "alone": lambda: [],
    "bnp": lambda: [BNP(decay=0.5)],
    "bnp+msr+damping": lambda: [BNP(decay=0.5), MeanShiftRejection(), RateDamping()],
}


class Network(nn.Module):
    """Rows of every kind: shared by layers, with two biases; parameters without rows, sparse and complex ones."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4, sparse=True)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.frozen = nn.Linear(4, 4)
        self.apart = nn.Linear(4, 4)
        self.wave = nn.Parameter(torch.ones(3, dtype=torch.complex128))
        self.head = nn.Linear(4, 2, bias=False)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        h = self.conv(self.embedding(x).mT).mT
        h, _ = self.lstm(h)
        h = self.norm(h + self.attention(h, h, h)[0])
        return self.head(self.apart(self.frozen(h))).mean(1) * (self.wave * 1j).real.sum().add(3.0)


def build():
    torch.manual_seed(0)
    return Network()


def loss(model, step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randint(5, (3, 6), generator=generator)
    scale = 10.0 ** torch.rand((), generator=generator).item()
    return scale * (model(x) - 1.0).square().sum()


def groups(model):
    """The layer `apart` is left alone."""
    apart = {id(p) for p in model.apart.parameters()}
    rest = [p for p in model.parameters() if id(p) not in apart]
    return [{"params": rest}, {"params": model.apart.parameters(), "gradcond": False}]


def wrapped(model, before="bnp", **settings):
    sgd = torch.optim.SGD(groups(model), lr=1e-3)
    return gradcond.wrap(sgd, model, [*BEFORE[before](), NormClipping(**settings)])


def dense_grad(p):
    grad = p.grad.to_dense() if p.grad.is_sparse else p.grad
    return grad.detach().clone()


def gradients(model):
    return {n: dense_grad(p) for n, p in model.named_parameters() if p.grad is not None}


def length(optimizer, raw):
    """sqrt(<g, M g>) over what is not left alone, and M g, both by the dense M of the last step."""
    real = {n: g for n, g in raw.items() if not g.is_complex()}
    g = flat(list(real.values()))
    m = preconditioner(optimizer)
    parts = (m @ g).split([t.numel() for t in real.values()])
    conditioned = {n: part.view_as(real[n]) for n, part in zip(real, parts, strict=True)}
    conditioned |= {n: g for n, g in raw.items() if g.is_complex()}
    square = sum((raw[n].conj() * conditioned[n]).real.sum() for n in raw if not n.startswith("apart"))
    return square.sqrt().item(), conditioned


def preconditioner(optimizer):
    """Over the real parameters that require grad, dense."""
    model, m = optimizer._engine.model, optimizer.preconditioner()
    kept = torch.cat([torch.full((p.numel(),), not p.is_complex()) for p in model.parameters() if p.requires_grad])
    return m.apply(torch.eye(len(kept)))[kept][:, kept]


def running_mean(norms, decay):
    weights = [(1 - decay) * decay ** (len(norms) - 1 - i) for i in range(len(norms))]
    return sum(w * n for w, n in zip(weights, norms, strict=True)) / (1 - decay ** len(norms))


def statistics(optimizer):
    """What a checkpoint holds of all layers together."""
    return optimizer.state_dict()["gradcond"]["chain"][-1]["network"]


def step(model, optimizer, i):
    optimizer.zero_grad()
    loss(model, i).backward()
    raw = gradients(model)
    optimizer.step()
    return raw


@pytest.mark.parametrize("before", BEFORE)
def test_gradients_are_held_to_the_running_mean_of_their_length(before):
    model = build()
    optimizer, norms, factors = wrapped(model, before, ratio=0.9, decay=0.8), [], []
    for i in range(6):
        raw = step(model, optimizer, i)
        norm, conditioned = length(optimizer, raw)
        norms.append(norm)
        mean = running_mean(norms, 0.8)  # of the lengths before clipping
        factors.append(min(1.0, 0.9 * mean / norm))
        assert statistics(optimizer)["steps"] == i + 1
        assert_close(statistics(optimizer)["mean"].item(), mean, rtol=1e-10, atol=0)
        for name, gradient in gradients(model).items():
            factor = 1.0 if name.startswith("apart") else factors[-1]
            assert_close(gradient, factor * conditioned[name], rtol=1e-9, atol=1e-12)
    assert set(raw) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert factors[0] == 0.9 and min(factors) < 0.85 and max(factors) == 1.0


def test_layers_that_are_left_out_count_as_they_are():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x = 2 + torch.randn(8, 3)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = gradcond.wrap(sgd, model, [BNP(), NormClipping(ratio=0.5)], only=lambda name: name == "0")
    model(x).square().mean().backward()
    raw = flat([p.grad for p in model.parameters()])
    optimizer.step()
    conditioned = optimizer.preconditioner() @ raw
    assert torch.equal(conditioned[16:], raw[16:]) and not torch.equal(conditioned[:16], raw[:16])
    assert_close(statistics(optimizer)["mean"], (raw @ conditioned).sqrt(), rtol=1e-12, atol=0)
    assert_close(flat([p.grad for p in model.parameters()]), conditioned / 2, rtol=1e-12, atol=0)


def test_evaluations_of_a_closure_fold_once():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.LayerNorm(1))
    lbfgs = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5)
    optimizer = gradcond.wrap(lbfgs, model, [BNP(), NormClipping(ratio=0.7, decay=0.5)])
    first = []
    for i in range(3):
        x, raws, clipped = 2 + torch.randn(8, 3), [], []

        def closure(i=i, x=x, raws=raws, clipped=clipped):
            if raws:
                clipped.append(flat([p.grad for p in model.parameters()]))
            optimizer.zero_grad()
            value = (model[:-1](x + i) + model[-1].bias.sum() - 1).square().sum() * (1 + len(raws))
            value.backward()
            model[-1].weight.grad = torch.ones(1)
            raws.append(flat([p.grad for p in model.parameters()]))
            return value

        optimizer.step(closure)
        clipped.append(flat([p.grad for p in model.parameters()]))
        assert len(raws) >= 3
        m = optimizer.preconditioner()
        norms = [(raw @ (m @ raw)).sqrt().item() for raw in raws]
        first.append(norms[0])
        mean = running_mean(first, 0.5)
        assert statistics(optimizer)["steps"] == i + 1
        assert_close(statistics(optimizer)["mean"].item(), mean, rtol=1e-10, atol=0)
        for raw, norm, gradient in zip(raws, norms, clipped, strict=True):
            assert_close(gradient, min(1.0, 0.7 * mean / norm) * (m @ raw), rtol=1e-9, atol=1e-12)


def test_half_precision_neither_overflows_nor_vanishes():
    for dtype in (torch.float16, torch.bfloat16):
        for size in (1e3, 1e-4):
            model = nn.Sequential(nn.Linear(30, 30), nn.LayerNorm(30)).to(dtype)
            optimizer = gradcond.wrap(torch.optim.SGD(model.parameters(), lr=0.0), model, [NormClipping(ratio=0.5)])
            for p in model.parameters():
                p.grad = torch.full_like(p, size)
            optimizer.step()
            value = torch.tensor(size, dtype=dtype).item()
            expected = value * math.sqrt(sum(p.numel() for p in model.parameters()))
            assert_close(statistics(optimizer)["mean"].item(), expected, rtol=1e-5, atol=0)
            assert_close(model[0].bias.grad, torch.full((30,), value / 2, dtype=dtype))


def test_a_zero_gradient_stays_zero():
    clipping, state = NormClipping(), {}
    zero = torch.tensor(0.0)
    assert clipping.clip_factor(state, zero, fold=True) == 1
    assert clipping.clip_factor(state, zero + 1, fold=True) < 1
    assert clipping.clip_factor(state, zero, fold=True) == 1


@pytest.mark.parametrize("before", BEFORE)
def test_a_gradient_is_clipped_and_its_length_folded_once(before):
    model = build()
    optimizer = wrapped(model, before, ratio=0.5)
    for i in range(2):
        step(model, optimizer, i)
        once, mean = {name: g.clone() for name, g in gradients(model).items()}, statistics(optimizer)["mean"]
        optimizer.step()  # torch runs an attached optimizer's hooks twice where its class calls its parent's step
        assert statistics(optimizer)["steps"] == i + 1 and torch.equal(statistics(optimizer)["mean"], mean)
        assert all(torch.equal(g, once[name]) for name, g in gradients(model).items())


def test_sparse_gradients_alone_are_clipped_too():
    tables = [nn.Embedding(5, 3, sparse=sparse, _weight=torch.ones(5, 3)) for sparse in (True, False)]
    for table in tables:
        optimizer = gradcond.wrap(torch.optim.SGD(table.parameters(), lr=1.0), table, [NormClipping(ratio=0.5)])
        table(torch.tensor([1, 2, 2])).square().sum().backward()
        optimizer.step()
    assert_close(tables[0].weight, tables[1].weight)
    with pytest.raises(ValueError, match="got nan or inf in the gradient of weight"):
        tables[0].weight.grad *= math.inf
        gradcond.wrap(torch.optim.SGD(tables[0].parameters()), tables[0], [NormClipping()]).step()


def test_a_parameter_outside_of_the_model_is_looked_at_too():
    model, temperature = nn.Linear(2, 2), nn.Parameter(torch.ones(()))
    sgd = torch.optim.SGD([*model.parameters(), temperature], lr=0.1)
    optimizer = gradcond.wrap(sgd, model, [NormClipping()])
    (model(torch.ones(1, 2)).sum() + temperature * math.inf).backward()
    with pytest.raises(ValueError, match="got nan or inf in the gradient of a parameter that is not the model's"):
        optimizer.step()


@pytest.mark.parametrize("place", [0, 1], ids=["first", "second"])
def test_one_that_is_stepped_again_beside_another_is_clipped_once(place):
    model = nn.ParameterList([torch.zeros(2), torch.zeros(2)])
    optimizer = gradcond.wrap(torch.optim.SGD(model.parameters(), lr=0.0), model, [NormClipping(0.5, decay=0.5)])
    model[place].grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    assert_close(model[place].grad, torch.tensor([1.5, 2.0]))
    model[1 - place].grad = torch.tensor([0.0, 5.0])
    optimizer.step()
    assert_close(model[place].grad, torch.tensor([1.5, 2.0]))
    assert_close(model[1 - place].grad, torch.tensor([0.0, 2.5]))


def through_a_file(model, optimizer):
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = Network()
    again.load_state_dict(saved["model"])
    resumed = wrapped(again, ratio=9.0, decay=0.1)
    resumed.load_state_dict(saved["optimizer"])
    return again, resumed


def copied(model, optimizer):
    return copy.deepcopy((model, optimizer))


def pickled(model, optimizer):
    return pickle.loads(pickle.dumps((model, optimizer)))


@pytest.mark.parametrize("resume", [through_a_file, copied, pickled])
def test_resumed_is_uninterrupted(resume):
    model = build()
    optimizer = wrapped(model, ratio=0.9, decay=0.8)
    for i in range(3):
        step(model, optimizer, i)
    again, resumed = resume(model, optimizer)
    assert resumed.conditioners[-1] == NormClipping(ratio=0.9, decay=0.8)
    for i in range(3, 6):
        step(model, optimizer, i)
        step(again, resumed, i)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    ours, theirs = statistics(optimizer), statistics(resumed)
    assert ours["steps"] == theirs["steps"] == 6
    assert torch.equal(ours["mean"], theirs["mean"])


def test_a_bare_state_starts_the_mean_anew():
    model = build()
    optimizer = wrapped(model)
    step(model, optimizer, 0)
    with pytest.warns(UserWarning, match="start anew"):
        optimizer.load_state_dict(optimizer.optimizer.state_dict())
    assert statistics(optimizer) == {}


def test_attached_is_wrapped():
    model, other = build(), build()
    optimizer, sgd = wrapped(model, ratio=0.9), torch.optim.SGD(groups(other), lr=1e-3)
    gradcond.attach(sgd, other, [BNP(decay=0.5), NormClipping(ratio=0.9)])
    for i in range(3):
        step(model, optimizer, i)
        step(other, sgd, i)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


@pytest.mark.parametrize("before", ["alone", "bnp"])
def test_a_step_that_a_scaler_skips_is_not_folded(before):
    def run(scale, overflows):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.LayerNorm(1)).float()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = gradcond.wrap(sgd, model, [*BEFORE[before](), NormClipping(ratio=0.9, decay=0.5)])
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=100, enabled=scale > 1)
        for i in range(4):
            for broken in [True, False] if i in overflows else [False]:
                x = torch.randn(8, 3, generator=torch.Generator().manual_seed(i), dtype=torch.float32)
                optimizer.zero_grad()
                scaled = scaler.scale((model[:-1](x) - 1).square().mean() + model[-1](x[:, :1]).mean())
                (scaled * math.inf if broken else scaled).backward()
                scaler.step(optimizer)
                scaler.update()
        return flat(list(model.parameters())), statistics(optimizer)

    (plain, wanted), (scaled, found) = run(1.0, ()), run(2.0**10, (0, 2))
    assert torch.equal(plain, scaled)
    assert wanted["steps"] == found["steps"] == 4
    assert torch.equal(wanted["mean"], found["mean"])


def test_wrong_chains_and_settings_are_refused():
    model = nn.Linear(2, 1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for chain in ([NormClipping(), BNP()], [BNP(), NormClipping(), NormClipping()]):
        with pytest.raises(ValueError, match=r"at most one NormClipping, behind that, got .*; change the order"):
            gradcond.wrap(sgd, model, chain)
    for join in (gradcond.wrap, gradcond.attach):
        with pytest.raises(ValueError, match="expected a chain without NormClipping for SGLD: it would shorten"):
            join(SGLD(model.parameters(), lr=0.1), model, [BNP(), NormClipping()])
    for ratio in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="NormClipping: ratio must be positive"):
            NormClipping(ratio=ratio)
    for decay in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"NormClipping: decay must be in \[0, 1\)"):
            NormClipping(decay=decay)


def test_it_clips_where_no_layer_is_conditioned():
    model = nn.Sequential(nn.LayerNorm(3), nn.PReLU())
    optimizer = gradcond.wrap(torch.optim.SGD(model.parameters(), lr=1.0), model, [NormClipping(decay=0.5)])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 4.0)
    optimizer.step()  # the mean of 1 and 4, with weights 1/3 and 2/3, is 3
    for parameter in model.parameters():
        torch.testing.assert_close(parameter.grad, torch.full_like(parameter, 3.0))


@pytest.mark.parametrize("chain", [[], [MeanShiftRejection()]], ids=["alone", "msr"])
def test_the_report_says_of_what_is_left_alone_whether_it_is_scaled(chain):
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("one", "apart", "frozen", "out")})
    model["norm"] = nn.LayerNorm(2)
    model["frozen"].requires_grad_(False)
    groups = [
        {"params": [p for name, p in model.named_parameters() if not name.startswith("apart")]},
        {"params": list(model["apart"].parameters()), "gradcond": False},
    ]
    clipping = NormClipping(ratio=0.5)
    optimizer = gradcond.wrap(
        torch.optim.SGD(groups, lr=0.0), model, [*chain, clipping], only=lambda name: name != "out"
    )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for p in trained.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    left_alone = optimizer.report().left_alone
    scaled = {name for name, p in trained.items() if bool((p.grad != 1).any()) and name in left_alone}
    assert {name for name, why in left_alone.items() if "NormClipping scales it all the same" in why} == scaled
    assert {"norm.weight", "out.bias", "one.bias"} <= scaled
    assert "apart.weight" not in scaled
