"""Every layer type against the dense matrix written out from its unfolded inputs; adapters that users register."""

import copy

import pytest
import torch
from cases import CHAINS, wrapped
from dense import check, conv_units, is_transposed, places, unfolded, units_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import gradcond
from gradcond import BNP, Layer, register_layer
from gradcond.layers import _adapters, find_layers
from gradcond.statistics import Moments

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
sweep = settings(max_examples=80, deadline=None, derandomize=True)


@pytest.fixture
def registry():
    """Adapters that a test registers are gone after it."""
    saved = dict(_adapters)
    yield
    _adapters.clear()
    _adapters.update(saved)


@st.composite
def convolutions(draw, transposed):
    """A convolution of any kind, and inputs for it whose channels differ."""
    torch.manual_seed(draw(st.integers(0, 9)))
    dims = draw(st.sampled_from([1, 2, 2, 3]))
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(dims))  # noqa: E731
    kernel, stride, dilation = each(1, 3 if dims < 3 else 2), each(1, 3), each(1, 2)
    groups, inputs, outputs = (draw(st.integers(1, 3)) for _ in range(3))
    options = dict(dilation=dilation, groups=groups, bias=draw(st.booleans()))
    padding = each(0, 2)
    size = [d * (k - 1) + 1 + draw(st.integers(0, 3)) for d, k in zip(dilation, kernel, strict=True)]
    if transposed:
        kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
        extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
        size = [draw(st.integers(1, 4)) for _ in range(dims)]
        options |= dict(output_padding=extra)
        sides = zip(size, stride, padding, dilation, kernel, extra, strict=True)
        assume(all((n - 1) * s - 2 * p + d * (k - 1) + e + 1 > 0 for n, s, p, d, k, e in sides))
    else:
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        options |= dict(padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])))
        word = draw(st.sampled_from([None, None, "same", "valid"]))
        if word is not None:
            padding, stride = word, (1,) * dims if word == "same" else stride
        size = [max(n, 3) for n in size]  # reflection pads by less than the size
    conv = kind(groups * inputs, groups * outputs, kernel, stride, padding, **options)
    batch = draw(st.sampled_from([(), (1,), (3,)]))
    x = torch.randn(*batch, groups * inputs, *size)
    x = torch.linspace(-2, 3, groups * inputs).view([-1] + [1] * dims) + x * torch.arange(1.0, x.shape[-1] + 1)
    assume(unfolded(conv, x).any())  # with none of its inputs met there is no gradient, and no step
    return conv, x


@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
def test_a_convolution_is_the_dense_matrix_of_its_channels(transposed):
    @sweep
    @given(convolutions(transposed))
    def run(case):
        conv, x = case
        check(conv, lambda: conv(x).pow(3).mean(), conv_units(conv, x))

    run()


@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
def test_with_taps_it_is_the_dense_matrix_of_its_unfolded_columns(transposed):
    @sweep
    @given(convolutions(transposed))
    def run(case):
        conv, x = case
        check(conv, lambda: conv(x).pow(3).mean(), conv_units(conv, x, taps=True), taps=True)

    run()


def test_the_reference_unfolds_as_torch_does():
    conv = nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, dilation=(1, 2), groups=2)
    x = torch.randn(2, 4, 6, 7)
    columns = nn.functional.unfold(x, (3, 2), dilation=(1, 2), padding=1, stride=2)  # (batch, 4 x 6, positions)
    assert_close(unfolded(conv, x).flatten(1), columns.mT.flatten(0, 1))
    assert not is_transposed(conv)


@sweep
@given(st.integers(1, 5), st.integers(1, 4), st.lists(st.integers(1, 4), max_size=3), st.booleans())
def test_a_linear_layer_is_the_dense_matrix_of_its_rows(inputs, units, leading, bias):
    layer, x = (
        nn.Linear(inputs, units, bias=bias),
        2 + torch.randn(*leading, inputs) * torch.arange(1.0, inputs + 1),
    )
    index = places(layer)
    rows = units_of(index["weight"], [index["bias"]] if bias else [], x.reshape(-1, inputs))
    check(layer, lambda: layer(x).pow(3).mean(), rows)


