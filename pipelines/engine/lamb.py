"""LAMB: Adam with every layer's step scaled to its weights (You et al., arXiv:1904.00962, algorithm 2).

    r = m_hat / (sqrt(v_hat) + eps) + weight_decay * w
    w = w - lr * phi(|w|) / |r| * r,  phi the identity

Layers whose weight or update is zero, and groups without weight decay (normalisation, biases), take the plain step
with ratio 1, as in the authors' BERT code, which leaves both out of the trust ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Lamb(Optimizer):
    """LAMB over whole layers: a tensor is a layer, so it must not be a slice of one."""

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        n = int(state["step"].item())
        beta1, beta2 = group["betas"]
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        ratio = (mean / (1 - beta1**n)) / ((square / (1 - beta2**n)).sqrt_().add_(group["eps"]))
        if group["weight_decay"]:
            ratio.add_(parameter, alpha=group["weight_decay"])
            weight_norm, update_norm = parameter.norm(), ratio.norm()
            trust = torch.where((weight_norm > 0) & (update_norm > 0), weight_norm / update_norm, 1.0)
            ratio.mul_(trust)
        parameter.add_(ratio, alpha=-group["lr"])
