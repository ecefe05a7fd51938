"""What a transfer run's student can and cannot retrieve, as pictures: clips, and those nearest by both towers."""

from __future__ import annotations

import base64
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from cliplift.pipelines.evaluation.clip_tables import OpenShards, ShardsByUrl, open_shard_dataset
from cliplift.pipelines.runs.records import RunRecord
from cliplift.pipelines.runs.retrieval import Query, Retrieval, ShownClip, read_retrieval
from cliplift.sharding.read.contact_sheet import jpeg
from cliplift.sharding.video.decode import VideoDecodeError, decode_frames, probe

log = logging.getLogger(__name__)

FRAMES = 3  # shown of a clip: its first, middle and last
MOST_PIXELS = 96  # of a picture's short side, about


@dataclass(frozen=True)
class Strip:
    """A clip's name and frames as data URLs, none where it could not be read."""

    name: str
    frames: tuple[str, ...]
    shared: bool = False  # nearest by teacher and student both


@dataclass(frozen=True)
class ShownQuery:
    """A clip, the rank of its own frames, and its nearest clips by teacher and by student."""

    clip: Strip
    rank: int
    by_teacher: tuple[Strip, ...]
    by_student: tuple[Strip, ...]

    @property
    def shared(self) -> int:
        return sum(strip.shared for strip in self.by_student)


@dataclass(frozen=True)
class RetrievalPage:
    """The section of one run."""

    run: RunRecord
    found: Retrieval
    retrieved: tuple[ShownQuery, ...]
    missed: tuple[ShownQuery, ...]
    notes: tuple[str, ...]


def retrieval_pages(
    runs: Sequence[RunRecord], *, pictures: bool, open_shards: OpenShards = open_shard_dataset
) -> list[RetrievalPage]:
    """The sections of the runs that kept a retrieval.

    Clips that cannot be read are shown by name alone, which ``notes`` says.

    Args:
        runs: of any stage.
        pictures: show frames; otherwise nothing of the shards is read.
        open_shards: how the clips' shard datasets are opened.

    Raises:
        ConfigError: a run's file is damaged.
    """
    pages = [_page(run, pictures=pictures, open_shards=open_shards) for run in runs]
    return [page for page in pages if page is not None]


def _page(run: RunRecord, *, pictures: bool, open_shards: OpenShards) -> RetrievalPage | None:
    found = read_retrieval(run.folder)
    if found is None:
        return None
    notes: list[str] = []
    frames = _frames_of(run, found.clips, notes, open_shards) if pictures else [()] * len(found.clips)

    def strip(number: int, shared: bool = False) -> Strip:
        clip = found.clips[number]
        return Strip(clip.video_id or clip.key, frames[number], shared)

    def shown(query: Query) -> ShownQuery:
        both = set(query.by_teacher) & set(query.by_student)
        return ShownQuery(
            clip=strip(query.clip),
            rank=query.rank,
            by_teacher=tuple(strip(n, n in both) for n in query.by_teacher),
            by_student=tuple(strip(n, n in both) for n in query.by_student),
        )

    return RetrievalPage(
        run=run,
        found=found,
        retrieved=tuple(shown(q) for q in found.retrieved),
        missed=tuple(shown(q) for q in found.missed),
        notes=tuple(dict.fromkeys(notes)),
    )


def _frames_of(
    run: RunRecord, clips: Sequence[ShownClip], notes: list[str], open_shards: OpenShards
) -> list[tuple[str, ...]]:
    """Pictures of every clip, none of those that cannot be read."""
    # A held-out share of the training split is stored in that split.
    split = run.setting("data.split") if run.setting("data.val_share") else run.setting("data.val_split")
    fold = run.setting("data.fold")
    shards = ShardsByUrl(
        open_shards, split=None if split is None else str(split), fold=fold if isinstance(fold, int) else None
    )
    frames: list[tuple[str, ...]] = []
    for clip in clips:
        try:
            frames.append(_pictures(shards.read(clip.shard_url, clip.key, clip.sample_index)))
        except (ValueError, OSError) as error:  # moved, deleted or damaged shards
            log.warning("%s: clip %s is shown without its frames: %s", run.name, clip.key, error)
            notes.append(f"Clip {clip.key} could not be read: {error}")
            frames.append(())
    return frames


def _pictures(data: bytes) -> tuple[str, ...]:
    """JPEG data URLs of a stored clip's frames.

    Raises:
        VideoDecodeError: it cannot be decoded.
    """
    count = probe(data).frames
    if not count:
        raise VideoDecodeError("the clip has no frames")
    numbers = [round(i * (count - 1) / (FRAMES - 1)) for i in range(FRAMES)]
    found = []
    for frame in decode_frames(data, numbers, decoder="pyav"):
        every = max(1, min(frame.shape[:2]) // MOST_PIXELS)
        encoded = base64.b64encode(jpeg(frame[::every, ::every])).decode("ascii")
        found.append(f"data:image/jpeg;base64,{encoded}")
    return tuple(found)
