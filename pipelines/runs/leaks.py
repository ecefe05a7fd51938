"""Whether what a run was trained on was compared with what it is tested on.

A run writes what is known of its datasets when it starts. An evaluation goes back from the tested run to those that
its weights come from, and says of each dataset whether `cliplift dedupe` looked in it for the tested clips, and what it
found.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from cliplift.configs.yaml_text import YamlTextError, read_yaml
from cliplift.pipelines.runs.folder import CONFIG, RUN, Record, read_json
from cliplift.sharding.leaks.records import KnownLeaks, LeakCheck, known_leaks, shards_digest
from cliplift.sharding.manifest import ManifestError, typed
from cliplift.sharding.read.generations import named_generation, open_dataset
from cliplift.sharding.storage import without_secrets

LEAK_CHECKS = "leak_checks"  # key of run.json
LEAKS = "leaks"  # key of result.json
MOST_RUNS = 16  # that weights are followed through
FOLDERS_UP = 3  # from a checkpoint or an export inside a run to the run

Status = Literal["clean", "removed", "found", "unchecked", "same", "unknown"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LeakStatement:
    """Of one dataset that weights were trained on, and one that they are tested on.

    Attributes:
        status: ``clean`` where the search found nothing, ``removed`` where what it found was taken out before,
            ``found`` where it was trained on, ``unchecked`` where nobody looked, ``same`` where both are splits of one
            dataset, ``unknown`` where the weights come from elsewhere.
        text: the same as a sentence.
    """

    status: Status
    text: str


@dataclass(frozen=True)
class Tested:
    """A dataset whose clips a network is tested on."""

    url: str
    name: str
    shards: str


@dataclass(frozen=True)
class _Trained:
    """A run of the lineage, or a place that no run is known of (``record`` is then None)."""

    place: str
    record: Record | None


def leak_record(urls: Sequence[str]) -> list[Record]:
    """What is known of a run's datasets when it starts, for run.json; those that cannot be read are left out."""
    rows: list[Record] = []
    for url in urls:
        try:
            rows.append({"dataset": without_secrets(url), "known": asdict(known_leaks(url))})
        except (ValueError, OSError) as error:  # the loader says what is wrong with a dataset
            log.warning("%s: whether it holds test clips is not known: %s", without_secrets(url), error)
    return rows


def lines_at_start(record: object) -> list[str]:
    """What a run says of its datasets when it starts: why one has fewer videos than it had, or holds test clips."""
    lines = []
    for url, known in _known(record):
        for check, left in zip(known.checks, known.left, strict=False):
            gone = len(check.videos) - left
            whose = f"that hold clips of {check.against} ({', '.join(check.splits)})"
            if gone:
                lines.append(f"{url}: fingerprint {known.fingerprint[:12]}, without {gone} videos {whose}")
            if left:
                hint = f"`cliplift dedupe {named_generation(url)[0]} --against ... --remove` takes them out"
                lines.append(f"{url}: {left} videos {whose} are trained on; {hint}")
    return lines


def leak_statements(
    folder: Path, urls: Sequence[str], *, split: str, fold: int | None
) -> list[LeakStatement]:
    """What is known of test clips in all that the weights of a run were trained on, the last training first.

    Args:
        folder: of the run that is tested, or of an export of it.
        urls: datasets that it is tested on.
        split: their split.
        fold: their official split number, from 1; None where they have one alone.
    """
    tested: list[Tested] = []
    for url in urls:
        try:
            dataset = open_dataset(url)[1]
        except (ValueError, OSError):  # the evaluation itself has said what is wrong
            continue
        tested.append(Tested(without_secrets(url), dataset.name, shards_digest(dataset)))
    found: list[LeakStatement] = []
    for run in _lineage(folder):
        found += _of_run(run, tested, split=split, fold=fold)
    return found


def statement_lines(statements: Sequence[LeakStatement]) -> str:
    """The statements for a terminal."""
    return "\n".join(f"  test clips in training: {one.text}" for one in statements)


def stored_statements(result: Mapping[str, object]) -> list[LeakStatement]:
    """The statements of a result.json; none where it has none that can be read."""
    rows = result.get(LEAKS)
    found = []
    for row in rows if isinstance(rows, list) else ():
        try:
            found.append(typed(LeakStatement, dict(row), "result.json", "a statement"))
        except (ManifestError, TypeError, ValueError) as error:
            log.warning("a statement about test clips in training cannot be read: %s", error)
    return found


def _known(record: object) -> Iterator[tuple[str, KnownLeaks]]:
    """Datasets and what was known of them, of run.json; what is damaged is left out."""
    for row in record if isinstance(record, list) else ():
        try:
            yield (
                str(row["dataset"]),
                typed(KnownLeaks, dict(row["known"]), RUN, "what is known of a dataset"),
            )
        except (KeyError, TypeError, ValueError) as error:
            log.warning("%s: what is known of a dataset cannot be read: %s", RUN, error)


