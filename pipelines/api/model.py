"""A trained network in a notebook: it predicts, gives features and explains, with the clips it was trained on.

Shape letters: B clips, V views of a video, C channels, T frames, H W pixels, D width, K classes.
"""

from __future__ import annotations

import base64
import copy
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cliplift.configs.data import ViewsConfig
from cliplift.configs.sections import ConfigError
from cliplift.models.protocol import InputSpec, VideoNetwork
from cliplift.pipelines.api.processor import Processor, Video
from cliplift.pipelines.engine.task import ModelCard, trained_input
from cliplift.pipelines.evaluation.evaluate import load_network
from cliplift.pipelines.evaluation.explain import (
    OVERLAY_FPS,
    class_to_explain,
    explain_clips,
    method_for,
)
from cliplift.pipelines.evaluation.grad_cam import overlay_video, write_overlay
from cliplift.pipelines.evaluation.predict import class_names, classify, data_of
from cliplift.pipelines.runs.folder import RESULT, RunFolder


def load(source: str | Path, *, device: str = "auto") -> Model:
    """The network of a finished run or of an export, ready to be used.

    Args:
        source: a run's folder, or one that ``cliplift export`` wrote.
        device: "cpu", "cuda", "cuda:1", ...; "auto" is a GPU where there is one.

    Raises:
        ConfigError: the folder holds no weights.
        ModelError: its files are damaged.
    """
    if several := _runs_of(Path(source)):
        raise ConfigError(
            f"{str(source)!r} holds {len(several)} runs", hint=f"load one of them, such as {several[0]!r}"
        )
    network, card = load_network(str(source))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Model(network.to(torch.device(device)), card)


def _runs_of(folder: Path) -> list[str]:
    """The runs of a folder of folds and seeds."""
    runs = ((RunFolder(folder).result() if (folder / RESULT).is_file() else None) or {}).get("runs")
    return [str(run) for run in runs] if isinstance(runs, list) else []


class Model:
    """A trained network and what its training says of its input.

    Attributes:
        network: the ``nn.Module``, in eval mode: (B, C, T, H, W) -> (B, K), or (B, D) without a classifier.
        classes: names of the K classes; empty without a classifier.
        input_spec: frames, stride, crop and normalisation of the training, not the architecture's defaults.
        processor: from a video to the network's input.
        card: what is written beside the weights, such as the stage and the name of the run.
    """

    def __init__(self, network: VideoNetwork, card: ModelCard) -> None:
        self.network, self.card = network.eval(), card
        self.classes = class_names(card, network) if network.num_classes else ()
        data = data_of(card, network, ViewsConfig())
        self.input_spec: InputSpec = trained_input(network.input_spec, data)
        self.processor = Processor(data, self.input_spec)

    def __repr__(self) -> str:
        spec = self.input_spec
        outputs = f"{len(self.classes)} classes" if self.classes else f"{self.network.feature_dim} features"
        return (
            f"Model({type(self.network).__name__}, {outputs}, clips of {spec.frames} frames "
            f"of {spec.crop_height}x{spec.crop_width} pixels, on {self.device})"
        )

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    @torch.no_grad()
    def __call__(self, clips: Tensor) -> Tensor:
        """Normalised clips (B, C, T, H, W) -> logits (B, K), or features (B, D) without a classifier."""
        outputs: Tensor = self.network(clips.to(self.device))
        return outputs

    def predict(
        self, video: Video, *, clips: int = 1, crops: int = 1, fps: float | None = None
    ) -> Prediction:
        """Class probabilities of a video, averaged over its views; the numbers of ``cliplift predict``.

        Args:
            video: file or URL, or its RGB frames (N, H, W, 3) in uint8.
            clips: clips spread over the video.
            crops: crops of each: 1, 3, 5 or 10.
            fps: frames per second of an array of frames.

        Raises:
            ConfigError: the network has no classifier.
            VideoDecodeError: the video cannot be read.
        """
        self._require_classes()
        processor = self.processor.with_views(clips=clips, crops=crops)
        batch = processor.views(video, fps=fps).to(self.device)
        several = self.card.get("task") == "multi_label"
        probabilities = classify(self.network, batch, processor.data, multi_label=several)
        return Prediction(video=_name(video), classes=self.classes, probabilities=probabilities)

    @torch.no_grad()
    def features(self, clips: Video | Tensor, *, fps: float | None = None) -> Tensor:
        """What the classifier is given.

        A video gives (D,), of its middle clip; normalised clips (B, C, T, H, W), such as :func:`cliplift.clips` makes,
        give (B, D). Float32, on the CPU.
        """
        if isinstance(clips, Tensor):
            found: Tensor = self._body(clips.to(self.device)).float().cpu()
            return found
        return self.features(self.processor(clips, fps=fps)).mean(dim=0)

    @torch.no_grad()
    def feature_maps(self, clips: Tensor) -> dict[str, Tensor]:
        """Features of every scale: of normalised clips (B, C, T, H, W), the last block's output at each resolution.

        By the block's name, in forward order: maps (B, D, T', H', W') of convolutional networks, whatever else the
        blocks of others give. On the network's device.
        """
        seen: dict[str, Tensor] = {}

        def keep(name: str, output: object) -> None:
            if isinstance(output, Tensor):
                seen[name] = output

        def hook(name: str) -> torch.utils.hooks.RemovableHandle:
            module: nn.Module = self.network.get_submodule(name)
            return module.register_forward_hook(lambda _, __, output: keep(name, output))

        handles = [hook(name) for name in self.network.checkpoint_blocks()]
        try:
            self(clips)
        finally:
            for handle in handles:
                handle.remove()
        last = {tuple(output.shape[2:]): name for name, output in seen.items()}
        return {name: seen[name] for name in seen if name in last.values()}

    def explain(
        self,
        video: Video,
        *,
        class_name: str | None = None,
        method: str = "auto",
        layer: str | None = None,
        fps: float | None = None,
    ) -> ExplainedVideo:
        """Where in a video's middle clip the evidence for a class lies; as ``cliplift explain``.

        Args:
            video: as for :meth:`predict`.
            class_name: the class to explain; None is the predicted one.
            method: "auto", "grad_cam", "rollout" or "attention".
            layer: grad_cam at the output of this submodule instead of the last feature map.
            fps: frames per second of an array of frames.

        Raises:
            ConfigError: no such class, or a method that does not apply to this network.
            ExplainError: the network cannot be explained this way.
        """
        self._require_classes()
        chosen = method_for(self.network, method)
        wanted = class_to_explain(class_name, self.classes, chosen)
        batch = self.processor.views(video, fps=fps).to(self.device)
        clips = self.processor.normalised(batch)
        found = explain_clips(self.network, clips, method=chosen, wanted=wanted, layer=layer)
        return ExplainedVideo(
            video=_name(video),
            frames=batch.clips[0].cpu().numpy(),
            heat=found.heat[0].detach().cpu().numpy(),
            class_name=self.classes[int(found.classes[0])],
            probability=float(found.probabilities[0]),
        )

    @cached_property
    def _body(self) -> VideoNetwork:
        """The network without its classifier; its tensors are the network's own."""
        if not self.network.num_classes:
            return self.network
        shared = {id(tensor): tensor for tensor in (*self.network.parameters(), *self.network.buffers())}
        body = copy.deepcopy(self.network, dict(shared))
        body.reset_classifier(0)
        return body.eval()

    def _require_classes(self) -> None:
        if not self.classes:
            raise ConfigError(
                f"this network has no classifier: it is a {self.card.get('stage', 'feature')} model",
                hint="use its features, or finetune it first, with initialise_from",
            )


