"""Weights in and out: export folders (``model.safetensors`` + ``config.json``), public state dicts, the Hub.

Nothing read here is executed: safetensors, JSON, and ``torch.load(weights_only=True)``.

A model may help with optional attributes: ``head_name`` (the submodule holding the classifier),
``adapt_state_dict(state) -> (state, notes)`` (renames public keys, resizes position embeddings and says so),
``published_weights`` (tags such as "imagenet" -> a function giving a state dict), ``checkpoint_parts`` (where files
that hold several nets keep this one's weights, the first found counts) and ``check_foreign_config(config)`` (refuses
the config of another project's folder).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cliplift.models.registry import ModelError, create_model

logger = logging.getLogger(__name__)

FORMAT = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
FLAT_PREFIX = "2d:"
HEAD_NAMES = ("classifier", "fc", "head")
WRAPPER_KEYS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "module",
)  # where public checkpoints keep the weights


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_pretrained` did beside copying: key names, and the notes that were logged."""

    loaded: int
    head_skipped: tuple[str, ...] = ()
    head_fresh: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    name: str,
    options: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``folder/model.safetensors`` and ``folder/config.json``.

    Args:
        model: a model made by ``create_model(name, **options)``.
        name: its registered name.
        options: the architecture options it was made with, beyond ``num_classes`` and ``in_frames``.
        extra: anything JSON the reader should find beside it (class names, metrics, the run).

    Returns:
        The folder.

    Raises:
        ModelError: options or extra hold something JSON cannot.
    """
    target = Path(folder)
    described = cast(Any, model)
    config = {
        "format": FORMAT,
        "name": name,
        "num_classes": described.num_classes,
        "in_frames": described.input_spec.frames,
        "options": dict(options or {}),
        "feature_dim": described.feature_dim,
        "input": dataclasses.asdict(described.input_spec),
        "extra": dict(extra or {}),
    }
    try:
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    except TypeError as error:
        raise ModelError(
            f"{target / CONFIG}: options and extra must be plain JSON values ({error})"
        ) from None
    target.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    save_file(state, target / WEIGHTS, metadata={"format": "pt"})
    (target / CONFIG).write_text(text, encoding="utf-8")
    return target


def read_config(source: str | Path) -> dict[str, Any]:
    """The ``config.json`` of an export folder. Raises ModelError when it is missing or not one of ours."""
    path = Path(source) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{source}: no {CONFIG} there; is it an export folder of cliplift?") from None
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT or "name" not in config:
        raise ModelError(f"{path}: not a cliplift model of format {FORMAT}")
    return config


def from_pretrained(
    source: str | Path, *, num_classes: int | None = None, revision: str | None = None
) -> nn.Module:
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


def read_state(model: nn.Module, source: str | Path) -> dict[str, Tensor]:
    """The tensors of a weights source, under the names they have there."""
    published = cast(Mapping[str, Any], getattr(model, "published_weights", {}))
    if str(source) in published:
        return cast(dict[str, Tensor], published[str(source)]())
    path = Path(source)
    if path.is_dir():
        _check_foreign_config(model, path)
        path = path / WEIGHTS
    if not path.is_file():
        tags = f" (tags of this model: {sorted(published)})" if published else ""
        raise ModelError(f"pretrained={str(source)!r}: no such file or export folder{tags}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # public files keep the arguments of their training beside the weights: a Namespace of plain values
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ModelError(f"{path}: not a readable safetensors file ({error})") from error
    except (
        Exception
    ) as error:  # pickle, zip and torch each raise their own; the file is the user's either way
        raise ModelError(f"{path}: torch.load(weights_only=True) refused it ({error})") from error
    return _unwrapped(content, path, tuple(getattr(model, "checkpoint_parts", ())))


def load_state(model: nn.Module, state: Mapping[str, Tensor], *, source: str) -> LoadReport:
    """:func:`load_pretrained` for tensors already in memory; ``source`` names them in messages."""
    given, notes = adapted_state(model, dict(state))
    own = model.state_dict()
    head = head_prefix(model)
    in_head = [k for k in (*given, *own) if head and k.startswith(head)]
    fits = all(k in given and k in own and given[k].shape == own[k].shape for k in in_head)
    skipped = () if fits else tuple(k for k in given if k in in_head)
    fresh = () if fits else tuple(k for k in own if k in in_head)
    body = {k: v for k, v in given.items() if k not in skipped}
    _refuse_strangers(own, body, fresh, source)
    model.load_state_dict(body, strict=False)
    if skipped or fresh:
        notes.append(
            f"head not loaded: left out of the source {_shapes(given, skipped)}; "
            f"freshly initialised {_shapes(own, fresh)}"
        )
    for note in notes:
        logger.info("%s: %s", source, note)
    return LoadReport(loaded=len(body), head_skipped=skipped, head_fresh=fresh, notes=tuple(notes))


def head_prefix(model: nn.Module) -> str:
    """``"classifier."`` or the like: what the classifier's keys begin with; empty when the model has no such part."""
    named = getattr(model, "head_name", None)
    names = (named,) if isinstance(named, str) else tuple(n for n in HEAD_NAMES if hasattr(model, n))
    return f"{names[0]}." if names else ""


