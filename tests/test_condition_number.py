"""The condition number command against dense matrices: its blocks, its correlations, and what it leaves open."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from dense import places, unfolded
from scipy.optimize import linear_sum_assignment
from test_recurrent import build, sequences_of, starts, unrolled
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.testing import assert_close

import gradcond
from gradcond import curvature

sys.path.insert(0, str(Path(__file__).parents[1] / "analysis"))

from condition_number import main
from input_correlation import InputCorrelation, condition, watching
from input_rows import input_rows
from layer_blocks import find_blocks
from problems import load_problem

COMMAND = Path(__file__).parents[1] / "analysis" / "condition_number.py"

PROBLEM = """
import torch
from torch import nn

def build_model():
    return nn.Sequential(
        nn.Linear(4, 3), nn.Tanh(), nn.LayerNorm(3), nn.Linear(3, 2), nn.Dropout(0.1)
    ).to(torch.float64)

def load_data():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(40, 4, generator=generator, dtype=torch.float64) + 1
    return [(inputs[:30], torch.arange(30) % 2), (inputs[30:], torch.arange(10) % 2)]

loss_fn = nn.CrossEntropyLoss()
"""
VARIANTS = ["plain", "BNP", "Adam"]
ROWS = {"0": [[*range(4 * i, 4 * i + 4), 12 + i] for i in range(3)],
        "3": [[*range(21 + 3 * i, 24 + 3 * i), 27 + i] for i in range(2)]}  # fmt: skip
BLOCKS = {"0": range(15), "2": range(15, 21), "3": range(21, 29)}


def train(folder, optimizer=torch.optim.Adam, conditioners=None, steps=6, name="last.pt"):
    problem = load_problem(folder / "problem.py")
    model = problem.build_model()
    own = optimizer(model.parameters(), lr=0.05)
    conditioners = [gradcond.BNP()] if conditioners is None else conditioners
    own = gradcond.wrap(own, model, conditioners) if conditioners else own
    for _ in range(steps):
        for inputs, target in problem.load_data():
            own.zero_grad()
            problem.loss_fn(model(inputs), target).backward()
            own.step()
    torch.save({"model": model.state_dict(), "optimizer": own.state_dict()}, folder / name)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "problem.py").write_text(PROBLEM)
    train(tmp_path)
    return tmp_path


def run(folder, *options, checkpoints=("last.pt",)):
    paths = [str(folder / name) for name in checkpoints]
    return main([*paths, "--problem", str(folder / "problem.py"), "--out", str(folder / "out"), *options])


def report(folder):
    def refuse(word):
        raise AssertionError(f"{word} is not strict JSON")

    return json.loads((folder / "out" / "condition.json").read_text(), parse_constant=refuse)


def dense(folder, operator):
    """H and the P of each variant, and the loss, written out."""
    problem, saved = load_problem(folder / "problem.py"), torch.load(folder / "last.pt", weights_only=True)
    model = problem.build_model().eval()
    model.load_state_dict(saved["model"])
    H = operator(model, problem.loss_fn, problem.load_data())
    bnp = gradcond.load_preconditioner(model, saved["optimizer"]).factor(torch.eye(29))
    second = [saved["optimizer"]["state"][i]["exp_avg_sq"].flatten() for i in range(6)]
    adam = (torch.cat(second) / (1 - 0.999**12)).sqrt() + 1e-8
    matrix = H.to_dense()
    factors = {"plain": torch.eye(29), "BNP": bnp, "Adam": torch.diag(adam**-0.5)}
    return {name: P.mT @ matrix @ P for name, P in factors.items()}, float(H.loss()), model, problem


def kappa(matrix):
    values = torch.linalg.eigvalsh((matrix + matrix.mT) / 2).abs()
    return float(values.max() / values[values > 1e-13 * values.max()].min())


def sub(matrix, index):
    return matrix[list(index)][:, list(index)]


@pytest.mark.parametrize("operator", ["hessian", "ggn"])
def test_numbers_are_those_of_the_dense_matrices(folder, capsys, operator):
    assert run(folder, "--operator", operator) == 0
    found = report(folder)
    (entry,) = found["checkpoints"]
    assert (found["format"], found["settings"]["operator"], entry["variants"]) == (1, operator, VARIANTS)
    matrices, loss, model, problem = dense(folder, {"hessian": curvature.Hessian, "ggn": curvature.GGN}[operator])
    assert entry["loss"] == pytest.approx(loss)
    whole, *blocks = entry["blocks"]
    assert [(b["name"], b["kind"], b["parameters"]) for b in blocks] == [
        ("0", "Linear", 15),
        ("2", "LayerNorm", 6),
        ("3", "Linear", 8),
    ]
    for name, matrix in matrices.items():
        assert whole["kappa"][name]["kappa"] == pytest.approx(kappa(matrix), rel=1e-6)
        for block in blocks:
            numbers, own = block["kappa"][name], sub(matrix, BLOCKS[block["name"]])
            values = torch.linalg.eigvalsh(own)
            assert numbers["exact"] and numbers["resolved"] and numbers["converged"]
            assert numbers["kappa"] == pytest.approx(kappa(own), rel=1e-6)
            assert numbers["lambda_max"] == pytest.approx(float(values[-1]), rel=1e-9)
            if block["units"]:
                units = block["units"]["kappa"][name]
                expected = [kappa(sub(matrix, row)) for row in ROWS[block["name"]]]
                assert units["kappa"] == pytest.approx(expected, rel=1e-6)
                assert units["max"] == pytest.approx([max(expected)] * 2, rel=1e-6)
                assert units["min"] == pytest.approx([min(expected)] * 2, rel=1e-6)
    table = capsys.readouterr().out
    assert f"{whole['kappa']['BNP']['kappa']:.4g}" in table and "3 output units" in table
    assert " / ".join(f"{blocks[0]['units']['kappa']['Adam'][k][0]:.4g}" for k in ("min", "median", "max")) in table
    inputs = torch.cat([x for x, _ in problem.load_data()])
    hidden = model[:3](inputs).detach()
    for block, h in ((blocks[0], inputs), (blocks[2], hidden)):
        floor = block["input_correlation"]
        assert floor["kappa"] == pytest.approx(kappa(torch.corrcoef(h.mT)), rel=1e-6)
        assert (floor["rows"], floor["inputs"], floor["constant"]) == (40, h.shape[1], 0)
        assert f"{floor['kappa']:.4g}" in table
    assert blocks[1]["input_correlation"] is None and blocks[1]["units"] is None


def test_estimates_agree_with_all_eigenvalues(folder, capsys):
    assert run(folder, "--exact-below", "0", "--kappa-matvecs", "40", "--units", "2") == 0
    (entry,) = report(folder)["checkpoints"]
    matrices, *_ = dense(folder, curvature.Hessian)
    assert all(block["kappa"]["plain"]["exact"] for block in entry["blocks"])  # at most 40 parameters
    assert [b["units"]["measured"] for b in entry["blocks"] if b["units"]] == [[0, 2], [0, 1]]
    for block in entry["blocks"][1:]:
        for name, numbers in block["kappa"].items():
            assert numbers["kappa"] == pytest.approx(kappa(sub(matrices[name], BLOCKS[block["name"]])), rel=1e-6)
            if block["units"]:
                rows = [ROWS[block["name"]][unit] for unit in block["units"]["measured"]]
                expected = [kappa(sub(matrices[name], row)) for row in rows]
                assert block["units"]["kappa"][name]["kappa"] == pytest.approx(expected, rel=1e-6)
    assert "2 of 3 output units" in capsys.readouterr().out
    assert run(folder, "--exact-below", "0", "--kappa-matvecs", "28") == 0
    estimated = report(folder)["checkpoints"][0]["blocks"][0]["kappa"]
    for name, numbers in estimated.items():
        assert not numbers["exact"]
        assert numbers["lambda_max"] == pytest.approx(float(torch.linalg.eigvalsh(matrices[name])[-1]), rel=1e-6)
        assert numbers["kappa_lower_bound"] <= kappa(matrices[name]) * 1.0001
        if numbers["resolved"] and numbers["converged"]:
            assert numbers["kappa"] == pytest.approx(kappa(matrices[name]), rel=1e-2)
    assert any(numbers["resolved"] for numbers in estimated.values())


SQUARES = """
import torch
from torch import nn

