"""Parameter groups, optimizers and learning-rate schedules.

LAMB: Adam with every layer's step scaled to its weights (You et al., arXiv:1904.00962, algorithm 2).

    r = m_hat / (sqrt(v_hat) + eps) + weight_decay * w
    w = w - lr * phi(|w|) / |r| * r,  phi the identity

Layers whose weight or update is zero, and groups without weight decay (normalisation, biases), take the plain step
with ratio 1, as in the authors' BERT code, which leaves both out of the trust ratio.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TypedDict, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cliplift.configs.sections import ConfigError
from cliplift.configs.training import OptimConfig, ScheduleConfig
from cliplift.models.protocol import NamesBlocks, VideoNetwork


class Lamb(Optimizer):
    """LAMB over whole layers: a tensor is a layer, so it must not be a slice of one."""

    def __init__(
        self,
        params: Iterable[dict[str, object]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        self.found_inf: Tensor | None = None
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
                    self._update(
                        parameter,
                        parameter.grad,
                        lr=group["lr"],
                        betas=group["betas"],
                        eps=group["eps"],
                        weight_decay=group["weight_decay"],
                    )
        return loss

    def _update(
        self,
        parameter: Tensor,
        gradient: Tensor,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        beta1, beta2 = betas
        # New tensors throughout, copied only at the end: an overflow found on the device must leave all of this as it
        # was, without the host waiting to hear of it.
        n = state["step"].double() + 1
        mean = state["exp_avg"].lerp(gradient, 1 - beta1)
        square = (state["exp_avg_sq"] * beta2).addcmul_(gradient, gradient, value=1 - beta2)
        ratio = (mean / (1 - beta1**n)) / ((square / (1 - beta2**n)).sqrt_().add_(eps))
        if weight_decay:
            ratio.add_(parameter, alpha=weight_decay)
            weight_norm, update_norm = parameter.norm(), ratio.norm()
            # A weight or an update of norm 0 says nothing about the scale: it is taken as it is.
            scaled = (weight_norm > 0) & (update_norm > 0)
            trust = (weight_norm / update_norm).masked_fill(~scaled, 1.0)
            ratio.mul_(trust)
        updated = {"step": state["step"] + 1, "exp_avg": mean, "exp_avg_sq": square}
        moved = parameter.add(ratio, alpha=-lr)
        for old, new in [(parameter, moved), *((state[name], value) for name, value in updated.items())]:
            old.copy_(new if self.found_inf is None else torch.where(self.found_inf > 0, old, new))


class Sgd(torch.optim.SGD):
    """torch's SGD, whose fused form can leave an update out on the device, made safe for the first one.

    torch 2.13 allocates the momentum of a first step without a value, so that leaving that step out would leave
    whatever lay in memory; a buffer of zeros has the same first step.
    """

    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update, unless ``found_inf`` says no."""
        if self.found_inf is not None and self.defaults["fused"]:
            for group in self.param_groups:
                for parameter in group["params"] if group["momentum"] else ():
                    if parameter.grad is not None and self.state[parameter].get("momentum_buffer") is None:
                        self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        elif self.found_inf is not None:  # on a CPU, where a value is read without waiting for a device
            bad, self.found_inf = self.found_inf.numpy() > 0, None
            if bad:
                return None
        loss: float | None = super().step(closure)
        return loss


def leave_out(optimizer: Optimizer, bad: Tensor) -> None:
    """Have the optimizer's next step change nothing where ``bad``, a scalar on its device, is true.

    torch's fused optimizers read ``found_inf`` inside their kernel (it was made for fp16's loss scale).
    """
    optimizer.found_inf = bad.float()  # type: ignore[attr-defined]


def optimizer_moments(optim: OptimConfig) -> int:
    """Tensors of a parameter's size that the optimizer keeps for it: AdamW and LAMB two, SGD its momentum."""
    return int(optim.momentum > 0) if optim.name == "sgd" else 2


