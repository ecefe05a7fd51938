"""RGB and optical flow as inputs of the same network: 3 planes, or 2 (x and y), and nothing but the stem differs.

Two-stream networks: Simonyan and Zisserman, arXiv 1406.2199. A flow network may start from an RGB network's weights
("cross modality pre-training", Wang et al., TSN, arXiv 1608.00859, section 3.2).

Shape letters: C input channels, O output channels, T H W kernel size.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from cliplift.models.protocol import InputSpec, ModelError

RGB_CHANNELS, FLOW_CHANNELS = 3, 2
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601


def stream_spec(
    rgb: InputSpec, in_channels: int, *, flow_mean: float = 0.5, flow_std: float = 0.226
) -> InputSpec:
    """The input of the RGB stream, or the same for flow.

    Args:
        rgb: the specification of the RGB network.
        in_channels: 3 for RGB, 2 for flow.
        flow_mean, flow_std: of flow planes stored as 8 bits and scaled to [0, 1], where 0.5 is no motion.

    Raises:
        ModelError: another number of channels.
    """
    if in_channels == RGB_CHANNELS:
        return rgb
    if in_channels != FLOW_CHANNELS:
        raise ModelError(f"in_channels={in_channels} must be 3 (RGB) or 2 (flow, x and y)")
    planes = (flow_mean,) * FLOW_CHANNELS, (flow_std,) * FLOW_CHANNELS
    return dataclasses.replace(rgb, channels=FLOW_CHANNELS, mean=planes[0], std=planes[1])


def luma(x: Tensor) -> Tensor:
    """The brightness of RGB clips: (B, 3, T, H, W) -> (B, 1, T, H, W)."""
    return LUMA[0] * x[:, 0:1] + LUMA[1] * x[:, 1:2] + LUMA[2] * x[:, 2:3]


def flow_from_rgb(
    state: dict[str, Tensor], stems: tuple[str, ...], *, in_channels: int
) -> tuple[dict[str, Tensor], list[str]]:
    """RGB weights for a flow network: every stem kernel becomes its mean over the 3 colours, repeated for x and y.

    Args:
        state: weights under the network's own names; returned as they are unless the stems are RGB and flow is wanted.
        stems: keys of the kernels that see the input, (O, 3, T, H, W) or (O, 3, H, W).
        in_channels: of the network that is filled.

    Returns:
        The tensors, and a note where they were changed.
    """
    colour = [k for k in stems if k in state and state[k].ndim > 1 and state[k].shape[1] == RGB_CHANNELS]
    if in_channels != FLOW_CHANNELS or not colour:
        return state, []
    averaged = {key: state[key].mean(dim=1, keepdim=True) for key in colour}
    repeated = {
        key: value.repeat(1, FLOW_CHANNELS, *[1] * (value.ndim - 2)) for key, value in averaged.items()
    }
    note = f"RGB weights for flow: {', '.join(colour)} averaged over colours, repeated for x, y"
    return {**state, **repeated}, [note]
