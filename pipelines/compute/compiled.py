"""``engine.compile``: the network's blocks, or the whole module with its loss, through ``torch.compile``.

Shapes are fixed: a training step always has the same ones, and kernels for those alone are the fastest. Parameters,
buffers and the names in checkpoints stay as they are, because only the calls are replaced.
"""

from __future__ import annotations

import torch
from torch import nn

from cliplift.configs.sections import ConfigError
from cliplift.models.protocol import VideoNetwork
from cliplift.pipelines.compute.recompute import Recomputed

BACKEND = "inductor"
FORMS_OF_A_BLOCK = 8  # one for each of training and evaluation, its last batch, and gradients on and off


def compile_blocks(network: VideoNetwork) -> None:
    """Compile each block that the network names, by itself. Blocks that are alike share what was compiled.

    A recomputed block with BatchNorm is compiled inside its recomputation, every other one with it.

    Raises:
        ConfigError: blocks with BatchNorm are recomputed selectively.
    """
    names = network.checkpoint_blocks()
    _allow_forms(len(names))
    for name in names:
        block = network.get_submodule(name)
        forward = block.__dict__.get("forward")
        if isinstance(forward, Recomputed) and forward.counts:
            _refuse_selective(forward)
            forward.run = torch.compile(forward.run, backend=BACKEND, dynamic=False)
        else:
            block.compile(backend=BACKEND, dynamic=False)


def compile_module(module: nn.Module) -> None:
    """Compile a stage's module as one: the network, and the loss behind it.

    Raises:
        ConfigError: it recomputes blocks with BatchNorm, whose statistics are held meanwhile by Python alone.
    """
    for part in module.modules():
        forward = part.__dict__.get("forward")
        if isinstance(forward, Recomputed) and forward.counts:
            raise ConfigError(
                "cannot be one piece where blocks with BatchNorm are recomputed",
                key="engine.compile",
                value="model",
                hint="use engine.compile: blocks, or engine.checkpoint_blocks_share: 0",
            )
    _allow_forms(1)
    module.compile(backend=BACKEND, dynamic=False)


def _refuse_selective(forward: Recomputed) -> None:
    if forward.selective:
        raise ConfigError(
            "chooses among operations, which a compiled block with BatchNorm does not show",
            key="engine.recompute",
            value="selective",
            hint="use engine.recompute: everything, or engine.compile: off",
        )


def _allow_forms(blocks: int) -> None:
    """Torch stops compiling a function after 8 forms of it, in silence; a network's blocks may all be different."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, FORMS_OF_A_BLOCK * blocks)
    config.accumulated_recompile_limit = max(
        config.accumulated_recompile_limit, 2 * FORMS_OF_A_BLOCK * blocks
    )
