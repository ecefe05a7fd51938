"""Arithmetic of a training step: floating-point operations per clip, and a device's peak, for MFU.

Model FLOPs utilisation (PaLM, arXiv:2204.02311, appendix B): operations the model needs, forward once and backward
twice that, over the peak of the devices. Recomputed activations do not count.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import torch

from cliplift.configs.training import ModelConfig, TrainingRun
from cliplift.models.measure import measure_model
from cliplift.models.registry import ModelError

log = logging.getLogger(__name__)

# Dense bf16/fp16 tensor-core peaks of the vendor's data sheets, 1e12 operations a second.
HALF_PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H200": 989.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "A40": 149.7,
    "L40S": 362.0,
    "L4": 121.0,
    "V100": 125.0,
    "T4": 65.0,
}
BACKWARD_TO_FORWARD = 2.0


def forward_flops(
    model: ModelConfig, *, classes: int, frames: int | None = None, crop_pixels: int | None = None
) -> float | None:
    """Operations of one forward pass on one clip (or image), counted on the meta device; None where that fails."""
    try:
        found = measure_model(
            model.name,
            num_classes=classes,
            in_frames=frames,
            crop=crop_pixels,
            **dict[str, Any](model.options),
        )
    except (ModelError, NotImplementedError, RuntimeError) as error:
        log.warning("the operations of %s cannot be counted, so MFU is not logged: %s", model.name, error)
        return None
    return 2e9 * found.gmacs


def training_flops(forward: float | None) -> float | None:
    """Operations of forward and backward; frozen parts are counted as if they were trained."""
    return None if forward is None else forward * (1.0 + BACKWARD_TO_FORWARD)


def peak_tflops(run: TrainingRun, device: torch.device) -> float | None:
    """Peak of one device at the run's precision, 1e12 operations a second; None for CPUs and unknown cards."""
    if run.track.peak_tflops is not None:
        return run.track.peak_tflops
    if device.type != "cuda" or run.engine.precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in HALF_PEAK_TFLOPS.items() if re.search(rf"\b{known}\b", name)), None)