def build_model():
    return nn.Linear(5, 2).to(torch.float64)

def load_data():
    g = torch.Generator().manual_seed(3)
    h = torch.randn(60, 5, generator=g, dtype=torch.float64) @ torch.randn(5, 5, generator=g, dtype=torch.float64)
    h = h * torch.logspace(-2, 2, 5, dtype=torch.float64) + torch.linspace(-5, 30, 5, dtype=torch.float64)
    return [(h, torch.randn(60, 2, generator=g, dtype=torch.float64))]

loss_fn = nn.MSELoss()
"""
TOKENS = "h = torch.cat([torch.arange(5), (20 * torch.rand(55, generator=g) ** 3).long() % 5])"
UNITS = {
    "bias": SQUARES,
    "no bias": SQUARES.replace("Linear(5, 2)", "Linear(5, 2, bias=False)"),
    "frozen bias": SQUARES + "\nbuild = build_model\ndef build_model():\n    model = build()\n"
    "    model.bias.requires_grad_(False)\n    return model\n",
    "embedding": SQUARES.replace("Linear", "Embedding").replace("    return [(h", f"    {TOKENS}\n    return [(h"),
}


@pytest.mark.parametrize("text", UNITS.values(), ids=UNITS)
def test_t26_bnp_reaches_its_floor_and_no_further(folder, capsys, text):
    (folder / "problem.py").write_text(text)
    exact = gradcond.BNP(decay=0, eps=0, eps_rel=0)
    train(folder, torch.optim.SGD, [exact], steps=1, name="squares.pt")
    assert run(folder, "--operator", "ggn", checkpoints=["squares.pt"]) == 0
    (entry,) = report(folder)["checkpoints"]
    assert entry["variants"] == ["plain", "BNP"] and entry["notes"] == []
    block = entry["blocks"][1]
    floor = block["input_correlation"]["kappa"]
    assert block["kappa"]["BNP"]["kappa"] == pytest.approx(floor, rel=1e-6)
    assert block["units"]["kappa"]["BNP"]["kappa"] == pytest.approx([floor] * 2, rel=1e-6)
    if "Linear" in text:
        assert block["kappa"]["plain"]["kappa"] > 1e3 * floor


def test_what_cannot_be_told_from_zero_is_a_bound_and_never_a_number(folder, capsys):
    text = PROBLEM.replace("+ 1\n", "* torch.tensor([1.0, 1.0, 1e-7, 1.0]) + 1\n")
    text = text.replace("nn.LayerNorm(3)", "nn.ReLU()")
    (folder / "problem.py").write_text(text)
    problem = load_problem(folder / "problem.py")
    model = problem.build_model()
    with torch.no_grad():
        model[0].bias[0] = -50.0  # dead: tanh and ReLU of it are constant
    torch.save(model.state_dict(), folder / "dead.pt")
    assert run(folder, "--operator", "ggn", "--dtype", "float32", checkpoints=["dead.pt"]) == 0
    (entry,) = report(folder)["checkpoints"]
    first = entry["blocks"][1]
    numbers = first["kappa"]["plain"]
    assert numbers["kappa"] is None and not numbers["resolved"] and numbers["kappa_lower_bound"] > 1e4
    units = first["units"]["kappa"]["plain"]
    assert units["zero"] == 1 and units["kappa"].count(None) > 1 and units["max"][1] is None
    table = capsys.readouterr().out
    assert f"> {numbers['kappa_lower_bound']:.4g}, unresolved below {numbers['noise_floor']:.1e}" in table
    assert "(1 zero)" in table and "nan" not in table and "inf" not in table
    for block in entry["blocks"][1:]:  # the third input, the first unit
        assert block["input_correlation"]["constant"] == 1 and block["input_correlation"]["resolved"]
    assert f"note: {folder / 'dead.pt'} holds no conditioner and no adaptive optimizer" in table


def test_two_checkpoints_files_and_random_state(folder):
    train(folder, torch.optim.SGD, [], name="sgd.pt")
    state = torch.get_rng_state()
    assert run(folder, checkpoints=("last.pt", "sgd.pt")) == 0
    assert [e["variants"] for e in report(folder)["checkpoints"]] == [VARIANTS, ["plain"]]
    files = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    assert sorted(files) == ["condition.json", "condition.png"] and files["condition.png"].startswith(b"\x89PNG")
    assert run(folder, checkpoints=("last.pt", "sgd.pt")) == 0
    assert {path.name: path.read_bytes() for path in (folder / "out").iterdir()} == files
    assert torch.equal(torch.get_rng_state(), state)


def test_an_optimizer_whose_diagonal_is_not_known_is_told(folder, capsys):
    train(folder, torch.optim.NAdam, [gradcond.GradientCentralization(), gradcond.BNP()])
    assert run(folder) == 0
    assert report(folder)["checkpoints"][0]["variants"] == ["plain", "GradientCentralization, BNP"]
    assert "the diagonal of its optimizer is left out: expected the state of Adam" in capsys.readouterr().out


def test_by_subprocess_with_a_progress_bar(folder):
    arguments = ["last.pt", "--problem", "problem.py", "--out", "out"]
    done = subprocess.run(
        [sys.executable, "-W", "error", COMMAND, *arguments], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "100%" in done.stderr and "29/29" in done.stderr  # the bar counts products
    assert "last: 29 parameters, loss" in done.stdout and "wrote out/condition.{json,png}" in done.stdout


def spoil_shape(folder):
    text = (folder / "problem.py").read_text()
    (folder / "problem.py").write_text(text.replace("nn.Linear(3, 2)", "nn.Linear(3, 1)"))


def spoil_data(folder):
    text = (folder / "problem.py").read_text()
    (folder / "problem.py").write_text(text.replace("40, 4", "40, 5"))


def spoil_conditioner(folder):
    saved = torch.load(folder / "last.pt", weights_only=True)
    saved["optimizer"]["gradcond"]["chain"][0]["name"] = "Unheard"
    torch.save(saved, folder / "last.pt")


def spoil_conditioners(folder):
    saved = torch.load(folder / "last.pt", weights_only=True)
    saved["optimizer"]["gradcond"] = 3
    torch.save(saved, folder / "last.pt")


BAD = {
    "no checkpoint": (lambda folder: (folder / "last.pt").unlink(), [], "no checkpoint file at"),
    "architecture": (spoil_shape, [], "another architecture"),
    "data": (spoil_data, [], "do not go together"),
    "conditioner": (spoil_conditioner, [], "unknown conditioner 'Unheard'"),
    "conditioners": (spoil_conditioners, [], "with an entry 'gradcond', got int"),
    "dropout": (lambda folder: None, ["--mode", "train"], "dropout is active in '4'"),
    "out is a file": (lambda folder: (folder / "out").write_text(""), [], "is a file; name another folder"),
}


@pytest.mark.parametrize("spoil, options, words", BAD.values(), ids=BAD)
def test_bad_input_is_told_in_one_line_and_nothing_is_written(folder, capsys, spoil, options, words):
    spoil(folder)
    before = {path.name for path in folder.iterdir()} - {"__pycache__"}
    assert run(folder, *options) == 2
    stdout, stderr = capsys.readouterr()
    last = stderr.replace("\r", "\n").splitlines()[-1]
    assert stdout == "" and last.startswith("error: ") and words in last
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == before


def test_the_picture_and_the_table_are_redrawn_from_the_file_alone(folder, capsys):
    assert run(folder) == 0
    table = capsys.readouterr().out.splitlines()
    out = folder / "out"
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    for path in (folder / "problem.py", folder / "last.pt", out / "condition.png"):
        path.unlink()
    assert main(["--redraw", "--out", str(out)]) == 0
    again = capsys.readouterr().out.splitlines()
    assert again[:-1] == table[:-1] and again[-1] == f"wrote {out}/condition.png"
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files


BAD_FILES = {
    "none": (None, ["no ", "condition.json", "--redraw needs"]),
    "damaged": ("{", ["condition.json is damaged", "measure again"]),
    "format": ('{"format": 2}', ['"format": 1', "measure again"]),
    "empty": ('{"format": 1}', ["damaged", "KeyError: 'checkpoints'", "measure again"]),
    "kinds": ('{"format": 1, "checkpoints": [3]}', ["damaged", "TypeError", "measure again"]),
}


@pytest.mark.parametrize("text, words", BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_cannot_be_redrawn_is_told(tmp_path, capsys, text, words):
    if text is not None:
        (tmp_path / "condition.json").write_text(text)
    before = sorted(tmp_path.iterdir())
    assert main(["--redraw", "--out", str(tmp_path)]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ") and all(word in stderr for word in words)
    assert sorted(tmp_path.iterdir()) == before


BAD_OPTIONS = {
    "nothing": [],
    "no problem": ["last.pt"],
    "no units": ["last.pt", "--problem", "p.py", "--units", "0"],
    "both": ["last.pt", "--problem", "p.py", "--redraw"],
}


@pytest.mark.parametrize("options", BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_options_are_checked(tmp_path, options):
    with pytest.raises(SystemExit) as caught:
        main([*options, "--out", str(tmp_path / "out")])
    assert caught.value.code == 2 and list(tmp_path.iterdir()) == []


# where the parameters of layers and units are, and what their rows meet


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.rnn, self.norm = nn.GRU(4, 3), nn.LayerNorm(3)
        self.up, self.conv = nn.ConvTranspose1d(4, 6, 2, groups=2), nn.Conv1d(6, 4, 3, groups=2, bias=False)
        self.tied, self.same, self.frozen = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(2, 2).requires_grad_(False)
        self.same.weight = self.tied.weight
        self.scale = nn.Parameter(torch.ones(2))


def test_blocks_hold_every_parameter_once_and_units_their_rows():
    model = Mixed()
    blocks = {block.name: block for block in find_blocks(model)}
    n = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert torch.cat([block.index for block in blocks.values()]).sort().values.tolist() == list(range(n))
    index = places(model)
    for name in ("norm", "tied", "same", ""):
        assert blocks[name].units == []
    assert sorted(blocks["tied"].index.tolist()) == sorted(
        [*index["tied.weight"].flatten().tolist(), *index["tied.bias"].tolist()]
    )
    assert blocks["same"].index.tolist() == index["same.bias"].tolist()
    for block in blocks.values():
        if block.units:
            assert torch.cat(block.units).sort().values.tolist() == block.index.sort().values.tolist()
    second = {name: blocks[name].units[1].tolist() for name in ("conv", "embed")}
    assert second["conv"] == index["conv.weight"][1].flatten().tolist()
    assert second["embed"] == index["embed.weight"][:, 1].tolist()
    up = blocks["up"].units[4]  # group 1, its unit 1: inputs 2 and 3
    assert up.tolist() == [*index["up.weight"][2:, 1].flatten().tolist(), int(index["up.bias"][4])]


CONVOLUTIONS = {
    "plain": nn.Conv2d(3, 4, (3, 2), stride=2, padding=1, dtype=torch.float64),
    "groups": nn.Conv1d(4, 6, 3, groups=2, padding=2, padding_mode="circular", dtype=torch.float64),
    "dilated": nn.Conv2d(2, 3, 2, dilation=2, bias=False, dtype=torch.float64),
    "transposed": nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dtype=torch.float64),
}


@pytest.mark.parametrize("module", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_convolution_meets_its_unfolded_input(module):
    x = torch.randn(5, module.in_channels, *[7] * (module.weight.dim() - 2))
    (block,) = find_blocks(module)
    found = torch.stack(input_rows(block.layer, (x,), {}, module(x)), 1)
    assert_close(found, unfolded(module, x).view(found.shape))


def correlated(rows, inputs, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, inputs, generator=g) @ torch.randn(inputs, inputs, generator=g)


def in_parts(x, sizes):
    own = InputCorrelation()
    for part in x.split(sizes):
        own.update(part)
    return own


@pytest.mark.parametrize("sizes", [[50], [1, 2, 47], [10] * 5])
@pytest.mark.parametrize("offset, dtype", [(0.0, torch.float64), (1e6, torch.float64), (30.0, torch.float32)])
def test_correlations_in_parts_are_those_of_all_rows(sizes, offset, dtype):
    x = (correlated(50, 6) + offset).to(dtype)
    x[:, 2] = 3.1  # never changes
    found = condition([in_parts(x, sizes)])
    rest = x[:, [0, 1, 3, 4, 5]].double()
    assert found["resolved"] and found["constant"] == 1 and found["inputs"] == 6
    assert found["kappa"] == pytest.approx(kappa(torch.corrcoef(rest.mT)), rel=1e-5)


def test_correlations_of_groups_are_taken_together():
    a, b = correlated(40, 3), correlated(40, 3, seed=1)
    values = torch.cat([torch.linalg.eigvalsh(torch.corrcoef(part.mT)) for part in (a, b)])
    found = condition([in_parts(a, [40]), in_parts(b, [40])])
    assert found["kappa"] == pytest.approx(float(values.max() / values.min()))


def test_directions_that_inputs_do_not_have_are_left_out():
    few = correlated(4, 6)  # three differences of four rows
    values = torch.linalg.svdvals((few - few.mean(0)) / few.std(0))[:3]
    found = condition([in_parts(few, [3, 1])])
    assert found["resolved"] and found["kappa"] == pytest.approx(float(values[0] / values[-1]) ** 2)
    doubled = torch.cat([few, few[:, :1] + few[:, 1:2]], 1).float()  # up to rounding the sum of others
    assert condition([in_parts(doubled, [4])])["kappa"] < 1e6
    alone = condition([in_parts(few[:1], [1])])
    assert not alone["resolved"] and alone["constant"] == 6 and alone["kappa_lower_bound"] == 1


def test_a_correlation_within_rounding_of_the_inputs_is_not_resolved():
    x = correlated(50, 3)
    x = torch.cat([x, x[:, :1] + 1e-5 * torch.randn(50, 1)], 1)
    exact, rounded = (condition([in_parts(x.to(dtype), [50])]) for dtype in (torch.float64, torch.float32))
    assert exact["resolved"] and exact["kappa"] > 1e9
    assert not rounded["resolved"] and 1e8 < rounded["kappa_lower_bound"] <= 1.01 * exact["kappa"]
    assert np.isnan(rounded["kappa"])


def left(x, bias):
    """What BNP with exact statistics leaves of the second moments of rows, by its definition."""
    x = x[:, x.std(0, correction=0) > 0]
    P, second = torch.diag(1 / x.std(0, correction=0)), torch.cov(x.mT, correction=0)
    if not bias:
        v = x.mean(0) @ P
        values, vectors = torch.linalg.eigh(torch.eye(len(v)) + torch.outer(v, v))
        P, second = P @ vectors @ torch.diag(values.rsqrt()) @ vectors.mT, x.mT @ x / len(x)
    return P.mT @ second @ P


def same_spectrum(correlation, matrix):
    values = torch.linalg.eigvalsh((matrix + matrix.mT) / 2)
    assert_close(correlation.spectrum()[0].square().sort().values, values, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sizes", [[50], [1, 2, 47]])
@pytest.mark.parametrize("offset", [0.0, 1.0, 300.0])
def test_without_a_bias_the_mean_stays_in_the_rows(sizes, offset):
    x = correlated(50, 6) + offset * torch.rand(6)
    x[:, 2] = 3.1
    own = InputCorrelation(bias=False)
    for part in x.split(sizes):
        own.update(part)
    same_spectrum(own, left(x, bias=False))
    same_spectrum(in_parts(x, sizes), left(x, bias=True))
    assert condition([own])["kappa"] == pytest.approx(kappa(left(x, bias=False)), rel=1e-6)


INDICES = {
    "some never": ([0, 4, 4, 6, 6, 6, 1, 1, 6], None, 4),
    "equally often": ([0, 1, 2, 0, 1, 2, 3, 3], None, 4),
    "padding": ([0, 4, 4, 6, 6, 6, 1, 3, 6], 4, 4),
    "one": ([2, 2, 2], None, 0),
    "one, and padding": ([2, 0, 2, 0, 2], 0, 1),
    "one nearly always": ([3] * 500 + [1, 2], None, 3),
}


@pytest.mark.parametrize("indices, padding, varying", INDICES.values(), ids=INDICES)
def test_one_hot_inputs_are_known_by_their_frequencies(indices, padding, varying):
    x = torch.tensor(indices)
    embedding = nn.Embedding(7, 2, padding_idx=padding)
    with watching(find_blocks(embedding)) as seen:
        for part in x.split(4):
            embedding(part[None])
    found, rows = condition(seen[""]), torch.eye(7)[x]
    if padding is not None:
        rows[x == padding] = 0
    assert (found["rows"], found["inputs"], found["constant"]) == (len(x), 7, 7 - varying)
    assert found["resolved"] == (varying > 0)
    if varying:
        same_spectrum(seen[""][0], left(rows, bias=False))
        written = InputCorrelation(bias=False)
        written.update(rows)
        assert found["kappa"] == pytest.approx(condition([written])["kappa"])
        assert float(seen[""][0].spectrum()[0].min()) ** 2 > 0.5 - 1e-12


def test_a_large_vocabulary_takes_no_matrix_of_its_size():
    x = (torch.rand(30_000) ** -1.5).long() % 200_000
    embedding = nn.Embedding(200_000, 1)
    with watching(find_blocks(embedding)) as seen:
        embedding(x)
    found, p = condition(seen[""]), x.bincount() / len(x)
    inverse = torch.diag(1 - p[p > 0]) + torch.outer(p[p > 0].sqrt(), p[p > 0].sqrt())
    assert len(inverse) > 200 and found["constant"] == 200_000 - len(inverse)
    assert found["kappa"] == pytest.approx(kappa(inverse), rel=1e-9)


RECURRENT = {
    "rnn": ("rnn", {"num_layers": 2}),
    "gru": ("gru", {"num_layers": 2, "bidirectional": True}),
    "lstm": ("lstm", {"num_layers": 3, "bias": False}),
    "lstm, projected": ("lstm", {"num_layers": 2, "bidirectional": True, "proj_size": 2}),
}


@pytest.mark.parametrize("start", [False, True], ids=["zero", "given"])
@pytest.mark.parametrize("how", ["padded", "batch first", "packed", "alone"])
@pytest.mark.parametrize("kind, options", RECURRENT.values(), ids=RECURRENT)
def test_recurrent_layers_meet_their_input_and_the_state_before(kind, options, how, start):
    module = build(kind, batch_first=how == "batch first", **options)
    sequences = sequences_of([3, 5, 1, 5] if how == "packed" else [4] if how == "alone" else [4, 4, 4])
    h0, c0, given = starts(module, len(sequences), start)
    if how == "packed":
        x = pack_sequence(sequences, enforce_sorted=False)
    elif how == "alone":
        x, given = sequences[0], [(s[0][:, 0], s[1][:, 0]) if kind == "lstm" else s[:, 0] for s in given]
    else:
        x = torch.stack(sequences, 0 if how == "batch first" else 1)
    blocks = [block for block in find_blocks(module) if block.layer]
    with watching(blocks) as seen:
        output = module(x, *given)
    rows, _ = unrolled(module, sequences, h0, c0)
    assert len(blocks) == len(rows) * (3 if kind == "gru" else 1)
    for block in blocks:
        suffix, _, part = block.name.partition(".")
        halves = {"new_x": rows[suffix][:1], "new_h": rows[suffix][1:]}
        expected = torch.cat(halves.get(part, rows[suffix]), 1)
        (found,) = input_rows(block.layer, (x, *given), {}, output)
        assert found.shape == expected.shape
        _, near = linear_sum_assignment(torch.cdist(found.detach(), expected))  # in any order
        assert_close(found.detach(), expected[near])
        assert condition(seen[block.name])["rows"] == len(expected)
        assert seen[block.name][0].bias == module.bias


def test_what_dropout_has_left_of_an_input_is_not_told():
    module = nn.LSTM(3, 4, 2, dropout=0.5)
    with watching(find_blocks(module)) as seen:
        module(torch.randn(5, 2, 3))
    assert list(seen) == ["l0"]
    with watching(find_blocks(module.eval())) as seen:
        module(torch.randn(5, 2, 3))
    assert list(seen) == ["l0", "l1"]


def test_an_empty_batch_says_nothing():
    model = nn.Sequential(nn.Linear(3, 2))
    with watching(find_blocks(model)) as seen:
        for rows in (0, 4, 0):
            model(torch.randn(rows, 3))
    assert condition(seen["0"])["rows"] == 4


def test_inputs_are_watched_in_attention_and_behind_normalization():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True).eval()  # with a fast path
    x = torch.randn(7, 6, 4) @ torch.randn(4, 4)
    H = curvature.Hessian(model, nn.MSELoss(), [(x[:5], x[:5]), (x[5:], x[5:])])
    blocks, met = find_blocks(model), []
    model.linear1.register_forward_hook(lambda module, args, output: met.append(args[0].detach().flatten(0, 1)))
    with watching(blocks) as seen:
        H.loss()
    for name in ("self_attn.query", "self_attn.key", "self_attn.value"):
        found = condition(seen[name])
        assert found["rows"] == 42 and found["kappa"] == pytest.approx(kappa(torch.corrcoef(x.flatten(0, 1).mT)))
    # normalized inputs add up to a constant: one direction is zero, not the smallest
    values = torch.linalg.eigvalsh(torch.corrcoef(torch.cat(met).mT))
    assert condition(seen["linear1"])["kappa"] == pytest.approx(float(values[-1] / values[1]))
    H.loss()
    assert condition(seen["linear1"])["rows"] == 42  # the hooks are gone
