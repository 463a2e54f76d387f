"""An interrupted spectrum run goes on where it was, and nothing of another run is mistaken for its own."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gradcond import curvature

sys.path.insert(0, str(Path(__file__).parents[1] / "analysis"))

from hessian_spectrum import main

ANALYSIS = Path(__file__).parents[1] / "analysis"
PROBLEM = """
import torch
from torch import nn

def build_model():
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).to(torch.float64)

def load_data():
    inputs = torch.randn(12, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 1
    return [(inputs, torch.arange(12) % 2)]

loss_fn = nn.CrossEntropyLoss()
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "problem.py").write_text(PROBLEM)
    for step in range(3):
        torch.manual_seed(step)
        layers = torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2)
        torch.save(torch.nn.Sequential(*layers).double().state_dict(), tmp_path / f"step{step}.pt")
    return tmp_path


def command(folder: Path, *more: str, out: str = "out") -> list[str]:
    checkpoints = [str(folder / f"step{step}.pt") for step in range(3)]
    return [*checkpoints, "--problem", str(folder / "problem.py"), "--out", str(folder / out), *more]


def files(folder: Path, out: str) -> dict[str, bytes]:
    """What a run has written; the json without the line that names the folder."""
    found = {path.name: path.read_bytes() for path in (folder / out).iterdir()}
    lines = found["spectrum.json"].split(b"\n")
    return found | {"spectrum.json": b"\n".join(line for line in lines if b'"out"' not in line)}


@pytest.fixture
def interrupted(monkeypatch):
    """Interrupts the run at the second trace, five results into the second checkpoint."""
    trace, count = curvature.trace, [0]

    def stopped(*args, **options):
        count[0] += 1
        if count[0] == 2:
            raise KeyboardInterrupt
        return trace(*args, **options)

    monkeypatch.setattr(curvature, "trace", stopped)
    return count


ESTIMATES = ("--exact-below", "0")


def test_an_interrupted_run_goes_on_and_ends_as_if_it_had_not_been(folder, interrupted, capsys):
    assert main(command(folder, *ESTIMATES)) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert [path.name for path in (folder / "out").iterdir()] == ["unfinished"]
    assert len(list((folder / "out").rglob("*.pt"))) == 5 + 4
    assert main(command(folder, *ESTIMATES)) == 0
    told = capsys.readouterr().out
    assert "step0.pt: 5 results are of the run" in told
    assert "step1.pt: 4 results are of the run" in told and "step2.pt:" not in told
    assert interrupted == [4]  # one trace for each checkpoint, one more for the interrupted one
    assert main(command(folder, *ESTIMATES, out="whole")) == 0
    assert files(folder, "out") == files(folder, "whole")  # and nothing unfinished is left


@pytest.mark.parametrize("change", ["option", "problem", "checkpoint", "data"])
def test_results_of_anything_else_are_not_taken(folder, interrupted, capsys, change):
    data = folder / "data.pt"
    torch.save(torch.ones(12, 1), data)
    (folder / "problem.py").write_text(PROBLEM.replace(" + 1\n", f" + torch.load({str(data)!r})\n"))
    assert main(command(folder, *ESTIMATES)) == 130
    more: tuple[str, ...] = ()
    if change == "option":
        more = ("--top", "4")
    elif change == "problem":
        with (folder / "problem.py").open("a") as file:  # same loss, fewer parameters
            file.write("build = build_model\ndef build_model():\n")
            file.write("    model = build()\n    model[0].requires_grad_(False)\n    return model\n")
    elif change == "data":
        torch.save(torch.zeros(12, 1), data)
    else:
        for step in range(3):
            state = torch.load(folder / f"step{step}.pt", weights_only=True)
            for name in ("0.weight", "0.bias", "2.weight"):  # same loss: tanh is odd
                state[name] = -state[name]
            torch.save(state, folder / f"step{step}.pt")
    assert main(command(folder, *ESTIMATES, *more)) == 0
    told = capsys.readouterr()
    assert "of the run that was interrupted" not in told.out + told.err
    assert not (folder / "out" / "unfinished").exists()


def test_exact_spectra_are_kept_too(folder, monkeypatch):
    exact, count = curvature.exact_spectrum, [0]

    def stopped(*args, **options):
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt
        return exact(*args, **options)

    monkeypatch.setattr(curvature, "exact_spectrum", stopped)
    assert main(command(folder)) == 130
    assert main(command(folder)) == 0
    assert count == [4]  # the third again, the first two not
    assert main(command(folder, out="whole")) == 0
    assert files(folder, "out") == files(folder, "whole")


def test_a_damaged_result_is_told(folder, interrupted, capsys):
    assert main(command(folder, *ESTIMATES)) == 130
    path = sorted((folder / "out").rglob("*.pt"))[0]
    path.write_bytes(path.read_bytes()[:50])
    assert main(command(folder, *ESTIMATES)) == 2
    assert f"{path} of an earlier run is damaged" in capsys.readouterr().err


def test_a_killed_process_leaves_whole_results(folder):
    process = subprocess.Popen(
        [sys.executable, ANALYSIS / "hessian_spectrum.py", *command(folder, *ESTIMATES, "--num-probes", "12")],
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while len(list((folder / "out").glob("unfinished/*/*.pt"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "out" / "spectrum.json").exists()
    assert main(command(folder, *ESTIMATES, "--num-probes", "12")) == 0
    assert main(command(folder, *ESTIMATES, "--num-probes", "12", out="whole")) == 0
    assert files(folder, "out") == files(folder, "whole")
