"""Mutation testing: changes one place of a module at a time, and asks the module's tests whether they notice.

    python tests/mutation/run.py [--mutants 40|all] [--modules order,metrics] [--folder build/mutants] [--report]

``modules.toml`` names the modules and their tests, ``equivalent.toml`` the mutants that no test could kill, with the
reason. The checkout is left alone: everything happens in a copy below the folder. Results are kept there, one line a
mutant, so that a run goes on where the last one stopped; one is used again while the module is as it was, a survivor
only while its tests are too.

A mutant is killed when its tests fail, cannot be collected, or take ten times the processor time they take without a
change ("timeout"). See docs/testing.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[0] = str(HERE)

from mutations import difference, mutants_of, mutated, sample  # noqa: E402
from report import summary  # noqa: E402

Outcome = Literal["killed", "timeout", "survived"]
GIB = 2**30
PYTEST = ("-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", "--tb=short")


@dataclass(frozen=True)
class Module:
    """A module under test, and the tests that are about it."""

    name: str
    file: Path
    tests: tuple[str, ...]

    def source_digest(self) -> str:
        return _digest((ROOT / self.file).read_bytes())

    def tests_digest(self) -> str:
        return _digest(b"\0".join((ROOT / test).read_bytes() for test in self.tests))


@dataclass(frozen=True)
class Result:
    """What became of one mutant."""

    module: str
    mutant: str
    file: str
    line: int
    outcome: Outcome
    seconds: float
    diff: str
    source: str  # digests of the module and of its tests
    tests: str


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def modules() -> dict[str, Module]:
    """The modules of modules.toml."""
    table = tomllib.loads((HERE / "modules.toml").read_text(encoding="utf-8"))
    return {name: Module(name, Path(row["file"]), tuple(row["tests"])) for name, row in table.items()}


class Copy:
    """A copy of the working tree in which one module may be changed, and tests run against it."""

    def __init__(self, module: Module, folder: Path) -> None:
        self.module, self.folder, self.tree = module, folder, folder / "tree"
        shutil.rmtree(folder, ignore_errors=True)
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, check=True, text=True,
        ).stdout.split("\0")  # fmt: skip
        for name in filter(None, listed):
            if (ROOT / name).is_file():
                (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.tree / name)
        (folder / "site").mkdir()
        (folder / "site" / "cliplift").symlink_to("../tree")
        shared = ROOT.parent / "shared"
        if shared.is_dir():
            (folder / "shared").symlink_to(shared)

    def write(self, code: str) -> None:
        """Give the module another text."""
        path = self.tree / self.module.file
        path.write_text(code, encoding="utf-8")
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            compiled.unlink()  # one of the same second and size would be taken for up to date

    def run_tests(self, *, cpu_seconds: float, wall_seconds: float, keep_compiled: bool) -> tuple[int, float]:
        """Exit status of pytest (negative: ended by that signal), and the processor seconds it took.

        In a fork of this process, where the libraries are already imported: a new one would spend most of its time
        on that.
        """
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        child = os.fork()
        if child == 0:
            self._become_pytest(cpu_seconds, keep_compiled)
        status = _wait(child, wall_seconds)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return status, spent

    def _become_pytest(self, cpu_seconds: float, keep_compiled: bool) -> None:
        os.setsid()
        log = os.open(self.folder / "pytest.log", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        resource.setrlimit(resource.RLIMIT_CPU, (int(cpu_seconds) + 1, int(cpu_seconds) + 5))
        resource.setrlimit(resource.RLIMIT_DATA, (8 * GIB, 8 * GIB))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.chdir(self.tree)
        site = str(self.folder / "site")
        sys.path[0] = site
        os.environ["PYTHONPATH"] = site
        sys.dont_write_bytecode = not keep_compiled
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        status = 3
        try:
            import hypothesis
            import pytest

            # The same examples for every mutant, and none made simpler: that a test fails is all that counts.
            phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
            hypothesis.settings.register_profile(
                "mutants", phases=phases, derandomize=True, database=None, deadline=None
            )
            os.environ["HYPOTHESIS_PROFILE"] = "mutants"  # tests/conftest.py loads it
            status = int(pytest.main([*PYTEST, f"--basetemp={self.folder / 'tmp'}", *self.module.tests]))
        finally:
            sys.stdout.flush()
            os._exit(status)


def _wait(child: int, seconds: float) -> int:
    """Wait for a child, at most that long, and end what it has started; its status as ``Popen.returncode``."""
    until = time.monotonic() + seconds
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        if time.monotonic() > until:
            os.killpg(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            return -signal.SIGXCPU
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # processes its tests have left
    return os.waitstatus_to_exitcode(status)


def outcome_of(status: int) -> Outcome:
    """What an exit status of pytest says of a mutant."""
    if status == 0:
        return "survived"
    if status in (-signal.SIGXCPU, -signal.SIGKILL):
        return "timeout"
    return "killed"  # 1: a test failed; 2 and 4: the tests or their conftest cannot be imported; -n: a crash


def recorded(folder: Path, module: Module) -> dict[str, Result]:
    """Results of earlier runs that still hold."""
    path = folder / f"{module.name}.jsonl"
    found: dict[str, Result] = {}
    source, tests = module.source_digest(), module.tests_digest()
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            result = Result(**json.loads(line))
        except (ValueError, TypeError):  # the line a killed run was writing
            continue
        if result.source == source and (result.outcome != "survived" or result.tests == tests):
            found[result.mutant] = result
        else:
            found.pop(result.mutant, None)
    return found


def run_module(module: Module, folder: Path, number: int | None) -> None:
    """Test the module's sample of mutants, those without a result only."""
    source = (ROOT / module.file).read_text(encoding="utf-8")
    everything = mutants_of(source)
    wanted = sample(everything, len(everything) if number is None else number, seed=module.file.as_posix())
    (folder / f"{module.name}.sample.json").write_text(
        json.dumps({"all": len(everything), "sample": [mutant.name for mutant in wanted]})
    )
    known = recorded(folder, module)
    todo = [mutant for mutant in wanted if mutant.name not in known]
    print(
        f"{module.name}: {len(everything)} mutants, {len(wanted)} in the sample, {len(todo)} to test",
        flush=True,
    )
    if not todo:
        return
    # What is tested is the copy, whatever becomes of the checkout meanwhile.
    digests = {"source": module.source_digest(), "tests": module.tests_digest()}
    copy = Copy(module, folder / module.name)
    status, unchanged = copy.run_tests(cpu_seconds=3600, wall_seconds=3600, keep_compiled=True)
    if status != 0:
        raise SystemExit(f"{module.name}: its tests fail without a change; see {copy.folder / 'pytest.log'}")
    limit = 10 + 10 * unchanged
    with (folder / f"{module.name}.jsonl").open("a", encoding="utf-8") as file:
        for mutant in todo:
            code = mutated(source, mutant)
            assert code is not None
            copy.write(code)
            status, seconds = copy.run_tests(
                cpu_seconds=limit, wall_seconds=60 + 6 * limit, keep_compiled=False
            )
            result = Result(
                module=module.name,
                mutant=mutant.name,
                file=module.file.as_posix(),
                line=mutant.line,
                outcome=outcome_of(status),
                seconds=round(seconds, 2),
                diff=difference(source, code, module.file),
                **digests,
            )
            file.write(json.dumps(dataclasses.asdict(result)) + "\n")
            file.flush()
            if result.outcome == "survived":
                print(result.diff.split("\n", 2)[2], flush=True)
    shutil.rmtree(copy.folder)


