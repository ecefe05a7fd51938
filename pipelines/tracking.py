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
from typing import Any, TextIO

from tqdm import tqdm

from cliplift.configs.training import TrainingRun
from cliplift.pipelines.distributed import Topology
from cliplift.pipelines.run_folder import write_json

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


class Tracker:
    """Logs of one run. Every method does nothing on ranks other than 0."""

    def __init__(self, run: TrainingRun, *, stage: str, folder: Path, topology: Topology) -> None:
        self.run, self.stage, self.folder = run, stage, folder
        self.active = topology.is_main
        self._wandb: Any = None
        self._bar: tqdm[Any] | None = None
        self._lines: TextIO | None = None
        self._last_line = 0.0
        if self.active:
            self._lines = (folder / "metrics.jsonl").open("a", encoding="utf-8")
            self._wandb = self._start_wandb()

    @property
    def run_id(self) -> str | None:
        """The W&B id, the same over restarts; None without W&B."""
        return None if self._wandb is None else str(self._wandb.id)

    def resume_at(self, step: int) -> None:
        """Drop the JSONL lines a killed run wrote after the checkpoint it is resumed from."""
        if not self.active:
            return
        assert self._lines is not None
        self._lines.close()
        path = self.folder / "metrics.jsonl"
        kept = [
            line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line, step) <= step
        ]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._lines = path.open("a", encoding="utf-8")

    def start(self, *, step: int, total: int) -> None:
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
            self._wandb.log(known, step=step)

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

    def log_clips(self, step: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A W&B table; an mp4's bytes become a playable cell."""
        if self._wandb is None or not rows:
            return
        import io

        import wandb

        table = wandb.Table(columns=list(columns))
        for row in rows:
            table.add_data(
                *(wandb.Video(io.BytesIO(v), format="mp4") if isinstance(v, bytes) else v for v in row)
            )
        self._wandb.log({"clips": table}, step=step)

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
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None
        self.active = False

    def _start_wandb(self) -> Any:
        mode = wandb_mode(self.run.track.wandb, os.environ)
        if mode == "disabled":
            return None
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        known = self.folder / "wandb.json"
        run_id = json.loads(known.read_text())["id"] if known.is_file() else secrets.token_hex(4)
        write_json(known, {"id": run_id})
        track = self.run.track
        return wandb.init(
            id=run_id,
            resume="allow",
            mode=mode,
            dir=str(self.folder),
            project=track.project,
            name=self.run.name,
            group=track.group or self.run.name,
            job_type=self.stage,
            tags=list(track.tags),
            notes=track.notes or None,
            config=self.run.model_dump(mode="json"),
            settings=wandb.Settings(
                console="off",
                silent=True,
                x_disable_stats=True,
                x_disable_meta=True,
                disable_git=True,
                save_code=False,
            ),
        )


def wandb_mode(asked: str, environment: Mapping[str, str]) -> Any:
    """``auto`` goes online with an API key, else writes offline files; W&B's own WANDB_MODE decides over ``auto``."""
    if asked != "auto":
        return asked
    if environment.get("WANDB_MODE"):
        return environment["WANDB_MODE"]
    has_key = bool(environment.get("WANDB_API_KEY")) or "api.wandb.ai" in _netrc()
    return "online" if has_key else "offline"


def _netrc() -> str:
    path = Path.home() / ".netrc"
    return path.read_text() if path.is_file() else ""


def _step_of(line: str, otherwise: int) -> int:
    """Step of a JSONL line; a half-written last line counts as after every step and is dropped."""
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return otherwise + 1
