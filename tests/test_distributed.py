"""Training on 2 and 4 gloo processes equals one process; the scenarios are in distributed_*.py, run by torchrun."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]


def launch(processes, *command, timeout=120):
    """Runs a script under torchrun; a deadlock ends by the timeout, and a failure shows every rank's traceback."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}  # this package, no other
    run = subprocess.Popen(
        [*TORCHRUN, f"--nproc_per_node={processes}", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        output, _ = run.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        pytest.fail(f"no end after {timeout} s:\n{run.communicate()[0]}")
    assert run.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where checkpoints go: saved by 2 processes, read by 4, and what those save by one."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.mark.parametrize("processes", [2, 4, 1])  # in this order
def test_many_processes_equal_one(processes, folder):
    names = ["checkpoints_go_on_as_if_nothing_had_happened"] if processes == 1 else []
    output = launch(processes, HERE / "distributed_run.py", folder, *names)
    print("\n".join(line for line in output.splitlines() if line.startswith(("PASS", "largest"))))
    assert f"all scenarios passed on {processes} processes" in output


def test_a_failure_shows_the_rank_s_traceback(folder):
    with pytest.raises(AssertionError, match=r"FAIL fails on rank 1\s+Traceback[\s\S]*ZeroDivisionError"):
        launch(2, HERE / "distributed_run.py", folder, "fails")


def test_the_example_equals_one_process():
    output = launch(2, HERE.parent / "examples" / "distributed.py", "--steps", 20)
    assert float(output.split("largest difference of a parameter, any process:")[1]) < 1e-12
