"""cliplift: raw videos to shards to trained video networks.

In a notebook or a script::

    import cliplift as cl

    model = cl.load("runs/my-finetune")
    model.predict("video.mp4").top(3)
    clips = cl.clips("shards/mine", split="train", frames=8, crop=112)

This file imports nothing: torch and the rest come when a name is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cliplift.models import InputSpec, create_model, from_pretrained, list_models
    from cliplift.pipelines.api.clips import ClipDataset, clips
    from cliplift.pipelines.api.model import ExplainedVideo, Model, Prediction, load
    from cliplift.pipelines.api.processor import Processor

    __version__: str

_HOMES = {
    "ClipDataset": "cliplift.pipelines.api.clips",
    "ExplainedVideo": "cliplift.pipelines.api.model",
    "InputSpec": "cliplift.models",
    "Model": "cliplift.pipelines.api.model",
    "Prediction": "cliplift.pipelines.api.model",
    "Processor": "cliplift.pipelines.api.processor",
    "clips": "cliplift.pipelines.api.clips",
    "create_model": "cliplift.models",
    "from_pretrained": "cliplift.models",
    "list_models": "cliplift.models",
    "load": "cliplift.pipelines.api.model",
}
_FOLDERS = ("configs", "launch", "models", "pipelines", "sharding")

__all__ = [
    "ClipDataset",
    "ExplainedVideo",
    "InputSpec",
    "Model",
    "Prediction",
    "Processor",
    "__version__",
    "clips",
    "create_model",
    "from_pretrained",
    "list_models",
    "load",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("cliplift")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _FOLDERS:
        return import_module(f"cliplift.{name}")
    raise AttributeError(f"module 'cliplift' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_FOLDERS})
