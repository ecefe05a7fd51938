"""Where numbers go: a JSONL file always, W&B from rank 0, a progress line for people.

One W&B id per run folder, kept in ``wandb.json``: a restarted run continues the same W&B run.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from tqdm import tqdm

from cliplift.configs.sections import ConfigError
from cliplift.configs.training import TrainingRun
from cliplift.pipelines.distributed.collectives import Topology
from cliplift.pipelines.runs.folder import HISTORY, Record, RunFolder, read_json, write_json, write_text
from cliplift.sharding.build.tracking import quiet_settings, wandb_mode, wandb_project
from cliplift.sharding.read.generations import manifest_file, named_generation

if TYPE_CHECKING:
    import wandb
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)

# Column names, and rows of as many cells.
ClipTable = tuple[Sequence[str], Sequence[Sequence[object]]]

SECONDS_BETWEEN_LINES = 10.0
WANDB_RECORD = "wandb.json"  # in a run's folder: id and group of its W&B run
AGGREGATE = "aggregate"  # job_type of the mean over folds and seeds
# Endings of the names of numbers of which one end is better; of the others W&B keeps the last.
LOWER_IS_BETTER = ("loss", "calibration_error")
HIGHER_IS_BETTER = ("accuracy", "average_precision", "precision", "recall", "f1", "auc", "skill", "cosine")
USERS_DATA_FOLDER = os.environ.get("WANDB_DATA_DIR")


class Tracker:
    """Logs of one run. Every method does nothing on ranks other than 0."""

    def __init__(self, run: TrainingRun, *, stage: str, folder: Path, topology: Topology) -> None:
        self.run, self.stage, self.folder = run, stage, folder
        self.active = topology.is_main
        self._wandb: wandb.Run | None = None
        self._bar: tqdm[int] | None = None
        self._lines: TextIO | None = None
        self._last_line = 0.0
        self._row_offset = 0
        self._defined: set[str] = set()
        self._board: SummaryWriter | None = None
        if self.active:
            self._lines = (folder / HISTORY).open("a", encoding="utf-8")
            self._board = _tensorboard(folder / "tensorboard") if run.track.tensorboard else None
            self._wandb = start_wandb(run, stage=stage, folder=folder)

    @property
    def run_id(self) -> str | None:
        """The W&B id, kept over restarts; None without W&B."""
        return None if self._wandb is None else str(self._wandb.id)

    @property
    def offline_folder(self) -> Path | None:
        """What ``wandb sync`` takes; None where W&B is online or off."""
        if self._wandb is None or not self._wandb.offline:
            return None
        return Path(self._wandb.settings.sync_dir)

    @property
    def shows_clips(self) -> bool:
        """Whether tables of clips have anywhere to go."""
        return self._wandb is not None and self.run.track.clip_table_rows > 0

    def resume_at(self, step: int, *, data_offset: int = 0) -> None:
        """Drop the JSONL lines written after the checkpoint a run goes on from.

        W&B rows cannot be dropped and must count up, so after a rewind their row number, not their ``step``, is
        moved by the data passed over.
        """
        self._row_offset = data_offset
        if not self.active:
            return
        assert self._lines is not None
        self._lines.close()
        path = self.folder / HISTORY
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        write_text(path, "".join(f"{line}\n" for line in lines if _step_of(line, step) <= step))
        self._lines = path.open("a", encoding="utf-8")

    def start(self, *, step: int, total: int) -> None:
        self._last_line = time.monotonic()
        if self.active and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=step, desc=self.run.name, unit="step", dynamic_ncols=True)

    def log(self, step: int, numbers: Mapping[str, float | None]) -> None:
        """One JSONL line and one W&B step. A number that is not known is left out, not written as zero."""
        if not self.active:
            return
        known = {key: value for key, value in numbers.items() if value is not None}
        assert self._lines is not None
        # A diverged run logs NaN losses; JSON has no NaN, so they become null there.
        finite = {key: value if math.isfinite(value) else None for key, value in known.items()}
        self._lines.write(json.dumps({"step": step, "time": round(time.time(), 3), **finite}) + "\n")
        self._lines.flush()
        if self._wandb is not None:
            self._define(known)
            self._wandb.log({**known, "step": step}, step=step + self._row_offset)
        if self._board is not None:
            for key, value in known.items():
                self._board.add_scalar(key, value, step)

    def _define(self, numbers: Mapping[str, float]) -> None:
        """Say how W&B sums up the numbers that come for the first time."""
        assert self._wandb is not None
        for key in numbers.keys() - self._defined:
            self._defined.add(key)
            if summary := metric_summary(key):
                self._wandb.define_metric(key, step_metric="step", summary=summary)

    def progress(self, step: int, total: int, text: str) -> None:
        """The progress line: rewritten on a terminal, every ten seconds in a log."""
        if not self.active:
            return
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(text)
            return
        now = time.monotonic()
        if now - self._last_line >= SECONDS_BETWEEN_LINES or step == total:
            self._last_line = now
            print(f"{self.run.name}: step {step}/{total}  {text}", file=sys.stderr, flush=True)

    def heartbeat(self, step: int, total: int) -> None:
        """A line that says the run goes on, ten seconds after the last one; it reads nothing of the step."""
        if not self.active:
            return
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            print(f"{self.run.name}: step {step}/{total}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line on standard output, above the progress bar where there is one."""
        if not self.active:
            return
        if self._bar is not None:
            self._bar.clear()
        print(f"{self.run.name}: {text}", flush=True)
        if self._bar is not None:
            self._bar.refresh()

    def log_clips(self, step: int, clips: ClipTable | None) -> None:
        """A W&B table; an mp4's bytes become a playable cell."""
        if self._wandb is None or clips is None or not clips[1]:
            return
        import io

        import wandb

        columns, rows = clips
        table = wandb.Table(columns=list(columns))
        for row in rows:
            table.add_data(
                *(wandb.Video(io.BytesIO(v), format="mp4") if isinstance(v, bytes) else v for v in row)
            )
        self._wandb.log({"clips": table, "step": step}, step=step + self._row_offset)

    def artifacts(self, *, shards: Sequence[str], fingerprint: str, weights: str) -> None:
        """Lineage in W&B: the data this run used and the weights it made, by reference, nothing uploaded."""
        if self._wandb is None or not self.run.track.artifacts:
            return
        import wandb

        self._wandb.config.update({"data_fingerprint": fingerprint}, allow_val_change=True)  # type: ignore[no-untyped-call]
        used = wandb.Artifact(f"data-{fingerprint[:16]}", type="dataset", metadata={"shards": list(shards)})
        for url in shards:
            # The index stands for the shards it lists; a folder would be walked file by file.
            root, generation = named_generation(url)
            index = f"{root.rstrip('/')}/{manifest_file(generation)}"
            used.add_reference(_as_uri(index), name=index.strip("/").replace("/", "_"), checksum=False)
        if not self._wandb.offline:  # offline, W&B has no way to say that a run used something
            self._wandb.use_artifact(used)
        made = wandb.Artifact(f"weights-{self._wandb.id}", type="model", metadata={"stage": self.stage})
        made.add_reference(_as_uri(weights), name="weights", checksum=False)
        self._wandb.log_artifact(made)

    def summary(self, metrics: Mapping[str, float]) -> None:
        """The run's final numbers."""
        if self._wandb is not None:
            self._wandb.summary.update(dict(metrics))

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._lines is not None:
            self._lines.close()
        if self._board is not None:
            self._board.close()
            self._board = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None
        self.active = False