def import_libraries() -> None:
    """Import what the tests import, once for all forks; of cliplift itself nothing."""
    import deepspeed  # noqa: F401
    import hypothesis  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import pydantic  # noqa: F401
    import pytest  # noqa: F401
    import sklearn.metrics  # noqa: F401
    import torch

    torch.set_num_threads(1)
    assert not [name for name in sys.modules if name.split(".")[0] == "cliplift"], (
        "cliplift must not be imported"
    )


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--mutants", default="40", help="how many of each module, or 'all' (default: 40)")
    parser.add_argument("--modules", default="", help="names of modules.toml with commas (default: all)")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "mutants", help="results and copies")
    parser.add_argument("--report", action="store_true", help="only show the results there are")
    return parser.parse_args(argv)


def main() -> None:
    options = arguments()
    known = modules()
    names = options.modules.split(",") if options.modules else list(known)
    if unknown := sorted(set(names) - set(known)):
        raise SystemExit(f"--modules: no {', '.join(unknown)} in modules.toml, which has {', '.join(known)}")
    number = None if options.mutants == "all" else int(options.mutants)
    options.folder.mkdir(parents=True, exist_ok=True)
    if not options.report:
        os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "WANDB_MODE": "offline"}
        import_libraries()
        for name in names:
            run_module(known[name], options.folder.resolve(), number)
    text = summary({name: recorded(options.folder, known[name]) for name in names}, options.folder, HERE)
    (options.folder / "report.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
