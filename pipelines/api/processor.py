"""From a video to the clips that a network takes: the frames, the crop and the normalisation of its training.

Shape letters: V views of a video, C channels, T frames, H W pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from cliplift.configs.data import DataConfig
from cliplift.configs.load import validate
from cliplift.configs.sections import ConfigError
from cliplift.models.protocol import InputSpec
from cliplift.models.streams import FLOW_CHANNELS
from cliplift.pipelines.data.augment import DeviceAugment
from cliplift.pipelines.data.batch import ClipBatch
from cliplift.pipelines.data.video_files import clips_of_frames, views_of_video

Video = str | Path | npt.NDArray[np.uint8]  # a file or URL, or decoded RGB frames (N, H, W, 3)


class Processor:
    """What evaluation does to a video before the network sees it.

    Args:
        data: sampling, crop and views.
        input_spec: mean and standard deviation.
    """

    def __init__(self, data: DataConfig, input_spec: InputSpec) -> None:
        self.data, self.input_spec = data, input_spec
        self._normalise = DeviceAugment(data.augment, input_spec, training=False)

    def __repr__(self) -> str:
        sampling, views = self.data.sampling, self.data.views
        return (
            f"Processor(frames={sampling.frames}, stride={sampling.stride}, fps={sampling.fps}, "
            f"mode={sampling.mode!r}, crop={self.data.crop_pixels}, clips={views.clips}, crops={views.crops})"
        )

    def with_views(self, *, clips: int = 1, crops: int = 1) -> Processor:
        """The same with other test views: ``clips`` spread over the video, ``crops`` (1, 3, 5 or 10) of each."""
        tree = self.data.model_dump() | {"views": {"clips": clips, "crops": crops}}
        return Processor(validate(tree, DataConfig, {}, "with_views"), self.input_spec)

    def __call__(self, video: Video, *, fps: float | None = None) -> Tensor:
        """A video's views as the network takes them, float32 (V, C, T, H, W).

        Args:
            video: file or URL, or its RGB frames (N, H, W, 3) in uint8, upright and in order.
            fps: frames per second of such an array; needed where the network was trained at a fixed rate.

        Raises:
            VideoDecodeError: the file cannot be read.
            ConfigError: the array is no video, or its rate is needed.
        """
        return self.normalised(self.views(video, fps=fps))

    def normalised(self, batch: ClipBatch) -> Tensor:
        """uint8 clips as they are decoded -> float32 (V, C, T, H, W)."""
        return self._normalise(batch)

    def views(self, video: Video, *, fps: float | None = None) -> ClipBatch:
        """The views before normalisation; ``views(video).clips`` is uint8 (V, T, H, W, C), to be looked at."""
        if not isinstance(video, np.ndarray):
            return views_of_video(str(video), self.data)
        if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or not len(video):
            raise ConfigError(
                f"an array of frames must be uint8 (N, H, W, 3), this is {video.dtype} {video.shape}"
            )
        if self.input_spec.channels == FLOW_CHANNELS:
            raise ConfigError("the network takes optical flow: give it the video's file, not RGB frames")
        if fps is None and self.data.sampling.fps is not None:
            raise ConfigError(
                f"the network was trained at {self.data.sampling.fps:g} frames per second: give fps=, the array's rate"
            )
        return clips_of_frames(video, self.data, fps=fps or 1.0)
