"""One prepared run on a GPU: ``python benchmarks/gpu --minutes 7 --output FILE`` (or ``cliplift bench gpu``).

The rows run in order of worth until the minutes are over; each is written to FILE as soon as it is known. A row that
fails is recorded with its error and the run goes on. Rows run in a child process: one that crashes, hangs or poisons
the CUDA context ends it, and another child goes on with the next row. Nothing is fetched; missing packages are named.

    --small     the same rows on tiny nets, to try the program itself, on a CPU too
    --shards    a dataset for the loader's row; without, the demo's clips are made and packed
    --only      names of rows, or beginnings of them
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from measure import Row, Setting

Facts = dict[str, Any]  # a row as FILE holds it, or the whole FILE

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
POISONED = 75  # exit code of a child whose CUDA context no longer works
WANTED = (
    "deepspeed",
    "transformers",
    "av",
    "webdataset",
    "wandb",
    "decord",
    "torchcodec",
    "einops",
    "pyarrow",
)


class Record:
    """FILE: the rows found so far, in the order they ran."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Facts:
        return json.loads(self.path.read_text()) if self.path.exists() else {"rows": []}

    def write(self, content: Facts) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
        partial.replace(self.path)

    def put(self, row: Facts) -> None:
        """Add a row, or replace the one of this name."""
        content = self.read()
        content["rows"] = [r for r in content["rows"] if r["name"] != row["name"]] + [row]
        self.write(content)


def chosen_rows(arguments: argparse.Namespace) -> list[Row]:
    import data
    import engine
    import nets
    import waits

    rows = [
        nets.MACHINE,
        *nets.FIRST,
        *engine.LOOPS,
        waits.WAITS,
        *nets.SECOND,
        nets.TRANSFER,
        nets.RECURRENT,
        *engine.MEMORY,
        data.AUGMENTATION,
        data.LOADER,
        engine.OFFLOAD,
        engine.CHECKPOINT,
        *nets.KERNELS,
        *nets.COMPILED,
    ]
    if arguments.only:
        rows = [row for row in rows if row is nets.MACHINE or row.name.startswith(tuple(arguments.only))]
    return rows


def run_rows(arguments: argparse.Namespace) -> int:
    """The child: rows that are not in FILE yet, until the deadline."""
    import torch
    from measure import Setting

    record = Record(Path(arguments.output))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        for row in chosen_rows(arguments):
            known = {r["name"]: r for r in record.read()["rows"]}
            if row.name in known:
                continue
            if time.time() > arguments.deadline:
                record.put({"name": row.name, "goal": row.goal, "not_reached": True})
                continue
            peak = known.get("machine", {}).get("numbers", {}).get("bf16_product_tflops")
            setting = Setting(device, arguments.small, Path(folder), arguments.shards,
                              peak if device.type == "cuda" else None)  # fmt: skip
            if not run_row(row, setting, record):
                return POISONED
    return 0


def run_row(row: Row, setting: Setting, record: Record) -> bool:
    """False where the process can run no further rows."""
    import torch

    facts: Facts = {"name": row.name, "goal": row.goal}
    # A CPU that others use too may take any time for a tiny net.
    limit = 10 * row.limit_seconds if setting.small else row.limit_seconds
    record.put(facts | {"error": "did not end", "limit_seconds": limit, "started": time.time()})
    if setting.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    poisoned = False
    try:
        facts["numbers"] = row.run(setting)
    except Exception as error:
        facts["error"] = f"{type(error).__name__}: {error}"[:600]
        facts["traceback"] = traceback.format_exc()[-1800:]
        poisoned = "CUDA error" in str(error) or "device-side assert" in str(error)
    facts["seconds"] = round(time.perf_counter() - begun, 2)
    record.put(facts)
    print(line_of(facts), flush=True)
    torch.compiler.reset()
    gc.collect()
    if setting.device.type == "cuda" and not poisoned:
        torch.cuda.empty_cache()
    return not poisoned


def line_of(row: Facts) -> str:
    """A row for people."""
    if "error" in row:
        outcome = "FAILED: " + row["error"].splitlines()[0][:160]
    elif row.get("not_reached"):
        outcome = "not reached"
    else:
        numbers = row["numbers"]
        outcome = "  ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in numbers.items()
            if isinstance(value, int | float | str)
        )
    return f"{row['name']} [{row['goal']}] ({row.get('seconds', 0)} s): {outcome}"


def supervise(arguments: argparse.Namespace) -> int:
    """The parent: starts children until every row is in FILE, and ends one that is stuck."""
    record = Record(Path(arguments.output))
    record.path.parent.mkdir(parents=True, exist_ok=True)
    missing = [name for name in WANTED if importlib.util.find_spec(name) is None]
    record.write({"started": time.time(), "minutes": arguments.minutes, "small": arguments.small,
                  "missing_packages": missing, "rows": []})  # fmt: skip
    if missing:
        print(f"not installed: {', '.join(missing)}", flush=True)
    deadline = time.time() + 60 * arguments.minutes
    words = [sys.executable, str(HERE), "--child", "--deadline", str(deadline), "--output", str(record.path)]
    words += ["--small"] if arguments.small else []
    words += ["--shards", str(arguments.shards)] if arguments.shards else []
    words += ["--only", *arguments.only] if arguments.only else []
    code = POISONED
    for _ in range(12):
        code = watch(subprocess.Popen(words), record, deadline)
        rows = record.read()["rows"]
        if code == 0 or time.time() > deadline or not rows:
            break
    record.write(record.read() | {"seconds": time.time() - (deadline - 60 * arguments.minutes)})
    failed = [row["name"] for row in record.read()["rows"] if "error" in row]
    print(f"{len(failed)} rows failed: {failed}" if failed else "every row ran", flush=True)
    return 1 if failed or code not in (0, None) else 0


def watch(child: subprocess.Popen[bytes], record: Record, deadline: float) -> int:
    """Wait for a child; end it where its row takes longer than it may, or the minutes have long been over."""
    while True:
        try:
            code = child.wait(timeout=1)
        except subprocess.TimeoutExpired:
            running = [row for row in record.read()["rows"] if "started" in row]
            now = time.time()
            late = running and now > min(running[-1]["started"] + running[-1]["limit_seconds"], deadline + 20)
            if late or now > deadline + 30:
                child.kill()
            continue
        for row in record.read()["rows"]:
            if "started" in row:  # the row the child died in
                started = row.pop("started")
                record.put(
                    row | {"error": f"its process ended with {code} after {time.time() - started:.0f} s"}
                )
                print(line_of(record.read()["rows"][-1]), flush=True)
        return code


def main() -> int:
    parser = argparse.ArgumentParser(description="the GPU table, row by row")
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--output", default="gpu.json")
    parser.add_argument("--small", action="store_true", help="tiny nets, to try the program itself")
    parser.add_argument("--shards", type=Path, help="dataset for the loader's row")
    parser.add_argument("--only", nargs="*", default=[], help="names of rows, or beginnings of them")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=0.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.setdefault("WANDB_MODE", "disabled")
    return run_rows(arguments) if arguments.child else supervise(arguments)


if __name__ == "__main__":
    sys.exit(main())