@pytest.mark.parametrize("padding", [None, 0, 3])
@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (2, 3, 30)])
def test_an_embedding_is_a_layer_without_bias_on_one_hot_inputs(shape, padding):
    layer = nn.Embedding(6, 3, padding_idx=padding)
    words = torch.randint(0, 5, shape)  # the last word never comes
    one_hot = nn.functional.one_hot(words.reshape(-1), 6).double()
    if padding is not None:
        one_hot[:, padding] = 0.0  # its row gets no gradient: as if it were the zero input
    before = layer.weight.detach().clone()
    if (one_hot == 0).all():
        return
    check(layer, lambda: (layer(words) - 1).pow(3).mean(), units_of(places(layer)["weight"].mT, [], one_hot))
    if padding is not None:
        assert torch.equal(layer.weight[padding], before[padding])


class Positions(nn.Embedding):
    """Looks up where the words are, not the words."""

    def forward(self, words):
        return super().forward(torch.arange(words.shape[-1]))


def test_a_sparse_embedding_and_one_that_counts_are_left_alone_or_not():
    kinds = [nn.Embedding(4, 2, sparse=True), nn.Embedding(4, 2), nn.EmbeddingBag(4, 2), Positions(4, 2)]
    model = nn.ModuleList(kinds)
    optimizer = gradcond.wrap(torch.optim.SGD(model.parameters(), lr=1.0), model, [BNP()])
    report = optimizer.report()
    assert report.left_alone == {
        "0.weight": "its gradients are sparse",
        "2.weight": "EmbeddingBag has no adapter",
        "3.weight": "Positions has a forward of its own; register_layer shows what it looks up",
    }
    assert list(report.conditioned) == ["1"]
    kinds[3](torch.tensor([[7, 8]])).sum().backward()  # words that it has no rows for
    optimizer.step()
    assert torch.equal(kinds[3].weight.grad, torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]))


class GraphConvolution(nn.Module):
    def __init__(self, inputs, units):
        super().__init__()
        self.linear = nn.Linear(inputs, units, bias=False)
        self.bias = nn.Parameter(torch.zeros(units))

    def forward(self, x, adjacency):
        return adjacency @ self.linear(x) + self.bias


def aggregated(module, args, kwargs, output):
    x, adjacency = args
    assert not torch.is_grad_enabled()
    return adjacency @ x


def graph_layer(module):
    return Layer("", module, weight="linear.weight", bias="bias", observe=aggregated)


def graph(nodes=7):
    adjacency = torch.rand(nodes, nodes).bernoulli() + torch.eye(nodes)
    return adjacency / adjacency.sum(1, keepdim=True), 1 + torch.randn(nodes, 4) * torch.arange(1.0, 5.0)


@pytest.mark.parametrize("kind", [GraphConvolution, f"{GraphConvolution.__module__}.GraphConvolution"], ids=str)
def test_a_registered_graph_convolution_is_the_dense_matrix_of_its_aggregated_rows(registry, kind):
    adjacency, x = graph()
    model = GraphConvolution(4, 3)
    index = places(model)
    assert list(find_layers(model)) == ["linear"]
    aggregates = units_of(index["linear.weight"], [index["bias"]], adjacency @ x)
    with pytest.raises(AssertionError):  # by itself the Linear inside sees rows that are not the layer's
        check(model, lambda: model(x, adjacency).pow(3).mean(), aggregates)
    model.zero_grad()
    register_layer(kind, graph_layer)
    assert list(find_layers(nn.Sequential(model))) == ["0"]
    optimizer = check(model, lambda: model(x, adjacency).pow(3).mean(), aggregates)
    assert not optimizer.report().left_alone


