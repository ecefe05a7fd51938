"""The child process that touches untrusted video: ``python -m cliplift.sharding.build.worker FD``.

It speaks length-prefixed JSON with an optional payload over an inherited socket. It may crash, hang or run out of
memory; its parent (:mod:`cliplift.sharding.build.pool`) replaces it. Messages in:

* first ``{"cut", "transcode", "flow", "memory_mib"}``: the settings,
* then tasks: ``{"url", "listed", "start", "end", "first_clip"}`` to cut a video (listed: the URL is one of the
  list's), ``{"check", "url", "offset", "bytes"}`` to decode a stored clip in full, with ``"looks_per_second"`` and
  ``"crc32"`` also to hash pictures between its key frames, ``{"score", "url", "offset", "bytes", "crc32"}`` to score
  one, or ``{"glance", "url"}`` for a first look at a raw video.

Messages out, per task: ``{"clips": n, "sha256"}``, then for every clip ``{"clip": i, ...facts}`` with the mp4 as
payload (its last ``flow_bytes`` are the clip's optical flow) or ``{"refused": i, "stage", "reason"}``, then
``{"done": true}``. ``{"working": true}`` in between asks for more time: a long video is searched for its shots. Before
an unexpected end: ``{"fatal": reason}``.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import resource
import signal
import socket
import struct
import sys
import tempfile
import traceback
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from av.error import FFmpegError
from pydantic import TypeAdapter

from cliplift.configs.sharding import Cut, FlowConfig, TranscodeConfig, WholeCut
from cliplift.sharding.manifest import Sample
from cliplift.sharding.redirects import allow_private_redirects
from cliplift.sharding.scores.measures import score_clip
from cliplift.sharding.sources.tars import inside_tar
from cliplift.sharding.storage import StorageError, open_store, require_plain_url
from cliplift.sharding.video.cuts import spans
from cliplift.sharding.video.decode import PastTheEndError, VideoDecodeError
from cliplift.sharding.video.flow import flow_member
from cliplift.sharding.video.full_decode import check_clip
from cliplift.sharding.video.glance import Glance, glance
from cliplift.sharding.video.transcode import SourceFacts, SpanCutter

HEADER = struct.Struct("!II")
PR_SET_PDEATHSIG = 1
CHUNK_BYTES = 1 << 20

Message = dict[str, Any]  # a JSON object as it arrives; its keys are listed above


class WorkerSettings(TypedDict):
    """The first message: sections of the run as JSON, and the limit of a worker's memory, MiB."""

    cut: object
    transcode: object
    flow: NotRequired[object]
    private_redirects: NotRequired[bool]
    memory_mib: int | None


class ClipFacts(TypedDict, total=False):
    """What comes back with a clip. Of a stored clip that was only decoded, the facts up to ``picture_hashes``."""

    clip: int
    num_frames: int
    fps: list[int]  # numerator, denominator
    width: int
    height: int
    keyframes: list[int]
    picture_hashes: list[int]  # of every key frame
    looks: list[int]  # of every `look_step`-th frame, where asked for
    look_step: int
    start_seconds: float
    end_seconds: float
    source_facts: SourceFacts
    not_copied: str | None
    flow_bytes: int
    scores: dict[str, float]  # of a stored clip that was only scored, and nothing else
    glance: Glance  # of a raw video that was only looked at, and nothing else


def decoding_settings(*, memory_mib: int | None = None) -> WorkerSettings:
    """The settings of workers that cut nothing and only decode stored clips."""
    return {
        "cut": WholeCut().model_dump(),
        "transcode": TranscodeConfig().model_dump(mode="json"),
        "memory_mib": memory_mib,
    }


def decoding_task(sample: Sample, tar_url: str) -> dict[str, object]:
    """The task to decode a stored clip in full."""
    return {"check": True, "url": tar_url, "offset": sample.mp4_offset, "bytes": sample.mp4_bytes}


def looking_task(sample: Sample, tar_url: str, *, looks_per_second: float) -> dict[str, object]:
    """The task to decode a stored clip in full and hash so many of its pictures a second."""
    return {
        **decoding_task(sample, tar_url),
        "crc32": sample.mp4_crc32,
        "looks_per_second": looks_per_second,
    }


