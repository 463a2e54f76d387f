"""Training on many processes: the ranks' rows count as their union, so that it equals one process.

The processes, the gradients and the shards are torch's own (DistributedDataParallel, fully_shard,
ZeroRedundancyOptimizer); here the moments of the inputs, which those know nothing of, are brought together, in
one all-reduce per step.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradcond.capture import InputCapture
from gradcond.statistics import Moments

if TYPE_CHECKING:
    from gradcond.engine import Engine

__all__ = ["Conditioning", "Ranks", "reshard", "unwrapped"]

dist = torch.distributed


class Ranks:
    """The processes whose rows make one step's gradient.

    Args:
        process_group: a group; None, the default group where torch.distributed has one; False, this process alone.

    Raises:
        TypeError: for anything else.

    Example:
        >>> Ranks(None).several  # torch.distributed is not initialized here
        False
    """

    def __init__(self, process_group: Any = None) -> None:
        is_group = dist.is_available() and isinstance(process_group, dist.ProcessGroup)
        if not (is_group or process_group is None or process_group is False):
            raise TypeError(
                "expected a torch.distributed process group, None (the default group) or False (never reduce) as "
                f"process_group, got {process_group!r}; torch.distributed.new_group makes one"
            )
        self.process_group = process_group

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self  # groups cannot be copied

    @property
    def several(self) -> bool:
        """Is there anybody to reduce with?"""
        if self.process_group is False or not (dist.is_available() and dist.is_initialized()):
            return False
        return dist.get_world_size(self.process_group) > 1

    def any(self, *flags: bool, device: torch.device) -> tuple[bool, ...]:
        """For each flag: is it true on any rank?"""
        return self.merge({}, {}, {}, *flags, device=device)[1]

    def merge(
        self,
        captures: Mapping[str, InputCapture],
        moments: Mapping[str, Moments | None],
        around: Mapping[str, Tensor],
        *flags: bool,
        device: torch.device,
    ) -> tuple[Mapping[str, Moments | None], tuple[bool, ...]]:
        """The moments of all ranks' rows together, in one all-reduce of float64 sums; every rank takes part.

        Counts, flags and sums of h - c and (h - c)^2 travel in the layers' order, zeros where a rank saw no rows,
        c around[layer]: the squares of a large mean would cost a small variance its digits.

        Args:
            captures: by layer; what they know of batch normalization is shared, too.
            moments: of this rank's rows, by layer.
            around: means that all ranks know already, by layer; c is 0 for other layers.
            flags: shared as well: true where they are on any rank.
            device: where the backend of the group wants its tensors.
        """
        if not self.several:
            return moments, flags
        centers = {name: center.to(device, torch.float64) for name, center in around.items()}
        head: list[int] = [*flags]
        body: list[Tensor] = []
        for name, capture in captures.items():
            m = moments[name]
            if m is None:
                head += [0, 0, 0, capture.feeds_batch_norm]
                body.append(torch.zeros(2 * capture.size, dtype=torch.float64, device=device))
            else:
                mean, variance = m.mean.to(device, torch.float64), m.variance.to(device, torch.float64)
                mean = mean - centers.get(name, 0.0)
                head += [m.count, m.samples, m.rows, capture.feeds_batch_norm]
                body += [m.count * mean, m.count * (variance + mean.square())]
        flat = torch.cat([torch.tensor(head, dtype=torch.float64, device=device), *body])
        dist.all_reduce(flat, group=self.process_group)

        sums = flat[len(head) :]
        head = [round(number) for number in flat[: len(head)].tolist()]
        merged: dict[str, Moments | None] = {}
        for i, (name, capture) in enumerate(captures.items()):
            count, samples, rows, feeds_batch_norm = head[len(flags) + 4 * i :][:4]
            total, squares = sums[: 2 * capture.size].chunk(2)
            sums = sums[2 * capture.size :]
            capture.feeds_batch_norm = feeds_batch_norm > 0
            center = centers.get(name, 0.0)
            merged[name] = _moments(capture, count, samples, rows, total, squares, center) if count else None
        return merged, tuple(number > 0 for number in head[: len(flags)])


def _moments(
    capture: InputCapture,
    count: int,
    samples: int,
    rows: int,
    total: Tensor,
    squares: Tensor,
    center: Tensor | float,
) -> Moments:
    weight = capture.weight
    dtype = torch.promote_types(weight.dtype, torch.float32)  # the same on all ranks, with rows or without
    mean = total / count
    variance = (squares / count - mean.square()).clamp_min(0)
    return Moments(
        count, samples, rows, (mean + center).to(weight.device, dtype), variance.to(weight.device, dtype)
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and torch.compile, so that layers are called the same everywhere.

    Raises:
        TypeError: for nn.DataParallel and for the first FullyShardedDataParallel, which hide the layers' weights.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> unwrapped(model) is model
        True
    """
    parallel = nn.parallel.DistributedDataParallel if dist.is_available() else ()
    while isinstance(model, parallel) or isinstance(getattr(model, "_orig_mod", None), nn.Module):
        model = model.module if isinstance(model, parallel) else model._orig_mod  # type: ignore[assignment]
    fsdp1 = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    for module in model.modules():
        if isinstance(module, nn.DataParallel):
            raise TypeError(
                "expected a model that runs in its own process, got one in nn.DataParallel, whose replicas live "
                "for one forward pass; use DistributedDataParallel, one process per device"
            )
        if isinstance(module, fsdp1):
            raise TypeError(
                "expected parameters in the shape of their layers, got a FullyShardedDataParallel (FSDP1), which "
                "flattens them; use torch.distributed.fsdp.fully_shard (FSDP2)"
            )
    return model


def reshard(model: nn.Module) -> None:
    """Lets modules of FSDP2 show their sharded parameters, those that an optimizer holds.

    A forward pass without a backward one leaves the root module's parameters gathered.
    """
    fsdp2 = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if fsdp2 is not None:
        for module in model.modules():
            if isinstance(module, fsdp2):
                module.reshard()


class Conditioning:
    """What gradcond adds to an optimizer's state, for torch.distributed.checkpoint, which saves nothing else of it.

    Put it into what is saved and loaded, `{"model": ..., "optimizer": ..., "gradcond": optimizer.conditioning}`:
    it has the two methods of `torch.distributed.checkpoint.stateful.Stateful`. Statistics are the same on every
    rank, so any number of processes may load what another number has saved. Load it before the optimizer's
    state, as dcp.load followed by set_state_dict does; the optimizer then knows that its statistics are there.

    Example:
        >>> import gradcond
        >>> model = nn.Linear(2, 1)
        >>> optimizer = gradcond.wrap(torch.optim.SGD(model.parameters()), model, [gradcond.BNP(decay=0.5)])
        >>> state = optimizer.conditioning.state_dict()
        >>> optimizer.conditioners[0].decay = 0.9
        >>> optimizer.conditioning.load_state_dict(state)
        >>> optimizer.conditioners[0].decay
        0.5
    """

    def __init__(self, engine: Engine, groups: list[dict[str, Any]]) -> None:
        self.engine, self.groups = engine, groups

    def state_dict(self) -> dict[str, Any]:
        """One entry of bytes, there before the first step, too: checkpoints are read into entries that exist."""
        file = io.BytesIO()
        torch.save(self.engine.state_dict(self.groups), file)
        return {"state": file.getvalue()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned.

        Raises:
            ValueError: for a state of another chain or model; nothing has been changed then.
        """
        state = torch.load(io.BytesIO(state_dict["state"]), map_location="cpu", weights_only=True)
        self.engine.check_state_dict(state)
        self.engine.load_state_dict(state)
