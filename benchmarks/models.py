"""The convolutional families against the plain PyTorch floor: ``python benchmarks/models.py --help``.

Each floor below is the published network written straight down with torch.nn.functional on the model's own weights.
Other families add their cases in files of their own, with :mod:`floor`.
"""

from __future__ import annotations

import sys

import torch
from floor import Case, Weights, main
from torch import Tensor
from torch.nn import functional as F

from cliplift.models import create_model


def dense_block(w: Weights, x: Tensor, name: str, layers: int) -> Tensor:
    maps = [x]
    for i in range(1, layers + 1):
        at = f"{name}.denselayer{i}"
        y = w.conv(F.relu(w.norm(torch.cat(maps, 1), f"{at}.norm1"), inplace=True), f"{at}.conv1")
        y = w.conv(F.relu(w.norm(y, f"{at}.norm2"), inplace=True), f"{at}.conv2", padding=1)
        maps.append(y)
    return torch.cat(maps, 1)


def temporal_transition(w: Weights, x: Tensor, name: str, depths: tuple[int, ...]) -> Tensor:
    outputs = []
    for i, depth in enumerate(depths):
        y = F.relu(w.norm(x, f"{name}.branches.{i}.norm"), inplace=True)
        front = (depth - 1) // 2
        if depth % 2 == 0:
            y = F.pad(y, (0, 0, 0, 0, 0, 1))
        padding = (front, 1, 1) if depth > 1 else 0
        outputs.append(w.conv(y, f"{name}.branches.{i}.conv", padding=padding))
    return F.avg_pool3d(torch.cat(outputs, 1), 2)


def t3d_121(w: Weights, x: Tensor) -> Tensor:
    """arXiv 1711.08200, Table 1."""
    x = w.conv(x, "features.conv0", stride=2, padding=(1, 3, 3))
    x = F.max_pool3d(F.relu(w.norm(x, "features.norm0"), inplace=True), 3, stride=(1, 2, 2), padding=1)
    depths = ((1, 3, 6), (1, 3, 4), (1, 3, 4))
    for i, layers in enumerate((6, 12, 24, 16)):
        x = dense_block(w, x, f"features.denseblock{i + 1}", layers)
        if i < 3:
            x = temporal_transition(w, x, f"features.transition{i + 1}", depths[i])
    x = F.relu(w.norm(x, "features.norm5"), inplace=True)
    return w.linear(x.mean((2, 3, 4)), "classifier")


def densenet3d_121(w: Weights, x: Tensor) -> Tensor:
    """The T3D authors' DenseNet3D.py, with a global average at the end."""
    x = w.conv(x, "features.conv0", stride=2, padding=(1, 3, 3))
    x = F.max_pool3d(F.relu(w.norm(x, "features.norm0"), inplace=True), 3, stride=2, padding=1)
    for i, layers in enumerate((6, 12, 24, 16), start=1):
        x = dense_block(w, x, f"features.denseblock{i}", layers)
        if i < 4:
            at = f"features.transition{i}"
            x = F.avg_pool3d(w.conv(F.relu(w.norm(x, f"{at}.norm"), inplace=True), f"{at}.conv"), 2)
    x = F.relu(w.norm(x, "features.norm5"), inplace=True)
    return w.linear(x.mean((2, 3, 4)), "classifier")


def resnet3d_50(w: Weights, x: Tensor) -> Tensor:
    """arXiv 1711.09577, Table 1."""
    x = F.relu(w.norm(w.conv(x, "conv1", stride=(1, 2, 2), padding=3), "bn1"), inplace=True)
    x = F.max_pool3d(x, 3, stride=2, padding=1)
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        for i in range(blocks):
            at, stride = f"layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1
            y = F.relu(w.norm(w.conv(x, f"{at}.conv1"), f"{at}.bn1"), inplace=True)
            y = w.conv(y, f"{at}.conv2", stride=stride, padding=1)
            y = w.conv(F.relu(w.norm(y, f"{at}.bn2"), inplace=True), f"{at}.conv3")
            if i == 0:
                x = w.norm(w.conv(x, f"{at}.downsample.0", stride=stride), f"{at}.downsample.1")
            x = F.relu(w.norm(y, f"{at}.bn3") + x, inplace=True)
    return w.linear(x.mean((2, 3, 4)), "fc")


def p3d_63(w: Weights, x: Tensor) -> Tensor:
    """The released P3D network on ResNet-50, without dropout."""
    x = w.conv(x, "conv1_custom", stride=(1, 2, 2), padding=(0, 3, 3))
    x = F.max_pool3d(F.relu(w.norm(x, "bn1"), inplace=True), (2, 3, 3), stride=2, ceil_mode=True)
    position = 0
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        for i in range(blocks):
            at, stride = f"layer{stage}.{i}", (1, 2, 2) if stage > 1 and i == 0 else 1
            y = F.relu(w.norm(w.conv(x, f"{at}.conv1", stride=stride), f"{at}.bn1"), inplace=True)
            if stage == 4:
                y = w.conv(y, f"{at}.conv_normal", padding=(0, 1, 1))
                y = F.relu(w.norm(y, f"{at}.bn_normal"), inplace=True)
            else:
                s = w.conv(y, f"{at}.conv2", padding=(0, 1, 1))
                s = F.relu(w.norm(s, f"{at}.bn2"), inplace=True)
                kind = "ABC"[position % 3]
                t = w.norm(w.conv(y if kind == "B" else s, f"{at}.conv3", padding=(1, 0, 0)), f"{at}.bn3")
                middle = t if kind == "A" else s + t if kind == "B" else 0.5 * (s + t)
                y = F.relu(middle, inplace=True)
            y = w.norm(w.conv(y, f"{at}.conv4"), f"{at}.bn4")
            if i == 0:
                x = w.norm(w.conv(x, f"{at}.downsample.0", stride=stride), f"{at}.downsample.1")
            x = F.relu(y + x, inplace=True)
            position += 1
        if stage < 4:
            x = F.max_pool3d(x, (2, 1, 1), stride=(2, 1, 1))
    return w.linear(x.mean((2, 3, 4)), "fc")


CASES = [
    Case(
        name="t3d_121",
        build=lambda: create_model("t3d_121", num_classes=101),
        floor=t3d_121,
        shape=(1, 3, 16, 64, 64),
    ),
    Case(
        name="densenet3d_121",
        build=lambda: create_model("densenet3d_121", num_classes=101),
        floor=densenet3d_121,
        shape=(1, 3, 32, 64, 64),
    ),
    Case(
        name="resnet3d_50",
        build=lambda: create_model("resnet3d_50", num_classes=101),
        floor=resnet3d_50,
        shape=(1, 3, 16, 64, 64),
    ),
    Case(
        name="p3d_63",
        build=lambda: create_model("p3d_63", num_classes=101, dropout=0.0),
        floor=p3d_63,
        shape=(1, 3, 16, 96, 96),
    ),
]

if __name__ == "__main__":
    sys.exit(main(CASES))
