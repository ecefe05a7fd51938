"""The frozen 2D networks that teach, one, or several whose features stand side by side; and what is computed of them
once for a run, kept in its folder and mapped into memory by all processes of a host.

* the features of every training sample (``teacher.cache_features``), or of some of them
* their mean and deviation, by which features are standardised where they are predicted
* the bank: all of them standardised, which a clip is told from
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cliplift.configs.data import DataConfig, ViewsConfig
from cliplift.configs.sections import ConfigError
from cliplift.configs.supervision import ImageTeacher, TeacherConfig
from cliplift.models import create_model
from cliplift.models.protocol import InputSpec, VideoNetwork
from cliplift.models.registry import model_entry
from cliplift.pipelines.data.batch import ClipBatch
from cliplift.pipelines.data.eval_loader import EvalLoader
from cliplift.pipelines.distributed.collectives import (
    Topology,
    all_reduce_max,
    barrier,
    broadcast_object,
    gather_objects,
)
from cliplift.pipelines.evaluation.over_split import over_split

FEATURES, SAMPLED = "teacher_features.safetensors", "teacher_sample.safetensors"
STATISTICS, BANK = "teacher_statistics.safetensors", "teacher_bank.safetensors"
STUDENT_START, PREDICTOR_START = "student_start.safetensors", "predictor_start.safetensors"
ROWS_AT_ONCE = 8192  # of a table: a fixed number, so that sums do not depend on the machine's memory
SMALLEST_DEVIATION = 0.01  # of the mean one: a channel that hardly ever answers would be all noise


class Teachers(nn.Module):
    """One or several 2D networks on the same frames, each at a size and with pixel statistics of its own.

    ``feature_dims`` are the widths of their features, ``input_spec`` the one by which the frames are normalised: the
    first network's.
    """

    def __init__(self, networks: list[VideoNetwork], sides: list[int | None]) -> None:
        super().__init__()
        self.networks, self.sides = nn.ModuleList(networks), sides
        self.feature_dims = tuple(network.feature_dim for network in networks)
        self.feature_dim = sum(self.feature_dims)
        self.specs = [network.input_spec for network in networks]
        self.input_spec = self.specs[0]

    def forward(self, frames: Tensor) -> Tensor:
        """(B, C, H, W), normalised for the first network -> (B, D), the features of all, one after the other.

        In the precision of each network's features; they are concatenated in fp32.
        """
        found = []
        for network, side, spec in zip(self.networks, self.sides, self.specs, strict=True):
            found.append(network(renormalised(resized(frames, side), self.input_spec, spec)).float())
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def resized(frames: Tensor, side: int | None) -> Tensor:
    """(B, C, H, W) -> (B, C, side, side); as they are where the side is theirs, or None."""
    height = frames.shape[2]
    if side is None or side == height:
        return frames
    return F.interpolate(
        frames, size=(side, side), mode="bilinear", antialias=side < height, align_corners=False
    )


def renormalised(frames: Tensor, made: InputSpec, wanted: InputSpec) -> Tensor:
    """Frames (B, C, H, W) with another mean and deviation of the pixels in [0, 1]."""
    if (made.mean, made.std) == (wanted.mean, wanted.std):
        return frames
    old_mean, old_std, mean, std = (
        frames.new_tensor(values)[:, None, None] for values in (made.mean, made.std, wanted.mean, wanted.std)
    )
    return (frames * old_std + old_mean - mean) / std


def build_teachers(config: TeacherConfig, *, weights: bool) -> Teachers:
    """The frozen teachers of a run, in eval mode for good (BatchNorm statistics included).

    Args:
        config: of the teacher, and of those beside it.
        weights: load their weights; otherwise random ones, where only shapes are wanted.

    Raises:
        ConfigError: a teacher is not a 2D model.
    """
    networks = [_network(teacher, key=key, weights=weights) for key, teacher in config.by_key().items()]
    teachers = Teachers(networks, [teacher.resize_pixels for teacher in config.by_key().values()])
    return teachers.eval().requires_grad_(False)


def _network(teacher: ImageTeacher, *, key: str, weights: bool) -> VideoNetwork:
    if model_entry(teacher.name).dims != "2d":
        raise ConfigError(
            "is not a 2D model",
            key=f"{key}.name",
            value=teacher.name,
            hint="the teacher sees single frames; `cliplift models` shows which models are 2D",
        )
    return create_model(
        teacher.name,
        num_classes=0,
        in_frames=None,
        pretrained=teacher.pretrained if weights else None,
        **teacher.options,
    )


@torch.no_grad()
def cached_features(
    features: Callable[[ClipBatch], Tensor],
    data: DataConfig,
    *,
    batch: int,
    folder: Path,
    identity: str,
    topology: Topology,
    max_samples: int | None = None,
    file: str | None = None,
) -> Tensor:
    """(N, D) in fp16, row i for sample i of the training split: one file, mapped into memory on every rank.

    A clip's row depends on that clip alone, not on those it is batched with, so it is the same to the last bit on any
    number of ranks.

    Args:
        features: (1, D) of one plain middle clip.
        data: the run's data; its training split is passed over once, each rank reading its share.
        batch: clips read at a time.
        folder: where the file is kept and, on a restart, found.
        identity: what the features depend on besides the data; a file of another identity is made again.
        topology: the ranks.
        max_samples: of so many samples only, chosen once for all; in their order.
        file: its name; None is the teacher's.

    Raises:
        ConfigError: a rank does not see the folder.
    """
    loader = EvalLoader(
        data.model_copy(update={"views": ViewsConfig()}),
        split=data.split,
        batch=batch,
        rank=topology.rank,
        world_size=topology.world_size,
        max_samples=max_samples,
    )
    file = file or (FEATURES if max_samples is None else SAMPLED)
    scratch = (folder / file).with_suffix(".rows")

    def make() -> dict[str, Tensor]:
        found = _features_of_all(features, loader, scratch=scratch, topology=topology)
        return {} if found is None else {"features": found}

    wanted = f"{loader.dataset.fingerprint} {identity} {max_samples or 'all'}"
    kept = kept_tensors(folder / file, wanted, make, topology)["features"]
    scratch.unlink(missing_ok=True)
    return kept


def _features_of_all(
    features: Callable[[ClipBatch], Tensor], loader: EvalLoader, *, scratch: Path, topology: Topology
) -> Tensor | None:
    """The rows of all ranks on the main one, in a file on disk that is mapped; None on the others."""
    table: Tensor | None = None
    seen: set[int] = set()

    def forward(clips: ClipBatch) -> list[None]:
        nonlocal table
        # Clip by clip: in a batch the last bits of a row would depend on its neighbours.
        rows = [features(clips.at(i)).half().cpu()[0] for i in range(len(clips.clips))]
        # After every batch, so that no rank ever holds more than a batch of rows beside the file.
        gathered = gather_objects(
            list(zip(clips.sample_index.tolist(), (r.clone() for r in rows), strict=True)), topology
        )
        if topology.is_main:
            if table is None:
                scratch.parent.mkdir(parents=True, exist_ok=True)
                scratch.unlink(missing_ok=True)
                shape = (len(loader.dataset), rows[0].numel())
                table = torch.from_file(
                    str(scratch), shared=True, size=shape[0] * shape[1], dtype=torch.half
                ).view(shape)
            for sample, row in gathered:
                table[sample] = row
                seen.add(sample)
        return [None] * len(rows)

    over_split(loader, forward, topology)
    return None if table is None else table[sorted(seen)] if len(seen) < len(table) else table


def kept_tensors(
    path: Path, identity: str, make: Callable[[], Mapping[str, Tensor]], topology: Topology
) -> dict[str, Tensor]:
    """The tensors of a file, mapped into memory; made first, by all ranks together, where it is not of this identity.

    What ``make`` gives on the main rank is what is kept.

    Raises:
        ConfigError: a rank does not see the file.
    """
    # The main rank decides whether the file is made, else some ranks would wait in `make` for the others.
    if not broadcast_object(_identity(path) == identity, topology):
        made = dict(make())
        if topology.is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            save_file(made, partial, metadata={"identity": identity})
            partial.replace(path)
        del made  # before it is read again below, or both would be in memory
        barrier(topology)
    if all_reduce_max(float(not path.is_file()), topology):
        raise ConfigError(
            "is not visible to all ranks, and the teacher's features are kept there, once for all of them",
            key="output",
            value=str(path.parent),
            hint="put it on a file system that all machines share, or set teacher.cache_features to false",
        )
    return load_file(path)


def _identity(path: Path) -> str | None:
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("identity")
    except (OSError, SafetensorError):  # none yet, or of a process that was killed
        return None


def cosines(steps: int) -> Tensor:
    """The orthonormal discrete cosine transform (DCT-II) over S parts, (S, S): row 0 is the mean times sqrt(S)."""
    time, frequency = torch.arange(steps).double() + 0.5, torch.arange(steps).double()
    rows: Tensor = torch.cos(math.pi / steps * frequency[:, None] * time) * (2 / steps) ** 0.5
    rows[0] *= 0.5**0.5
    return rows


class Standardisation:
    """Mean 0 and deviation 1 of every channel over the training clips: what the student predicts.

    S parts of a clip share mean and deviation, (D,); with a ``basis`` (S, S) over the parts, each of its coefficients
    has its own, (S, D). With ``spread`` what is standardised is the parts' mean and their deviation over the clip,
    each by itself, (2, D).
    """

    def __init__(
        self, mean: Tensor, deviation: Tensor, *, basis: Tensor | None = None, spread: bool = False
    ) -> None:
        self.mean, self.deviation, self.basis, self.spread = mean, deviation, basis, spread  # fp32

    @classmethod
    def of(
        cls,
        table: Tensor,
        *,
        steps: int,
        folder: Path,
        identity: str,
        topology: Topology,
        basis: Tensor | None = None,
        spread: bool = False,
    ) -> Standardisation:
        """Of a table (N, S D) of features."""
        shared = basis is None and not spread  # by all parts
        over = (0, 1) if shared else (0,)

        def chunks() -> Iterable[Tensor]:
            """(n, S, D), or (n, 2, D) with spread, in double precision."""
            for rows in torch.split(table, ROWS_AT_ONCE):
                yield over_time(torch.unflatten(rows.double(), 1, (steps, -1)), basis, spread=spread)

        def make() -> dict[str, Tensor]:
            rows = len(table) * (steps if shared else 1)
            mean = sum(chunk.sum(dim=over) for chunk in chunks()) / rows
            assert isinstance(mean, Tensor)
            spread = sum((chunk - mean).square().sum(dim=over) for chunk in chunks()) / rows
            assert isinstance(spread, Tensor)
            deviation = spread.sqrt()
            floor = SMALLEST_DEVIATION * deviation.mean(dim=-1, keepdim=True)
            floor = floor.clamp_min(torch.finfo(torch.float32).tiny)
            return {"mean": mean.float(), "deviation": torch.maximum(deviation, floor).float()}

        kept = kept_tensors(folder / STATISTICS, identity, make, topology)
        single = None if basis is None else basis.float()
        return cls(kept["mean"], kept["deviation"], basis=single, spread=spread)

    def to(self, device: torch.device) -> Standardisation:
        """The same on a device."""
        basis = None if self.basis is None else self.basis.to(device)
        return Standardisation(
            self.mean.to(device), self.deviation.to(device), basis=basis, spread=self.spread
        )

    def __call__(self, features: Tensor, *, steps: int) -> Tensor:
        """(B, S D) -> (B, S, D), or (B, 2, D) with spread, in fp32, standardised."""
        parts = torch.unflatten(features.float(), 1, (steps, -1))
        standard: Tensor = (over_time(parts, self.basis, spread=self.spread) - self.mean) / self.deviation
        return standard


def over_time(parts: Tensor, basis: Tensor | None, *, spread: bool) -> Tensor:
    """Features (B, S, D) of the parts: as they are, their coefficients (B, S, D), or mean and deviation (B, 2, D)."""
    if spread:
        return torch.stack([parts.mean(dim=1), parts.std(dim=1, correction=0)], dim=1)
    return parts if basis is None else basis @ parts


@torch.no_grad()
def predictor_start(
    student: Callable[[ClipBatch], Tensor],
    table: Tensor,
    standard: Standardisation,
    data: DataConfig,
    *,
    steps: int,
    penalty: float,
    batch: int,
    folder: Path,
    identity: str,
    topology: Topology,
    max_samples: int | None,
) -> dict[str, Tensor]:
    """``weight`` (S D_t, D) and ``bias`` (S D_t,) of the predictor of the teacher's features, at the start of transfer.

    The ridge regression on the student's features as it is, over the training samples' plain middle clips. Kept in the
    run's folder: the same on any number of ranks, and not computed again when a run goes on.

    Args:
        student: (B, D) of clips.
        table: the teacher's features (N, S D_t) of the same samples.
        standard: makes of them what is predicted.
        steps: S.
        penalty: of :func:`ridge`.
        data, batch, folder, identity, topology, max_samples: as for :func:`cached_features`.
    """

    def make() -> dict[str, Tensor]:
        seen = cached_features(
            student,
            data,
            batch=batch,
            folder=folder,
            identity=identity,
            topology=topology,
            max_samples=max_samples,
            file=STUDENT_START,
        )
        if not topology.is_main:
            return {}
        rows = zip(torch.split(seen, ROWS_AT_ONCE), torch.split(table, ROWS_AT_ONCE), strict=True)
        pairs = ((features, standard(taught, steps=steps).flatten(1)) for features, taught in rows)
        weight, bias = ridge(pairs, penalty=penalty)
        return {"weight": weight.float().contiguous(), "bias": bias.float()}

    return kept_tensors(folder / PREDICTOR_START, identity, make, topology)


def ridge(pairs: Iterable[tuple[Tensor, Tensor]], *, penalty: float) -> tuple[Tensor, Tensor]:
    """Weights (K, D) and bias (K,) of the linear map whose mean |W x + b - t|^2 + penalty * v * |W|^2 is least.

    v is the mean variance of a channel of x, so that the penalty does not depend on the features' scale. In double
    precision and from sums over the rows: memory does not grow with them.

    Args:
        pairs: features x (n, D) and targets t (n, K) of some rows at a time.
        penalty: above 0.
    """
    rows, mean_x, mean_t, square, cross = 0, *torch.zeros(4)
    for features, targets in pairs:
        x, t = features.double(), targets.double()
        rows += len(x)
        mean_x, mean_t = mean_x + x.sum(dim=0), mean_t + t.sum(dim=0)
        square, cross = square + x.T @ x, cross + x.T @ t
    mean_x, mean_t = mean_x / rows, mean_t / rows
    covariance = square / rows - torch.outer(mean_x, mean_x)
    strength = penalty * covariance.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    covariance.diagonal().add_(strength)
    weight = torch.linalg.solve(covariance, cross / rows - torch.outer(mean_x, mean_t)).T
    return weight, mean_t - weight @ mean_x


def bank_of(
    table: Tensor,
    standard: Standardisation,
    *,
    steps: int,
    widths: Sequence[int],
    folder: Path,
    identity: str,
    topology: Topology,
) -> Tensor:
    """(N, S D) in fp16: every clip's standardised features, each part of each teacher of one length, and all together
    of length 1."""

    def make() -> dict[str, Tensor]:
        if not topology.is_main:
            return {}
        bank = torch.empty_like(table)
        for start in range(0, len(table), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            bank[rows] = unit_parts(standard(table[rows], steps=steps), widths).half()
        return {"bank": bank}

    return kept_tensors(folder / BANK, identity, make, topology)["bank"]


def unit_parts(features: Tensor, widths: Sequence[int]) -> Tensor:
    """(B, S, D) -> (B, S D): parts of length 1 / sqrt(S M), so that a product of two is the mean cosine of the parts.

    M teachers' features of the widths given stand side by side in D.
    """
    shared: float = (features.shape[1] * len(widths)) ** -0.5
    parts = [F.normalize(part, dim=-1) * shared for part in torch.split(features, list(widths), dim=-1)]
    return torch.cat(parts, dim=-1).flatten(1)
