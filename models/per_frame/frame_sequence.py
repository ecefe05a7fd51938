"""What the recurrent and pooled frame models share: an image network on every frame, and weights that fit both.

A frame model is a registered 2D network (the encoder) applied to all B T frames at once, and a temporal part that
reads its maps. Features, losses and predictions per step follow the papers in the modules that use this one: LRCN,
Beyond Short Snippets, MultiLSTM and visual attention.

Shape letters: B clips, C channels, T frames, H W pixels, H' W' the encoder's grid, D its width, K classes.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Self, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models.factory import create_model
from cliplift.models.per_frame.lstm import real_frames
from cliplift.models.protocol import (
    ModelError,
    PoolsMap,
    StateLoader,
    VideoNetwork,
    adapt_state_dict,
    published_weights,
)
from cliplift.models.registry import model_entry, model_options

ENCODER = "encoder."
_M = TypeVar("_M", bound=VideoNetwork)
FC_LAYERS = {"conv": 0, "fc6": 1, "fc7": 2}


def frame_encoder(name: str, *, layer: str | None = None, unless_given: str = "fc7") -> VideoNetwork:
    """A registered 2D model without its classifier.

    Args:
        name: the model.
        layer: "conv", "fc6" or "fc7", for the CaffeNets alone: where their features are read. None is
            ``unless_given`` for those and does not matter for others, whose features are the average of the last map.

    Raises:
        ModelError: no such model, not an image model, or a layer it does not have.
    """
    if model_entry(name).dims != "2d":
        raise ModelError(f"encoder={name!r} is not a 2D model; list_models(dims='2d') names them")
    if "fully_connected" not in model_options(name):
        if layer is not None:
            raise ModelError(f"encoder_layer={layer!r}: {name!r} has no such layer; leave the option out")
        return create_model(name, num_classes=0)
    chosen = unless_given if layer is None else layer
    if chosen not in FC_LAYERS:
        raise ModelError(f"encoder_layer={chosen!r} must be one of {list(FC_LAYERS)}")
    return create_model(name, num_classes=0, fully_connected=FC_LAYERS[chosen])


def on_encoder(network: Callable[..., _M], *, read_at: str = "fc7") -> Callable[..., _M]:
    """A frame model's class as a builder for :func:`~cliplift.models.registry.variant`.

    The builder takes the arguments of the class, with the encoder by its registered name and ``encoder_layer`` (as
    ``layer`` in :func:`frame_encoder`, ``read_at`` where it is None) in place of the encoder itself.
    """

    def build(
        *, encoder: str = "efficientnet_lite0", encoder_layer: str | None = None, **options: object
    ) -> _M:
        return network(frame_encoder(encoder, layer=encoder_layer, unless_given=read_at), **options)

    own, added = inspect.signature(network).parameters, inspect.signature(build).parameters
    parameters = {**own, "encoder": added["encoder"], "encoder_layer": added["encoder_layer"]}
    build.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    build.__doc__ = network.__doc__
    return build


class OnEncoder(VideoNetwork):
    """A network that holds an image network as ``encoder`` and runs it on every frame.

    ``train_encoder=False`` freezes the encoder and keeps it in eval mode: its BatchNorm statistics belong to its
    weights.
    """

    def __init__(
        self, encoder: VideoNetwork, *, in_frames: int, frame_stride: int, train_encoder: bool
    ) -> None:
        super().__init__()
        if in_frames < 1:
            raise ModelError(f"in_frames={in_frames} must be 1 or more")
        self.encoder, self.train_encoder = encoder, train_encoder
        self.input_spec = dataclasses.replace(encoder.input_spec, frames=in_frames, frame_stride=frame_stride)
        if not train_encoder:
            self.encoder.requires_grad_(False)

    def on_frames(self, network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, D, T, ...): the encoder, or a part of it, in one pass over all B T frames."""
        frames = x.transpose(1, 2).flatten(0, 1)  # (B T, C, H, W)
        with torch.set_grad_enabled(self.train_encoder and torch.is_grad_enabled()):
            answers = network(frames)
        return torch.unflatten(answers, 0, (x.shape[0], x.shape[2])).transpose(1, 2)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if not self.train_encoder:
            self.encoder.eval()
        return self

    def checkpoint_blocks(self) -> list[str]:
        return [f"{ENCODER}{name}" for name in self.encoder.checkpoint_blocks()] if self.train_encoder else []

    @property
    def published_weights(self) -> Mapping[str, StateLoader]:
        """The encoder's published weights under this model's names; anything else is added when they are loaded."""
        encoder = self.encoder
        own = encoder.state_dict().keys()

        def load_as_part(load: StateLoader) -> dict[str, Tensor]:
            adapted, _ = adapt_state_dict(encoder, load())
            return {f"{ENCODER}{key}": value for key, value in adapted.items() if key in own}

        return {
            tag: functools.partial(load_as_part, load) for tag, load in published_weights(encoder).items()
        }


