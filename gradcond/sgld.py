"""Stochastic gradient Langevin dynamics: gradient steps with noise, which sample a posterior."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from gradcond.shards import placed

__all__ = ["SGLD"]


class SGLD(Optimizer):
    r"""Samples exp(-U / temperature) by stochastic gradient Langevin dynamics.

    With g a gradient of U, the negative log posterior of the full data (the sum over all examples, not their
    mean, minus the log prior), and xi standard normal,

        theta <- theta - lr g + sqrt(2 lr temperature) xi.

    Under `gradcond.wrap` both parts go through the step's M = P P^T, theta <- theta - lr M g +
    sqrt(2 lr temperature) P xi: plain SGLD in the variables z, theta = P z, so that a constant P leaves the
    stationary distribution as it is, up to O(lr). The drift Gamma = div M, which a moving P would add, is
    dropped, as usual. There is no weight decay, which a wrapper could not condition: a prior is a part of U.

    Args:
        params: tensors or parameter groups; each group may have its own lr and temperature.
        lr: step size, >= 0; Welling and Teh's epsilon is 2 lr.
        temperature: >= 0; 1 samples the posterior, 0 descends its gradient.
        maximize: g is the gradient of -U, the log posterior.
        generator: of the noise; by default one on the CPU, seeded from torch's global generator. It is a part of
            the state, so that a resumed chain is the uninterrupted one. Data-parallel ranks need equal seeds.

    Attributes:
        generator: of the noise.
        factor_: when set, called once per step with [(parameter, noise), ...] over all parameters that the step
            moves, before they move; it replaces each standard normal noise by P noise, in place. Not saved or
            copied with the optimizer.

    Raises:
        ValueError: for an lr or a temperature that is negative; at a step, for a gradient that is sparse or
            complex (nothing has been changed then).

    References:
        Welling, Teh, "Bayesian Learning via Stochastic Gradient Langevin Dynamics", ICML 2011, equation 4.
        Li, Chen, Carlson, Carin, "Preconditioned Stochastic Gradient Langevin Dynamics for Deep Neural
        Networks", AAAI 2016, https://arxiv.org/abs/1512.07666, where Gamma is dropped.
        Lange, Deng, Ye, Lin, "Batch Normalization Preconditioning for Stochastic Gradient Langevin Dynamics",
        J. Mach. Learn. 2(1):65-82, 2023, https://doi.org/10.4208/jml.220726a.

    Example:
        >>> theta = nn.Parameter(torch.zeros(10_000))  # as many chains, each of which samples N(0, 1)
        >>> optimizer = SGLD([theta], lr=0.05, generator=torch.Generator().manual_seed(0))
        >>> for _ in range(200):
        ...     optimizer.zero_grad()
        ...     (theta.square().sum() / 2).backward()
        ...     optimizer.step()
        >>> round(theta.var().item(), 1)
        1.0
    """

    factor_: Callable[[list[tuple[nn.Parameter, Tensor]]], None] | None = None

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        temperature: float = 1.0,
        maximize: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "temperature": temperature, "maximize": maximize})
        if generator is None:
            generator = torch.Generator().manual_seed(int(torch.randint(2**63 - 1, ())))
        self.generator = generator

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as in torch.optim.Optimizer."""
        for key in ("lr", "temperature"):
            value = param_group.get(key, self.defaults[key])
            if not value >= 0:
                raise ValueError(f"SGLD: {key} must be at least 0, got {value}")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Moves every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: for a gradient that is sparse or complex; nothing has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for parameter, _ in moved:
            if parameter.grad.is_sparse or parameter.grad.is_complex():
                raise ValueError(
                    f"SGLD: expected dense real gradients, got a {parameter.grad.layout} one of dtype "
                    f"{parameter.grad.dtype}; keep sparse or complex parameters in another optimizer"
                )
        noises = [(parameter, self._noise(parameter)) for parameter, _ in moved]
        if self.factor_ is not None:
            self.factor_(noises)
        for (parameter, group), (_, noise) in zip(moved, noises, strict=True):
            lr = float(group["lr"])
            parameter.add_(parameter.grad, alpha=lr if group["maximize"] else -lr)
            parameter.add_(noise, alpha=(2 * lr * group["temperature"]) ** 0.5)
        return loss

    def _noise(self, parameter: Tensor) -> Tensor:
        """Standard normal; drawn on the generator's device, so that a chain is the same on every device."""
        device = self.generator.device
        noise = torch.randn(parameter.shape, dtype=parameter.dtype, device=device, generator=self.generator)
        return placed(noise.to(parameter.device), parameter)

    def state_dict(self) -> dict[str, Any]:
        """As in torch.optim.Optimizer, with one more entry, "generator", the generator's state."""
        return {**super().state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned; the chain goes on with the noise that it would have had.

        Raises:
            ValueError: for a state without a generator's; nothing has been changed then.
        """
        if "generator" not in state_dict:
            raise ValueError(
                f"SGLD: expected a state with the entry 'generator', got {sorted(map(str, state_dict))}; load what "
                "SGLD's state_dict() returned"
            )
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "generator"})
        self.generator.set_state(state_dict["generator"].cpu())

    def __getstate__(self) -> dict[str, Any]:
        # not the generator itself: torch 2.6 crashes where it is unpickled in a spawned process
        return {**super().__getstate__(), "generator": (self.generator.device, self.generator.get_state())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "generator" in state:
            device, generator_state = state["generator"]
            state = {**state, "generator": torch.Generator(device)}
            state["generator"].set_state(generator_state)
        super().__setstate__(state)
