"""How ranks compare what they run: all of them over one store, as threads, and each answer by hand."""

from __future__ import annotations

import hashlib
import platform
import threading
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pydantic import Field

from cliplift.configs.sections import ConfigError, Section
from cliplift.pipelines.distributed import agreement
from cliplift.pipelines.distributed.agreement import PACKAGES, Facts
from cliplift.pipelines.distributed.collectives import Topology

CPU = torch.device("cpu")


def topology(rank: int, world: int) -> Topology:
    return Topology(rank=rank, world_size=world, local_rank=rank, device=CPU)


@pytest.fixture
def shared_store(monkeypatch: pytest.MonkeyPatch) -> dist.HashStore:
    store = dist.HashStore()
    monkeypatch.setattr(agreement, "_store", lambda: store)
    return store


def side_by_side(
    world: int, action: Callable[[Topology], object], *, but: tuple[int, ...] = ()
) -> dict[int, object]:
    """What each rank's action returns or raises."""
    found: dict[int, object] = {}

    def run(rank: int) -> None:
        try:
            found[rank] = action(topology(rank, world))
        except (ConfigError, ValueError, OSError) as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world) if rank not in but]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(found) == world - len(but), "a rank waits for ever"
    return found


def test_ranks_that_run_the_same_go_on(shared_store: dist.HashStore) -> None:
    found = side_by_side(3, lambda place: agreement.agree({"seed": "0"}, place, seconds=20))
    assert found == {0: None, 1: None, 2: None}


def test_every_rank_hears_of_the_first_difference(
    shared_store: dist.HashStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement.socket, "gethostname", lambda: "node")  # type: ignore[attr-defined]
    found = side_by_side(
        4,
        lambda place: agreement.agree(
            {"a": "x", "seed": "17" if place.rank >= 2 else "0"}, place, seconds=20
        ),
    )
    for rank in range(4):
        error = found[rank]
        assert isinstance(error, ConfigError)
        assert "seed: rank 2 on node has 17 and rank 0 on node has 0" in str(error)
        assert (error.key, error.value) == ("seed", "17")
        assert str(error).startswith("ranks disagree")
        assert "start all ranks with the same command, code and data" in str(error)


def test_a_silent_rank_is_named_to_all_others(shared_store: dist.HashStore) -> None:
    found = side_by_side(4, lambda place: agreement.agree({}, place, seconds=1), but=(1, 3))
    for rank in (0, 2):
        assert "rank 1, 3 of 4 has not answered after 1 s; look at its log" in str(found[rank])


def test_a_difference_counts_more_than_a_silent_rank(shared_store: dist.HashStore) -> None:
    found = side_by_side(
        3, lambda place: agreement.agree({"seed": str(place.rank)}, place, seconds=1), but=(2,)
    )
    for rank in (0, 1):
        assert "seed: rank 1 on" in str(found[rank])


def test_a_silent_rank_0_is_named(shared_store: dist.HashStore) -> None:
    found = side_by_side(2, lambda place: agreement.agree({}, place, seconds=0.2), but=(0,))
    assert str(found[1]) == "ranks disagree: rank 0 has not answered after 0 s; look at its log"


