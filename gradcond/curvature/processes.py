"""Processes that share the data: what each sums over its batches is added up, in one all-reduce a product."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

dist = torch.distributed


class Processes:
    """The processes whose batches together are the data.

    Args:
        process_group: a group; None, the default group where torch.distributed has one; False, this process alone.

    Raises:
        TypeError: for anything else.
    """

    def __init__(self, process_group: Any = None) -> None:
        is_group = dist.is_available() and isinstance(process_group, dist.ProcessGroup)
        if not (is_group or process_group is None or process_group is False):
            raise TypeError(
                "expected a torch.distributed process group, None (the default group) or False (this process "
                f"alone) as process_group, got {process_group!r}"
            )
        self.group = process_group
        self._agreed = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Processes:
        return self  # groups cannot be copied

    @property
    def several(self) -> bool:
        """Is there anybody to add up with?"""
        if self.group is False or not (dist.is_available() and dist.is_initialized()):
            return False
        return dist.get_world_size(self.group) > 1

    @property
    def rank(self) -> int:
        """This process's number among them, 0 where it is alone."""
        return dist.get_rank(self.group) if self.several else 0

    def add_up(self, total: Tensor, numbers: list[float], error: Exception | None) -> tuple[Tensor, list[float]]:
        """The sums over all processes of a tensor, of the same shape on each, and of some numbers.

        Raises:
            Exception: the error of this process, where there is one.
            RuntimeError: another process has one.
        """
        extra = torch.tensor([*numbers, float(error is not None)], dtype=total.dtype, device=total.device)
        flat = torch.cat([total.reshape(-1), extra])
        if error is not None:
            flat[:-1] = 0
        dist.all_reduce(flat, group=self.group)
        if error is not None:
            raise error
        *sums, failed = flat[total.numel() :].tolist()
        if failed:
            raise RuntimeError(f"the product failed on {failed:.0f} other processes; the error stands there")
        return flat[: total.numel()].view_as(total), sums

    def gather(self, own: Any) -> list[Any]:
        """What every process has, in the order of their ranks."""
        everyone: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(everyone, own, group=self.group)
        return everyone

    def agree(self, same: dict[str, Hashable] | None, kinds: set[Hashable]) -> set[Hashable]:
        """The kinds of batches of all processes; once, the first time, and after that this process's own.

        A process that an error has kept from saying what must be the same says None.

        Raises:
            ValueError: something that must be the same is not.
        """
        if self._agreed:
            return kinds
        everyone = self.gather((same, kinds))
        told = [own for own, _ in everyone if own is not None]
        for name in told[0] if told else ():
            others = [own[name] for own in told]
            if any(other != others[0] for other in others):
                raise ValueError(f"expected the same {name} on every process, got {others}")
        self._agreed = len(told) == len(everyone)
        return set().union(*(own for _, own in everyone))
