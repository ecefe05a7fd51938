"""The report page: what it says of runs, that hostile text stays text, and that nothing outside is loaded."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from cliplift.configs.runs import ReportRun
from cliplift.configs.sections import ConfigError
from cliplift.configs.sharding import ShardRun, TranscodeConfig
from cliplift.pipelines.report.page import find_runs, run_report, write_report
from cliplift.sharding.build.run import run_shard
from cliplift.sharding.read.reader import ShardDataset
from cliplift.sharding.video.transcode import encode_array

HOSTILE = "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>"
CLASSES = ("walk", "run", "jump")
# One wrong sample of "walk" (taken for "run"), one of "jump"; six samples, four right.
LABELS = (0, 0, 1, 1, 2, 2)
PREDICTED = (0, 1, 1, 1, 2, 0)


@dataclass(frozen=True)
class _Facts:
    key: str


class _Clips:
    """A shard dataset in memory: the bytes of clip i name it."""

    def __init__(self, keys: Sequence[str], *, size: int = 40) -> None:
        self.keys, self.size = keys, size

    def __len__(self) -> int:
        return len(self.keys)

    def facts(self, i: int) -> _Facts:
        return _Facts(self.keys[i])

    def read(self, i: int) -> bytes:
        return f"mp4 of {self.keys[i]} ".encode().ljust(self.size, b".")


class _Page(HTMLParser):
    """Elements and texts of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def attributes(self, tag: str, name: str) -> list[str]:
        return [a[name] or "" for t, a in self.elements if t == tag and name in a]