class FrameSequence(OnEncoder):
    """An encoder on every frame and a temporal part in a subclass, which defines ``clip_features``.

    Args:
        encoder: an image model without classifier, with ``forward_features`` (N, C, H, W) -> (N, D, H', W'). One
            whose features are not the mean of that map says how wide the map is (``map_dim``) and how it becomes the
            features (``pool_map``).
        in_frames: T the model is built for; models that take any T only record it.
        train_encoder: whether the encoder is trained; see :class:`OnEncoder`.
        multi_label: classes do not exclude each other: sigmoid and BCE in place of softmax and cross-entropy.
    """

    head_name = "head"

    def __init__(
        self, encoder: VideoNetwork, *, in_frames: int, train_encoder: bool = True, multi_label: bool = False
    ) -> None:
        super().__init__(encoder, in_frames=in_frames, frame_stride=1, train_encoder=train_encoder)
        self.encoder_dim, self.multi_label = encoder.feature_dim, multi_label
        self.map_dim = encoder.map_dim if isinstance(encoder, PoolsMap) else encoder.feature_dim

    # --- frames ---------------------------------------------------------------------------------------------------

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, D, T, H', W'): the encoder's last map of every frame."""
        if x.ndim != 5 or x.shape[1] != self.input_spec.channels:
            raise ModelError(
                f"{type(self).__name__} takes (B, {self.input_spec.channels}, T, H, W), got {tuple(x.shape)}"
            )
        return self.on_frames(self.encoder.forward_features, x)

    def refuse_layers_behind_the_map(self) -> None:
        """For networks that read the map: layers of the encoder behind it would stay in the model, untrained.

        Raises:
            ModelError: the encoder has some.
        """
        if self.map_dim != self.encoder_dim:
            raise ModelError(
                f"{type(self).__name__} reads the encoder's last map of {self.map_dim} channels, but "
                f"{type(self.encoder).__name__} goes on to {self.encoder_dim} features; use an encoder without "
                "fully connected layers (a CaffeNet with fully_connected=0)"
            )

    def frame_vectors(self, maps: Tensor) -> Tensor:
        """(B, D, T, H', W') -> (B, T, D): each map through the encoder's own last layers.

        Those are its fully connected layers where it has some (``pool_map``, CaffeNet), else the mean over the grid.
        """
        frames = maps.transpose(1, 2).flatten(0, 1)  # (B T, D, H', W')
        own = self.encoder
        vectors = own.pool_map(frames) if isinstance(own, PoolsMap) else frames.mean(dim=(2, 3))
        return torch.unflatten(vectors, 0, (maps.shape[0], maps.shape[2]))

    # --- clips ----------------------------------------------------------------------------------------------------

    def clip_features(self, maps: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """(B, D, T, H', W') -> (B, feature_dim)."""
        raise NotImplementedError

    def clip_logits(self, maps: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """(B, D, T, H', W') -> (B, K): their softmax (sigmoid for multi-label) is the clip's prediction."""
        return cast(Tensor, self.head(self.clip_features(maps, lengths=lengths)))

    def forward(self, x: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """(B, C, T, H, W) -> (B, K), or features (B, feature_dim) when ``num_classes == 0``.

        Args:
            x: the clips.
            lengths: int64 (B,), real frames of each clip, at least one; the rest is padding behind them and changes
                nothing. None means that all T are real.
        """
        answer = self.clip_logits if self.num_classes else self.clip_features
        return answer(self.forward_features(x), lengths=lengths)

    def head_size(self, num_classes: int) -> tuple[int, int]:
        """Inputs and outputs of the head."""
        return self.feature_dim, num_classes

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a freshly initialised one; 0 removes it."""
        if num_classes < 0:
            raise ModelError(f"num_classes={num_classes} must be 0 (features) or more")
        self.num_classes = num_classes
        reference = next(self.parameters())
        head = nn.Linear(*self.head_size(num_classes)) if num_classes else nn.Identity()
        self.head = head.to(device=reference.device, dtype=reference.dtype)

    # --- weights --------------------------------------------------------------------------------------------------

    def adapt_state_dict(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Accept the weights of an image network or of another frame model: the temporal part then starts fresh.

        That is how the papers train: ImageNet, then the single-frame network, then the recurrent one. A source that
        has some tensors of this temporal part and lacks others is left as it is, and refused by the loader.
        """
        state, notes = self._encoder_as_part(state)
        own = self.state_dict()
        mine = {k for k in own if self._is_temporal(k)}
        theirs = {k for k in state if self._is_temporal(k)}
        if mine & theirs or mine == theirs or not any(k.startswith(ENCODER) for k in state):
            return state, notes
        kept = {k: v for k, v in state.items() if k in own}
        left = sorted(state.keys() - kept.keys())
        if mine:
            notes.append(f"the temporal part starts fresh: {', '.join(sorted(mine))}")
        if left:
            notes.append(f"left out of the source: {', '.join(left)}")
        return {**{k: own[k] for k in mine}, **kept}, notes

    def _is_temporal(self, key: str) -> bool:
        return not key.startswith((ENCODER, f"{self.head_name}."))

    def _encoder_as_part(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """The state dict of the image network alone, under this model's names; any other comes back as it is."""
        if any(k.startswith(ENCODER) for k in state):
            return state, []
        adapted, notes = adapt_state_dict(self.encoder, state)
        own = {k for k in self.encoder.state_dict() if not k.endswith("num_batches_tracked")}
        if not own <= adapted.keys():
            return state, []
        return {f"{ENCODER}{k}": v for k, v in adapted.items()}, [*notes, "the weights are the encoder's"]


class FrameClassifier(FrameSequence):
    """A frame model that predicts at every frame; a subclass defines ``step_features``.

    The clip's prediction is the mean of its frames' probabilities, the loss the mean of their losses.
    """

    dropout: nn.Module  # before the classifier

    def step_features(self, maps: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """(B, D, T, H', W') -> (B, T, feature_dim)."""
        raise NotImplementedError

    def predict(self, maps: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """(B, D, T, H', W') -> the logits of every frame (B, T, K)."""
        return cast(Tensor, self.head(self.dropout(self.step_features(maps, lengths=lengths))))

    def step_logits(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, T, K): the prediction of every frame."""
        return self.predict(self.forward_features(x))

    def counted(self, steps: Tensor, lengths: Tensor | None) -> Tensor:
        """float (B, T): how much each frame counts in the clip's features and prediction."""
        return real_weights(lengths, steps)

    def clip_features(self, maps: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        features = self.step_features(maps, lengths=lengths)
        weights = self.counted(features, lengths)[..., None]
        return (features * weights).sum(dim=1) / weights.sum(dim=1)

    def clip_logits(self, maps: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        logits = self.predict(maps, lengths=lengths)
        return averaged_predictions(logits, self.counted(logits, lengths), multi_label=self.multi_label)

    def loss(self, x: Tensor, labels: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """Mean of the losses of all real frames; labels as in :func:`step_losses`."""
        logits = self.predict(self.forward_features(x), lengths=lengths)
        losses = step_losses(logits, labels, multi_label=self.multi_label)
        return mean_of_real(losses, real_weights(lengths, logits))


# --- predictions and losses of several steps --------------------------------------------------------------------------


def real_weights(lengths: Tensor | None, like: Tensor) -> Tensor:
    """float (B, T): 1 for real frames, 0 for the padding behind them. ``like`` (B, T, ...) gives T and the device."""
    B, T = like.shape[:2]
    if lengths is None:
        return torch.ones(B, T, device=like.device)
    return real_frames(lengths, clips=B, frames=T).float()


def averaged_predictions(logits: Tensor, weights: Tensor, *, multi_label: bool) -> Tensor:
    """Weighted mean over steps of the class probabilities, given back as logits.

    Args:
        logits: (B, T, K) of every step.
        weights: (B, T), not negative; each row is scaled to sum 1. A step of weight 0 does not count.
        multi_label: probabilities are sigmoids, else softmax.

    Returns:
        (B, K) whose softmax (sigmoid) is that mean: log p, or log p - log(1 - p). Working with logarithms keeps
        confident steps exact, where averaging and taking the logarithm afterwards would round 1 - p to 0.
    """
    share = (weights / weights.sum(dim=1, keepdim=True)).log()[..., None]  # -inf where the weight is 0
    scores = logits.float()
    if not multi_label:
        return torch.logsumexp(scores.log_softmax(dim=-1) + share, dim=1)
    yes = torch.logsumexp(F.logsigmoid(scores) + share, dim=1)
    return yes - torch.logsumexp(F.logsigmoid(-scores) + share, dim=1)


def step_losses(logits: Tensor, labels: Tensor, *, multi_label: bool) -> Tensor:
    """The loss of every step.

    Args:
        logits: (B, T, K).
        labels: single label: int64 (B,), repeated for all steps, or (B, T). Multi-label: 0 and 1 (B, K), repeated for
            all steps, or (B, T, K).
        multi_label: BCE, mean over the classes; else cross-entropy.

    Returns:
        (B, T).

    Raises:
        ModelError: labels of another shape.
    """
    B, T, K = logits.shape
    wanted = ((B, K), (B, T, K)) if multi_label else ((B,), (B, T))
    if tuple(labels.shape) not in wanted:
        raise ModelError(
            f"labels must be {wanted[0]} or {wanted[1]}, got {tuple(labels.shape)}: the model was built with "
            f"multi_label={multi_label}, which has to agree with the task"
        )
    if labels.shape == wanted[0]:
        labels = labels.unsqueeze(1).expand(wanted[1])
    if multi_label:
        losses = F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none")
        return losses.mean(dim=2)
    # flat: the kernel for (B, K, T) has no deterministic form on CUDA
    flat = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    return flat.view(B, T)


def mean_of_real(values: Tensor, weights: Tensor) -> Tensor:
    """Mean of ``values`` (B, T) over the frames of weight 1: every real frame of the batch counts the same."""
    return (values * weights).sum() / weights.sum()