@dataclass(frozen=True)
class Prediction:
    """Class probabilities of a video: (K,), which sum to 1 unless a video may have several labels."""

    video: str
    classes: Sequence[str] = field(repr=False)
    probabilities: npt.NDArray[np.float32] = field(repr=False)

    def top(self, count: int = 5) -> list[tuple[str, float]]:
        """The likeliest classes with their probabilities, the likeliest first."""
        best = np.argsort(-self.probabilities, kind="stable")[:count]
        return [(self.classes[k], float(self.probabilities[k])) for k in best]

    @property
    def label(self) -> str:
        """The likeliest class."""
        return self.top(1)[0][0]

    def __repr__(self) -> str:
        named = ", ".join(f"{name} {share:.3f}" for name, share in self.top())
        return f"Prediction({self.video}: {named})"


@dataclass(frozen=True)
class ExplainedVideo:
    """A clip and where the evidence for a class lies in it; a notebook shows both side by side as a video."""

    video: str
    frames: npt.NDArray[np.uint8] = field(repr=False)  # (T, H, W, 3)
    heat: npt.NDArray[np.float32] = field(repr=False)  # (T, H, W) in [0, 1], scaled by its own maximum
    class_name: str
    probability: float

    def save(self, path: str | Path, *, fps: float = OVERLAY_FPS) -> Path:
        """Write an mp4: the clip on the left, the clip under its heat map on the right."""
        write_overlay(Path(path), self.frames, self.heat, fps=fps)
        return Path(path)

    def _repr_html_(self) -> str:
        text = html.escape(f"{self.video}: {self.class_name}, {self.probability:.3f}")
        data = base64.b64encode(overlay_video(self.frames, self.heat, fps=OVERLAY_FPS)).decode("ascii")
        return (
            f'<figure><video controls loop muted src="data:video/mp4;base64,{data}" '
            f'aria-label="{html.escape(text)}"></video><figcaption>{text}</figcaption></figure>'
        )


def _name(video: Video) -> str:
    return "frames" if isinstance(video, np.ndarray) else str(video)