def test_subclasses_are_shown_as_their_nearest_registered_base_is(registry):
    class Special(GraphConvolution):
        pass

    class Scaled(nn.Linear):
        pass

    register_layer(GraphConvolution, graph_layer)
    register_layer(Scaled, lambda module: "its rows are scaled")
    model = nn.ModuleDict({"graph": Special(4, 3), "scaled": Scaled(2, 2), "linear": nn.Linear(2, 2)})
    optimizer = gradcond.wrap(torch.optim.SGD(model.parameters(), lr=1.0), model, [BNP()])
    report = optimizer.report()
    assert list(report.conditioned) == ["graph", "linear"]
    assert report.left_alone == dict.fromkeys(["scaled.weight", "scaled.bias"], "its rows are scaled")


def test_an_adapter_may_claim_parts_of_other_modules_which_are_then_no_layers(registry):
    class Pair(nn.Module):
        """a = W [x, y] + b + c with the weight in two Linears and two biases that share one direction."""

        def __init__(self):
            super().__init__()
            self.x, self.y = nn.Linear(3, 2), nn.Linear(2, 2)

        def forward(self, x, y):
            return self.x(x) + self.y(y)

    register_layer(
        Pair,
        lambda module: Layer(
            "both",
            module,
            weight=["x.weight", "y.weight"],
            bias=["x.bias", "y.bias"],
            observe=lambda module, args, kwargs, output: torch.cat(args, -1),
        ),
    )
    model, x, y = Pair(), 1 + torch.randn(9, 3), 2 * torch.randn(9, 2) - 1
    index = places(model)
    rows = units_of(
        torch.cat([index["x.weight"], index["y.weight"]], 1),
        [index["x.bias"], index["y.bias"]],
        torch.cat([x, y], 1),
    )
    optimizer = check(model, lambda: model(x, y).pow(3).mean(), rows)
    assert list(optimizer.report().conditioned) == ["both"]