def _lineage(folder: Path) -> Iterator[_Trained]:
    """The run, that whose weights it started from, and so on."""
    place: str | None = str(folder)
    seen: set[Path] = set()
    for _ in range(MOST_RUNS):
        if place is None:
            return
        run = _run_of(place)
        if run is None:
            yield _Trained(place, None)
            return
        if run in seen:
            return
        seen.add(run)
        config, record = _config(run), read_json(run / RUN) or {}
        if record.get("stage") != "evaluate":  # an evaluation trained nothing
            yield _Trained(str(record.get("name") or run.name), record)
        place = _source(config)


def _run_of(place: str) -> Path | None:
    """The run that a folder is, or is inside of."""
    if "://" in place:
        return None
    path = Path(place).absolute()
    return next((p for p in (path, *path.parents[:FOLDERS_UP]) if (p / RUN).is_file()), None)


def _config(run: Path) -> Mapping[str, object]:
    try:
        found = read_yaml((run / CONFIG).read_text(encoding="utf-8", errors="replace"))
    except (OSError, YamlTextError):
        return {}
    return found if isinstance(found, dict) else {}


def _source(config: Mapping[str, object]) -> str | None:
    """Where the weights that a run started from lie; None where it started from random ones."""
    model = config.get("model")
    pretrained = model.get("pretrained") if isinstance(model, Mapping) else None
    source = config.get("initialise_from") or config.get("run") or pretrained
    return str(source) if source else None


def _of_run(
    run: _Trained, tested: Sequence[Tested], *, split: str, fold: int | None
) -> Iterator[LeakStatement]:
    if run.record is None:
        yield LeakStatement("unknown", f"what the weights of {run.place} were trained on is not known")
        return
    datasets = run.record.get("datasets")
    at_start = dict(_known(run.record.get(LEAK_CHECKS)))
    for name in datasets if isinstance(datasets, list) else ():
        url = without_secrets(str(name))
        now = _known_now(str(name))
        known = at_start.get(url)
        where = f"{run.record.get('stage', 'run')} of {run.place} on {url}"
        for one in tested:
            yield _of_pair(where, url, one, known, now, split=split, fold=fold)


def _known_now(url: str) -> KnownLeaks | None:
    """What is known of a dataset today; None where it cannot be read from here."""
    try:
        return known_leaks(url)
    except (ValueError, OSError):
        return None


def _covering(
    known: KnownLeaks, tested: Tested, *, split: str, fold: int | None
) -> list[tuple[LeakCheck, int]]:
    """The checks that looked for a tested split, each with how many of its videos are left."""
    checks = zip(known.checks, known.left, strict=False)
    return [
        (check, left)
        for check, left in checks
        if check.covers(shards=known.shards, tested_shards=tested.shards, split=split, fold=fold)
    ]


def _of_pair(
    where: str,
    url: str,
    tested: Tested,
    at_start: KnownLeaks | None,
    now: KnownLeaks | None,
    *,
    split: str,
    fold: int | None,
) -> LeakStatement:
    whose = f"{tested.name} ({split})"
    shards = next((known.shards for known in (at_start, now) if known is not None), None)
    if shards is None:
        text = f"{where}: the dataset cannot be read; whether it holds {whose} is not known"
        return LeakStatement("unknown", text)
    if shards == tested.shards:
        text = f"{where}: its own split {split} is tested; the build, and `cliplift verify`, compare splits"
        return LeakStatement("same", text)
    for known, since in ((at_start, False), (now, True)):
        made = [] if known is None else _covering(known, tested, split=split, fold=fold)
        if made:
            return _of_checks(where, whose, made, since=since)
    hint = f"`cliplift dedupe {named_generation(url)[0]} --against {tested.url}` does it"
    return LeakStatement("unchecked", f"{where}: was not searched for {whose}; {hint}")


def _of_checks(
    where: str, whose: str, made: Sequence[tuple[LeakCheck, int]], *, since: bool
) -> LeakStatement:
    """What checks say that were known when the training began, or made since."""
    found = len({video for check, _ in made for video in check.videos})
    left = max(left for _, left in made)
    if not found:
        return LeakStatement("clean", f"{where}: searched for {whose}, nothing was found")
    if since:
        text = f"{where}: a search made since found {found} videos of {whose} in it: train again without them"
        return LeakStatement("found", text)
    if left:
        return LeakStatement("found", f"{where}: holds {left} videos of {whose}, which were trained on")
    text = f"{where}: searched for {whose}; the {found} videos that were found were removed before"
    return LeakStatement("removed", text)
