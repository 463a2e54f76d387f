"""Every script of examples/ and analysis/ runs, by a glob: nothing has to be kept in step by hand."""

import ast
import inspect
import pathlib
import runpy
import sys

import numpy as np
import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path for folder in ("analysis", "examples") for path in (ROOT / folder).glob("*.py"))
COMMANDS = [path for path in SCRIPTS if "def main(" in path.read_text()]
PROBLEMS = [path for path in SCRIPTS if path.parent.name == "examples" and path not in COMMANDS]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda p: p.name)
def test_every_command_explains_itself(path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(path.parent))
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(path), run_name="__main__")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "usage:" in text and "None" not in text and "False" not in text
    if path.parent.name == "analysis":
        assert inspect.cleandoc(ast.get_docstring(ast.parse(path.read_text()))) in text
        assert "default: " in text


@pytest.mark.parametrize("path", PROBLEMS, ids=lambda p: p.name)
def test_every_problem_file_has_its_three_names_and_fits_together(path, monkeypatch):
    monkeypatch.syspath_prepend(str(path.parent))
    torch.set_default_dtype(torch.float32)
    problem = runpy.run_path(str(path))
    inputs, targets = problem["load_data"]()[0]
    loss = problem["loss_fn"](problem["build_model"]()(inputs), targets)
    assert 1.5 < loss.item() < 40


def test_the_quickstart_writes_what_it_says(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    torch.set_default_dtype(torch.float32)
    import quickstart

    out = tmp_path / "runs"
    assert quickstart.main(["--out", str(out), "--steps", "10", "--methods", "SGD", "BNP"]) == 0
    text = capsys.readouterr().out
    for name in ("SGD", "BNP"):
        assert (
            (out / name / "metrics.csv")
            .read_text()
            .startswith("seed,step,train_loss,train_accuracy,test_accuracy\n")
        )
        assert sorted(p.name for p in (out / name).glob("*.pt")) == [
            f"seed{seed}_step{step:04d}.pt" for seed in (0, 1) for step in (5, 10)
        ]
        assert (out / name / "spectrum.png").stat().st_size > 10_000
        assert f"{out / name / 'spectrum.png'}" in text
    assert (out / "convergence.png").stat().st_size > 10_000
    assert "lambda_max" in text


def test_the_quickstart_refuses_too_few_steps(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import quickstart

    with pytest.raises(SystemExit) as stop:
        quickstart.main(["--steps", "1", "--out", str(tmp_path / "none")])
    assert stop.value.code == 2
    assert "--steps must be at least 2, got 1" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("content", ["text", "arrays", "images"])
def test_a_study_tells_of_data_of_another_kind(tmp_path, capsys, monkeypatch, content):
    monkeypatch.syspath_prepend(str(ROOT / "analysis"))
    import training_study

    path = tmp_path / "data.npz"
    path.write_text("no archive")
    if content != "text":
        names = ("x_train", "y_train", "x_test", "y_test")[: 2 if content == "arrays" else 4]
        np.savez(path, **{name: np.zeros((4, 28, 28)) for name in names})
    assert training_study.main(["--task", "cifar10", "--data", str(path)]) == 2
    words = "got (4, 28, 28)" if content == "images" else "expected an .npz file with x_train"
    assert words in capsys.readouterr().err


def test_a_study_tells_of_a_damaged_line(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "analysis"))
    import training_study

    (tmp_path / "results.jsonl").write_text('{"task": "digits", "batch": 8}\n{"task": "dig')
    assert training_study.main(["--out", str(tmp_path)]) == 2
    assert f"error: line 2 of {tmp_path / 'results.jsonl'} is damaged" in capsys.readouterr().err
