"""What W&B writes offline, read back."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def logged_blobs(data: bytes) -> Iterator[bytes]:
    """Records of W&B's offline file: a LevelDB log (32 KiB blocks of crc32, length, kind, data)."""
    assert data[:4] == b":W&B"
    at, parts = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


def wandb_records(folder: Path) -> Iterator[Any]:
    """Every record of a run's offline W&B files, oldest file first."""
    from wandb.proto import wandb_internal_pb2

    for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        for data in logged_blobs(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            yield record


def wandb_history(folder: Path) -> dict[int, dict[str, Any]]:
    """Logged numbers by step."""
    found: dict[int, dict[str, Any]] = {}
    for record in wandb_records(folder):
        if record.WhichOneof("record_type") == "history":
            items = {(i.key or ".".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
            found.setdefault(int(items["_step"]), {}).update(items)
    return found


def finished_records(folder: Path, *, seconds: float = 120.0) -> list[Any]:
    """All records once the last one is there: W&B's service writes the file on its own time."""
    until = time.monotonic() + seconds
    while True:
        records = list(wandb_records(folder))
        if any(record.WhichOneof("record_type") == "exit" for record in records) or time.monotonic() > until:
            return records
        time.sleep(0.1)


def wandb_summary(records: list[Any]) -> dict[str, Any]:
    """The summary that the records end with."""
    found: dict[str, Any] = {}
    for record in records:
        if record.WhichOneof("record_type") == "summary":
            items = record.summary.update
            found |= {(i.key or ".".join(i.nested_key)): json.loads(i.value_json) for i in items}
    return found
