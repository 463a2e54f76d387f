"""An interrupted run goes on where it was, and nothing of another run is mistaken for its own."""

import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gradcond import curvature

sys.path.insert(0, str(Path(__file__).parents[1] / "analysis"))

import condition_number
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
READS = """
saved = torch.load({path!r})
build = build_model

def build_model():
    model = build()
    model[0].requires_grad_(not saved["frozen"])
    return model
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "problem.py").write_text(PROBLEM)
    for step in range(3):
        torch.manual_seed(step)
        layers = torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2)
        torch.save(torch.nn.Sequential(*layers).double().state_dict(), tmp_path / f"step{step}.pt")
    return tmp_path


@pytest.fixture
def full_disk():
    """Lets no file grow beyond so many bytes, or any size again."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(most: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, before if most is None else (most, before[1]))

    yield limit
    limit(None)


def command(folder: Path, *more: str, out: str = "out") -> list[str]:
    checkpoints = [str(folder / f"step{step}.pt") for step in range(3)]
    return [*checkpoints, "--problem", str(folder / "problem.py"), "--out", str(folder / out), *more]


def files(folder: Path, out: str) -> dict[str, bytes]:
    """What a run has written; the json without the line that names the folder."""
    found = {path.name: path.read_bytes() for path in (folder / out).iterdir()}
    for name in found:
        if name.endswith(".json"):
            found[name] = b"\n".join(line for line in found[name].split(b"\n") if b'"out"' not in line)
    return found


def stop(monkeypatch, name: str, at: int) -> list[int]:
    """Interrupts the run at this call of a function of gradcond.curvature; the calls are counted."""
    function, count = getattr(curvature, name), [0]

    def stopped(*args, **options):
        count[0] += 1
        if count[0] == at:
            raise KeyboardInterrupt
        return function(*args, **options)

    monkeypatch.setattr(curvature, name, stopped)
    return count


@pytest.fixture
def interrupted(monkeypatch):
    """Interrupts hessian_spectrum at the second trace, four results into the second checkpoint."""
    return stop(monkeypatch, "trace", 2)


ESTIMATES = ("--exact-below", "0")
SOME = (*ESTIMATES, "--kappa-matvecs", "20")  # of the 23 parameters together; blocks and units are exact
COMMANDS = {
    "spectrum": (main, "trace", 2, ESTIMATES, ("--top", "4")),
    "condition": (condition_number.main, "exact_spectrum", 10, SOME, ("--units", "1")),
}


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


@pytest.mark.parametrize("change", ["option", "problem", "checkpoint", "data", "parameters"])
@pytest.mark.parametrize("run, function, at, options, other", COMMANDS.values(), ids=COMMANDS)
def test_results_of_anything_else_are_not_taken(
    folder, monkeypatch, capsys, run, function, at, options, other, change
):
    data, saved = folder / "data.pt", {"offset": torch.ones(12, 1), "frozen": False}
    torch.save(saved, data)
    text = PROBLEM.replace(" + 1\n", " + saved['offset']\n") + READS.format(path=str(data))
    (folder / "problem.py").write_text(text)
    stop(monkeypatch, function, at)
    assert run(command(folder, *options)) == 130
    more: tuple[str, ...] = ()
    if change == "option":
        more = other
    elif change == "problem":
        (folder / "problem.py").write_text(text.replace('not saved["frozen"]', "False"))
    elif change == "data":
        torch.save(saved | {"offset": torch.zeros(12, 1)}, data)
    elif change == "parameters":  # same files, same loss
        torch.save(saved | {"frozen": True}, data)
    else:
        for step in range(3):
            state = torch.load(folder / f"step{step}.pt", weights_only=True)
            for name in ("0.weight", "0.bias", "2.weight"):  # same loss: tanh is odd
                state[name] = -state[name]
            torch.save(state, folder / f"step{step}.pt")
    assert run(command(folder, *options, *more)) == 0
    told = capsys.readouterr()
    assert "of the run that was interrupted" not in told.out + told.err
    assert not (folder / "out" / "unfinished").exists()


