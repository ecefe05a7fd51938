"""Starts groups of training ranks out of one process that has torch and DeepSpeed imported already.

Not a test itself. Importing takes each rank of an ordinary launch several seconds, and the stop matrix is many hundred
ranks; a fork has it all. Each rank is a process of its own, meets the others at a port of the group's own, and can be
killed as any other. Reads a line of JSON for each group, ``{"ranks": 2, "results": FILE, "cases": [...]}``, as
training_worker.py takes them; answers with the processes, and with how they ended when all have.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401 (what takes long)
import training_worker as worker  # beside this file


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def fork_rank(rank: int, port: int, group: dict[str, Any]) -> int:
    """One rank's process; what it says goes beside the results."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        said = os.open(
            Path(group["results"]).with_suffix(f".rank{rank}.txt"),
            os.O_CREAT | os.O_WRONLY | os.O_TRUNC,
            0o644,
        )
        for stream in (1, 2):
            os.dup2(said, stream)
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": group["ranks"], "MASTER_PORT": port}
        os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in places.items()}
        worker.main(Path(group["results"]), group["cases"])
        code = 0
    except BaseException:  # the process ends here, whatever it was
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")  # the ranks' words must not come between them
    for line in sys.stdin:
        group, port = json.loads(line), free_port()
        ranks = [fork_rank(rank, port, group) for rank in range(group["ranks"])]
        print(json.dumps(ranks), file=answers, flush=True)
        codes = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
        print(json.dumps(codes), file=answers, flush=True)