class Transposed(nn.Module):
    """A linear layer whose weight is (in, out)."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.ones(4, 3))
        self.offset = nn.Parameter(torch.zeros(3))

    def forward(self, hidden):
        return hidden @ self.kernel + self.offset


def seen(_, args, kwargs, output):
    return kwargs["hidden"]


ADAPTERS = {
    "no such weight": (dict(), ValueError, r"Transposed.weight to be a weight of two axes or more, got none"),
    "no matrix": (dict(weight="offset"), ValueError, r"got shape \(3,\); name the parameter by weight="),
    "not transposed": (
        dict(weight="kernel", observe=seen),
        ValueError,
        "to have 3 numbers along axis 1, got shape",
    ),
    "another input": (
        dict(weight="kernel", transposed=True, observe=lambda *call: call[-1]),
        ValueError,
        "to have 4 numbers along axis 1",
    ),
    "rows of one that is transposed": (
        dict(weight="kernel", transposed=True, span=(0, 2), observe=seen),
        ValueError,
        r"Transposed.kernel to be \(out, in\), since span= takes rows of it, got transposed=True",
    ),
    "several that are transposed": (
        dict(weight=("kernel", "kernel"), transposed=True, observe=seen),
        ValueError,
        r"to be \(out, in\), since several weights are joined",
    ),
    "moments of others": (
        dict(
            weight="kernel",
            transposed=True,
            observe=lambda *call: Moments(6, 6, 6, torch.zeros(3), torch.ones(3)),
        ),
        ValueError,
        r"moments of 4 numbers for layer '0', one per input, got mean \(3,\) and variance \(3,\)",
    ),
    "no tensor": (
        dict(weight="kernel", transposed=True, observe=lambda *call: [1.0]),
        TypeError,
        "layer '0' to return a tensor, got list",
    ),
}


@pytest.mark.parametrize("options, error, words", ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_that_does_not_fit_is_told_what_to_say(registry, options, error, words):
    register_layer(Transposed, lambda module: Layer("", module, bias="offset", **options))
    model = nn.ModuleList([Transposed()])
    with pytest.raises(error, match=words):
        _optimizer = gradcond.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, [BNP()])
        model[0](hidden=torch.ones(6, 4))


@pytest.mark.parametrize("returned", [None, 1, nn.Linear(1, 1), [None]], ids=["none", "number", "module", "list"])
def test_an_adapter_returns_layers_or_a_text(registry, returned):
    register_layer(Transposed, lambda module: returned)
    with pytest.raises(TypeError, match="adapter of Transposed to return a Layer, a list of them, or a text"):
        find_layers(nn.Sequential(Transposed()))
    with pytest.raises(TypeError, match="a function that takes a module and returns its Layer, got None"):
        register_layer(Transposed, None)


@pytest.mark.parametrize("kind", [nn.Linear(2, 2), torch.Tensor, int, None, torch.nn.functional.linear], ids=repr)
def test_only_module_classes_and_names_are_registered(registry, kind):
    before = dict(_adapters)
    with pytest.raises(TypeError, match=r"expected a subclass of torch\.nn\.Module or its full name, got"):
        register_layer(kind, graph_layer)
    assert _adapters == before


@pytest.mark.filterwarnings("ignore:.*(nested tensors is in prototype|Sparse CSR tensor support is in beta)")
@pytest.mark.parametrize("kind", ["jagged", "strided", "sparse", "sparse_csr"])
def test_rows_of_nested_and_sparse_inputs_count_as_those_of_dense_ones(kind):
    def pack(parts):
        if kind in ("jagged", "strided"):
            return torch.nested.nested_tensor(parts, layout=getattr(torch, kind))
        return getattr(torch.cat(parts), f"to_{kind}")()

    parameters = []
    for build in (pack, torch.cat):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = gradcond.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, [BNP()])
        for _ in range(3):
            y = model(build([1 + torch.randn(2, 4), torch.randn(5, 4)]))
            (torch.cat(y.unbind()) if y.is_nested else y).pow(3).mean().backward()
            optimizer.step()
        parameters.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert_close(*parameters, rtol=1e-12, atol=1e-12)


class Late(nn.Linear):
    """Called with its input last, by a name of its own."""

    def forward(self, scale, *, rows):
        return scale * super().forward(rows)


class Sequences(nn.LSTM):
    """Puts out its states alone."""

    def forward(self, x):
        return super().forward(x)[0]


class Attending(nn.MultiheadAttention):
    """To itself."""

    def forward(self, x):
        return super().forward(x, x, x)[0]


@pytest.mark.parametrize(
    ("build", "call", "left_alone"),
    [
        (lambda: Late(4, 3), lambda model, x: model(2.0, rows=x), {""}),
        (lambda: Sequences(4, 3), nn.Module.__call__, {"l0"}),
        (lambda: Attending(4, 2), nn.Module.__call__, {"key", "value", "out_proj"}),
    ],
    ids=["linear", "recurrent", "attention"],
)
def test_layers_called_in_a_way_of_their_own_are_left_alone_with_a_warning(build, call, left_alone):
    model = build()
    optimizer = gradcond.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, [BNP()])
    call(model, torch.randn(5, 2, 4)).pow(3).mean().backward()
    with pytest.warns(UserWarning, match="register_layer shows the input"):
        optimizer.step()
    texts = optimizer.report().conditioned
    assert {name for name, (text,) in texts.items() if "no statistics yet" in text} == left_alone


@pytest.mark.parametrize("settings", [{}, {"ghost": 5}, {"taps": True}], ids=str)
def test_a_convolution_inside_a_registered_module_has_moments_per_channel(registry, settings):
    """Which positions its taps meet only the module knows, so taps are tied; ghost rows are whole samples."""

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3)

        def forward(self, x):
            return self.conv(2 * x)

    register_layer(
        Wrapped,
        lambda module: Layer(
            "", module, weight="conv.weight", bias="conv.bias", observe=lambda m, args, kwargs, output: 2 * args[0]
        ),
    )
    model, x = Wrapped(), 1 + torch.randn(5, 3, 5, 5)
    optimizer = gradcond.wrap(torch.optim.SGD(model.parameters(), lr=1.0), model, [BNP(decay=0.0, **settings)])
    model(x).pow(3).mean().backward()
    optimizer.step()
    plain = nn.Conv2d(3, 2, 3)
    other = gradcond.wrap(torch.optim.SGD(plain.parameters(), lr=1.0), plain, [BNP(decay=0.0)])
    plain(2 * x).pow(3).mean().backward()
    other.step()
    eye = torch.eye(sum(p.numel() for p in plain.parameters()))
    assert_close(optimizer.preconditioner().apply(eye), other.preconditioner().apply(eye))
    optimizer.load_state_dict(optimizer.state_dict())


def test_a_grouped_convolution_inside_a_registered_module_is_conditioned_as_by_itself(registry):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 3, groups=2, stride=2)

        def forward(self, x):
            return self.conv(x)

    register_layer(Wrapped, lambda module: Layer("", module, weight="conv.weight", bias="conv.bias", groups=2))
    inside = Wrapped()
    alone = copy.deepcopy(inside.conv)
    x = torch.randn(1, 4, 5, 5)  # q^2 counts 4 output positions, fewer than the 18 weights of a row
    for model in (inside, alone):
        optimizer = gradcond.wrap(torch.optim.SGD(model.parameters(), lr=1.0), model, [BNP()])
        model(x).pow(3).mean().backward()
        optimizer.step()
    assert_close(inside.conv.weight, alone.weight, rtol=0, atol=1e-14)
    assert_close(inside.conv.bias, alone.bias, rtol=0, atol=1e-14)


@pytest.mark.parametrize("end", [nn.GLU(1), nn.Flatten(), nn.Identity()], ids=repr)
def test_rows_of_a_convolution_inside_a_registered_module_are_its_positions(registry, end):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(3, 4, 3, padding=1, stride=2)

        def forward(self, x):
            return end(self.conv(x))

    register_layer(Wrapped, lambda module: Layer("", module, weight="conv.weight", bias="conv.bias"))
    model = Wrapped()
    optimizer = gradcond.wrap(torch.optim.SGD(model.parameters(), lr=1.0), model, [BNP()])
    model(torch.randn(2, 3, 9)).pow(3).mean().backward()
    optimizer.step()
    assert optimizer._engine.states[0][""]["rows"] == 10


@pytest.mark.parametrize("chain", ["bnp", "gc", "gc-both", "msr", "bnp+msr+damping+clipping"])
def test_several_kernels_may_make_one_row(registry, chain):
    """As in convolutional recurrent cells: of one convolution of all their inputs."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.x, self.h = nn.Conv1d(2, 4, 3), nn.Conv1d(3, 4, 3, bias=False)

        def forward(self, both):
            return self.x(both[:, :2]) + self.h(both[:, 2:])

    register_layer(Pair, lambda module: Layer("", module, weight=("x.weight", "h.weight"), bias="x.bias"))
    model, alone = Pair(), nn.Conv1d(5, 4, 3)
    with torch.no_grad():
        alone.weight.copy_(torch.cat([model.x.weight, model.h.weight], 1))
        alone.bias.copy_(model.x.bias)
    optimizers = [wrapped(m, CHAINS[chain].chain(), lr=0.01) for m in (model, alone)]
    for _ in range(3):
        both = 1 + torch.randn(4, 5, 6)
        for m, optimizer in zip((model, alone), optimizers, strict=True):
            optimizer.zero_grad()
            m(both).pow(3).mean().backward()
            optimizer.step()
    assert_close(torch.cat([model.x.weight, model.h.weight], 1), alone.weight, rtol=1e-12, atol=1e-12)
    assert_close(model.x.bias, alone.bias, rtol=1e-12, atol=1e-12)


class Mixed(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(first)), nn.Parameter(torch.ones(second))


@pytest.mark.parametrize("first, second", [((4, 2), (3, 2)), ((4, 2, 3), (4, 2, 1)), ((4, 2), (4,))], ids=str)
def test_several_weights_of_one_row_have_the_same_units_and_kernel(first, second):
    with pytest.raises(ValueError, match="of Mixed to differ in their inputs alone, since they make one row"):
        Layer("", Mixed(first, second), weight=("a", "b"))
    with pytest.raises(ValueError, match="one group, since several weights are joined, got groups=2"):
        Layer("", Mixed((4, 2), (4, 2)), weight=("a", "b"), groups=2)
