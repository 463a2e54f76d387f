"""Hyper-parameters of a conditioner that follow the step count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gradcond.conditioner import Conditioner

__all__ = ["ConditionerScheduler"]


class ConditionerScheduler:
    """Sets hyper-parameters of a conditioner by functions of the step, as a learning-rate scheduler does for lr.

    The values of step 0 are set at once, those of step t after t calls of `step()`, which belongs after
    `optimizer.step()`. A value that the conditioner does not accept raises its error, and the former values stay.

    Args:
        conditioner: e.g. `optimizer.conditioners[0]`.
        **functions: for each hyper-parameter by name, its value from the number of steps taken.

    Raises:
        TypeError: for something that is not a conditioner, or not a function.
        ValueError: for a hyper-parameter that the conditioner does not have, or a value out of its range.

    Example:
        >>> from gradcond import MeanShiftRejection
        >>> msr = MeanShiftRejection()
        >>> schedule = ConditionerScheduler(msr, rejection=lambda step: min(0.9, 0.3 * step))
        >>> for _ in range(2):
        ...     schedule.step()
        >>> msr.rejection
        0.6
    """

    def __init__(self, conditioner: Conditioner, **functions: Callable[[int], Any]) -> None:
        if not isinstance(conditioner, Conditioner):
            raise TypeError(f"expected a conditioner, such as optimizer.conditioners[0], got {conditioner!r:.60}")
        for name, function in functions.items():
            if not callable(function):
                raise TypeError(f"{name} must be a function of the step, got {function!r}; write lambda step: ...")
        self.conditioner, self.functions, self.steps = conditioner, functions, 0
        self._set()

    def step(self) -> None:
        """Takes the values of the next step."""
        self.steps += 1
        self._set()

    def state_dict(self) -> dict[str, Any]:
        """The number of steps taken."""
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from that number of steps."""
        if "steps" not in state_dict:
            raise ValueError(f"expected what state_dict() returned, got the keys {sorted(state_dict)}")
        self.steps = int(state_dict["steps"])
        self._set()

    def _set(self) -> None:
        values = {name: function(self.steps) for name, function in self.functions.items()}
        self.conditioner.check(values)
        for name, value in values.items():
            setattr(self.conditioner, name, value)
