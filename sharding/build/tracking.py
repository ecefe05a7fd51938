"""W&B of a build: one run per dataset (and part), ``job_type=shard``, the same id when the build is continued."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from cliplift.configs.sharding import ShardRun
from cliplift.sharding.build.run import BuildReport
from cliplift.sharding.build.unit import Progress
from cliplift.sharding.manifest import canonical, dump_dataset
from cliplift.sharding.storage import open_store, without_secrets

if TYPE_CHECKING:
    import wandb

Mode = Literal["online", "offline", "disabled"]


class BuildTracker:
    """Sends the progress of a build to W&B; a context manager. With ``wandb: disabled`` nothing is even imported.

    Args:
        run: the validated config.
        part: (I, N) of an array job; every part is a W&B run of its own in the dataset's group.
    """

    def __init__(self, run: ShardRun, *, part: tuple[int, int] | None = None) -> None:
        self.run = run
        self._name = run.name if part is None else f"{run.name} part {part[0]} of {part[1]}"
        self._id_file = "wandb.json" if part is None else f"wandb-{part[0]}-of-{part[1]}.json"
        self._wandb: wandb.Run | None = None
        self._last = float("-inf")

    def __enter__(self) -> BuildTracker:
        mode = wandb_mode(self.run.track.wandb, os.environ)
        if mode != "disabled":
            self._wandb = self._start(mode)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)
            self._wandb = None

    def update(self, progress: Progress) -> None:
        """Log how far the build is, at most every ``track.every_seconds``; always when all videos are done."""
        now = time.monotonic()
        whole = progress.videos_done == progress.videos_total
        if self._wandb is None or (now - self._last < self.run.track.every_seconds and not whole):
            return
        self._last = now
        self._wandb.log(progress_numbers(progress))

    def finish(self, report: BuildReport) -> None:
        """The closing numbers and, when the dataset is complete, ``dataset.json`` as an artifact."""
        if self._wandb is None:
            return
        self._wandb.summary.update(summary_numbers(report))
        if report.dataset is None:
            return
        import wandb

        artifact = wandb.Artifact(
            f"shards-{self.run.name}",
            type="dataset",
            metadata={
                "url": without_secrets(report.url),
                "fingerprint": report.dataset.fingerprint,
                "plan_id": report.plan_id,
            },
        )
        with artifact.new_file("dataset.json", mode="wb") as file:
            file.write(dump_dataset(report.dataset))
        self._wandb.log_artifact(artifact)

    def _start(self, mode: Mode) -> wandb.Run:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        track = self.run.track
        folder = track.folder or (self.run.output if "://" not in self.run.output else ".")
        Path(folder).mkdir(parents=True, exist_ok=True)
        return wandb.init(
            id=self._run_id(),
            resume="allow",
            mode=mode,
            dir=folder,
            project=wandb_project(track.project, os.environ),
            entity=track.entity,
            name=self._name,
            group=track.group or os.environ.get("WANDB_RUN_GROUP") or self.run.name,
            job_type="shard",
            tags=list(track.tags) or None,  # None leaves it to W&B's own variables
            notes=track.notes or None,
            config=self.run.model_dump(mode="json"),
            settings=quiet_settings(),
        )

    def _run_id(self) -> str:
        """The id kept beside the shards, so that a build that was killed goes on in the same W&B run."""
        store = open_store(self.run.output)
        try:
            return str(json.loads(store.read(self._id_file))["id"])
        except FileNotFoundError:
            run_id = secrets.token_hex(4)
            store.write(self._id_file, canonical({"id": run_id}) + b"\n")
            return run_id


def progress_numbers(progress: Progress) -> dict[str, float]:
    """What is logged while a build runs."""
    numbers: dict[str, float] = {
        "videos_done": progress.videos_done,
        "videos_total": progress.videos_total,
        "shards_done": progress.shards_done,
        "shards_total": progress.shards_total,
        "clips": progress.clips,
        "bytes": progress.bytes,
        "seconds": progress.seconds,
        "clips_per_second": progress.clips_per_second,
        **{f"refused/{stage}": count for stage, count in progress.refused.items()},
    }
    if progress.seconds_left is not None:
        numbers["seconds_left"] = progress.seconds_left
    if progress.copied or progress.not_copied:
        numbers["copied"] = progress.copied
        numbers |= {f"not_copied/{reason}": count for reason, count in progress.not_copied.items()}
    return numbers


def summary_numbers(report: BuildReport) -> dict[str, float | str]:
    """The closing numbers of a build."""
    numbers: dict[str, float | str] = {
        "shards_built": report.shards_built,
        "shards_kept": report.shards_kept,
        "clips_written": report.clips_written,
        "bytes_written": report.bytes_written,
        "missing": report.missing,
        "seconds": report.seconds,
        **{f"refused/{stage}": count for stage, count in report.refused.items()},
    }
    if report.duplicates is not None:
        numbers |= {
            f"duplicates/{name}": n for name, n in vars(report.duplicates).items() if name != "action"
        }
    if report.dataset is not None:
        numbers |= {"samples": report.dataset.samples, "fingerprint": report.dataset.fingerprint}
    if report.verified is not None:
        numbers["verified"] = report.verified.ok
    return numbers


def wandb_project(asked: str | None, environment: Mapping[str, str]) -> str:
    """The project that a config asks for; where it is silent W&B's own WANDB_PROJECT, or ours."""
    return asked or environment.get("WANDB_PROJECT") or "cliplift"


def quiet_settings() -> wandb.Settings:
    """Of every W&B run: no words on the terminal, and nothing of the machine, its git checkout or its code is taken."""
    import wandb

    return wandb.Settings(
        console="off",
        silent=True,
        x_disable_stats=True,
        x_disable_meta=True,
        disable_git=True,
        save_code=False,
    )


def wandb_mode(asked: str, environment: Mapping[str, str]) -> Mode:
    """``auto`` goes online with an API key, else writes offline files; W&B's own WANDB_MODE decides over ``auto``."""
    if asked != "auto":
        return cast(Mode, asked)
    if environment.get("WANDB_MODE"):
        return cast(Mode, environment["WANDB_MODE"])
    netrc = Path.home() / ".netrc"
    has_key = bool(environment.get("WANDB_API_KEY")) or (
        netrc.is_file() and "api.wandb.ai" in netrc.read_text()
    )
    return "online" if has_key else "offline"
