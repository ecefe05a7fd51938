"""Ranks that share every clip: they compute what one rank computes alone and keep less of it, runs go on with another
number of them, and what cannot be shared is refused before anything is computed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cliplift.configs.load import load_run
from cliplift.configs.runs import RUNS
from cliplift.configs.sections import ConfigError
from cliplift.models.video_vit.blocks import deal, own_run
from cliplift.pipelines.cost.memory_plan import plan_memory
from cliplift.pipelines.engine.deepspeed_setup import batch_split, deepspeed_config
from cliplift.pipelines.stages.run import check_model

WORKER = Path(__file__).with_name("sequence_worker.py")
CASES = ("pooled", "trilinear", "rope", "attentive", "levels", "recomputed")
# Length of the difference over the length of the expected tensor. With rotary positions the last norm's bias, a sum of
# many terms that nearly cancel, is rounded by 1.2e-6 in fp32; that nothing but rounding differs is shown in fp64.
TOLERANCE = {"float32": 1e-6, "float64": 1e-14}
COMPARED = [("float64", case) for case in CASES]
COMPARED += [("float32", case) for case in ("pooled", "trilinear", "attentive", "recomputed")]
STEPS, EVERY = 6, 2
MODEL = {"name": "video_vit_tiny_8", "options": {"patch": 8, "width": 48, "depth": 2, "heads": 4, "hidden": 96,
                                                 "drop_path": 0.4}}  # fmt: skip


def words(*more: str, model: object = MODEL) -> list[str]:
    return [
        "data.shards=unused", "track.wandb=disabled", "data.sampling.frames=6", "data.sampling.stride=1",
        "data.crop_pixels=24", "data.resize_short_side_pixels=28", f"model={json.dumps(model)}",
        "engine.global_batch=4", "engine.device=cpu", "engine.channels_last=false", "optim.name=adamw",
        "optim.lr=0.01", "optim.clip_grad_norm=1", "evaluation.every_steps=null", f"schedule.steps={STEPS}",
        "track.every_steps=1", f"checkpoint.every_steps={EVERY}", f"checkpoint.keep_last={STEPS}", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def recipe(repository: Path) -> Path:
    return repository / "configs" / "pretrain" / "demo.yaml"


@pytest.fixture(scope="module")
def worker(load_module: Callable[[Path], ModuleType]) -> ModuleType:
    return load_module(WORKER)


def work(jobs: list[dict[str, Any]]) -> None:
    done = subprocess.run(
        [sys.executable, str(WORKER), json.dumps(jobs)],
        capture_output=True, text=True, check=False, timeout=280, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What groups of two and of four ranks found."""
    folder = tmp_path_factory.mktemp("shared")
    work([{"ranks": 4, "cases": str(folder)}])
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, place: Path, recipe: Path) -> Path:
    """A run of one rank, and runs that go on from its checkpoints, and from theirs."""
    folder = tmp_path_factory.mktemp("runs")

    def run(output: str, ranks: int, stage: int, after: tuple[str, int] | None = None) -> dict[str, Any]:
        engine = [f"engine.sequence_parallel={ranks}", f"engine.zero_stage={stage}"]
        more = [f"data.shards={place}/shards/actions", f"output={folder}/{output}", *engine]
        job: dict[str, Any] = {"ranks": ranks, "recipe": str(recipe), "words": words(*more)}
        if after is not None:
            name = f"checkpoints/step_{after[1]:08d}"
            job["copy"] = [f"{folder}/{after[0]}/{name}", f"{folder}/{output}/{name}"]
        return job

    jobs = [run("one", 1, 1), *(run(f"two{stage}", 2, stage, after=("one", 2)) for stage in range(4))]
    work([*jobs, run("four", 4, 2, after=("two3", 4)), run("again", 1, 0, after=("two2", 4))])
    return folder


