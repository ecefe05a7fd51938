"""Models made, saved, published and read back: ``create_model``, export folders, the Hub.

An export folder is ``model.safetensors`` (or several files and their index) + ``config.json``. Nothing read here is
executed: safetensors, JSON, and ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from torch import Tensor, nn

from cliplift.models.inflate import inflate
from cliplift.models.protocol import ModelError, VideoModel, VideoNetwork
from cliplift.models.registry import model_entry, model_options
from cliplift.models.state_dicts import (
    CONFIG,
    FORMAT,
    LoadReport,
    head_prefix,
    load_state,
    read_state,
)
from cliplift.models.weight_files import (
    INDEX,
    MAX_FILE_BYTES,
    WEIGHTS,
    TensorToWrite,
    read_json,
    write_weights,
)

FLAT_PREFIX = "2d:"
TRAINED_INPUT = ("frame_stride", "crop_height", "crop_width")  # of the training, not of the architecture
FILES = [WEIGHTS, "model-*-of-*.safetensors", INDEX, CONFIG]  # of an export folder
MEMBERS = (*VideoNetwork.__annotations__, *(name for name in vars(VideoNetwork) if not name.startswith("_")))


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    in_frames: int | None = None,
    pretrained: str | None = None,
    **options: Any,
) -> VideoNetwork:
    """Build a registered model.

    Args:
        name: a name from :func:`list_models`.
        num_classes: K of the classifier; 0 for features only; None for the published K.
        in_frames: clip length T; None for the model's own. Models that take any T only record it.
        pretrained: path of a local ``.safetensors`` file, a cliplift export folder, or a ``.pt``/``.pth`` state
            dict (read with ``weights_only=True``); a tag of the model's published weights such as "imagenet"; or
            "2d:" and one of these, to inflate 2D weights. Heads of another K are replaced, and that is logged.
        options: architecture options of that model (:func:`model_options`).

    Raises:
        UnknownModelError: no such name; the message names the nearest ones.
        ModelError: an unknown option, one with an impossible value, or weights that do not fit.
    """
    entry = model_entry(name)
    known = model_options(name)
    for option in options:
        if option not in known:
            nearest = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"it takes {sorted(known)}."
            raise ModelError(f"model {name!r} has no option {option!r}: {hint}")
    classes = entry.default_classes if num_classes is None else num_classes
    if classes < 0:
        raise ModelError(f"model {name!r}: num_classes={classes} must be 0 (features) or more")
    frames = {} if in_frames is None else {"in_frames": in_frames}
    model = _check_protocol(entry.build(num_classes=classes, **frames, **options), name)
    if pretrained is not None:
        load_pretrained(model, pretrained)
    return model


def _check_protocol(model: nn.Module, name: str) -> VideoNetwork:
    """The model, if it offers all of :class:`VideoModel`; a plug-in's may not."""
    if not isinstance(model, VideoModel):
        missing = [member for member in MEMBERS if not hasattr(model, member)]
        raise ModelError(
            f"model {name!r}: {type(model).__name__} lacks {', '.join(missing)}; see cliplift.models.protocol"
        )
    return cast(VideoNetwork, model)


