"""nn.RNN, nn.LSTM and nn.GRU against the joint inputs [x_t, h_{t-1}] of cells unrolled by hand."""

import copy

import pytest
import torch
from dense import assemble, check, damped, moments, places, row_matrix
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.testing import assert_close

import gradcond
from gradcond import BNP


def cell(module, suffix, x, state):
    """One step of one depth and direction: what it puts out, and its next state (h, c)."""

    def parameter(name):
        return getattr(module, f"{name}_{suffix}", None)

    h, c = state
    bias_x, bias_h = (parameter(name) if module.bias else 0.0 for name in ("bias_ih", "bias_hh"))
    a, b = x @ parameter("weight_ih").mT + bias_x, h @ parameter("weight_hh").mT + bias_h
    if isinstance(module, nn.LSTM):
        i, f, g, o = (a + b).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        if module.proj_size:
            h = h @ parameter("weight_hr").mT
    elif isinstance(module, nn.GRU):
        (ra, za, na), (rb, zb, nb) = a.chunk(3, -1), b.chunk(3, -1)
        z, n = torch.sigmoid(za + zb), torch.tanh(na + torch.sigmoid(ra + rb) * nb)
        h = (1 - z) * n + z * h
    else:
        h = torch.tanh(a + b) if module.nonlinearity == "tanh" else torch.relu(a + b)
    return h, (h, c)


@torch.no_grad()
def unrolled(module, sequences, h0=None, c0=None, last=None):
    """Rows (x, h) of every depth and direction, over all steps of a list of sequences (steps, inputs).

    States start at h0 and c0 (depths x directions, sequences, size). Where outputs of the last depth are given
    they are taken for its states, whatever noise is in them.
    """
    size, directions = module.proj_size or module.hidden_size, 1 + module.bidirectional
    rows = {}
    for depth in range(module.num_layers):
        following = [[] for _ in sequences]
        for direction in range(directions):
            suffix = f"l{depth}" + "_reverse" * direction
            xs, hs = [], []
            for k, sequence in enumerate(sequences):
                at = depth * directions + direction
                state = (
                    torch.zeros(size) if h0 is None else h0[at, k],
                    torch.zeros(module.hidden_size) if c0 is None else c0[at, k],
                )
                outputs = {}
                for t in range(len(sequence))[:: -1 if direction else 1]:
                    xs.append(sequence[t])
                    hs.append(state[0])
                    outputs[t], state = cell(module, suffix, sequence[t], state)
                    if last is not None and depth == module.num_layers - 1:
                        state = last[k][t, direction * size : (direction + 1) * size], state[1]
                following[k].append(torch.stack([outputs[t] for t in range(len(sequence))]))
            rows[suffix] = torch.stack(xs), torch.stack(hs)
        sequences = [torch.cat(parts, -1) for parts in following]
    return rows, sequences


