"""The predictions of a run: one object, written to and read from ``predictions.parquet`` and ``features.npy``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cliplift.configs.sections import ConfigError
from cliplift.sharding.manifest import ManifestError, read_table
from cliplift.sharding.storage import whole_file

if TYPE_CHECKING:
    import pyarrow as pa

PREDICTIONS = "predictions.parquet"
FEATURES = "features.npy"
LOGITS = "logits"  # a column that is there where an evaluation averaged logits
COLUMNS = ("key", "video_id", "shard_url", "sample_index", "label", "predicted", "probabilities")

Scores = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Class probabilities of N samples, averaged over their views, in dataset order.

    The file holds neither ``targets`` nor ``classes``; the class names are in the run's ``result.json``.
    """

    keys: tuple[str, ...]
    video_ids: tuple[str, ...]
    shard_urls: tuple[str, ...]
    sample_index: npt.NDArray[np.int64]  # (N,)
    labels: npt.NDArray[np.int64]  # (N,), -1 where unlabelled
    probabilities: Scores  # (N, K)
    classes: tuple[str, ...] = ()
    targets: Scores | None = None  # (N, K) for multi-label data
    logits: Scores | None = None  # (N, K) means over the views, where logits were averaged
    features: npt.NDArray[np.float16] | None = None  # (N, D) at the classifier's input, means over the views

    @property
    def predicted(self) -> npt.NDArray[np.int64]:
        """(N,) the likeliest class of each sample."""
        return np.asarray(self.probabilities.argmax(axis=1), dtype=np.int64)

    @property
    def labelled(self) -> npt.NDArray[np.bool_]:
        """(N,) whether each sample has a single true class."""
        return self.labels >= 0

    def rows(self, order: npt.NDArray[np.int64]) -> Predictions:
        """The samples of these rows, in this order."""

        def picked(names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(names[row] for row in order)

        return replace(
            self,
            keys=picked(self.keys),
            video_ids=picked(self.video_ids),
            shard_urls=picked(self.shard_urls),
            sample_index=self.sample_index[order],
            labels=self.labels[order],
            probabilities=self.probabilities[order],
            targets=None if self.targets is None else self.targets[order],
            logits=None if self.logits is None else self.logits[order],
            features=None if self.features is None else self.features[order],
        )

    def write(self, path: Path) -> None:
        """One Parquet row for each sample, and the features beside it, where there are any."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table(
            {
                "key": pa.array(self.keys, pa.string()),
                "video_id": pa.array(self.video_ids, pa.string()),
                "shard_url": pa.array(self.shard_urls, pa.string()),
                "sample_index": pa.array(self.sample_index),
                "label": pa.array(self.labels.astype(np.int32)),
                "predicted": pa.array(self.predicted.astype(np.int32)),
                "probabilities": pa.array(list(self.probabilities), pa.list_(pa.float32())),
            }
        )
        if self.logits is not None:
            table = table.append_column(LOGITS, pa.array(list(self.logits), pa.list_(pa.float32())))
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            pq.write_table(table, temporary)
        if self.features is not None:
            with whole_file(path.with_name(FEATURES)) as temporary, temporary.open("wb") as file:
                np.save(file, self.features)


def read_predictions(path: Path) -> Predictions:
    """Read a predictions.parquet, without the features beside it (:func:`read_features`).

    Raises:
        ConfigError: the file is not one, or its rows do not fit together.
    """
    try:
        table = read_table(path.read_bytes(), file=path.name)
    except (ManifestError, OSError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", key="runs", value=str(path)) from None
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise ConfigError(f"{path} lacks the columns {', '.join(missing)}", key="runs", value=str(path))
    _require_types(table, path)
    probabilities = _matrix(table, "probabilities", path)
    logits = _matrix(table, LOGITS, path) if LOGITS in table.column_names else None
    if logits is not None and logits.shape != probabilities.shape:
        raise ConfigError(
            f"{path} has {logits.size} logits for {probabilities.size} probabilities",
            key="runs",
            value=str(path),
        )
    return Predictions(
        keys=tuple(table["key"].to_pylist()),
        video_ids=tuple(table["video_id"].to_pylist()),
        shard_urls=tuple(table["shard_url"].to_pylist()),
        sample_index=table["sample_index"].to_numpy().astype(np.int64),
        labels=table["label"].to_numpy().astype(np.int64),
        probabilities=probabilities,
        logits=logits,
    )


def _require_types(table: pa.Table, path: Path) -> None:
    """Raise ConfigError unless names are text, numbers integers and scores lists of floats, with no cell empty."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for name in [name for name in (*COLUMNS, LOGITS) if name in table.column_names]:
        column = table[name]
        if name in ("probabilities", LOGITS):
            right = pa.types.is_list(column.type) and pa.types.is_floating(column.type.value_type)
            right = right and not pc.list_flatten(column).null_count
        elif name in ("key", "video_id", "shard_url"):
            right = pa.types.is_string(column.type)
        else:
            right = pa.types.is_integer(column.type)
        if not right or column.null_count:
            raise ConfigError(
                f"{path} cannot be read: its column {name!r} is damaged", key="runs", value=str(path)
            )


def _matrix(table: pa.Table, column: str, path: Path) -> Scores:
    """(N, K) from a column of lists, which must be of equal length."""
    import pyarrow.compute as pc

    widths = pc.unique(pc.list_value_length(table[column])).to_pylist()
    if len(widths) > 1:
        raise ConfigError(f"{path} has rows of {sorted(widths)} {column}", key="runs", value=str(path))
    flat: Scores = pc.list_flatten(table[column]).to_numpy().astype(np.float32)
    return flat.reshape(table.num_rows, widths[0] if widths else 0)


def read_features(folder: Path, *, rows: int) -> npt.NDArray[np.floating] | None:
    """A run's features (N, D); None where it has none, or they are of another evaluation.

    Mapped, not read: a header may claim any shape, and a file that is shorter is refused before memory is taken.

    Raises:
        ConfigError: the file is damaged.
    """
    path = folder / FEATURES
    if not path.is_file():
        return None
    try:
        features: npt.NDArray[np.floating] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ConfigError(f"is not a readable .npy file ({error})", file=str(path)) from None
    if features.ndim != 2 or not np.issubdtype(features.dtype, np.floating):
        raise ConfigError(
            f"holds {features.dtype} of shape {features.shape}, not one row of features per clip",
            file=str(path),
        )
    return features if len(features) == rows and rows >= 5 else None