def save_pretrained(
    model: VideoNetwork,
    folder: str | Path,
    *,
    name: str,
    options: Mapping[str, object] | None = None,
    extra: Mapping[str, object] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Path:
    """Write ``folder/model.safetensors`` and ``folder/config.json``.

    Weights beyond ``max_file_bytes`` go to several files with an index, ``model.safetensors.index.json``. They are
    written tensor by tensor.

    Args:
        model: a model made by ``create_model(name, **options)``.
        name: its registered name.
        options: the architecture options it was made with, beyond ``num_classes`` and ``in_frames``.
        extra: anything JSON the reader should find beside it (class names, metrics, the run).
        weights: the tensors by the model's names, read as they are written; the model may then be on the meta device.
            None takes the model's own.
        max_file_bytes: of the weights in one file.

    Returns:
        The folder.

    Raises:
        ModelError: options or extra hold something JSON cannot, or ``weights`` are not this model's.
    """
    target = Path(folder)
    config = {
        "format": FORMAT,
        "name": name,
        "num_classes": model.num_classes,
        "in_frames": model.input_spec.frames,
        "options": dict(options or {}),
        "feature_dim": model.feature_dim,
        "input": dataclasses.asdict(model.input_spec),
        "extra": dict(extra or {}),
    }
    try:
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    except TypeError as error:
        raise ModelError(
            f"{target / CONFIG}: options and extra must be plain JSON values ({error})"
        ) from None
    target.mkdir(parents=True, exist_ok=True)
    write_weights(target, _to_write(model, weights), max_file_bytes=max_file_bytes)
    (target / CONFIG).write_text(text, encoding="utf-8")
    return target


def _to_write(model: nn.Module, weights: Mapping[str, Tensor] | None) -> list[TensorToWrite]:
    own: Mapping[str, Tensor] = model.state_dict()
    given = own if weights is None else weights
    if different := set(own) ^ set(given):
        raise ModelError(
            f"not the weights of this model: {len(different)} differences, first {min(different)}"
        )
    return [
        TensorToWrite(
            name=name, dtype=like.dtype, shape=tuple(like.shape), read=partial(_read, given, name, like)
        )
        for name, like in own.items()
    ]


def _read(weights: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    values = weights[name]
    if values.shape != like.shape:
        raise ModelError(f"{name}: the weights are {tuple(values.shape)}, the model's {tuple(like.shape)}")
    return values.to(like.dtype)


def read_config(source: str | Path) -> dict[str, Any]:
    """The ``config.json`` of an export folder.

    Raises:
        ModelError: it is missing, not one of ours, or a value in it is none that :func:`save_pretrained` writes.
    """
    path = Path(source) / CONFIG
    if not path.is_file():
        raise ModelError(f"{source}: no {CONFIG} there; is it an export folder of cliplift?")
    config = read_json(path)
    if not isinstance(config, dict) or config.get("format") != FORMAT or "name" not in config:
        raise ModelError(f"{path}: not a cliplift model of format {FORMAT}")
    _check_config(config, path)
    return config


# A model has a weight for each class and each channel, so no number of its config exceeds the bytes of its weights.
_SMALLEST_LIMIT = 1 << 16


def _check_config(config: dict[str, Any], path: Path) -> None:
    weights = path.with_name(WEIGHTS)
    most = max(_SMALLEST_LIMIT, weights.stat().st_size if weights.is_file() else 0)

    def number(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most

    def option(value: object) -> bool:
        if isinstance(value, (list, dict)):
            return all(map(option, value.values() if isinstance(value, dict) else value))
        if isinstance(value, int):
            return abs(value) <= most
        return value is None or isinstance(value, (str, float))

    options, extra, classes = config.get("options", {}), config.get("extra", {}), config.get("num_classes")
    clip = config.get("input", {})
    named = extra.get("classes") if isinstance(extra, dict) else None
    checks = {
        "name": isinstance(config["name"], str),
        "num_classes": number(classes),
        "in_frames": config.get("in_frames") is None
        or (number(config["in_frames"]) and config["in_frames"] > 0),
        "options": isinstance(options, dict) and all(map(option, options.values())),
        "extra": isinstance(extra, dict),
        "input": isinstance(clip, dict)
        and all(number(clip.get(k, 1)) and clip.get(k, 1) for k in TRAINED_INPUT),
        "extra.classes": not named
        or (isinstance(named, list) and all(isinstance(name, str) for name in named)),
    }
    for key, right in checks.items():
        if not right:
            raise ModelError(f"{path}: {key} is damaged: {str(config.get(key, named))[:100]}")


def from_pretrained(
    source: str | Path, *, num_classes: int | None = None, revision: str | None = None
) -> VideoNetwork:
    """Build a model from an export folder or a Hub id (``owner/name``), with its weights, in eval mode.

    Args:
        source: a folder written by :func:`save_pretrained`, or a Hub id (needs the extra ``hub``).
        num_classes: K other than the stored one; the head is then fresh.
        revision: branch, tag or commit on the Hub.
    """
    folder = Path(source) if Path(source).is_dir() else _download(str(source), revision)
    config = read_config(folder)
    classes = config["num_classes"] if num_classes is None else num_classes
    options: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in config.get("options", {}).items()
    }
    model = create_model(config["name"], num_classes=classes, in_frames=config.get("in_frames"), **options)
    load_pretrained(model, folder)
    given = {key: value for key, value in config.get("input", {}).items() if key in TRAINED_INPUT}
    model.input_spec = dataclasses.replace(model.input_spec, **given)
    return model.eval()


def load_pretrained(model: nn.Module, source: str | Path) -> LoadReport:
    """Copy weights into a model by name.

    The head is left as it is (fresh) where the source has another number of classes, no head, or the model has
    none; exactly what was left out is logged. Everything else must be there with the same shape.

    Args:
        model: the model to fill.
        source: an export folder, a ``.safetensors`` file, a ``.pt``/``.pth`` state dict, a tag of the model's
            ``published_weights`` such as "imagenet", or "2d:" and one of these, which inflates the weights of the 2D
            counterpart (:mod:`cliplift.models.inflate`).

    Raises:
        ModelError: no such source, or weights that are not this model's; names the first keys concerned.
    """
    if str(source).startswith(FLAT_PREFIX):
        return _load_inflated(model, str(source).removeprefix(FLAT_PREFIX))
    return load_state(model, read_state(model, source), source=str(source))


def push(folder: str | Path, repo_id: str, *, private: bool = True, message: str = "Upload model") -> str:
    """Upload an export folder to the Hub (extra ``hub``; uses the login of ``huggingface_hub``). Returns the URL."""
    read_config(folder)
    hub = _hub()
    api = hub.HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=str(folder), allow_patterns=FILES, commit_message=message
    )
    return str(commit.commit_url)


def _load_inflated(model: nn.Module, source: str) -> LoadReport:
    report = inflate(model, read_state(model, source), source=source)
    head = head_prefix(model)
    return LoadReport(
        loaded=len(report.copied) + len(report.inflated),
        head_skipped=tuple(k for k in report.unused if head and k.startswith(head)),
        head_fresh=tuple(k for k in report.fresh if head and k.startswith(head)),
        notes=(f"inflated {len(report.inflated)} kernels from 2D", *(f"fresh: {k}" for k in report.fresh)),
    )


def _download(repo_id: str, revision: str | None) -> Path:
    if Path(repo_id).exists():
        raise ModelError(
            f"{repo_id!r} is a file, not an export folder; load it by create_model(NAME, pretrained={repo_id!r})"
        )
    if repo_id.count("/") != 1 or repo_id.startswith((".", "/", "~")):
        raise ModelError(f"{repo_id!r} is neither an export folder nor a Hub id (owner/name)")
    hub = _hub()
    return Path(hub.snapshot_download(repo_id, revision=revision, allow_patterns=FILES))


def _hub() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError:
        raise ModelError("the Hub needs the package huggingface_hub: pip install 'cliplift[hub]'") from None
    return huggingface_hub
