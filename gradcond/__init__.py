"""Condition the gradients that any torch optimizer receives, and measure what that does to the Hessian."""

from gradcond._version import __version__

__all__ = ["__version__"]