def push(folder: str | Path, repo_id: str, *, private: bool = True, message: str = "Upload model") -> str:
    """Upload an export folder to the Hub (extra ``hub``; uses the login of ``huggingface_hub``). Returns the URL."""
    read_config(folder)
    hub = _hub()
    api = hub.HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=str(folder), allow_patterns=[WEIGHTS, CONFIG], commit_message=message
    )
    return str(commit.commit_url)


def _load_inflated(model: nn.Module, source: str) -> LoadReport:
    from cliplift.models.inflate import inflate  # inflate needs head_prefix from here

    report = inflate(model, read_state(model, source), source=source)
    head = head_prefix(model)
    return LoadReport(
        loaded=len(report.copied) + len(report.inflated),
        head_skipped=tuple(k for k in report.unused if head and k.startswith(head)),
        head_fresh=tuple(k for k in report.fresh if head and k.startswith(head)),
        notes=(f"inflated {len(report.inflated)} kernels from 2D", *(f"fresh: {k}" for k in report.fresh)),
    )


def adapted_state(model: nn.Module, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under the model's own names, as far as it knows theirs, and a note for every change."""
    notes: list[str] = []
    if state and all(key.startswith("module.") for key in state):  # saved from DistributedDataParallel
        state = {key.removeprefix("module."): value for key, value in state.items()}
        notes.append("took the prefix 'module.' off the keys")
    adapt = getattr(model, "adapt_state_dict", None)
    if adapt is not None:
        state, more = adapt(state)
        notes += more
    return state, notes


def _refuse_strangers(
    own: Mapping[str, Tensor], body: Mapping[str, Tensor], fresh: tuple[str, ...], source: str
) -> None:
    unexpected = [k for k in body if k not in own]
    missing = [k for k in own if k not in body and k not in fresh and not k.endswith("num_batches_tracked")]
    shapes = [
        f"{k} {tuple(v.shape)} for {tuple(own[k].shape)}"
        for k, v in body.items()
        if k in own and v.shape != own[k].shape
    ]
    problems = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if keys
    ]
    if problems:
        raise ModelError(
            f"{source}: not the weights of this model: {'; '.join(problems)}. Check the model's name and options."
        )


def _shapes(state: Mapping[str, Tensor], keys: tuple[str, ...]) -> str:
    return ", ".join(f"{key} {tuple(state[key].shape)}" for key in keys) or "nothing"


def _check_foreign_config(model: nn.Module, folder: Path) -> None:
    """Another project's folder may say in its config what no tensor's shape tells, such as the number of heads."""
    check, path = getattr(model, "check_foreign_config", None), folder / CONFIG
    if check is None or not path.is_file():
        return
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: not valid JSON ({error})") from None
    if isinstance(config, dict) and config.get("format") != FORMAT:
        try:
            check(config)
        except ModelError as error:
            raise ModelError(f"{folder}: {error}") from None


def _unwrapped(content: object, path: Path, parts: tuple[str, ...] = ()) -> dict[str, Tensor]:
    for key in (*parts, *WRAPPER_KEYS):
        found = content.get(key) if isinstance(content, dict) else None
        if isinstance(found, list) and key in parts:
            if len(found) != 1:
                raise ModelError(
                    f"{path}: {key!r} holds {len(found)} nets: save the one you want to a file of its own"
                )
            found = found[0]
        if isinstance(found, dict):
            content = found
            break
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ModelError(f"{path}: holds no state dict (a mapping of names to tensors)")
    return cast(dict[str, Tensor], content)


def _download(repo_id: str, revision: str | None) -> Path:
    if repo_id.count("/") != 1 or repo_id.startswith((".", "/", "~")):
        raise ModelError(f"{repo_id!r} is neither an export folder nor a Hub id (owner/name)")
    hub = _hub()
    return Path(hub.snapshot_download(repo_id, revision=revision, allow_patterns=[WEIGHTS, CONFIG]))


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise ModelError("the Hub needs the package huggingface_hub: pip install 'cliplift[hub]'") from None
    return huggingface_hub
