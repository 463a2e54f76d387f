"""The convergence command: curves and tables of runs, and one clear line for every bad input."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "analysis"))

from convergence import bands, main, summary
from metrics import load_run

ANALYSIS = Path(__file__).parents[1] / "analysis"
HEADER = "seed,step,train_loss,train_accuracy,test_accuracy"


def write_run(folder: Path, *rows: str, header: str = HEADER) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder


@pytest.fixture
def run(tmp_path):
    """Two seeds, three evaluations each, test accuracy at the ends only."""
    return write_run(
        tmp_path / "bnp",
        *("0,0,2.0,0.1,0.1", "0,10,0.5,0.8,", "0,20,0.01,0.95,0.9"),
        *("1,0,2.2,0.1,0.1", "1,10,0.3,0.9,", "1,20,0.03,0.97,0.8"),
    )


def test_picture_table_and_numbers(run, tmp_path, capsys):
    other = write_run(tmp_path / "sgd", "0,0,2.0,0.1,", "0,20,1.9,0.2,")
    out = tmp_path / "new" / "curves.png"
    assert main([str(run), str(other), "--out", str(out)]) == 0
    header, bnp, sgd, last = capsys.readouterr().out.splitlines()
    assert header.split("  ")[0] == "method" and header.endswith("steps to 90%")
    assert bnp.split() == ["bnp", "2", "0.02", "96.0%", "85.0%", "15"]  # seeds reach 90 % at steps 20 and 10
    assert sgd.split() == ["sgd", "1", "1.9", "20.0%", "-", "not", "reached"]
    assert "curves.png" in last
    assert out.read_bytes().startswith(b"\x89PNG")
    with np.load(out.with_suffix(".npz")) as drawn:
        np.testing.assert_array_equal(drawn["bnp/steps"], [0, 10, 20])
        np.testing.assert_allclose(drawn["bnp/train_loss/mean"], [2.1, 0.4, 0.02])
        np.testing.assert_allclose(drawn["bnp/train_loss/min"], [2.0, 0.3, 0.01])
        np.testing.assert_allclose(drawn["bnp/test_accuracy/max"], [0.1, 0.5, 0.9])
    assert sorted(path.name for path in out.parent.iterdir()) == ["curves.npz", "curves.png"]


@pytest.mark.parametrize("suffix", ["pdf", "svg"])
def test_same_numbers_give_the_same_file(run, tmp_path, suffix):
    files = [tmp_path / f"{name}.{suffix}" for name in "ab"]
    for file in files:
        assert main([str(run), "--out", str(file)]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()


def test_by_subprocess_from_another_folder(run, tmp_path):
    command = [sys.executable, "-W", "error", ANALYSIS / "convergence.py", "bnp", "--out", "curves.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "curves.png").is_file() and (tmp_path / "curves.npz").is_file()


def test_a_diverged_seed_ends_the_mean_and_is_counted(tmp_path):
    run = write_run(
        tmp_path / "sgd",
        *("0,0,2.0,0.1,0.1", "0,10,1.0,0.5,0.5", "0,20,0.5,0.8,0.8"),
        *("1,0,2.0,0.1,0.1", "1,10,nan,0.1,0.1", "1,20,inf,0.1,0.1"),
    )
    curves = load_run(run)
    np.testing.assert_array_equal(bands({"sgd": curves})["sgd/train_loss/mean"], [2.0, np.nan, np.nan])
    told = summary(curves)
    assert told["train_loss"] == "1 of 2 ended early" and told["train_accuracy"] == "45.0%"
    assert main([str(run), "--out", str(tmp_path / "a.png")]) == 0


def test_a_seed_that_stops_early_is_not_continued(tmp_path):
    curves = load_run(write_run(tmp_path / "a", *("0,0,4,0,", "0,1,3,0,", "0,2,2,0,"), *("1,1,4,0,", "1,2,1,0,")))
    np.testing.assert_array_equal(curves["train_loss"], [[4, 3, 2], [np.nan, 4, 1]])
    short = load_run(write_run(tmp_path / "b", "0,0,4,0,", "0,1,3,0,", "1,0,4,0,"))
    np.testing.assert_array_equal(short["train_loss"], [[4, 3], [4, np.nan]])
    assert summary(short)["train_loss"] == "1 of 2 ended early"


def test_seeds_evaluated_at_different_steps_meet_by_interpolation(tmp_path):
    run = write_run(tmp_path / "a", *("0,0,4,0,", "0,4,0,1,"), *("1,0,4,0,", "1,2,1,0.5,", "1,4,0,1,"))
    curves = load_run(run)
    np.testing.assert_array_equal(curves["steps"], [0, 2, 4])
    np.testing.assert_array_equal(curves["train_loss"], [[4, 2, 0], [4, 1, 0]])


def test_smoothing_averages_the_evaluations_so_far(tmp_path):
    run = write_run(tmp_path / "a", "0,0,4,0,", "0,1,2,0,", "0,2,6,0,", "0,3,1,0,")
    np.testing.assert_allclose(load_run(run, smooth=2)["train_loss"], [[4, 3, 4, 3.5]])
    assert main([str(run), "--out", str(tmp_path / "a.png"), "--smooth", "2"]) == 0


def test_more_columns_another_order_a_single_row_and_a_byte_order_mark(tmp_path):
    header = "\ufefftest_accuracy,lr,train_accuracy,train_loss,step,seed"
    run = write_run(tmp_path / "a", ",0.1,0.5,1.5,7,3", header=header)
    assert load_run(run)["train_loss"].tolist() == [[1.5]]
    assert main([str(run), "--out", str(tmp_path / "a.png")]) == 0


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path, capsys):
    runs = [write_run(tmp_path / size / "bnp", "0,0,1,0.5,") for size in ("small", "large")]
    assert main([*map(str, runs), "--out", str(tmp_path / "a.png")]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:3]] == [
        "small/bnp",
        "large/bnp",
    ]


BAD_RUNS = {
    "no folder": (None, ["no folder", "metrics.csv"]),
    "no file": ([], ["holds no metrics.csv", HEADER]),
    "empty file": ([""], ["lacks the column", HEADER]),
    "no column": (
        ["seed,step,train_loss,test_accuracy", "0,0,1,1"],
        ["lacks the column train_accuracy", HEADER],
    ),
    "no rows": ([HEADER], ["no rows", "expected one row per evaluation"]),
    "not a number": (
        [HEADER, "0,0,1,0.5,", "0,1,fast,0.5,"],
        ["line 3", "train_loss", "'fast'", "mend the row"],
    ),
    "short row": ([HEADER, "0,0,1"], ["line 2", "train_accuracy", "''"]),
    "no step": ([HEADER, "0,nan,1,0.5,"], ["line 2", "step must be finite", "'nan'"]),
    "another encoding": ([HEADER, "0,0,1,0.5,\xe9"], ["not text in UTF-8", "save it again"]),
    "percent": ([HEADER, "0,0,1,93.5,"], ["fraction in 0..1", "got 93.5", "divide percentages by 100"]),
}


@pytest.mark.parametrize("lines, words", BAD_RUNS.values(), ids=BAD_RUNS.keys())
def test_a_bad_run_is_told_in_one_line_and_nothing_is_written(run, tmp_path, capsys, lines, words):
    bad, out = tmp_path / "bad", tmp_path / "new" / "curves.png"
    if lines is not None:
        bad.mkdir()
    if lines:
        (bad / "metrics.csv").write_text("\n".join(lines), encoding="latin-1")
    assert main([str(run), str(bad), "--out", str(out)]) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == "" and stderr.startswith("error: ") and stderr.count("\n") == 1 and str(bad) in stderr
    for word in words:
        assert word in stderr
    assert not out.parent.exists()


@pytest.mark.parametrize("name, words", {"a.npz": [".png", "got"], "run/a.png": ["is a file"]}.items())
def test_a_place_that_cannot_be_written_is_refused(run, tmp_path, capsys, name, words):
    (tmp_path / "run").write_text("a file")
    assert main([str(run), "--out", str(tmp_path / name)]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ") and all(word in stderr for word in words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bnp", "run"]


def test_a_picture_that_fails_leaves_the_old_one(run, tmp_path, monkeypatch):
    out = tmp_path / "a.png"
    out.write_text("old")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, file, **_: file.write(b"half") / 0)
    with pytest.raises(ZeroDivisionError):
        main([str(run), "--out", str(out)])
    assert out.read_text() == "old" and sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "bnp"]


def test_options_are_checked(run, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([str(run), "--out", "a.png", "--smooth", "0"])
    assert "--smooth must be at least 1 evaluation, got 0" in capsys.readouterr().err
