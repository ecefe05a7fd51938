"""Whole decoded videos kept in memory, for small datasets that are read many times."""

from __future__ import annotations

from collections import OrderedDict

from cliplift.sharding.video.decode import Frames


class DecodedVideos:
    """Decoded videos of this process up to a size, the least recently used dropped first."""

    def __init__(self) -> None:
        self.videos: OrderedDict[tuple[str, str], Frames] = OrderedDict()
        self.bytes, self.limit = 0, 0

    def get(self, key: tuple[str, str]) -> Frames | None:
        video = self.videos.get(key)
        if video is not None:
            self.videos.move_to_end(key)
        return video

    def put(self, key: tuple[str, str], video: Frames) -> None:
        self.videos[key] = video
        self.bytes += video.nbytes
        while self.bytes > self.limit:
            _, oldest = self.videos.popitem(last=False)
            self.bytes -= oldest.nbytes


_DECODED = DecodedVideos()


def decoded_videos(limit_mib: int) -> DecodedVideos | None:
    """The process's cache, shared by all its loaders, or None where the config keeps nothing."""
    if not limit_mib:
        return None
    _DECODED.limit = max(_DECODED.limit, limit_mib * 2**20)
    return _DECODED
