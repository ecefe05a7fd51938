"""How far a build is, for whoever watches it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Progress:
    """How far a build is; handed to ``on_progress`` after every video, or after every shard on a Ray cluster."""

    videos_done: int = 0
    videos_total: int = 0
    shards_done: int = 0
    shards_total: int = 0
    clips: int = 0
    bytes: int = 0
    seconds: float = 0.0
    refused: Counter[str] = field(default_factory=Counter)
    copied: int = 0
    not_copied: Counter[str] = field(default_factory=Counter)

    @property
    def clips_per_second(self) -> float:
        return self.clips / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Time the rest takes at the pace so far; None before the first video."""
        if not self.videos_done:
            return None
        return self.seconds / self.videos_done * (self.videos_total - self.videos_done)

    def add(self, other: Progress) -> None:
        """Add what another process has done. Totals and time are this one's own."""
        for name in ("videos_done", "shards_done", "clips", "bytes", "copied"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.refused.update(other.refused)
        self.not_copied.update(other.not_copied)
