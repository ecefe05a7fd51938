"""Which kernels torch may choose in this process: deterministic or the fastest ones, and how exact they are."""

from __future__ import annotations

import torch

from cliplift.configs.training import EngineConfig


def set_numerics(engine: EngineConfig, device: torch.device) -> None:
    """Set torch's switches to what the engine section asks for; each is written, none is left to its default.

    ``fp32`` multiplies in fp32 everywhere (torch's own default rounds convolutions to TF32). At every other precision
    what is left in fp32 may be rounded to TF32. Where kernels need not be deterministic, cuDNN times its algorithms for
    each shape, which are the same in every step. Attention takes the flash kernel, then the memory-efficient one.
    """
    deterministic = device.type == "cpu" if engine.deterministic == "auto" else engine.deterministic
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    # Filling every new tensor guards against reading memory nobody wrote; it costs most of a CPU step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type != "cuda":
        return
    rounded = engine.precision != "fp32"
    torch.set_float32_matmul_precision("high" if rounded else "highest")
    torch.backends.cudnn.allow_tf32 = rounded
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_mem_efficient_sdp(True)
    torch.backends.cuda.enable_cudnn_sdp(False)