def write_run(
    folder: Path,
    *,
    name: str = "finetune-arid",
    stage: str = "finetune",
    seed: int = 0,
    accuracy: float | None = 4 / 6,
    classes: Sequence[str] = CLASSES,
    predicted: Sequence[int] | None = PREDICTED,
    shards: str = "runs/shards",
    config: dict[str, Any] | None = None,
    metrics: dict[str, float | None] | None = None,
    steps: int = 20,
) -> Path:
    """A run folder as the stages leave it; ``accuracy=None`` is a run that has not finished."""
    folder.mkdir(parents=True)
    tree: dict[str, Any] = {
        "stage": stage, "name": name, "output": str(folder), "seed": seed, "test_split": "test",
        "model": {"name": "t3d_tiny", "pretrained": None}, "data": {"shards": [{"url": shards, "weight": 1.0}]},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(tree | (config or {})))
    command = ["cliplift", stage, "a b.yaml"]
    start = {"stage": stage, "name": name, "command": command, "torch_version": "2.13.0"}
    (folder / "run.json").write_text(json.dumps(start | {"seconds": 75.0, "git_commit": None}))
    lines = [
        {"step": s, "time": s / 2, "train/loss": 2 - s / 40, "train/lr": 0.1} for s in range(1, steps + 1)
    ]
    lines.append({"step": steps, "time": 11, "eval/accuracy": accuracy or 0.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if accuracy is None:
        return folder
    numbers = {"accuracy": accuracy, "chance": 1 / len(classes), "samples": 6.0} | (metrics or {})
    result = {"stage": stage, "metrics": numbers, "classes": list(classes)}
    result["data_fingerprint"] = "f00dcafe12345678"
    (folder / "result.json").write_text(json.dumps(result))
    if predicted is not None:
        pq.write_table(_predictions(predicted, len(classes), shards), folder / "predictions.parquet")
    return folder


def _predictions(predicted: Sequence[int], num_classes: int, shards: str) -> pa.Table:
    N = len(predicted)
    probabilities = np.full((N, num_classes), 0.2 / (num_classes - 1), dtype=np.float32)
    probabilities[np.arange(N), predicted] = 0.8
    return pa.table(
        {
            "key": [f"{i:08d}" for i in range(N)],
            "video_id": [f"video {i}" for i in range(N)],
            "shard_url": [shards] * N,
            "sample_index": pa.array(range(N), pa.int64()),
            "label": pa.array(LABELS[:N], pa.int32()),
            "predicted": pa.array(predicted, pa.int32()),
            "probabilities": pa.array(list(probabilities), pa.list_(pa.float32())),
        }
    )


def report(
    output: Path, *runs: Path, max_clips: int = 6, clips: _Clips | None = None, **options: Any
) -> _Page:
    source = clips or _Clips([f"{i:08d}" for i in range(6)])
    options = {"title": None} | options
    path = write_report(
        runs=runs, output=output / "report.html", max_clips=max_clips, open_shards=lambda url, **_: source, **options
    )  # fmt: skip
    return _Page(path)


def test_says_what_came_out(tmp_path: Path) -> None:
    page = report(tmp_path, write_run(tmp_path / "run"))
    assert "Accuracy on 6 clips (chance 33.3 %): finetune-arid 66.7 %." in page.text
    assert "<title>finetune-arid</title>" in page.html
    assert "walk → run 1 time, 50 % of the class" in page.text
    assert "cliplift finetune 'a b.yaml'" in page.text
    assert "runs/shards" in page.text  # the resolved config
    assert "shards (f00dcafe1234)" in page.text
    assert "1 min 15 s" in page.text


def test_runs_of_one_kind_are_one_line_with_mean_and_sd(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / f"s{k}", name=f"scratch-seed{k}", seed=k, accuracy=a)
        for k, a in enumerate((0.5, 0.7))
    ]
    page = report(tmp_path, *runs)
    assert "scratch mean of 2" in page.text
    assert "60.0 % ± 14.1" in page.text  # sample standard deviation of 0.5 and 0.7
    assert "66.7 % of 12 predictions, 2 runs together" in page.text  # from the predictions themselves


def write_repeats(folder: Path, accuracies: dict[str, float]) -> Path:
    """What ``folds`` and ``seeds`` leave: runs below, and a folder that sums them up with bounds as it once did."""
    for place, accuracy in accuracies.items():
        parts = place.split("/")
        fold = next((int(part[4:]) for part in parts if part.startswith("fold")), None)
        data = {"shards": ["runs/shards"], "fold": fold}
        write_run(folder.joinpath(*parts), name="-".join(["net", *parts]), seed=int(place[-1]), accuracy=accuracy,
                  config={"data": data, "checkpoint": {"url": f"s3://b/{place}"}},
                  metrics={"accuracy_low": accuracy - 0.2, "accuracy_high": accuracy + 0.2})  # fmt: skip
    (folder / "run.json").write_text(json.dumps({"stage": "finetune", "name": "net"}))
    metrics = {"runs": 2.0, "accuracy": 0.6, "accuracy_sd": 0.1, "accuracy_low": 0.4, "accuracy_high": 0.8}
    result = {"stage": "finetune", "metrics": metrics, "runs": [f"moved/{place}" for place in accuracies]}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_a_folder_of_folds_and_seeds_stands_for_its_runs(tmp_path: Path) -> None:
    accuracies = {"fold1/seed0": 0.5, "fold1/seed1": 0.7, "fold10/seed0": 0.6, "fold2/seed0": 0.6}
    folder = write_repeats(tmp_path / "campaign" / "net", accuracies)
    found, _ = find_runs(tmp_path / "campaign")
    order = ["fold1/seed0", "fold1/seed1", "fold2/seed0", "fold10/seed0"]
    assert [run.relative_to(folder).as_posix() for run in found] == order
    page = report(tmp_path, *found)
    assert "net mean of 4" in page.text
    assert "60.0 % ± 8.2" in page.text  # sample standard deviation of 0.5, 0.7, 0.6 and 0.6
    assert "30.0–70.0" in page.text  # a run's own interval


def test_a_folder_whose_runs_are_gone_shows_its_spread_and_no_interval(tmp_path: Path) -> None:
    folder = write_repeats(tmp_path / "net", {"seed0": 0.5, "seed1": 0.7})
    for seed in (0, 1):
        shutil.rmtree(folder / f"seed{seed}")
    page = report(tmp_path, *find_runs(folder)[0])
    assert "60.0 % ± 10.0" in page.text
    assert "40.0–80.0" not in page.text


def test_runs_of_one_kind_have_a_mean_curve_and_a_band(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"s{k}", name=f"net-seed{k}", seed=k) for k in (0, 1)]
    for k, values in enumerate(([1.0, 3.0, 5.0], [3.0, 5.0, 7.0])):
        lines = [{"step": step, "eval/loss": value} for step, value in zip((10, 20, 30), values, strict=True)]
        (runs[k] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report(tmp_path, *runs)
    svg = next(s for s in re.findall(r"<svg.*?</svg>", page.html, re.DOTALL) if 'aria-label="Loss"' in s)
    assert "net, mean of 2 runs, validation" in svg
    assert svg.count("faint") == 2
    (band,) = re.findall(r'class="band" d="M([^"]*)Z"', svg)
    corners = [tuple(map(float, place.split())) for place in band.split("L")]
    (mean,) = re.findall(r'class="line" d="M([^"]*)"', svg)
    middle = [tuple(map(float, place.split())) for place in mean.split("L")]
    # Means 2, 4, 6 with a standard deviation of sqrt(2) each; on the axis from 0 to 8 a unit is 178 / 8 high.
    assert [y for _, y in middle] == pytest.approx(
        [8 + 178 * (1 - value / 8) for value in (2, 4, 6)], abs=0.06
    )
    assert corners[0][1] == pytest.approx(middle[0][1] - 2**0.5 * 178 / 8, abs=0.1)
    assert corners[-1][1] == pytest.approx(middle[0][1] + 2**0.5 * 178 / 8, abs=0.1)
    assert corners[0][0] == corners[-1][0] == middle[0][0]


def test_numbers_that_never_change_have_no_curve(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as lines:
        for step in (1, 2, 3):
            row = {"step": step, "speed/memory_gib": 3.0, "speed/clips_per_second": step}
            lines.write(json.dumps(row | ({"speed/once": 1.0} if step == 1 else {})) + "\n")
    page = report(tmp_path, run)
    assert "Clips per second" in page.attributes("svg", "aria-label")
    assert not {"Memory gib", "Once"} & set(page.attributes("svg", "aria-label"))


def test_the_last_start_is_the_one_shown(tmp_path: Path) -> None:
    """The first may have been aborted; config, command and versions are those of the last."""
    run = write_run(tmp_path / "run")
    start = json.loads((run / "run.json").read_text())
    first, last = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"
    start |= {"starts": [first, last], "started_utc": first}
    (run / "run.json").write_text(json.dumps(start))
    page = report(tmp_path, run)
    assert f"{last}, start 2" in page.text
    assert "2026-01-01" not in page.text


def test_the_headline_has_every_transfer(tmp_path: Path) -> None:
    runs = []
    for name, accuracy, sigmas in (("good", 0.8, 9.0), ("bad", 0.51, 0.2)):
        numbers = {"matching_accuracy": accuracy, "matching_prior": 0.5, "above_chance_sigmas": sigmas}
        runs.append(write_run(tmp_path / name, stage="transfer", name=name, predicted=None, metrics=numbers,
                              config={"lr": accuracy}))  # fmt: skip
        result = json.loads((runs[-1] / "result.json").read_text())
        del result["metrics"]["accuracy"]
        (runs[-1] / "result.json").write_text(json.dumps(result))
    page = report(tmp_path, *runs)
    assert (
        "good 80.0 % against a prior of 50.0 %, bad 51.0 % against a prior of 50.0 %, which is not"
        in page.text
    )


def test_a_missing_number_is_an_empty_cell_and_no_mean(tmp_path: Path) -> None:
    with_it = write_run(tmp_path / "a", name="m-0", seed=0, metrics={"calibration_error": 0.05})
    without = write_run(tmp_path / "b", name="m-1", seed=1, metrics={"calibration_error": None})
    page = report(tmp_path, with_it, without)
    assert page.text.count("5.0 %") == 1  # the run's own cell; a mean of one of two would mislead
    assert '<td class="num"></td>' in page.html
    assert "None" not in page.text.split("Resolved config")[0]


def test_nothing_is_loaded_from_outside_and_nothing_runs(tmp_path: Path) -> None:
    page = report(tmp_path, write_run(tmp_path / "run"))
    assert not [tag for tag, _ in page.elements if tag in ("script", "iframe", "object", "embed", "form")]
    sources = [
        v or "" for _, a in page.elements for k, v in a.items() if k in ("src", "srcset", "poster", "data")
    ]
    assert len(sources) == 6
    assert all(source.startswith("data:video/mp4;base64,") for source in sources)
    links = [v or "" for tag, a in page.elements if tag in ("a", "link") for k, v in a.items() if k == "href"]
    assert all(link.startswith("#") or link == "data:," for link in links)
    assert "url(" not in page.html
    assert "@import" not in page.html
    policy = next(
        a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:"


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    evil = write_run(
        tmp_path / "run <b>",
        name=HOSTILE,
        classes=(HOSTILE, "</style><script>", "a\"b'c"),
        shards=f"x/{HOSTILE}",
        config={"notes": HOSTILE},
    )
    demo = {"table": [{"method": HOSTILE, "mean": 0.5, "sd": None, "values": [0.5], "runs": [str(evil)]}]}
    page = report(tmp_path, evil, demo=demo, title=HOSTILE, clips=_Clips([f"{i:08d}" for i in range(6)]))
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "img"})
    handlers = [k for _, attributes in page.elements for k in attributes if k.startswith("on")]
    assert handlers == []
    assert page.text.count("alert(1)") > 5  # it is shown, as text
    assert HOSTILE not in page.html


def test_clips_carry_bytes_labels_and_marks(tmp_path: Path) -> None:
    page = report(tmp_path, write_run(tmp_path / "run"), max_clips=4)
    clips = [base64.b64decode(s.partition(",")[2]) for s in page.attributes("video", "src")]
    # Half are mistakes (samples 1 and 5), then right ones from different classes.
    assert [clip.split()[2] for clip in clips] == [b"00000001", b"00000005", b"00000000", b"00000002"]
    marks = [a["class"] for tag, a in page.elements if tag == "article"]
    assert marks == ["wrong", "wrong", "right", "right"]
    assert page.text.count("80 %") >= 4


def test_no_clip_is_read_when_none_is_wanted(tmp_path: Path) -> None:
    page = report(tmp_path, write_run(tmp_path / "run"), max_clips=0)
    assert page.attributes("video", "src") == []


def test_clips_too_large_or_unreadable_are_named_and_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    page = report(tmp_path, run, clips=_Clips([f"{i:08d}" for i in range(6)], size=3 * 1024**2))
    assert page.attributes("video", "src") == []
    assert "Clip 00000001 was left out for its size, 3.0 MiB." in page.text

    page = report(tmp_path, run, clips=_Clips(["other"] * 6))
    assert "holds no sample '00000001'; the shards have been rebuilt since the run" in page.text


def test_moved_shards_do_not_stop_a_report(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", shards=str(tmp_path / "gone"))
    path = write_report(runs=[run], output=tmp_path / "r.html", title=None, max_clips=3)
    page = _Page(path)
    assert "could not be read" in page.text
    assert "66.7 %" in page.text


def test_clips_come_out_of_real_shards(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(256, size=(3, 2, 24, 64, 64, 3), dtype=np.uint8)
    for label, name in enumerate(CLASSES):
        for k in range(2):
            folder = tmp_path / "videos" / "test" / name
            folder.mkdir(parents=True, exist_ok=True)
            frames = noise[label, k]
            (folder / f"{k}.mp4").write_bytes(
                encode_array(frames, fps=Fraction(12), config=TranscodeConfig())
            )
    shards = tmp_path / "shards"
    source = {"kind": "folder", "root": str(tmp_path / "videos"), "layout": "split/class", "classes": CLASSES}
    run_shard(ShardRun.model_validate({"name": "six", "output": str(shards), "source": source, "workers": 1}))
    dataset = ShardDataset(str(shards), split="test")
    run = write_run(tmp_path / "run", shards=str(shards))
    table = pq.read_table(run / "predictions.parquet")
    keys, labels = zip(*((f.key, f.label) for f in map(dataset.facts, range(6))), strict=True)
    table = table.set_column(0, "key", pa.array(keys)).set_column(4, "label", pa.array(labels, pa.int32()))
    pq.write_table(table, run / "predictions.parquet")
    page = _Page(write_report(runs=[run], output=tmp_path / "r.html", title=None, max_clips=6))
    shown = {base64.b64decode(s.partition(",")[2]) for s in page.attributes("video", "src")}
    assert shown == {dataset.read(i) for i in range(6)}


def test_samples_are_found_by_key_when_numbers_have_moved(tmp_path: Path) -> None:
    shifted = _Clips(["new", *(f"{i:08d}" for i in range(6))])
    page = report(tmp_path, write_run(tmp_path / "run"), max_clips=1, clips=shifted)
    (source,) = page.attributes("video", "src")
    assert base64.b64decode(source.partition(",")[2]).startswith(b"mp4 of 00000000")


def test_demo_table_stands_on_top_in_its_order(tmp_path: Path) -> None:
    better = write_run(tmp_path / "demo" / "z", name="z", accuracy=0.7, config={"lr": 1})
    worse = write_run(tmp_path / "demo" / "a", name="a", accuracy=0.4, config={"lr": 2})
    table = [
        {"method": "from transfer", "mean": 0.7, "sd": None, "values": [0.7], "runs": ["elsewhere/demo/z"]},
        {"method": "from scratch", "mean": 0.4, "sd": 0.1, "values": [0.4], "runs": [str(worse)]},
        {"method": "a single frame, at best", "mean": 1 / 3},
    ]
    demo = {"table": table, "transfer": {}, "seconds": {"shard": 12.5, "total": 200}}
    (tmp_path / "demo" / "demo.json").write_text(json.dumps(demo))
    found, read = find_runs(tmp_path / "demo")
    assert set(found) == {better, worse}
    page = report(tmp_path, *found, demo=read)
    assert "from transfer 70.0 %, from scratch 40.0 %" in page.text
    comparison = page.text.partition("Comparison Method")[2].partition("Results")[0]
    assert comparison.index("from transfer") < comparison.index("from scratch")
    assert "± 10.0" in comparison
    assert "a single frame, at best 33.3 %" in comparison
    assert "33.3 %" in page.attributes("svg", "aria-label")
    assert "3 min 20 s" in page.text


def test_transfer_at_chance_is_said(tmp_path: Path) -> None:
    numbers = {"matching_accuracy": 0.51, "matching_prior": 0.5, "above_chance_sigmas": 0.2, "auc": 0.5}
    run = write_run(tmp_path / "t", stage="transfer", name="transfer", predicted=None, metrics=numbers)
    result = json.loads((run / "result.json").read_text())
    del result["metrics"]["accuracy"]
    (run / "result.json").write_text(json.dumps(result))
    page = report(tmp_path, run)
    assert "51.0 % against a prior of 50.0 %, which is not above chance." in page.text


def test_lineage_names_the_run_whose_weights_were_taken(tmp_path: Path) -> None:
    parent = write_run(tmp_path / "parent", stage="transfer", name="the transfer", predicted=None)
    child = write_run(tmp_path / "child", name="child", config={"initialise_from": str(parent)})
    page = report(tmp_path, parent, child)
    assert "starts from the transfer finetune child: t3d_tiny" in page.text
    assert "starts from random weights" in page.text


def test_an_unfinished_run_is_shown_as_such(tmp_path: Path) -> None:
    page = report(tmp_path, write_run(tmp_path / "run", accuracy=None))
    assert "1 of the runs below have not finished." in page.text
    assert "unfinished" in page.text
    assert "Loss" in page.text


def test_many_classes_give_a_page_of_bearable_size(tmp_path: Path) -> None:
    K, N = 400, 4000
    rng = np.random.default_rng(0)
    run = write_run(tmp_path / "run", classes=[f"kinetics class {k}" for k in range(K)], predicted=None)
    labels = rng.integers(K, size=N)
    probabilities = rng.random((N, K)).astype(np.float32)
    table = {
        "key": [str(i) for i in range(N)],
        "video_id": [""] * N,
        "shard_url": ["x"] * N,
        "sample_index": pa.array(range(N), pa.int64()),
        "label": pa.array(labels, pa.int32()),
        "predicted": pa.array(probabilities.argmax(axis=1), pa.int32()),
        "probabilities": pa.array(list(probabilities), pa.list_(pa.float32())),
    }
    pq.write_table(pa.table(table), run / "predictions.parquet")
    page = report(tmp_path, run, clips=_Clips([str(i) for i in range(N)]))
    assert len(page.html) < 3e6
    assert page.text.count("kinetics class 7 ") > 0


def test_config_entry_point_takes_a_folder_of_runs(tmp_path: Path) -> None:
    write_run(tmp_path / "all" / "one", shards=str(tmp_path / "none"))
    output = tmp_path / "pages" / "r.html"
    run = ReportRun(
        runs=(str(tmp_path / "all"), str(tmp_path / "all" / "one")), output=str(output), max_clips=0
    )
    assert run_report(run) == output
    assert _Page(output).text.count("Resolved config") == 1  # named twice, shown once


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("no folder", "is not a folder"),
        ("empty", "holds no run"),
        ("config.yaml", "config.yaml is not YAML"),
        ("predictions.parquet", "predictions.parquet cannot be read"),
    ],
)
def test_damaged_folders_are_named(tmp_path: Path, damage: str, said: str) -> None:
    folder = tmp_path / "runs"
    if damage == "empty":
        folder.mkdir()
    elif damage != "no folder":
        write_run(folder)
        (folder / damage).write_text('{"step": 1}\n{broken: [\n{"step": 2}\n')
    with pytest.raises(ConfigError, match=said) as error:
        run_report(ReportRun(runs=(str(folder),), output=str(tmp_path / "r.html")))
    assert error.value.key == "runs"


@pytest.mark.parametrize("damage", ["run.json", "result.json", "metrics.jsonl"])
def test_a_damaged_record_does_not_hide_the_run(tmp_path: Path, damage: str) -> None:
    run = write_run(tmp_path / "run")
    (run / damage).write_bytes((run / damage).read_bytes()[:-9] + b"\xff{")
    page = run_report(ReportRun(runs=(str(run),), output=str(tmp_path / "r.html"), max_clips=0))
    assert "Resolved config" in page.read_text()


@pytest.mark.parametrize("text", ["{", '{"table": 3}', "[" * 100_000, '{"table": [{}]}'])
def test_a_damaged_table_of_a_demo_is_named(tmp_path: Path, text: str) -> None:
    write_run(tmp_path / "demo" / "run")
    (tmp_path / "demo" / "demo.json").write_text(text)
    with pytest.raises(ConfigError, match=r"demo\.json is damaged"):
        run_report(ReportRun(runs=(str(tmp_path / "demo"),), output=str(tmp_path / "r.html")))


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written") as error:
        write_report(runs=[run], output=tmp_path / "file" / "r.html", title=None, max_clips=0)
    assert error.value.key == "output"
