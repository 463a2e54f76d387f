"""The spectrum command against dense Hessians, its files, and one clear line for every bad input."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import gradcond
from gradcond import curvature

sys.path.insert(0, str(Path(__file__).parents[1] / "analysis"))

from hessian_spectrum import main
from problems import load_problem
from spectra import ARRAYS

ANALYSIS = Path(__file__).parents[1] / "analysis"

PROBLEM = """
import torch
from torch import nn

def build_model():
    return nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.Tanh(), nn.Linear(3, 2)).to(torch.float64)

def load_data():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(12, 4, generator=generator, dtype=torch.float64) + 1
    return [(inputs[:8], torch.arange(8) % 2), (inputs[8:], torch.arange(4) % 2)]

loss_fn = nn.CrossEntropyLoss()
"""


@pytest.fixture
def folder(tmp_path):
    """A problem file and two checkpoints of a conditioned run, at steps 3 and 9."""
    (tmp_path / "problem.py").write_text(PROBLEM)
    problem = load_problem(tmp_path / "problem.py")
    model = problem.build_model().eval()
    optimizer = gradcond.wrap(torch.optim.SGD(model.parameters(), lr=0.5), model, [gradcond.BNP()])
    for step in range(1, 10):
        model.train()
        for inputs, target in problem.load_data():
            optimizer.zero_grad()
            problem.loss_fn(model(inputs), target).backward()
            optimizer.step()
        if step in (3, 9):
            content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(content, tmp_path / f"step{step}.pt")
    return tmp_path


def command(folder: Path, *more: str, checkpoints: tuple[str, ...] = ("step9.pt",)) -> list[str]:
    paths = [str(folder / name) for name in checkpoints]
    # a few parameters would be measured exactly: these tests are of the estimates unless they say otherwise
    if not {"--exact-below", "--redraw"} & set(more):
        more = (*more, "--exact-below", "0")
    return [*paths, "--problem", str(folder / "problem.py"), "--out", str(folder / "out"), *more]


def results(folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not strict JSON")

    with np.load(folder / "out" / "spectrum.npz") as file:
        arrays = dict(file)
    text = (folder / "out" / "spectrum.json").read_text()
    return json.loads(text, parse_constant=refuse), arrays


def dense(folder: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """H, and P^T H P by the preconditioner that the checkpoint holds."""
    problem, saved = load_problem(folder / "problem.py"), torch.load(folder / name, weights_only=True)
    model = problem.build_model().eval()
    model.load_state_dict(saved["model"])
    H = curvature.Hessian(model, problem.loss_fn, problem.load_data()).to_dense()
    P = gradcond.load_preconditioner(model, saved["optimizer"]).factor(torch.eye(len(H)))
    return H, P.mT @ H @ P


def test_numbers_are_those_of_the_dense_matrices(folder, capsys):
    assert main(command(folder, "--preconditioned", checkpoints=("step3.pt", "step9.pt"))) == 0
    report, arrays = results(folder)
    settings = report["settings"]
    assert (report["format"], settings["num_matvecs"], settings["seed"], settings["device"]) == (1, 80, 0, "cpu")
    assert set(report["versions"]) == {"gradcond", "torch", "numpy", "scipy", "python"}
    assert [entry["label"] for entry in report["checkpoints"]] == ["step3", "step9"]
    assert len(arrays) == 2 * 2 * len(ARRAYS)
    for index, entry in enumerate(report["checkpoints"]):
        matrices = dense(folder, f"{entry['label']}.pt")
        for variant, matrix in zip(("plain", "preconditioned"), matrices, strict=True):
            exact = torch.linalg.eigvalsh(matrix).numpy()
            numbers, own = entry[variant], {name: arrays[f"{index}/{variant}/{name}"] for name in ARRAYS}
            ends = [*exact[:5], *exact[-5:]]
            np.testing.assert_allclose(own["eigenvalues"], ends, atol=1e-6 * exact[-1])
            np.testing.assert_allclose(numbers["largest"]["eigenvalues"], exact[:-6:-1], atol=1e-6 * exact[-1])
            assert all(numbers["largest"]["converged"]) and max(numbers["smallest"]["residuals"]) < 1e-6
            assert numbers["trace"]["estimate"] == pytest.approx(exact.sum())
            assert numbers["condition"]["lambda_max"] == pytest.approx(exact[-1])
            np.testing.assert_allclose(own["nodes"][[0, -1]], exact[[0, -1]], atol=1e-6 * exact[-1])
            assert own["weights"].sum() == pytest.approx(1) and own["cdf"][-1] == pytest.approx(1)
            kept = np.abs(exact)[np.abs(exact) > 10 * numbers["condition"]["noise_floor"]]
            if numbers["condition"]["converged"]:
                assert numbers["condition"]["kappa"] == pytest.approx(kept.max() / kept.min(), rel=1e-3)
            assert numbers["condition"]["kappa_lower_bound"] <= 1.001 * kept.max() / kept.min()
            assert numbers["num_matvecs"] > 5 * 20
            bulk, (low, high) = numbers["bulk"], numbers["bulk"]["ratio_of_probes"]
            assert bulk["ratio"] == pytest.approx(exact[-1] / bulk["median_magnitude"])
            assert low <= bulk["ratio"] <= high and low < np.inf
    table = capsys.readouterr().out
    assert "step3: 23 parameters, loss" in table
    assert "kappa of preconditioned: " in table and "certified >= " in table
    first = f"{report['checkpoints'][1]['preconditioned']['largest']['eigenvalues'][0]:.4g}"
    assert f"largest of preconditioned: {first}" in table


def test_up_to_so_many_parameters_every_eigenvalue_is_known(folder, capsys):
    assert main(command(folder, "--preconditioned", "--exact-below", "23")) == 0
    report, arrays = results(folder)
    for variant, matrix in zip(("plain", "preconditioned"), dense(folder, "step9.pt"), strict=True):
        exact = torch.linalg.eigvalsh(matrix).numpy()
        numbers = report["checkpoints"][0][variant]
        assert numbers["exact"] and numbers["num_matvecs"] == 23
        tolerance = 1e-12 * exact[-1]
        np.testing.assert_allclose(arrays[f"0/{variant}/nodes"], exact, atol=tolerance)
        np.testing.assert_allclose(arrays[f"0/{variant}/eigenvalues"], [*exact[:5], *exact[-5:]], atol=tolerance)
        assert numbers["trace"] == {"estimate": pytest.approx(exact.sum()), "std_error": 0, "num_matvecs": 23}
        kept = np.abs(exact)[np.abs(exact) > numbers["condition"]["noise_floor"]]
        assert numbers["bulk"]["ratio"] == pytest.approx(exact[-1] / np.sort(kept)[(len(kept) - 1) // 2])
    assert "all 23 eigenvalues" in capsys.readouterr().out


def test_the_picture_is_redrawn_from_the_files_alone(folder, capsys):
    assert main(command(folder)) == 0
    picture = folder / "out" / "spectrum.png"
    drawn = picture.read_bytes()
    for path in (picture, folder / "step9.pt", folder / "problem.py"):
        path.unlink()
    assert main(["--redraw", "--out", str(folder / "out")]) == 0
    assert picture.read_bytes() == drawn and drawn.startswith(b"\x89PNG")
    names = sorted(path.name for path in (folder / "out").iterdir())
    assert names == ["spectrum.json", "spectrum.npz", "spectrum.png"]


def test_several_checkpoints_make_a_trajectory(folder, capsys):
    from trajectory_figure import draw_trajectory

    assert main(command(folder, "--preconditioned", checkpoints=("step3.pt", "step9.pt"))) == 0
    picture = folder / "out" / "trajectory.png"
    drawn = picture.read_bytes()
    picture.unlink()
    assert main(["--redraw", "--out", str(folder / "out")]) == 0
    assert picture.read_bytes() == drawn and f"wrote {picture}" in capsys.readouterr().out
    report = results(folder)[0]
    for number in range(40):  # more checkpoints than have room for a name, one of them unresolved
        entry = json.loads(json.dumps(report["checkpoints"][number % 2])) | {"label": f"step{number}"}
        entry["plain"]["condition"] |= {"resolved": number != 4, "kappa": None if number == 4 else 10.0}
        report["checkpoints"].append(entry)
    draw_trajectory(report, folder / "many.png")
    assert (folder / "many.png").stat().st_size > 10_000
    assert main(command(folder)) == 0  # of one checkpoint, into the same folder
    assert not picture.exists()


def test_the_same_run_gives_the_same_files(folder):
    state = torch.get_rng_state()
    assert main(command(folder)) == 0
    files = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    assert main(command(folder)) == 0
    assert {path.name: path.read_bytes() for path in (folder / "out").iterdir()} == files
    assert torch.equal(torch.get_rng_state(), state)


def test_by_subprocess_with_a_progress_bar(folder):
    arguments = ["step9.pt", "--problem", "problem.py", "--out", "out", "--preconditioned", "--top", "2"]
    arguments += ["--exact-below", "0"]
    done = subprocess.run(
        [sys.executable, "-W", "error", ANALYSIS / "hessian_spectrum.py", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "product" in done.stderr and "100%" in done.stderr
    assert "step9.pt: repeatable to" in done.stderr and "200 products of" in done.stderr
    report, arrays = results(folder)
    counts = [report["checkpoints"][0][variant]["num_matvecs"] for variant in ("plain", "preconditioned")]
    assert f"{sum(counts)}/{sum(counts)}" in done.stderr  # the bar counts products
    assert arrays["0/plain/eigenvalues"].shape == (4,)


@pytest.mark.parametrize("operator", ["hessian", "ggn"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_operator_and_dtype(folder, operator, dtype):
    assert main(command(folder, "--operator", operator, "--dtype", dtype)) == 0
    numbers = results(folder)[0]["checkpoints"][0]["plain"]
    assert numbers["largest"]["eigenvalues"][0] > 0
    assert (numbers["smallest"]["eigenvalues"][0] < -1e-4) == (operator == "hessian")
    assert (numbers["condition"]["noise_floor"] > 1e-10) == (dtype == "float32")


def test_notes_and_what_did_not_converge_are_told(folder, capsys, monkeypatch):
    saved = torch.load(folder / "step9.pt", weights_only=True)
    torch.save({f"module.{key}": value for key, value in saved["model"].items()}, folder / "step9.pt")
    eigsh = curvature.eigsh
    monkeypatch.setattr(curvature, "eigsh", lambda *a, **k: eigsh(*a, **k, tol=1e-30))
    assert main(command(folder)) == 0
    table = capsys.readouterr().out
    assert "note: " in table and "stripped the prefixes" in table and "(not converged: within" in table
    assert not any(results(folder)[0]["checkpoints"][0]["plain"]["largest"]["converged"])


def test_a_condition_number_that_is_not_resolved_is_null_and_told(folder, capsys, monkeypatch):
    from dataclasses import replace

    condition_number = curvature.condition_number

    def unresolved(*args, **options):
        nan = float("nan")
        result = condition_number(*args, **options)
        return replace(result, kappa=nan, lambda_min_nonzero=nan, resolved=False, converged=False, noise_floor=0.5)

    monkeypatch.setattr(curvature, "condition_number", unresolved)
    assert main(command(folder)) == 0
    assert results(folder)[0]["checkpoints"][0]["plain"]["condition"]["kappa"] is None
    assert ", unresolved below 5.0e-01" in capsys.readouterr().out


def replace_text(old: str, new: str):
    def spoil(folder: Path) -> None:
        text = (folder / "problem.py").read_text()
        assert old in text
        (folder / "problem.py").write_text(text.replace(old, new))

    return spoil


def truncate(folder: Path) -> None:
    (folder / "step9.pt").write_bytes((folder / "step9.pt").read_bytes()[:300])


def forget(*keys: str):
    def spoil(folder: Path) -> None:
        saved = torch.load(folder / "step9.pt", weights_only=True)
        state = saved["optimizer"]
        torch.save(
            {"model": saved["model"], "optimizer": {key: state[key] for key in state if key not in keys}},
            folder / "step9.pt",
        )

    return spoil


def bare(folder: Path) -> None:
    torch.save(torch.load(folder / "step9.pt", weights_only=True)["model"], folder / "step9.pt")


def diverge(folder: Path) -> None:
    weights = torch.load(folder / "step9.pt", weights_only=True)["model"]
    torch.save({name: weight * torch.nan for name, weight in weights.items()}, folder / "step9.pt")


def delete(name: str):
    return lambda folder: (folder / name).unlink()


def block(folder: Path) -> None:
    (folder / "out").write_text("a file")


BAD = {
    "no checkpoint": (delete("step9.pt"), [], ["no checkpoint file at", "torch.save"]),
    "no problem": (delete("problem.py"), [], ["no problem file at", "build_model()"]),
    "syntax": (replace_text("def build_model():", "def build_model("), [], ["is not Python", "line 5"]),
    "no loss": (replace_text("loss_fn =", "loss ="), [], ["it lacks loss_fn"]),
    "no data": (replace_text("return [(", "return [] and [("), [], ["at least one (input, target) batch"]),
    "truncated": (truncate, [], ["truncated, corrupt", "save it again"]),
    "architecture": (
        replace_text("(3, 2)", "(3, 1)"),
        [],
        ["another architecture", "3.weight is (2, 3), not (1"],
    ),
    "other data": (replace_text("12, 4", "12, 5"), [], ["do not go together", "RuntimeError"]),
    "not finite": (replace_text(" + 1", " / 0"), [], ["finite loss", "batch 0"]),
    "diverged": (diverge, [], ["the model at", "step9.pt", "finite loss", "nan"]),
    "dropout, all eigenvalues": (
        lambda folder: None,
        ["--mode", "train", "--exact-below", "99"],
        ["dropout is active", "'1'", "leave out --mode train"],
    ),
    "dropout": (lambda folder: None, ["--mode", "train"], ["dropout is active", "'1'", "leave out --mode train"]),
    "no optimizer": (bare, ["--preconditioned"], ["step9.pt holds none", "leave the option out"]),
    "no gradcond": (forget("gradcond"), ["--preconditioned"], ["step9.pt", "'gradcond'", "wrap"]),
    "out is a file": (block, [], ["is a file; name another folder"]),
}


@pytest.mark.parametrize("spoil, options, words", BAD.values(), ids=BAD.keys())
def test_bad_input_is_told_in_one_line_and_nothing_is_written(folder, capsys, spoil, options, words):
    spoil(folder)
    before = {path.name for path in folder.iterdir()} - {"__pycache__"}
    assert main(command(folder, *options)) == 2
    stdout, stderr = capsys.readouterr()
    last = stderr.replace("\r", "\n").splitlines()[-1]
    assert stdout == "" and last.startswith("error: ")
    for word in words:
        assert word in last
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == before


def test_the_second_checkpoint_is_checked_before_the_first_is_computed(folder, capsys, monkeypatch):
    torch.save(torch.nn.Linear(2, 2).state_dict(), folder / "step9.pt")
    monkeypatch.setattr("hessian_spectrum.measure", lambda *a, **k: pytest.fail("computed too early"))
    assert main(command(folder, checkpoints=("step3.pt", "step9.pt"))) == 2
    assert "step9.pt is of another architecture" in capsys.readouterr().err


BAD_FILES = {
    "none": (None, ["no ", "spectrum.json", "--redraw needs"]),
    "damaged": ("{", ["damaged", "measure again"]),
    "format": ('{"format": 2}', ['"format": 1', "measure again"]),
    "empty": ('{"format": 1}', ["damaged", "KeyError: 'checkpoints'", "measure again"]),
    "kinds": ('{"format": 1, "checkpoints": [3]}', ["damaged", "TypeError", "measure again"]),
}


@pytest.mark.parametrize("text, words", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_files_that_cannot_be_redrawn_are_told(tmp_path, capsys, text, words):
    if text is not None:
        (tmp_path / "spectrum.json").write_text(text)
        np.savez(tmp_path / "spectrum.npz", a=np.ones(1))
    before = sorted(tmp_path.iterdir())
    assert main(["--redraw", "--out", str(tmp_path)]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ") and all(word in stderr for word in words)
    assert sorted(tmp_path.iterdir()) == before


BAD_OPTIONS = {
    "nothing": ([], "expected CKPT"),
    "no problem": (["a.pt"], "--problem FILE.py as well"),
    "no checkpoint": (["--problem", "p.py"], "at least one CKPT as well"),
    "both": (["a.pt", "--problem", "p.py", "--redraw"], "--redraw and neither"),
    "zero": (["a.pt", "--problem", "p.py", "--top", "0"], "must be at least 1, got 0"),
    "few": (["a.pt", "--problem", "p.py", "--kappa-matvecs", "4"], "must be at least 5, got 4"),
    "device": (["a.pt", "--problem", "p.py", "--device", "abacus"], "--device"),
}


@pytest.mark.parametrize("options, words", BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_options_are_checked(tmp_path, capsys, options, words):
    with pytest.raises(SystemExit) as caught:
        main([*options, "--out", str(tmp_path / "out")])
    assert caught.value.code == 2 and words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