def start_wandb(run: TrainingRun, *, stage: str, folder: Path) -> wandb.Run | None:
    """The W&B run of a run's folder, which goes on where an earlier start left it; None where W&B is off."""
    mode = wandb_mode(run.track.wandb, os.environ)
    if mode == "disabled":
        return None
    os.environ.setdefault("WANDB_SILENT", "true")
    # Tables' clips wait here for `wandb sync`: in the run's folder, so that it can be synced from elsewhere.
    os.environ["WANDB_DATA_DIR"] = USERS_DATA_FOLDER or str((folder / "wandb").absolute())
    import wandb

    known = folder / WANDB_RECORD
    again = known.is_file() and run.checkpoint.resume == "auto"
    before = (read_json(known) or {}).get("id") if again else None
    of_sweep = (
        os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None
    )  # its agent chose the id
    run_id = before if isinstance(before, str) and before else of_sweep or secrets.token_hex(4)
    track, group = run.track, wandb_group(run, os.environ)
    write_json(known, {"id": run_id, "group": group})
    started = wandb.init(
        id=run_id,
        resume="allow",
        mode=mode,
        dir=str(folder),
        project=wandb_project(track.project, os.environ),
        entity=track.entity,
        name=run.name if of_sweep is None else None,  # W&B names the trials of a sweep
        group=group,
        job_type=stage,
        tags=list(track.tags) or None,  # None leaves it to W&B's own variables
        notes=track.notes or None,
        config=run.model_dump(mode="json") | {"environment": _environment(folder)},
        settings=quiet_settings(),
    )
    started.define_metric("*", step_metric="step")
    return started