def peak_lr(optim: OptimConfig, *, global_batch: int) -> float:
    """The learning rate after the linear scaling rule: lr * global_batch / lr_reference_batch."""
    if optim.lr_reference_batch is None:
        return optim.lr
    return optim.lr * global_batch / optim.lr_reference_batch


class ParameterGroup(TypedDict):
    """Parameters that are updated alike."""

    params: list[nn.Parameter]
    names: list[str]
    weight_decay: float
    lr_factor: float  # of the schedule's learning rate


def parameter_groups(module: nn.Module, optim: OptimConfig) -> list[ParameterGroup]:
    """Trainable parameters by (weight decay, lr factor), each group with the names of its parameters.

    Normalisation weights and biases are recognised by their shape (one dimension). Groups are in order of first
    appearance, so that equal configs give equal groups.
    """
    factors = _block_factors(module, optim)
    groups: dict[tuple[float, float], ParameterGroup] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = optim.weight_decay if parameter.ndim > 1 or optim.decay_norm_and_bias else 0.0
        factor = factors.get(name, 1.0)
        group = groups.setdefault(
            (decay, factor), ParameterGroup(params=[], names=[], weight_decay=decay, lr_factor=factor)
        )
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        raise ConfigError("leaves no parameter to train", key="model.frozen", hint="freeze less")
    return list(groups.values())


def _block_factors(module: nn.Module, optim: OptimConfig) -> dict[str, float]:
    """lr factor of the network's parameters under layer-wise decay, as in BEiT (arXiv:2106.08254) and VideoMAE.

    With n blocks the stem gets decay**(n + 1), block i (from 0) decay**(n - i), and what comes after the last block
    1, like everything outside the network: the head is the part that starts from random weights. A parameter
    between two blocks goes with the one before it.
    """
    if optim.layer_decay == 1.0:
        return {}
    prefix, network = network_with_blocks(module, key="optim.layer_decay")
    blocks = list(network.checkpoint_blocks())
    # Parameters are declared in forward order, so one between two blocks belongs to the block before it.
    names = [name for name, _ in network.named_parameters()]
    inside = [next((i for i, b in enumerate(blocks) if name.startswith(f"{b}.")), None) for name in names]
    last = max((at for at, number in enumerate(inside) if number is not None), default=-1)
    factors, layer = {}, 0
    for at, (name, number) in enumerate(zip(names, inside, strict=True)):
        layer = layer if number is None else number + 1
        factors[prefix + name] = 1.0 if at > last else optim.layer_decay ** (len(blocks) + 1 - layer)
    return factors


def network_with_blocks(module: nn.Module, *, key: str) -> tuple[str, VideoNetwork]:
    """(parameter-name prefix, network) of the trained network inside a stage's module that names its blocks.

    Raises:
        ConfigError: none does; names ``key``, the setting that needs blocks.
    """
    for name, child in module.named_modules():
        trained = any(p.requires_grad for p in child.parameters())
        if trained and isinstance(child, NamesBlocks):
            return (f"{name}." if name else ""), cast(VideoNetwork, child)  # only its blocks are used
    raise ConfigError("needs a model that names its blocks", key=key, hint="leave it at its default")


def build_optimizer(
    module: nn.Module, optim: OptimConfig, *, global_batch: int, device: torch.device
) -> Optimizer:
    """A torch optimizer (never DeepSpeed's own, which need a compiler); every group's lr is set by the schedule."""
    lr = peak_lr(optim, global_batch=global_batch)
    groups: list[dict[str, object]] = [
        {**group, "lr": lr * group["lr_factor"]} for group in parameter_groups(module, optim)
    ]
    if optim.name == "sgd":
        nesterov = optim.nesterov and optim.momentum > 0
        fused = device.type == "cuda"
        return Sgd(groups, lr=lr, momentum=optim.momentum, nesterov=nesterov, fused=fused)
    if optim.name == "lamb":
        return Lamb(groups, lr=lr, betas=optim.betas, eps=optim.eps)
    # One kernel over all parameters, on a GPU and on a CPU.
    fused = device.type in ("cuda", "cpu")
    return torch.optim.AdamW(groups, lr=lr, betas=optim.betas, eps=optim.eps, fused=fused)