def units(model, module, rows, prefix="", dropout=0.0):
    """Every unit of every depth, direction and part, with its dense M."""
    index, found = {k.removeprefix(prefix): v for k, v in places(model).items()}, []
    for suffix, (x, h) in rows.items():
        mx, vx = moments(x)
        if dropout and not suffix.startswith("l0"):  # second moment m^2 + v divided by 1 - p
            vx = (vx + mx**2) / (1 - dropout) - mx**2
        mh, vh = moments(h)
        w_x, w_h = index[f"weight_ih_{suffix}"], index[f"weight_hh_{suffix}"]
        b_x, b_h = (index[f"bias_{k}_{suffix}"] if module.bias else None for k in ("ih", "hh"))
        n, size = len(x), len(w_x)
        gru = isinstance(module, nn.GRU)
        joint = row_matrix(torch.cat([mx, mh]), damped(torch.cat([vx, vh])), n, module.bias)
        for i in range(2 * size // 3 if gru else size):
            found.append((torch.cat([w_x[i], w_h[i]]), both(b_x, b_h, i), joint))
        if gru:
            for weight, bias, mean, variance in ((w_x, b_x, mx, vx), (w_h, b_h, mh, vh)):
                m = row_matrix(mean, damped(variance), n, module.bias)
                found += [(weight[i], both(bias, None, i), m) for i in range(2 * size // 3, size)]
    return found


def both(a, b, i):
    return torch.tensor([int(bias[i]) for bias in (a, b) if bias is not None], dtype=torch.long)


def build(kind, **options):
    torch.manual_seed(1)
    module = {"rnn": nn.RNN, "relu": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}[kind](
        3, 4, **({"nonlinearity": "relu"} if kind == "relu" else {}), **options
    )
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(1.5)
    return module


def starts(module, batch, given):
    """h0 and c0, or nothing; and the same as the module takes them."""
    if not given:
        return None, None, ()
    count, size = module.num_layers * (1 + module.bidirectional), module.proj_size or module.hidden_size
    h0, c0 = 2 + torch.randn(count, batch, size), torch.randn(count, batch, module.hidden_size)
    return h0, c0, ((h0, c0) if isinstance(module, nn.LSTM) else h0,)


def sequences_of(lengths):
    return [1 + torch.randn(n, 3) * torch.tensor([0.5, 1.0, 3.0]) for n in lengths]


CASES = {
    f"{kind}{''.join('-' + str(k) + '=' + str(v) for k, v in options.items())}": (kind, options)
    for kind in ("rnn", "relu", "lstm", "gru")
    for options in (
        {},
        {"bias": False},
        {"num_layers": 2, "bidirectional": True},
        {"num_layers": 3, "batch_first": True},
        {"num_layers": 2, "bidirectional": True, "proj_size": 2},
    )
    if kind == "lstm" or "proj_size" not in options
}


@pytest.mark.parametrize("start", [False, True], ids=["zero", "given"])
@pytest.mark.parametrize("case", CASES)
def test_padded_batches_are_the_dense_matrix_of_their_joint_inputs(case, start):
    kind, options = CASES[case]
    module = build(kind, **options)
    sequences = sequences_of([5, 5, 5])
    h0, c0, extra = starts(module, 3, start)
    rows, outputs = unrolled(module, sequences, h0, c0)
    axis = 0 if module.batch_first else 1
    x = torch.stack(sequences, axis)
    assert_close(module(x, *extra)[0], torch.stack(outputs, axis))  # the reference is the module's function
    check(module, lambda: module(x, *extra)[0].pow(3).mean(), units(module, module, rows))


@pytest.mark.parametrize("start", [False, True], ids=["zero", "given"])
@pytest.mark.parametrize("case", CASES)
def test_packed_sequences_count_each_of_their_steps_and_no_padding(case, start):
    kind, options = CASES[case]
    module = build(kind, **options)
    sequences = sequences_of([2, 5, 1, 4])
    h0, c0, extra = starts(module, 4, start)
    rows, outputs = unrolled(module, sequences, h0, c0)
    packed = pack_sequence(sequences, enforce_sorted=False)
    assert_close(module(packed, *extra)[0].data, pack_sequence(outputs, enforce_sorted=False).data)
    check(module, lambda: module(packed, *extra)[0].data.pow(3).mean(), units(module, module, rows))


@pytest.mark.parametrize("start", [False, True], ids=["zero", "given"])
@pytest.mark.parametrize("kind", ["rnn", "lstm", "gru"])
def test_a_sequence_by_itself(kind, start):
    module = build(kind, num_layers=2, bidirectional=True)
    (x,) = sequences_of([6])
    h0, c0, extra = starts(module, 1, start)
    rows, _ = unrolled(module, [x], h0, c0)
    if start:
        extra = (tuple(s[:, 0] for s in extra[0]) if kind == "lstm" else extra[0][:, 0],)
    check(module, lambda: module(x, *extra)[0].pow(3).mean(), units(module, module, rows))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.sampled_from(["rnn", "relu", "lstm", "gru"]),
    st.booleans(),
    st.booleans(),
    st.integers(1, 3),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.booleans(),
)
def test_any_lengths_and_any_shape_of_network(kind, bias, bidirectional, depths, lengths, start):
    module = build(kind, bias=bias, bidirectional=bidirectional, num_layers=depths)
    sequences = sequences_of(lengths)
    h0, c0, extra = starts(module, len(lengths), start)
    rows, _ = unrolled(module, sequences, h0, c0)
    packed = pack_sequence(sequences, enforce_sorted=False)
    check(module, lambda: (module(packed, *extra)[0].data - 1).pow(2).mean(), units(module, module, rows))


@pytest.mark.parametrize("kind", ["rnn", "lstm", "gru"])
def test_dropout_between_depths_enters_by_its_mean_and_variance(kind):
    module = build(kind, num_layers=2, dropout=0.4)
    sequences = sequences_of([5, 5, 5])
    x = torch.stack(sequences, 1)
    torch.manual_seed(7)
    last = module(x)[0].detach().unbind(1)  # the states as they were with this mask
    rows, _ = unrolled(module, sequences, last=last)

    def loss():
        torch.manual_seed(7)
        return module(x)[0].pow(3).mean()

    check(module, loss, units(module, module, rows, dropout=0.4))


def test_observing_leaves_the_draws_of_dropout_as_they_are():
    module = build("gru", num_layers=3, dropout=0.4)
    x = torch.randn(4, 2, 3)
    torch.manual_seed(7)
    expected = module(x)[0], torch.rand(1)
    _wrapped = gradcond.wrap(torch.optim.SGD(module.parameters(), lr=1.0), module, [BNP()])
    torch.manual_seed(7)
    assert_close((module(x)[0], torch.rand(1)), expected, rtol=0, atol=0)


def test_calls_of_one_step_count_as_one_and_states_carried_between_them_as_starts():
    module = build("lstm", num_layers=2)
    (sequence,) = sequences_of([6])
    rows, _ = unrolled(module, [sequence])

    def loss():
        first, states = module(sequence[:2, None])
        second, _ = module(sequence[2:, None], states)
        return torch.cat([first, second]).pow(3).mean()

    check(module, loss, units(module, module, rows))


@pytest.mark.parametrize("how", ["padded", "batch first", "packed", "by itself"])
def test_sequences_are_the_samples_and_steps_the_rows(how):
    module = build("lstm", batch_first=how == "batch first")
    sequences = sequences_of([2, 5, 1, 4] if how == "packed" else [5] if how == "by itself" else [5] * 4)
    if how == "packed":
        x = pack_sequence(sequences, enforce_sorted=False)
    else:
        x = sequences[0] if how == "by itself" else torch.stack(sequences, 0 if how == "batch first" else 1)
    optimizer = gradcond.wrap(torch.optim.SGD(module.parameters(), lr=1.0), module, [BNP()])
    y = module(x)[0]
    (y.data if how == "packed" else y).pow(3).mean().backward()
    optimizer.step()
    state = optimizer.state_dict()["gradcond"]["chain"][0]["layers"]["l0"]
    assert (state["samples"], state["rows"]) == (len(sequences), sum(map(len, sequences)))


def test_a_network_around_it_trains_the_same_from_a_copy_and_a_checkpoint():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(9, 3)
            self.rnn = nn.GRU(3, 4, num_layers=2, bidirectional=True, batch_first=True)
            self.out = nn.Linear(8, 2)

        def forward(self, words):
            return self.out(self.rnn(self.words(words))[0])

    def train(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            words = torch.randint(0, 9, (4, 6), generator=torch.Generator().manual_seed(step))
            model(words).pow(2).mean().backward()
            optimizer.step()

    def wrapped(model):
        return gradcond.wrap(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), model, [BNP()])

    model = Tagger()
    optimizer = wrapped(model)
    report = optimizer.report()
    parts = [f"rnn.l{d}{r}.{p}" for d in (0, 1) for r in ("", "_reverse") for p in ("gates", "new_x", "new_h")]
    assert sorted(report.conditioned) == sorted(["words", "out", *parts])
    assert not report.left_alone
    train(model, optimizer, range(3))
    twin, again = copy.deepcopy((model, optimizer))
    resumed = Tagger()
    resumed.load_state_dict(model.state_dict())
    other = wrapped(resumed)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, opt in ((model, optimizer), (twin, again), (resumed, other)):
        train(m, opt, range(3, 6))
    for p, q, r in zip(model.parameters(), twin.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)


@pytest.mark.parametrize("kind", ["rnn", "lstm", "gru"])
def test_a_batch_of_no_sequences_counts_nothing(kind):
    module = build(kind, num_layers=2)
    sequences = sequences_of([5, 5, 5])
    rows, _ = unrolled(module, sequences)
    x = torch.stack(sequences, 1)
    loss = lambda: module(x)[0].pow(3).mean() + module(x[:, :0])[0].sum()  # noqa: E731
    check(module, loss, units(module, module, rows))


def test_what_is_in_no_row_is_said_to_be():
    module = build("lstm", proj_size=2)
    optimizer = gradcond.wrap(torch.optim.SGD(module.parameters(), lr=1.0), module, [BNP()])
    report = optimizer.report()
    assert list(report.conditioned) == ["l0"]
    assert report.left_alone == {"weight_hr_l0": "it is in no row of LSTM"}


@pytest.mark.parametrize("frozen", ["bias_ih_l0", "bias_hh_l0"])
def test_of_two_biases_one_may_be_frozen(frozen):
    module = build("lstm")
    getattr(module, frozen).requires_grad_(False)
    sequences = sequences_of([5, 5, 5])
    rows, _ = unrolled(module, sequences)
    index = places(module)
    joint = torch.cat(rows["l0"], 1)
    mean, variance = moments(joint)
    m = row_matrix(mean, damped(variance), len(joint), True)
    bias = index["bias_hh_l0" if frozen == "bias_ih_l0" else "bias_ih_l0"]
    weight = torch.cat([index["weight_ih_l0"], index["weight_hh_l0"]], 1)
    rows_of = [(weight[i], bias[i : i + 1], m) for i in range(len(bias))]
    x = torch.stack(sequences, 1)
    check(module, lambda: module(x)[0].pow(3).mean(), rows_of)


def test_cells_called_by_hand_are_layers_of_their_own_or_said_to_be_none():
    model = nn.ModuleList([nn.LSTMCell(2, 3), nn.GRUCell(2, 3), nn.RNNCell(2, 3)])
    optimizer = gradcond.wrap(torch.optim.SGD(model.parameters(), lr=1.0), model, [BNP()])
    reasons = set(optimizer.report().left_alone.values())
    assert reasons == {"LSTMCell has no adapter", "GRUCell has no adapter", "RNNCell has no adapter"}


def test_the_reference_spreads_biases_as_one_direction():
    m = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    dense = assemble(3, [(torch.tensor([0]), torch.tensor([1, 2]), m)])
    g = torch.tensor([5.0, 7.0, 7.0])  # both biases have the gradient of their sum
    step = dense @ g
    assert step[0] == 7 * 1 + 5 * 3
    assert step[1] + step[2] == 7 * 2 + 5