def test_rank_0_stays_until_the_others_have_read_why(
    shared_store: dist.HashStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store may live in its process. Ranks that are missing are not waited for as long."""
    waited: dict[str, float] = {}
    wait = agreement._wait

    def noted(store: dist.Store, key: str, seconds: float) -> bool:
        if key.startswith("seen/"):
            waited[key] = seconds
        return wait(store, key, seconds)

    monkeypatch.setattr(agreement, "_wait", noted)
    side_by_side(3, lambda place: agreement.agree({}, place, seconds=0.5), but=(2,))
    assert waited == {"seen/0": 10.0, "seen/1": 10.0, "seen/2": 0.2}


@pytest.mark.parametrize(
    ("call", "seconds"),
    [
        (lambda place: agreement.agree({}, place), 60),
        (lambda place: agreement.agreed_data(lambda: "a", str, place), 300),
    ],
)
def test_a_rank_has_a_minute_to_answer_and_five_where_data_is_opened(
    shared_store: dist.HashStore,
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[[Topology], object],
    seconds: float,
) -> None:
    """The verdict may take rank 0 as long once more, as it waits for the others."""
    waited: dict[str, float] = {}
    monkeypatch.setattr(agreement, "difference", lambda *_, **__: None)
    monkeypatch.setattr(agreement, "_wait", lambda _, key, limit: bool(waited.setdefault(key, limit)))
    shared_store.set("facts", "{}")
    shared_store.set("outcome", "null")
    call(topology(1, 2))
    assert waited == {"facts": seconds, "outcome": 2 * seconds}


def test_each_comparison_has_keys_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over one store, what an earlier comparison left is not taken for an answer."""
    store = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    first, second = agreement._store(), agreement._store()
    first.set("facts", "old")
    assert not agreement._wait(second, "facts", 0.1)
    assert agreement._wait(first, "facts", 0.1)
    assert agreement._wait(first, "facts", -1.0), "also where no time is left"


def test_the_whole_run_is_compared_among_several_ranks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Run(Section):
        seed: int = 3

    seen: list[tuple[dict[str, str], Topology]] = []
    monkeypatch.setattr(agreement, "agree", lambda facts, place: seen.append((facts, place)))
    agreement.agree_on_run(Run(), topology(0, 1))
    assert seen == []
    agreement.agree_on_run(Run(), topology(1, 2))
    ((facts, place),) = seen
    assert place.rank == 1
    assert facts == {
        "seed": "3",
        "device": "cpu",
        "cliplift's code": agreement.code_digest(),
        "torch version": torch.__version__,
        "deepspeed version": metadata.version("deepspeed"),
        "python version": ".".join(platform.python_version().split(".")[:2]),
    }


def opened_by(place: Topology) -> object:
    """Rank 1 sees another file; rank 2 none."""
    if place.rank == 2:
        raise FileNotFoundError("no such dataset")
    return "b" if place.rank == 1 else "a"


def test_data_is_opened_by_every_rank_and_compared(shared_store: dist.HashStore) -> None:
    found = side_by_side(2, lambda place: agreement.agreed_data(lambda: "a", lambda data: data * 2, place))
    assert found == {0: "a", 1: "a"}
    assert agreement.agreed_data(lambda: "x", lambda _: 1 / 0, topology(0, 1)) == "x", (
        "a rank alone compares nothing"
    )


@pytest.mark.parametrize(("world", "said"), [(2, "data: rank 1 on"), (3, "data: rank 1 on")])
def test_other_data_stops_all(shared_store: dist.HashStore, world: int, said: str) -> None:
    found = side_by_side(world, lambda place: agreement.agreed_data(lambda: opened_by(place), str, place))
    assert all(said in str(error) and "has b and rank 0" in str(error) for error in found.values())


def test_a_rank_without_data_is_told_with_its_reason(shared_store: dist.HashStore) -> None:
    found = side_by_side(
        2, lambda place: agreement.agreed_data(lambda: opened_by(topology(2 * place.rank, 3)), str, place)
    )
    for rank in (0, 1):
        assert "has unreadable: no such dataset and rank 0" in str(found[rank])
    assert isinstance(found[1], ConfigError)
    assert isinstance(found[1].__cause__, FileNotFoundError)


def test_where_no_rank_can_read_the_error_is_the_file_systems_own(shared_store: dist.HashStore) -> None:
    found = side_by_side(
        2, lambda place: agreement.agreed_data(lambda: opened_by(topology(2, 3)), str, place)
    )
    assert all(isinstance(error, FileNotFoundError) for error in found.values())


def test_the_first_fact_that_differs_is_named() -> None:
    """In the order of rank 0's facts; those that rank 0 does not have come last."""
    first: Facts = {"host": "a", "facts": {"x": "1", "y": "2"}}
    other: Facts = {"host": "b", "facts": {"z": "9", "y": "3", "x": "1"}}
    found = agreement.difference(first, other, rank=1)
    assert found is not None
    assert (found["key"], found["value"]) == ("y", "3")
    only: Facts = {"host": "b", "facts": {"z": "9", "y": "2", "x": "1"}}
    found = agreement.difference(first, only, rank=1)
    assert found is not None
    assert (found["key"], found["value"]) == ("z", "9")
    assert found["reason"] == "rank 1 on b has 9 and rank 0 on a has (not set)"


def test_a_run_is_flat_facts_by_dotted_key() -> None:
    class Data(Section):
        cache_folder: str = "/scratch"
        sizes: tuple[int, ...] = (1, 2)
        more: dict[str, int] = Field(default_factory=dict)

    class Run(Section):
        cache_folder: str = "kept here"
        data: Data = Data()

    assert agreement.run_facts(Run()) == {
        "cache_folder": "'kept here'", "data.sizes": "[1, 2]", "data.more": "{}"
    }  # fmt: skip


def test_the_code_is_every_python_file_at_any_depth(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no source files below"):
        agreement.source_files(tmp_path)
    names = ["configs/a.py", "models/b.py", "models/deep/er/c.py", "pipelines/d.py"]
    for name in [*names, "configs/notes.txt", "tests/e.py"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [p.relative_to(tmp_path).as_posix() for p in agreement.source_files(tmp_path)] == names
    text = b"".join(f"{name}\0{name}".encode() for name in names)
    assert agreement.code_digest(tmp_path) == hashlib.sha256(text).hexdigest()[:12]


def test_the_package_that_is_running_is_what_is_digested(repository: Path) -> None:
    files = {p.relative_to(agreement.ROOT).as_posix() for p in agreement.source_files()}
    assert files == {
        p.relative_to(repository).as_posix() for name in PACKAGES for p in (repository / name).rglob("*.py")
    }