def glance_task(url: str) -> dict[str, object]:
    """The task to look at a raw video of a list."""
    return {"glance": True, "url": url}


def send(link: socket.socket, message: Mapping[str, object], payload: bytes = b"") -> None:
    """Send one message."""
    head = json.dumps(message, ensure_ascii=True).encode()
    link.sendall(HEADER.pack(len(head), len(payload)) + head)
    if payload:
        link.sendall(payload)


def receive(link: socket.socket) -> tuple[Message, bytes]:
    """Receive one message; ``EOFError`` when the other side is gone."""
    head_bytes, payload_bytes = HEADER.unpack(_exactly(link, HEADER.size))
    head = json.loads(_exactly(link, head_bytes))
    return head, _exactly(link, payload_bytes)


def _exactly(link: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = link.recv(min(CHUNK_BYTES, count - len(parts)))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


@dataclass(frozen=True)
class Stored:
    """What is stored of a clip: its video, and its optical flow if that is wanted."""

    transcode: TranscodeConfig
    flow: FlowConfig | None


def _serve(link: socket.socket) -> None:
    settings, _ = receive(link)
    cut: Cut = TypeAdapter(Cut).validate_python(settings["cut"])
    transcode = TranscodeConfig.model_validate(settings["transcode"])
    flow = None if settings.get("flow") is None else FlowConfig.model_validate(settings["flow"])
    if settings.get("private_redirects"):
        allow_private_redirects()
    if settings["memory_mib"] is not None:
        resource.setrlimit(resource.RLIMIT_AS, (settings["memory_mib"] << 20,) * 2)
    # The parent made this folder for us alone and removes it, however we end.
    scratch = Path(tempfile.gettempdir())
    while True:
        try:
            task, _ = receive(link)
        except EOFError:
            return
        if "check" in task:
            _decode_clip(link, task)
        elif "score" in task:
            _score_clip(link, task)
        elif "glance" in task:
            _glance_video(link, task, scratch)
        else:
            _cut_video(link, task, cut, Stored(transcode, flow), scratch)
        send(link, {"done": True})


def _cut_video(link: socket.socket, task: Message, cut: Cut, stored: Stored, scratch: Path) -> None:
    copy: Path | None = None
    try:
        if task["listed"]:
            require_plain_url(task["url"])
        path, copy = _local(task["url"], scratch)
        sha256 = _sha256(path)
        clips = spans(
            cut,
            path,
            start=task["start"] or 0.0,
            end=task["end"],
            alive=lambda: send(link, {"working": True}),
        )
    except (VideoDecodeError, OSError, StorageError, MemoryError) as error:
        stage = "probe" if isinstance(error, VideoDecodeError) else "read"
        send(link, {"refused": 0, "stage": stage, "reason": _reason(error)})
        return
    else:
        send(link, {"clips": len(clips), "sha256": sha256})
        # A worker that took over from one that died goes on behind the clip the other died at.
        with SpanCutter(path, stored.transcode, alive=lambda: send(link, {"working": True})) as cutter:
            for number in range(task["first_clip"], len(clips)):
                if not _cut_clip(link, cutter, number, clips[number], stored):
                    break
    finally:
        if copy is not None:
            copy.unlink(missing_ok=True)


def _cut_clip(
    link: socket.socket, cutter: SpanCutter, number: int, span: tuple[float, float | None], stored: Stored
) -> bool:
    """Cut and send one clip; whether the video may have more of them."""
    stage = "transcode"
    try:
        clip = cutter.cut(start_seconds=span[0], end_seconds=span[1])
        stage = "flow"
        flow = b"" if stored.flow is None else flow_member(clip.data, stored.flow, stored.transcode)
    except (VideoDecodeError, OSError, MemoryError) as error:
        send(link, {"refused": number, "stage": stage, "reason": _reason(error)})
        return not isinstance(error, PastTheEndError)
    checked = clip.checked
    facts: ClipFacts = {
        "clip": number,
        "start_seconds": clip.start_seconds,
        "end_seconds": clip.end_seconds,
        "num_frames": checked.frames,
        "fps": [checked.fps.numerator, checked.fps.denominator],
        "width": checked.width,
        "height": checked.height,
        "keyframes": list(checked.keyframes),
        "picture_hashes": list(checked.picture_hashes),
        "source_facts": clip.source,
        "not_copied": clip.not_copied,
        "flow_bytes": len(flow),
    }
    send(link, facts, clip.data + flow)
    return True


def _decode_clip(link: socket.socket, task: Message) -> None:
    folder, _, name = task["url"].rpartition("/")
    try:
        data = open_store(folder).read_range(name, task["offset"], task["bytes"])
        if zlib.crc32(data) != task.get("crc32", zlib.crc32(data)):
            raise StorageError("crc32 differs: the bytes are damaged")
        checked = check_clip(data, hash_pictures=True, looks_per_second=task.get("looks_per_second", 0.0))
    except (VideoDecodeError, OSError, StorageError, MemoryError) as error:
        stage = "decode" if isinstance(error, VideoDecodeError) else "read"
        send(link, {"refused": 0, "stage": stage, "reason": _reason(error)})
        return
    facts: ClipFacts = {
        "clip": 0,
        "num_frames": checked.frames,
        "width": checked.width,
        "height": checked.height,
        "fps": [checked.fps.numerator, checked.fps.denominator],
        "keyframes": list(checked.keyframes),
        "picture_hashes": list(checked.picture_hashes),
        "looks": list(checked.looks),
        "look_step": checked.look_step,
    }
    send(link, facts)


def _score_clip(link: socket.socket, task: Message) -> None:
    folder, _, name = task["url"].rpartition("/")
    try:
        data = open_store(folder).read_range(name, task["offset"], task["bytes"])
        if zlib.crc32(data) != task["crc32"]:
            raise StorageError("crc32 differs: the bytes are damaged")
        facts: ClipFacts = {"clip": 0, "scores": score_clip(data, task["score"])}
    except (VideoDecodeError, OSError, StorageError, MemoryError) as error:
        stage = "decode" if isinstance(error, VideoDecodeError) else "read"
        send(link, {"refused": 0, "stage": stage, "reason": _reason(error)})
        return
    send(link, facts)


def _glance_video(link: socket.socket, task: Message, scratch: Path) -> None:
    copy: Path | None = None
    try:
        require_plain_url(task["url"])
        path, copy = _local(task["url"], scratch)
        facts: ClipFacts = {"clip": 0, "glance": glance(str(path))}
    except (VideoDecodeError, FFmpegError, OSError, StorageError, MemoryError) as error:
        send(link, {"refused": 0, "stage": "probe", "reason": _reason(error)})
        return
    finally:
        if copy is not None:
            copy.unlink(missing_ok=True)
    send(link, facts)


def _reason(error: BaseException) -> str:
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == 12:
        return "out of memory"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, (VideoDecodeError, StorageError)):
        return str(error)
    return f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"


def _local(url: str, scratch: Path) -> tuple[Path, Path | None]:
    """A local file with the video, and the copy to remove afterwards if it had to be fetched."""
    within = inside_tar(url)
    folder, _, name = (within[0] if within else url).rpartition("/")
    store = open_store(folder or ("/" if url.startswith("/") else "."))
    copy = scratch / "source"
    if within is not None:
        data = store.read_range(name, within[1], within[2])
        if len(data) != within[2]:
            raise StorageError(f"{within[0]}: {within[2]} bytes expected at {within[1]}, {len(data)} found")
        copy.write_bytes(data)
        return copy, copy
    path = store.local_path(name)
    if path is not None:
        return path, None
    store.fetch(name, copy)
    return copy, copy


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    """Serve the parent on the socket whose descriptor is the only argument."""
    # A worker stuck in a decoder must not outlive its parent.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.environ["AV_LOG_FORCE_NOCOLOR"] = "1"
    with socket.socket(fileno=int(sys.argv[1])) as link:
        try:
            _serve(link)
        except Exception as error:
            # A mistake of ours: the ledger must say which, and the parent replaces the worker.
            place = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"
            send(link, {"fatal": reason})
            raise


if __name__ == "__main__":
    main()