def alone(worker: ModuleType, case: str, *, data_ranks: int, dtype: str) -> dict[str, Tensor]:
    """Means over ranks that do not share, one after the other; their equal parts keep equally many bytes."""
    found: list[dict[str, Tensor]] = []
    for data_rank in range(data_ranks):
        network = worker.network_of(case, worker.DTYPES[dtype])
        found.append(worker.computed(network, data_rank=data_rank, data_ranks=data_ranks))
    return {name: torch.stack([one[name] for one in found]).mean(dim=0) for name in found[0]}


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("dtype", "case"), COMPARED)
def test_loss_and_gradients_are_those_of_one_rank(
    shared: Path, worker: ModuleType, dtype: str, case: str, size: int
) -> None:
    """And what a rank keeps for the backward pass is its share of it, and little more."""
    expected = alone(worker, case, data_ranks=4 // size, dtype=dtype)
    everything = load_file(shared / f"{size}-{dtype}.safetensors")
    found = {n.removeprefix(f"{case}: "): t for n, t in everything.items() if n.startswith(f"{case}: ")}
    assert found.keys() == expected.keys()
    kept = float(found.pop("bytes") / expected.pop("bytes"))
    wrong = {n: float((found[n] - t).norm() / t.norm()) for n, t in expected.items()}
    worst = max(wrong, key=lambda name: wrong[name])
    print(f"{case}, {dtype}, groups of {size}: {worst} {wrong[worst]:.1e}, {kept:.3f} of the bytes")
    assert wrong[worst] <= TOLERANCE[dtype], worst
    assert kept <= {2: 0.6, 4: 0.32}[size]


def logged(folder: Path, name: str) -> list[float]:
    """Of every step: its loss, or the norm of its gradient."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[f"train/{name}"] for row in rows if f"train/{name}" in row]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "after"), [("two0", 2), ("two1", 2), ("two2", 2), ("two3", 2), ("four", 4), ("again", 4)]
)
def test_a_run_goes_on_with_another_number_of_ranks_for_a_clip(runs: Path, run: str, after: int) -> None:
    """One rank, then two at every ZeRO stage, then four, or one again; half of the residuals are dropped."""
    unbroken, found = logged(runs / "one", "loss"), logged(runs / run, "loss")
    assert len(unbroken) == STEPS
    assert found == pytest.approx(unbroken[after:], abs=2e-6)
    # AdamW would not mind gradients of another scale.
    norms = logged(runs / "one", "grad_norm")[after:]
    assert logged(runs / run, "grad_norm") == pytest.approx(norms, rel=1e-5)
    print(run, found, [a - b for a, b in zip(found, unbroken[after:], strict=True)])


def run_of(recipe: Path, *more: str, model: object = MODEL) -> Any:
    return load_run(recipe, RUNS, words(*more, model=model)).run


def test_tokens_are_dealt_evenly_and_all_of_them() -> None:
    assert deal(27, 4) == (7, 7, 7, 6)
    assert deal(8, 4) == (2, 2, 2, 2)
    numbers = list(range(27))
    assert [n for rank in range(4) for n in numbers[own_run(deal(27, 4), rank)]] == numbers


def test_a_group_counts_as_one_rank_when_clips_are_dealt(recipe: Path) -> None:
    run = run_of(recipe, "engine.global_batch=12", "engine.micro_batch=3", "engine.sequence_parallel=2")
    assert batch_split(run, world_size=4) == (3, 2)  # 2 groups x 3 clips x 2 times
    # DeepSpeed insists on clips of a rank x times x ranks
    config = deepspeed_config(run, world_size=4)
    assert config["train_batch_size"] == 3 * 2 * 4
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (3, 2)


OTHER_VIT = {"name": "video_vit_tiny_8", "options": {"width": 48, "depth": 2, "heads": 3, "hidden": 96}}
ATTENTIVE = {"name": "vjepa2_large_16", "options": MODEL["options"] | {"probe_heads": 6, "drop_path": 0}}  # type: ignore[operator]
DROPPED = {"name": "vjepa2_large_16", "options": MODEL["options"] | {"probe_heads": 4, "dropout": 0.5}}  # type: ignore[operator]


@pytest.mark.parametrize(
    ("more", "model", "said"),
    [
        ([], OTHER_VIT, "2 ranks cannot share 3 heads of .* tokens evenly: possible are 1, 3"),
        (["engine.sequence_parallel=4"], ATTENTIVE, "4 ranks cannot share 2 heads .* possible are 1, 2"),
        ([], DROPPED, "use dropout=0"),
        ([], {"name": "t3d_tiny"}, "T3D keeps every clip on one rank"),
        (["objective=masked", "label_smoothing=0"], MODEL, "this objective keeps every clip on one rank"),
    ],
    ids=["heads", "heads of the probe", "dropout of tokens", "network", "objective"],
)
def test_what_cannot_be_shared_is_refused_before_anything_is_computed(
    recipe: Path, more: list[str], model: object, said: str
) -> None:
    run = run_of(recipe, "engine.sequence_parallel=2", *more, model=model)
    for refused in (check_model, lambda run: plan_memory(run, classes=5, world_size=4, on_gpu=False)):
        with pytest.raises(ConfigError, match=said) as caught:
            refused(run)
        assert caught.value.key == "engine.sequence_parallel"


@pytest.mark.parametrize(
    ("more", "key", "said"),
    [
        (["engine.global_batch=6"], "engine.global_batch", "6 clips .* 4 groups of 2 ranks"),
        (
            ["engine.sequence_parallel=3"],
            "engine.sequence_parallel",
            r"8 ranks .* groups of 3.*\[1, 2, 4, 8\]",
        ),
    ],
)
def test_ranks_and_clips_that_do_not_divide_are_refused(
    recipe: Path, more: list[str], key: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        batch_split(run_of(recipe, "engine.sequence_parallel=2", *more), world_size=8)
    assert caught.value.key == key


def test_what_torch_or_deepspeed_would_do_another_way_is_refused(recipe: Path) -> None:
    with pytest.raises(ConfigError, match="compile"):
        run_of(recipe, "engine.sequence_parallel=2", "engine.compile=true")
    with pytest.raises(ConfigError, match="set 'sequence_parallel' instead"):
        run_of(recipe, "engine.deepspeed={sequence_parallel_size: 2}")


def test_the_memory_plan_counts_a_share_of_the_tokens(recipe: Path) -> None:
    """A block keeps, in widths of a token: its input, a norm, queries, keys, values and the attention's output, its
    sum, a norm, and twice the MLP's hidden layer; and with shared clips the output once more, as it was attended."""
    options = {"patch": 8, "width": 48, "depth": 2, "heads": 4, "hidden": 192}
    model = {"name": "video_vit_tiny_8", "options": options}
    plans = {
        size: plan_memory(
            run_of(recipe, f"engine.sequence_parallel={size}", "data.crop_pixels=64", "data.sampling.frames=16",
                   "data.resize_short_side_pixels=64", "engine.zero_stage=1", model=model),
            classes=5, world_size=size, on_gpu=False,
        )[0]
        for size in (1, 2, 4)
    }  # fmt: skip
    one = 4 * (16 // 2) * (64 // 8) ** 2 * 48 * 4  # bytes of the clips' tokens
    assert plans[1].saved_activations == pytest.approx(2 * 16 * one, rel=0.03)
    for size in (2, 4):
        assert plans[size].saved_activations == pytest.approx(2 * 17 * one / size, rel=0.03)
    assert plans[2].backward < 0.65 * plans[1].backward
