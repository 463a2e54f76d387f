"""How many vectors fit into memory, and where."""

from __future__ import annotations

from pathlib import Path

import torch

SHARE = 0.8  # of what is free: the products need some, too


def available(device: torch.device) -> int | None:
    """Free bytes of a device; None where nobody tells."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    known = [_field("/proc/meminfo", "MemAvailable:", 1024), _control_group()]
    return min((size for size in known if size is not None), default=None)


def _control_group() -> int | None:
    """What a container leaves: its limit, less what is used and cannot be given back."""
    root = "/sys/fs/cgroup/memory"
    limit, used = _field(f"{root}.max", "", 1), _field(f"{root}.current", "", 1)
    if limit is None or used is None:
        return None
    return limit - used + (_field(f"{root}.stat", "file ", 1) or 0)


def _field(path: str, name: str, unit: int) -> int | None:
    if not Path(path).is_file():
        return None
    for line in Path(path).read_text().splitlines():
        number = line.removeprefix(name).split()
        if line.startswith(name) and number and number[0].isdigit():
            return unit * int(number[0])
    return None


def placement(
    devices: list[torch.device], vector: int, extra: int, least: int, most: int
) -> tuple[torch.device, int]:
    """The first of the devices that holds ``least`` vectors, and how many it holds, up to ``most``.

    Args:
        devices: candidates, the best one first.
        vector: bytes of one vector.
        extra: bytes needed beside the vectors.
        least: fewer are of no use.
        most: more are not needed.

    Raises:
        MemoryError: none of them holds ``least``; with the sizes.
    """
    told = []
    for device in devices:
        free = available(device)
        fits = most if free is None else int(max(SHARE * free - extra, 0) // vector)
        if fits >= least:
            return device, min(fits, most)
        told.append(f"{(free or 0) / 2**30:.3g} GiB are free on {device}")
    raise MemoryError(
        f"{least} vectors of {vector / 2**30:.3g} GiB and their products need "
        f"{(least * vector + extra) / 2**30:.3g} GiB, but {' and '.join(told)}; take a smaller k or block, "
        "a shorter dtype or fewer parameters"
    )
