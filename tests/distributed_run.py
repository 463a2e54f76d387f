"""Runs all scenarios, or those that are named, on each process that torchrun starts: FOLDER [NAME...]."""

import datetime
import os
import sys
import traceback
import warnings

import distributed_checkpoints  # noqa: F401
import distributed_replicas  # noqa: F401
import distributed_shards  # noqa: F401
import torch
import torch.distributed as dist
from distributed_helpers import LARGEST, RANK, SCENARIOS, WORLD, scenario


def fails():
    """For the test that shows a failure."""
    if RANK == 1:
        raise ZeroDivisionError


if "fails" in sys.argv:
    scenario(fails)


def main():
    warnings.simplefilter("error")
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=20))
    for function in SCENARIOS:
        if sys.argv[2:] and function.__name__ not in sys.argv[2:]:
            continue
        try:
            function()
        except BaseException:
            print(f"FAIL {function.__name__} on rank {RANK}\n{traceback.format_exc()}", flush=True)
            os._exit(1)  # torchrun ends the others
        dist.barrier()
        if RANK == 0:
            print(f"PASS {function.__name__}", flush=True)
    if RANK == 0:
        for what, difference in LARGEST.items():
            print(f"largest difference on {WORLD} processes, {what}: {difference:.1e}")
        print(f"all scenarios passed on {WORLD} processes", flush=True)
    os._exit(0)  # the interpreter's own end may meet a thread of torch, and abort


if __name__ == "__main__":
    main()