class Schedule:
    """Learning-rate factor and weight decay at each optimizer step, pure functions of the step (plateau: and of its
    drops). ``weight_decay`` is the optimizer's, where ``final_weight_decay`` is to change it."""

    def __init__(self, schedule: ScheduleConfig, *, total_steps: int, weight_decay: float = 0.0) -> None:
        self.config, self.total_steps, self.first_decay = schedule, total_steps, weight_decay
        self.warmup_steps = round(schedule.warmup_share * total_steps)
        self.drops = 0
        self._best: float | None = None
        self._waited = 0

    def factor(self, step: int) -> float:
        """The factor the ``step``-th update (from 0) is made with."""
        config, final = self.config, self.config.final_lr_share
        if step < self.warmup_steps:
            return config.first_lr_share + (1 - config.first_lr_share) * ((step + 1) / self.warmup_steps)
        laid_out = self.total_steps * config.stretch
        progress = (step - self.warmup_steps) / max(1, laid_out - self.warmup_steps)
        if config.name == "cosine":
            return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
        if config.name == "step":
            return config.factor ** sum(step >= round(m * self.total_steps) for m in config.milestones)
        if config.name == "plateau":
            return config.factor**self.drops
        if config.name == "warmup_constant_cooldown":
            cooldown_steps = round(config.cooldown_share * self.total_steps)
            beyond = (config.stretch - 1) * cooldown_steps  # laid out behind the run's end
            left = (self.total_steps - step + beyond) / max(1, cooldown_steps + beyond)
            return final + (1 - final) * min(1.0, left)
        return 1.0

    def weight_decay(self, step: int) -> float | None:
        """What the ``step``-th update decays with, where that changes; None leaves it as it is."""
        final = self.config.final_weight_decay
        if final is None:
            return None
        turned = math.cos(math.pi * step / (self.total_steps * self.config.stretch))
        return final + (self.first_decay - final) * 0.5 * (1 + turned)

    def observe(self, metric: float) -> bool:
        """Tell the plateau schedule an evaluation's metric (higher is better). True when the lr drops."""
        if self.config.name != "plateau":
            return False
        if self._best is None or metric > self._best:
            self._best, self._waited = metric, 0
            return False
        self._waited += 1
        if self._waited < self.config.patience_evaluations:
            return False
        self.drops, self._waited = self.drops + 1, 0
        return True

    def state(self) -> dict[str, float | None]:
        return {"drops": self.drops, "best": self._best, "waited": self._waited}

    def load(self, state: Mapping[str, float | None]) -> None:
        """Go on from what :meth:`state` gave."""
        self.drops, self._waited = int(state["drops"] or 0), int(state["waited"] or 0)
        self._best = state["best"]

    def apply(self, optimizer: Optimizer, step: int, lr: float) -> float:
        """Set every group's lr and weight decay for one update; returns the factor-free peak times the schedule."""
        now, decay = lr * self.factor(step), self.weight_decay(step)
        for group in optimizer.param_groups:
            group["lr"] = now * group["lr_factor"]
            if (
                decay is not None and group["weight_decay"]
            ):  # normalisation and biases have none, and keep none
                group["weight_decay"] = decay
        return now


def total_steps(schedule: ScheduleConfig, *, steps_per_epoch: int) -> int:
    """Length of a run in optimizer steps."""
    if schedule.steps is not None:
        return schedule.steps
    assert schedule.epochs is not None
    return max(1, math.ceil(schedule.epochs * steps_per_epoch))
