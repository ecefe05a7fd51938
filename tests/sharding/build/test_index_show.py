"""Foreign tars get an index; a dataset can be looked at."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import av
import fsspec
import numpy as np
import pytest
import webdataset

from cliplift.configs.sections import ConfigError
from cliplift.configs.sharding import ShardRun
from cliplift.sharding.build.index_tars import index_tars
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.build.verify import verify
from cliplift.sharding.manifest import REFUSED_FILE
from cliplift.sharding.read.contact_sheet import jpeg, write_contact_sheet
from cliplift.sharding.read.reader import ShardDataset, ShardReadError
from cliplift.sharding.sources.lists import SourceError
from cliplift.sharding.sources.read import read_source


def _foreign(folder: Path, videos: Path) -> list[Path]:
    """Tars as video2dataset writes them: key.mp4, key.json, key.txt; one sample with a class file, one broken."""
    films = sorted((videos / "labelled/train").rglob("*.mp4"))[:5]
    for split, mine in (("train", films[:3]), ("val", films[3:])):
        (folder / split).mkdir(parents=True)
        with webdataset.TarWriter(str(folder / split / "00000.tar")) as writer:
            for i, film in enumerate(mine):
                sample = {"__key__": f"0000_{i}", "mp4": film.read_bytes(), "txt": "a caption"}
                if i == 1:
                    sample["cls"] = "jump"
                else:
                    sample["json"] = {"label": "wave", "url": f"https://example.org/{split}{i}"}
                writer.write(sample)
            writer.write({"__key__": "broken", "mp4": b"no video", "json": {"label": "wave"}})
            writer.write({"__key__": "no_video", "txt": "only words"})
    return films


def test_foreign_tars_are_read_by_number(demo_videos: Path, tmp_path: Path) -> None:
    films = _foreign(tmp_path, demo_videos)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.tar")}
    dataset = index_tars(str(tmp_path), name="foreign", workers=2)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.tar")} == before
    assert dataset.classes == ("jump", "wave")
    assert dataset.refused == {"decode": 2}
    assert len((tmp_path / REFUSED_FILE).read_text().splitlines()) == 2
    train, val = ShardDataset(str(tmp_path), split="train"), ShardDataset(str(tmp_path), split="val")
    assert [train.read(i) for i in range(3)] == [f.read_bytes() for f in films[:3]]
    assert [val.read(i) for i in range(2)] == [f.read_bytes() for f in films[3:]]
    assert [train.facts(i).label for i in range(3)] == [1, 0, 1]
    assert train.facts(0).video_id == "https://example.org/train0"
    assert train.facts(0).num_frames == 21
    assert train.read_json(0)["label"] == "wave"
    with pytest.raises(ShardReadError, match="no such member"):
        train.read_json(1)


def test_verify_works_on_foreign_tars(demo_videos: Path, tmp_path: Path) -> None:
    _foreign(tmp_path, demo_videos)
    index_tars(str(tmp_path), name="foreign", workers=1)
    assert verify(str(tmp_path), decode="full").ok
    tar = tmp_path / "train/00000.tar"
    data = bytearray(tar.read_bytes())
    data[data.index(b"mdat") + 500] ^= 1  # inside the first clip
    tar.write_bytes(data)
    report = verify(str(tmp_path), decode="none")
    assert {p.kind for p in report.problems if p.error} == {"checksum", "lost"}


def test_a_folder_without_tars(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no \.tar"):
        index_tars(str(tmp_path), name="foreign")


def test_the_contact_sheet_shows_every_split(built: Path, tmp_path: Path) -> None:
    page = write_contact_sheet(str(built), tmp_path / "sheet/show.html", clips_per_split=3, frames_per_clip=2)
    text = page.read_text()
    assert len(re.findall(r"<figure>", text)) == 9
    images = re.findall(r"base64,([A-Za-z0-9+/=]+)", text)
    assert len(images) == 18
    for word in (
        "<h2>train</h2>",
        "<h2>val</h2>",
        "<h2>test</h2>",
        "move_left",
        "21 frames at 15/s",
        "48×48",
    ):
        assert word in text
    assert "<script" not in text
    assert "http" not in text  # self-contained


def test_hostile_names_are_escaped(built: Path, dataset: Path, tmp_path: Path) -> None:
    manifest = json.loads((dataset / "dataset.json").read_text())
    manifest["classes"] = ["<script>alert(1)</script>", *manifest["classes"][1:]]
    (dataset / "dataset.json").write_text(json.dumps(manifest))
    text = write_contact_sheet(
        str(dataset), tmp_path / "show.html", clips_per_split=20, frames_per_clip=1
    ).read_text()
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


def test_a_jpeg_shows_its_frame() -> None:
    y, x = np.mgrid[:48, :64]
    frame = np.stack([x * 4, y * 5, np.full_like(x, 90)], axis=-1).astype(np.uint8)
    with av.open(io.BytesIO(jpeg(frame))) as picture:
        decoded = next(picture.decode(video=0)).to_ndarray(format="rgb24")
    assert np.abs(decoded.astype(int) - frame).mean() < 4


def test_foreign_tars_are_a_source(
    demo_videos: Path, built: Path, make_run: Callable[..., ShardRun], tmp_path: Path
) -> None:
    """The same clips, cut and encoded like any other video; what is no video is in the ledger."""
    _foreign(tmp_path / "tars", demo_videos)
    run = make_run(
        tmp_path / "out",
        source={"kind": "tars", "root": str(tmp_path / "tars")},
        limits={"max_refused_share": 0.5},
    )
    report = run_shard(run)
    assert (report.clips_written, report.refused) == (5, {"transcode": 2})
    dataset = ShardDataset(run.output)
    assert dataset.classes == ("jump", "wave")
    assert sorted(dataset.facts(i).split for i in range(5)) == ["train", "train", "train", "val", "val"]
    told = {dataset.facts(i).video_id: dataset.facts(i).label for i in range(5)}
    assert told["train/00000.tar/0000_1"] == 0
    same = ShardDataset(str(built))
    clips = {zlib.crc32(same.read(i)) for i in range(len(same))}
    assert {zlib.crc32(dataset.read(i)) for i in range(5)} <= clips


def test_tars_on_an_object_store_are_a_source(
    demo_videos: Path, make_run: Callable[..., ShardRun], tmp_path: Path
) -> None:
    _foreign(tmp_path / "tars", demo_videos)
    fs = fsspec.filesystem("memory")
    fs.put(str(tmp_path / "tars") + "/", "/foreign/tars/", recursive=True)
    url = make_run(tmp_path / "out", source={"kind": "tars", "root": "memory://foreign/tars"})
    local = make_run(tmp_path / "out", source={"kind": "tars", "root": str(tmp_path / "tars")})
    assert [v.source for v in read_source(url).videos] == [v.source for v in read_source(local).videos]
    fs.rm("/foreign", recursive=True)


def test_a_damaged_tar_is_named(make_run: Callable[..., ShardRun], demo_videos: Path, tmp_path: Path) -> None:
    _foreign(tmp_path / "tars", demo_videos)
    tar = tmp_path / "tars/val/00000.tar"
    tar.write_bytes(b"x" * 700 + tar.read_bytes()[700:])
    with pytest.raises(SourceError, match=r"val/00000\.tar: its headers are damaged"):
        run_shard(make_run(tmp_path / "out", source={"kind": "tars", "root": str(tmp_path / "tars")}))


@pytest.mark.slow
def test_the_contact_sheet_opens_in_a_browser_without_errors(built: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on the path")
    page = write_contact_sheet(str(built), tmp_path / "sheet.html")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,1600"]
    done = subprocess.run(
        [*command, f"--screenshot={tmp_path / 'sheet.png'}", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "CONSOLE" not in done.stderr
    with av.open(str(tmp_path / "sheet.png")) as picture:
        pixels = next(picture.decode(video=0)).to_ndarray(format="rgb24")
    assert pixels.shape == (1600, 1200, 3)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 1000  # the frames of clips, not an empty page