def log_aggregate(
    run: TrainingRun, *, folder: Path, metrics: Mapping[str, float], runs: Mapping[str, Mapping[str, float]]
) -> None:
    """A W&B run of its own for the mean over folds and seeds, with a table of what each of them reached.

    Args:
        run: the config that stands for all of them.
        folder: where its W&B files go.
        metrics: means and standard deviations.
        runs: the metrics of each run by its name.
    """
    started = start_wandb(run, stage=AGGREGATE, folder=folder)
    if started is None:
        return
    import wandb

    names = [name for name in next(iter(runs.values())) if all(name in found for found in runs.values())]
    table = wandb.Table(columns=["run", *names])
    for name, found in runs.items():
        table.add_data(name, *(found[each] for each in names))
    started.log({"runs": table, "step": 0}, step=0)
    started.summary.update(dict(metrics))
    started.finish()


def metric_summary(key: str) -> str | None:
    """How W&B sums a logged number up: the best and the last of what has a better end; None leaves it the last."""
    group, _, name = key.rpartition("/")
    if name.endswith(LOWER_IS_BETTER):
        return "min,last"
    return "max,last" if group == "eval" and name.endswith(HIGHER_IS_BETTER) else None


def wandb_group(run: TrainingRun, environment: Mapping[str, str]) -> str:
    """The campaign a run belongs to: as the config says, as W&B's WANDB_RUN_GROUP says, that of the run it starts from.

    A run that starts from none begins a campaign of its own name.
    """
    source = getattr(run, "initialise_from", None)
    before = read_json(Path(source) / WANDB_RECORD) if source and "://" not in source else None
    inherited = (before or {}).get("group")
    return (
        run.track.group
        or environment.get("WANDB_RUN_GROUP")
        or (inherited if isinstance(inherited, str) else None)
        or run.name
    )


def _environment(folder: Path) -> Record:
    """Versions and git commit of the run's start record; W&B's own probing would also take remotes and diffs."""
    record = RunFolder(folder, writes=False).start_record() or {}
    return {
        key: value
        for key, value in record.items()
        if key.endswith("_version") or key in ("python", "git_commit")
    }


def _tensorboard(folder: Path) -> SummaryWriter:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            f"needs the package tensorboard ({error})",
            key="track.tensorboard",
            value=True,
            hint="pip install 'cliplift[tensorboard]'",
        ) from error
    return SummaryWriter(str(folder))


def _as_uri(url: str) -> str:
    return url if "://" in url else Path(url).absolute().as_uri()


def _step_of(line: str, otherwise: int) -> int:
    """Step of a JSONL line; one that is half written or damaged counts as after every step and is dropped."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return otherwise + 1
    return step if isinstance(step, int) else otherwise + 1