def test_exact_spectra_are_kept_too(folder, monkeypatch):
    count = stop(monkeypatch, "exact_spectrum", 3)
    assert main(command(folder)) == 130
    assert main(command(folder)) == 0
    assert count == [4]  # the third again, the first two not
    assert main(command(folder, out="whole")) == 0
    assert files(folder, "out") == files(folder, "whole")


@pytest.mark.parametrize("options, at", [(SOME, 10), ((), 12)], ids=["estimates", "written out"])
def test_condition_numbers_go_on_and_end_as_if_they_had_not_been_interrupted(
    folder, monkeypatch, capsys, options, at
):
    run = condition_number.main
    count, passes = stop(monkeypatch, "exact_spectrum", at), []
    watch = condition_number.watching
    monkeypatch.setattr(condition_number, "watching", lambda blocks: passes.append(1) or watch(blocks))
    assert run(command(folder, *options)) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert [path.name for path in (folder / "out").iterdir()] == ["unfinished"]
    # all parameters, the inputs, two layers and their 3 + 2 units; in the second checkpoint half of it
    assert len(list((folder / "out").rglob("*.pt"))) == 9 + 4
    assert run(command(folder, *options)) == 0
    told = capsys.readouterr().out
    assert "step0.pt: 9 results are of the run" in told
    assert "step1.pt: 4 results are of the run" in told and "step2.pt:" not in told
    # only what was interrupted, again: one, or the three units that were measured side by side
    assert count == [(24 if options else 25)] and len(passes) == 3
    assert run(command(folder, *options, out="whole")) == 0
    assert files(folder, "out") == files(folder, "whole")
    assert sorted(files(folder, "out")) == ["condition.json", "condition.png"]


@pytest.mark.parametrize("run", [main, condition_number.main], ids=["spectrum", "condition"])
def test_a_run_that_is_stopped_as_it_draws_measures_nothing_again(folder, monkeypatch, run):
    module, count = sys.modules[run.__module__], stop(monkeypatch, "exact_spectrum", 0)
    with monkeypatch.context() as patch:
        patch.setattr(module, "draw", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(command(folder)) == 130
    measured = list(count)
    assert run(command(folder)) == 0
    assert count == measured
    assert not (folder / "out" / "unfinished").exists()


def test_two_commands_may_share_a_folder(folder, monkeypatch, capsys):
    stop(monkeypatch, "exact_spectrum", 3)
    assert main(command(folder)) == 130
    assert condition_number.main(command(folder)) == 0
    assert len(list((folder / "out" / "unfinished").rglob("*.pt"))) == 2
    assert main(command(folder)) == 0
    assert "step1.pt: 1 results" in capsys.readouterr().out
    assert not (folder / "out" / "unfinished").exists()


def test_a_damaged_result_is_told(folder, interrupted, capsys):
    assert main(command(folder, *ESTIMATES)) == 130
    path = sorted((folder / "out").rglob("*.pt"))[0]
    path.write_bytes(path.read_bytes()[:50])
    assert main(command(folder, *ESTIMATES)) == 2
    assert f"{path} of an earlier run is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("most", [600, 6000], ids=["a result", "the picture"])
@pytest.mark.parametrize("run", [main, condition_number.main], ids=["spectrum", "condition"])
def test_a_full_disk_is_told_and_the_run_goes_on_where_there_is_room(folder, full_disk, capsys, run, most):
    full_disk(most)
    assert run(command(folder)) == 2
    last = capsys.readouterr().err.replace("\r", "\n").splitlines()[-1]
    assert last.startswith(f"error: cannot write {folder / 'out'}") and "give the command again" in last
    assert not list((folder / "out").rglob("*.tmp"))
    full_disk(None)
    assert run(command(folder)) == 0
    assert run(command(folder, out="whole")) == 0
    assert files(folder, "out") == files(folder, "whole")


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
