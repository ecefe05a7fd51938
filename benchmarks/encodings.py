"""Bytes of a clip and CPU time to decode it, for several encodings and every backend that is installed.

    python benchmarks/encodings.py [VIDEOS ...] [--clips 60] [--every 1] [--folder FOLDER]

Packs the videos (as ``benchmarks/loading.py`` finds them) once for each (short side, GOP, tune), decodes 16 frames of
the same clips with each backend in turn, and checks that their pixels are equal. CPU time of one process, so that other
work on the machine disturbs it little. Prints one JSON object. This table chooses the default encoding and backend.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cliplift.sharding.video.decode import decode_frames

sys.path.insert(0, str(Path(__file__).resolve().parent))
from loading import data_config, loader_of, shards_of, usable_decoders, videos_of

SETTINGS = (
    {"short_side_pixels": 256, "gop_frames": 16, "tune": "fastdecode"},
    {"short_side_pixels": 256, "gop_frames": 16, "tune": "none"},
    {"short_side_pixels": 256, "gop_frames": 1, "tune": "fastdecode"},
    {"short_side_pixels": 256, "gop_frames": 250, "tune": "fastdecode"},
    {"short_side_pixels": 256, "gop_frames": 250, "tune": "none"},
    {"short_side_pixels": 128, "gop_frames": 16, "tune": "fastdecode"},
)


def encodings(videos: Sequence[Path], folder: Path, *, clips: int) -> list[dict[str, object]]:
    """Bytes of a clip and CPU time to decode 16 frames of it, for every encoding and backend; pixels compared."""
    rows = []
    for transcode in SETTINGS:
        shards = shards_of(videos, folder, dict(transcode))
        rows.append({**transcode, **_decode_costs(shards, clips)})
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def _decode_costs(shards: str, clips: int) -> dict[str, object]:
    decoders = usable_decoders(shards)
    source = loader_of(data_config(shards, decoder="pyav", processes=0, crop_pixels=112)).dataset
    chosen = np.linspace(0, len(source) - 1, min(clips, len(source))).round().astype(int).tolist()
    seconds: dict[str, list[float]] = {decoder: [] for decoder in decoders}
    different: set[str] = set()
    sizes = []
    for turn, index in enumerate(chosen):
        data, numbers = source.read(index), source.plan(index, 0).frames[0].tolist()
        sizes.append(len(data))
        pixels: dict[str, bytes] = {}
        for decoder in decoders if turn % 2 else reversed(decoders):
            began = time.process_time()
            frames = decode_frames(data, numbers, decoder=decoder)  # type: ignore[arg-type]
            seconds[decoder].append(time.process_time() - began)
            pixels[decoder] = frames.tobytes()
        different |= {decoder for decoder in decoders if pixels[decoder] != pixels["pyav"]}
    warm = slice(len(chosen) // 10, None)  # the first clips pay for imports and tables
    return {
        "clips": len(chosen),
        "kib_per_clip": round(statistics.mean(sizes) / 1024, 1),
        "decode_ms": {d: round(1000 * statistics.mean(s[warm]), 2) for d, s in seconds.items()},
        "pixels_equal": not different,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("videos", type=Path, nargs="*", help="folders of videos")
    parser.add_argument("--clips", type=int, default=60, help="clips decoded of each encoding")
    parser.add_argument("--every", type=int, default=1, help="take every n-th video only")
    parser.add_argument("--folder", type=Path, help="keep shards here; a second run reuses them")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        videos = videos_of(options.videos, folder)[:: options.every]
        if not videos:
            sys.exit(f"{options.videos} hold no video")
        rows = encodings(videos, folder, clips=options.clips)
    print(json.dumps({"videos": len(videos), "encodings": rows}, indent=1))


if __name__ == "__main__":
    main()
