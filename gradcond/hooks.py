"""Forward hooks that belong to one module, and not to its copies."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import nn

__all__ = ["Hook", "drop_inert"]


class Hook:
    """A forward hook that belongs to one module: copies of the module get one that does nothing.

    It is Python's own, so that a module that was pickled whole is read where there is no gradcond.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return nullcontext().__exit__

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")


def drop_inert(module: nn.Module) -> None:
    """Clears away what copying left behind."""
    inert: Any = nullcontext.__exit__
    for key in [k for k, hook in module._forward_hooks.items() if getattr(hook, "__func__", None) is inert]:
        del module._forward_hooks[key]
        module._forward_hooks_with_kwargs.pop(key, None)
