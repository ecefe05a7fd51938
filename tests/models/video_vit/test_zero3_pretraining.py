"""Pretraining nets under ZeRO-3: they call parts of their encoder other than its forward, and every parameter must be
gathered all the same."""

import json
import os
import socket
import subprocess
import sys

import pytest

SCRIPT = """
import contextlib, json, sys, torch, deepspeed
from cliplift.models import create_model
from cliplift.models.hiera.decoder import HieraMaskedAutoencoder
from cliplift.pipelines.compute.recompute import recompute_blocks
from cliplift.models.video_vit.decoder import MaskedAutoencoder
from cliplift.models.video_vit.latent import LatentPredictor

class Latent(torch.nn.Module):
    def __init__(self):
        super().__init__()
        small = {"width": 48, "heads": 2, "hidden": 96, "crop": 64, "in_frames": 4}
        self.encoder = create_model("vjepa21_base_16", num_classes=0, **small)
        self.predictor = LatentPredictor.of(self.encoder, width=36, depth=2, heads=3, predict_context=True)

    def forward(self, clips, context):
        levels = torch.cat(self.encoder.forward_levels(clips, context), dim=-1)
        targets = (context + 5) % 32
        both = self.predictor(levels, context, targets, self.encoder.grid(4, 64))
        return sum(part.square().mean() for part in both)

def masked():
    encoder = create_model("video_vit_tiny_8", num_classes=0, final_norm="tokens", crop=64, in_frames=4, depth=2)
    return MaskedAutoencoder(encoder, width=48, depth=1, heads=3)

def hiera():
    small = {"width": 16, "stages": (1, 1, 1, 1), "crop": 64, "in_frames": 4}
    encoder = create_model("hiera_base", num_classes=0, pretraining=True, **small)
    return HieraMaskedAutoencoder(encoder, width=32, depth=1, heads=4)

deepspeed.init_distributed("gloo")
found = {}
for build, tokens in ((masked, 9), (hiera, 3), (Latent, 5)):
    for stage, fraction, early in ((0, 0.0, False), (3, 1.0, False), (3, 1.0, True)):
        config = {
            "train_batch_size": 2,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "optimizer": {"type": "SGD", "params": {"lr": 0.01}},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        torch.manual_seed(0)
        with deepspeed.zero.Init(config_dict_or_path=config) if early else contextlib.nullcontext():
            model = build()
        if build is not Latent:
            recompute_blocks(model, fraction)
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
        clips = torch.randn(2, 3, 4, 64, 64, generator=torch.Generator().manual_seed(1))
        losses = []
        for _ in range(3):
            out = engine(clips, torch.arange(tokens).expand(2, -1))
            loss = out if build is Latent else out.loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        partitioned = sum(hasattr(p, "ds_id") for p in model.parameters())
        found.setdefault(build.__name__, []).append({"losses": losses, "partitioned": partitioned})
print(json.dumps(found))
"""


@pytest.mark.slow
def test_pretraining_nets_learn_the_same_partitioned() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rank = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, **rank, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == {"masked", "hiera", "Latent"}
    for whole, parts, early in found.values():
        assert early["losses"] == parts["losses"], "built under zero.Init, the weights must be the same"
        assert whole["partitioned"] == 0
        assert parts["partitioned"] > 20
        assert parts["losses"] == pytest.approx(whole["losses"], rel=1e-5)
        assert whole["losses"][2] < whole["losses"][0]
