"""Times that can be compared on a machine that others use: processor time, interleaved rounds, medians."""

from __future__ import annotations

import ctypes
import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

Step = Callable[[], object]


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed for what comes next; says whether it could (glibc)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # malloc.h
    huge = 2**31 - 1
    return all([mallopt(mmap_threshold, 2**30), mallopt(trim_threshold, huge), mallopt(mmap_max, 0)])


def cpu_seconds(step: Step) -> float:
    """Processor time of one call: on one thread the wall time, less what other programs make it wait."""
    start = time.process_time()
    step()
    return time.process_time() - start


def cuda_seconds(step: Step) -> float:
    """Time on the device between what came before a call and its last kernel."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def peak_bytes(action: Step) -> int:
    """The most memory alive at once on the CPU of what an action allocates, by PyTorch's own records."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        action()
    assert record.profiler is not None and record.profiler.kineto_results is not None
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return int(max(np.cumsum([e.nbytes() for e in events]), default=0))


@contextmanager
def _collected_apart() -> Iterator[None]:
    """The garbage collector runs between the rounds, not in the midst of one."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def interleaved(
    steps: Mapping[str, Step],
    *,
    rounds: int,
    warm_up: int,
    device: torch.device,
    title: str,
    prepare: Step | None = None,
) -> dict[str, np.ndarray]:
    """Milliseconds of every step in every round, in a new order each; the first rounds warm up and do not count.

    Args:
        steps: what to time, by name.
        rounds: how many times count.
        warm_up: how many do not.
        device: where the steps run.
        title: of the progress bar.
        prepare: called before each step, outside the time taken.
    """
    timer = cuda_seconds if device.type == "cuda" else cpu_seconds
    order, shuffle = list(steps), random.Random(0).shuffle
    times: dict[str, list[float]] = {name: [] for name in steps}
    with _collected_apart():
        for i in tqdm(range(warm_up + rounds), desc=title, leave=False):
            if i % 20 == 0:
                gc.collect()
            shuffle(order)
            for name in order:
                if prepare is not None:
                    prepare()
                times[name].append(1e3 * timer(steps[name]))
    return {name: np.array(values[warm_up:]) for name, values in times.items()}


def spread(statistic: Callable[[np.ndarray], float], rounds: int, draws: int = 1000) -> tuple[float, float]:
    """A 95 % bootstrap interval of a statistic of the rounds: it gets the indices of those drawn."""
    picks = np.random.default_rng(0).integers(rounds, size=(draws, rounds))
    low, high = np.quantile([statistic(pick) for pick in picks], [0.025, 0.975])
    return float(low), float(high)


def compare(times: Mapping[str, np.ndarray], yardstick: str) -> dict[str, dict[str, Any]]:
    """Each variant's time, what it adds to "plain" in the same round, and that over what the yardstick adds.

    Example:
        >>> plain = np.array([1.0, 2.0])
        >>> compare({"plain": plain, "BatchNorm": plain + 0.5, "BNP": plain + 0.25}, "BatchNorm")["BNP"]["ratio"]
        0.5
    """
    found = {}
    for name, values in times.items():
        entry: dict[str, Any] = {"ms": float(np.median(values)), "ms_quartiles": quartiles(values)}
        if name != "plain":
            added, unit = values - times["plain"], times[yardstick] - times["plain"]

            def ratio(pick: Any, added: np.ndarray = added, unit: np.ndarray = unit) -> float:
                return float(np.median(added[pick]) / np.median(unit[pick]))

            entry["added_ms"], entry["added_quartiles"] = float(np.median(added)), quartiles(added)
            entry["ratio"], entry["ratio_interval"] = ratio(slice(None)), spread(ratio, len(values))
        found[name] = entry
    return found


def quartiles(values: np.ndarray) -> tuple[float, float]:
    """Between them lies the middle half."""
    low, high = np.quantile(values, [0.25, 0.75])
    return float(low), float(high)
