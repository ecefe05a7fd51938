"""``predict`` and ``explain`` on videos made to mislead, and to places that cannot be written."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cliplift.configs.data import DataConfig
from cliplift.configs.runs import ExplainRun, PredictRun
from cliplift.configs.sections import ConfigError
from cliplift.models import create_model, save_pretrained
from cliplift.pipelines.data.video_files import sliding_windows
from cliplift.pipelines.evaluation.explain import run_explain
from cliplift.pipelines.evaluation.predict import run_predict
from cliplift.sharding.video import regular_frames


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("network") / "export"
    save_pretrained(create_model("t3d_tiny", num_classes=3, in_frames=4), folder, name="t3d_tiny", options={})
    return folder


def film(path: Path, seconds: int = 1) -> Path:
    source = ["-f", "lavfi", "-i", f"testsrc2=s=96x64:r=25:d={seconds}", "-pix_fmt", "yuv420p"]
    subprocess.run(
        ["ffmpeg", "-v", "error", *source, "-c:v", "libx264", "-g", "12", f"file:{path}"], check=True
    )
    return path


@pytest.fixture
def videos(tmp_path: Path) -> Iterator[tuple[list[str], Callable[[], bool]]]:
    """Videos of which only the last is one, and whether anything knocked at the port that some of them name."""
    secret = film(tmp_path / "secret.mp4")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        port = server.getsockname()[1]
        (tmp_path / "v").mkdir()
        texts = {
            "concat.mp4": f"ffconcat version 1.0\nfile {secret}\n",
            "hls.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:1,\nhttp://127.0.0.1:{port}/x.ts\n#EXT-X-ENDLIST\n",
            "dash.mp4": f'<?xml version="1.0"?><MPD><BaseURL>http://127.0.0.1:{port}/</BaseURL></MPD>',
            "empty.mp4": "",
        }
        for name, text in texts.items():
            (tmp_path / "v" / name).write_text(text)
        bad = [
            *(str(tmp_path / "v" / name) for name in texts),
            f"tcp:127.0.0.1:{port}.mp4",
            f"rtp://127.0.0.1:{port}",
        ]
        good = tmp_path / "v" / f"udp:127.0.0.1:{port}.mp4"
        secret.rename(good)

        def knocked() -> bool:
            try:
                server.accept()
            except TimeoutError:
                return False
            return True

        yield [*bad, str(good)], knocked


def test_predict_names_what_is_no_video_and_opens_nothing_else(
    tmp_path: Path,
    network: Path,
    videos: tuple[list[str], Callable[[], bool]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    names, knocked = videos
    output = tmp_path / "p.jsonl"
    assert (
        run_predict(PredictRun(run=str(network), videos=tuple(names), output=str(output))) == len(names) - 1
    )
    assert not knocked()
    assert [json.loads(line)["video"] for line in output.read_text().splitlines()] == names[-1:]
    told = capsys.readouterr().err
    assert all(name in told for name in names[:-1])


def test_explain_names_what_is_no_video_and_opens_nothing_else(
    tmp_path: Path, network: Path, videos: tuple[list[str], Callable[[], bool]]
) -> None:
    names, knocked = videos
    run = ExplainRun(run=str(network), videos=tuple(names), output=str(tmp_path / "e"))
    assert run_explain(run) == len(names) - 1
    assert not knocked()
    told = json.loads((tmp_path / "e/explained.json").read_text())["videos"]
    assert [one["video"] for one in told] == names[-1:]


def test_predict_to_a_folder_is_refused_before_the_work(
    tmp_path: Path, network: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(IsADirectoryError):
        run_predict(PredictRun(run=str(network), videos=("x.mp4",), output=str(tmp_path)))
    assert capsys.readouterr().err == ""
    assert list(tmp_path.iterdir()) == []


def test_explain_to_a_file_is_refused(tmp_path: Path, network: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        run_explain(ExplainRun(run=str(network), videos=("x.mp4",), output=str(tmp_path / "file")))


def test_a_name_that_is_no_text_is_predicted(tmp_path: Path, network: Path) -> None:
    name = bytes(film(tmp_path / "x.mp4").rename(Path(f"{tmp_path}/\udcff.mp4"))).decode(
        "utf-8", "surrogateescape"
    )
    output = tmp_path / "p.jsonl"
    assert run_predict(PredictRun(run=str(network), videos=(name,), output=str(output))) == 0
    assert json.loads(output.read_text())["video"] == f"{tmp_path}/\\xff.mp4"


def test_sliding_windows_of_a_transport_stream_take_a_decode_for_each_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seconds = film(tmp_path / "x.ts", seconds=6), 6
    count: list[int] = []
    real = regular_frames._stamped

    def counted(container: Any, stream: Any) -> Iterator[Any]:
        for stamped in real(container, stream):
            count.append(1)
            yield stamped

    monkeypatch.setattr(regular_frames, "_stamped", counted)
    data = DataConfig.model_validate(
        {"shards": ["unused:"], "sampling": {"frames": 4, "stride": 1}, "crop_pixels": 32, "decoder": "pyav"}
    )
    found = list(sliding_windows(path, data, window_seconds=1.0, stride_seconds=0.5))
    assert [(start, end) for start, end, _ in found] == [(0.5 * k, 0.5 * k + 1) for k in range(11)]
    assert len(count) <= 2 * 25 * seconds


@pytest.mark.parametrize(
    "extra",
    [
        {"sampling": "x"},
        {"crop_pixels": -1},
        {"normalize_brightness": "perhaps"},
        {"classes": ["a"]},
        {"sampling": {"frames": 0}},
    ],
)
def test_a_damaged_card_is_one_sentence(tmp_path: Path, network: Path, extra: dict[str, Any]) -> None:
    folder = shutil.copytree(network, tmp_path / "export")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"extra": extra}))
    with pytest.raises(ConfigError, match=f"damaged: .*{next(iter(extra))}"):
        run_predict(PredictRun(run=str(folder), videos=("x.mp4",)))
