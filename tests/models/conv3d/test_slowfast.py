"""SlowFast: published counts and sizes, the two frame rates, a block and a lateral connection against their formulas,
and the names of the three kinds of weight files."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models import ModelError, create_model
from cliplift.models.conv3d.slowfast import Block, Lateral, Pathways, SlowFast
from cliplift.models.factory import load_pretrained
from cliplift.models.inflate import inflate
from cliplift.models.measure import measure_model
from cliplift.models.state_dicts import load_state

BLOCKS = (3, 4, 6, 3)
FAST_WIDTHS = (8, 16, 32, 64)


def on_meta(**options: object) -> SlowFast:
    with torch.device("meta"):
        model = create_model("slowfast_r50_8x8", **options)
    assert isinstance(model, SlowFast)
    return model


def test_published_counts_and_sizes() -> None:
    """33,762,043 at 51 classes, 50.31 GMAC; 34,566,488 at 400 as in pytorchvideo; 2048x8x7x7 and 256x32x7x7."""
    measured = measure_model("slowfast_r50_8x8", num_classes=51)
    assert measured.parameters == 33_762_043
    assert measured.gmacs == pytest.approx(50.31, abs=0.01)
    assert measured.input_shape == (3, 32, 224, 224)
    assert measured.feature_shape == (2304, 8, 7, 7)
    model = on_meta()
    assert sum(p.numel() for p in model.parameters()) == 34_566_488
    with torch.device("meta"):
        slow, fast = model.forward_pathways(torch.empty(2, 3, 32, 224, 224))
    assert (slow.shape, fast.shape) == ((2, 2048, 8, 7, 7), (2, 256, 32, 7, 7))


def test_the_options_size_the_pathways() -> None:
    """alpha: Slow's frames; beta_inv: Fast's channels; lateral_ratio: what Slow gets from Fast, by Table 1's widths."""
    model = on_meta(alpha=8, beta_inv=4, lateral_ratio=3, lateral_kernel=5, num_classes=0)
    with torch.device("meta"):
        slow, fast = model.forward_pathways(torch.empty(1, 3, 16, 64, 64))
    assert (slow.shape, fast.shape) == ((1, 2048, 2, 2, 2), (1, 512, 16, 2, 2))
    assert model.feature_dim == 2560
    for stage, slow_channels, fast_channels in ((1, 64, 16), (2, 256, 64), (3, 512, 128), (4, 1024, 256)):
        lateral = model.get_submodule(f"s{stage}_fuse").conv_f2s
        assert tuple(lateral.weight.shape) == (3 * fast_channels, fast_channels, 5, 1, 1)
        assert lateral.stride == (8, 1, 1)
        first = model.get_submodule(f"s{stage + 1}.pathway0_res0").branch2.a
        assert first.in_channels == slow_channels + 3 * fast_channels
        assert model.get_submodule(f"s{stage + 1}.pathway1_res0").branch2.a.in_channels == fast_channels


def test_time_kernels_are_table_1s() -> None:
    model = on_meta()
    depths = {
        name: tuple(
            model.get_submodule(f"s{s}.pathway{p}_res0").branch2.a.kernel_size[0] for s in range(2, 6)
        )
        for p, name in enumerate(("slow", "fast"))
    }
    assert depths == {"slow": (1, 1, 3, 3), "fast": (3, 3, 3, 3)}
    stems = [model.get_submodule(f"s1.pathway{p}_stem").conv for p in (0, 1)]
    assert [stem.kernel_size for stem in stems] == [(1, 7, 7), (5, 7, 7)]
    assert all(
        m.stride[0] == 1 for n, m in model.named_modules() if isinstance(m, nn.Conv3d) and "f2s" not in n
    )


def test_which_frames_the_pathways_see() -> None:
    """Strided by alpha (paper); spread as PySlowFast's linspace(0, 31, 8) truncated; every second of 64 for 32."""
    clip = torch.arange(64.0).view(1, 1, 64, 1, 1)

    def frames(x: Tensor) -> list[int]:
        return [int(v) for v in x.flatten()]

    slow, fast = Pathways().split(clip[:, :, :32])
    assert (frames(slow), frames(fast)) == ([0, 4, 8, 12, 16, 20, 24, 28], list(range(32)))
    slow, fast = Pathways(slow_sampling="spread").split(clip[:, :, :32])
    assert (frames(slow), frames(fast)) == ([0, 4, 8, 13, 17, 22, 26, 31], list(range(32)))
    slow, fast = Pathways(fast_stride=2).split(clip)
    assert (frames(slow), frames(fast)) == (list(range(0, 64, 8)), list(range(0, 64, 2)))
    assert on_meta(in_frames=64, fast_stride=2).input_spec.frame_stride == 1
    assert on_meta().input_spec.frame_stride == 2


def scrambled(module: nn.Module) -> nn.Module:
    for part in module.modules():
        if isinstance(part, nn.BatchNorm3d):
            part.running_mean.normal_(0, 0.2)
            part.running_var.uniform_(0.5, 2)
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0, 0.2)
    return module.double().eval()


def normalised(x: Tensor, bn: nn.Module) -> Tensor:
    view = (1, -1, 1, 1, 1)
    centred = (x - bn.running_mean.view(view)) / (bn.running_var.view(view) + bn.eps).sqrt()
    return centred * bn.weight.view(view) + bn.bias.view(view)


def over_time(x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    """A kx1x1 convolution with k // 2 zeros at either end, as a sum over neighbours."""
    depth = kernel.shape[2]
    padded = F.pad(x, (0, 0, 0, 0, depth // 2, depth // 2))
    frames = []
    for t in range(0, x.shape[2], stride):
        near = (
            torch.einsum("bchw,oc->bohw", padded[:, :, t + d], kernel[:, :, d, 0, 0]) for d in range(depth)
        )
        frames.append(sum(near, torch.zeros((), dtype=x.dtype)))
    return torch.stack(frames, dim=2)


def over_space(x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    frames = [F.conv2d(x[:, :, t], kernel[:, :, 0], stride=stride, padding=1) for t in range(x.shape[2])]
    return torch.stack(frames, dim=2)


@pytest.mark.parametrize(("in_channels", "stride", "depth"), [(8, 1, 3), (6, 2, 1), (6, 1, 3)])
def test_a_block_is_its_formula(in_channels: int, stride: int, depth: int) -> None:
    torch.manual_seed(0)
    block = scrambled(Block(in_channels, 2, depth=depth, stride=stride))
    x = torch.randn(2, in_channels, 4, 5, 6, dtype=torch.float64)
    inner = block.branch2
    y = normalised(over_time(x, inner.a.weight, 1), inner.a_bn).relu()
    y = normalised(over_space(y, inner.b.weight, stride), inner.b_bn).relu()
    y = normalised(torch.einsum("bcthw,oc->bothw", y, inner.c.weight.flatten(1)), inner.c_bn)
    kept = x
    if (in_channels, stride) != (8, 1):
        taken = x[:, :, :, ::stride, ::stride]
        kept = torch.einsum("bcthw,oc->bothw", taken, block.branch1.weight.flatten(1))
        kept = normalised(kept, block.branch1_bn)
    torch.testing.assert_close(block(x), (y + kept).relu(), rtol=1e-10, atol=1e-10)


def test_a_lateral_connection_is_its_formula() -> None:
    torch.manual_seed(0)
    lateral = scrambled(Lateral(3, Pathways(alpha=4, lateral_ratio=2, lateral_kernel=7)))
    fast = torch.randn(2, 3, 12, 4, 5, dtype=torch.float64)
    expected = normalised(over_time(fast, lateral.conv_f2s.weight, 4), lateral.bn).relu()
    assert expected.shape == (2, 6, 3, 4, 5)
    torch.testing.assert_close(lateral(fast), expected, rtol=1e-10, atol=1e-10)


def test_every_block_starts_as_its_shortcut() -> None:
    torch.manual_seed(0)
    block = Block(8, 2, depth=3, stride=1).eval()
    x = torch.randn(1, 8, 4, 5, 6)
    assert torch.equal(block(x), x.relu())


def test_the_head_is_the_released_one() -> None:
    """Each pathway averaged over its own frames, concatenated, projected: what the fused map's average must be."""
    torch.manual_seed(0)
    model = create_model("slowfast_r50_8x8", num_classes=5).eval()
    nn.init.normal_(model.projection.weight)
    x = torch.randn(2, 3, 8, 32, 32)
    with torch.no_grad():
        slow, fast = model.forward_pathways(x)
        pooled = torch.cat([slow.mean(dim=(2, 3, 4)), fast.mean(dim=(2, 3, 4))], dim=1)
        expected = pooled @ model.projection.weight.T + model.projection.bias
        answer = model(x)
    # float32: sums of 2304 products in another order
    torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-4)


def test_lateral_connections_carry_fast_into_slow() -> None:
    """A frame that only Fast sees changes Slow's map; without lateral weights it does not."""
    torch.manual_seed(0)
    model = create_model("slowfast_r50_8x8", num_classes=0).eval()
    clip = torch.randn(1, 3, 8, 32, 32)
    moved = clip.clone()
    moved[:, :, 2] += 1  # Slow sees 0 and 4
    with torch.no_grad():
        assert not torch.equal(model.forward_pathways(clip)[0], model.forward_pathways(moved)[0])
        for stage in range(1, 5):
            model.get_submodule(f"s{stage}_fuse").conv_f2s.weight.zero_()
        assert torch.equal(model.forward_pathways(clip)[0], model.forward_pathways(moved)[0])


NORM = ("weight", "bias", "running_mean", "running_var")


def layers() -> dict[str, dict[str, str]]:
    """Every convolution and BN, ours -> its names in the other two projects, generated from their naming rules."""
    names: dict[str, dict[str, str]] = {}

    def add(conv: str, bn: str, *, video: tuple[str, str], caffe: str) -> None:
        names[conv] = {"pytorchvideo": video[0], "caffe2": caffe}
        names[bn] = {"pytorchvideo": video[1], "caffe2": f"{caffe}_bn"}

    for p, t in ((0, ""), (1, "t_")):
        video = f"blocks.0.multipathway_blocks.{p}"
        add(
            f"s1.pathway{p}_stem.conv",
            f"s1.pathway{p}_stem.bn",
            video=(f"{video}.conv", f"{video}.norm"),
            caffe="?",
        )
        names[f"s1.pathway{p}_stem.conv"]["caffe2"] = f"{t}conv1"
        names[f"s1.pathway{p}_stem.bn"]["caffe2"] = f"{t}res_conv1_bn"
    for s, count in enumerate(BLOCKS, start=2):
        left = f"blocks.{s - 2}.multipathway_fusion"
        source = "t_pool1" if s == 2 else f"t_res{s - 1}_{BLOCKS[s - 3] - 1}_branch2c_bn"
        add(
            f"s{s - 1}_fuse.conv_f2s",
            f"s{s - 1}_fuse.bn",
            video=(f"{left}.conv_fast_to_slow", f"{left}.norm"),
            caffe=f"{source}_subsample",
        )
        for p, t in ((0, ""), (1, "t_")):
            for i in range(count):
                ours, caffe = f"s{s}.pathway{p}_res{i}", f"{t}res{s}_{i}_branch"
                video = f"blocks.{s - 1}.multipathway_blocks.{p}.res_blocks.{i}"
                for x in "abc":
                    pair = (f"{video}.branch2.conv_{x}", f"{video}.branch2.norm_{x}")
                    add(f"{ours}.branch2.{x}", f"{ours}.branch2.{x}_bn", video=pair, caffe=f"{caffe}2{x}")
                if i == 0:
                    pair = (f"{video}.branch1_conv", f"{video}.branch1_norm")
                    add(f"{ours}.branch1", f"{ours}.branch1_bn", video=pair, caffe=f"{caffe}1")
    names["projection"] = {"pytorchvideo": "blocks.6.proj", "caffe2": "pred"}
    return names


def test_the_layers_are_all_there() -> None:
    state = on_meta().state_dict()
    assert {key.rpartition(".")[0] for key in state} == set(layers())


def translated(state: dict[str, Tensor], project: str) -> dict[str, Tensor]:
    short = {"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv"}
    names, foreign = layers(), {}
    for key, value in state.items():
        layer, _, tensor = key.rpartition(".")
        theirs = names[layer][project]
        if project == "pytorchvideo":
            foreign[f"{theirs}.{tensor}"] = value
        elif tensor != "num_batches_tracked":
            is_norm = theirs.endswith("_bn")
            foreign[f"{theirs}_{short[tensor] if is_norm or tensor == 'bias' else 'w'}"] = value
    return foreign


@pytest.mark.parametrize("project", ["pytorchvideo", "caffe2"])
def test_other_projects_names_are_read(project: str) -> None:
    model = on_meta()
    state = model.state_dict()
    foreign = translated(state, project)
    literal = {
        "pytorchvideo": {
            "blocks.0.multipathway_fusion.conv_fast_to_slow.weight",
            "blocks.1.multipathway_blocks.1.res_blocks.2.branch2.norm_c.running_var",
            "blocks.4.multipathway_blocks.0.res_blocks.0.branch1_norm.weight",
            "blocks.6.proj.bias",
        },
        "caffe2": {
            "t_pool1_subsample_w",
            "t_res4_5_branch2c_bn_subsample_bn_riv",
            "res_conv1_bn_s",
            "t_res2_0_branch2a_w",
            "res5_2_branch2c_bn_rm",
            "pred_b",
        },
    }
    assert literal[project] <= set(foreign)
    renamed, notes = model.adapt_state_dict(foreign)
    expected = {k for k in state if project == "pytorchvideo" or not k.endswith("num_batches_tracked")}
    assert set(renamed) == expected
    assert all(renamed[key] is state[key] for key in renamed), "a tensor went to another layer"
    assert notes


def test_a_file_of_pyslowfast_loads(tmp_path: Path) -> None:
    """Its ``.pyth`` holds ``model_state`` beside the epoch and the configuration; the head is ``head.projection``."""
    with torch.device("meta"):
        model, other = on_meta(num_classes=4), on_meta(num_classes=4)
    model, other = model.to_empty(device="cpu"), other.to_empty(device="cpu")
    for n, tensor in enumerate(model.state_dict().values()):
        tensor.fill_(n)
    file = {k.replace("projection.", "head.projection."): v for k, v in model.state_dict().items()}
    path = tmp_path / "SLOWFAST_8x8_R50.pyth"
    torch.save({"epoch": 1, "model_state": file, "optimizer_state": {}, "cfg": "TRAIN:\n"}, path)
    report = load_pretrained(other, path)
    assert report.loaded == len(file)
    assert any("PySlowFast" in note for note in report.notes)
    loaded = other.state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in model.state_dict().items())


def test_unknown_names_are_refused() -> None:
    model = on_meta()
    foreign = translated(model.state_dict(), "caffe2")
    foreign["nonlocal_conv4_1_theta_w"] = foreign["conv1_w"]
    with pytest.raises(ModelError, match="nonlocal_conv4_1_theta_w"):
        load_state(model, foreign, source="SLOWFAST_NLN_8x8_R50.pkl")
    with pytest.raises(ModelError, match="not the weights of this model"):
        load_state(on_meta(lateral_kernel=5), model.state_dict(), source="8x8")


def test_both_stems_take_flow() -> None:
    model = on_meta(in_channels=2, num_classes=51)
    assert sum(p.numel() for p in model.parameters()) == 33_762_043 - 64 * 49 - 8 * 5 * 49
    given = dict(on_meta(num_classes=51).state_dict())
    renamed, notes = model.adapt_state_dict(given)
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert "pathway1_stem" in notes[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_frames": 30}, "in_frames=30 must be a multiple of alpha . fast_stride = 4 . 1 = 4"),
        ({"in_frames": 36, "fast_stride": 2}, "in_frames=36 must be a multiple"),
        ({"alpha": 0}, "alpha=0 must be at least 1"),
        ({"beta_inv": 7}, "beta_inv=7 must divide 64"),
        ({"lateral_kernel": 6}, "lateral_kernel=6 must be odd"),
        ({"slow_sampling": "random"}, "slow_sampling='random' must be 'strided' or 'spread'"),
        ({"in_channels": 1}, "in_channels=1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        on_meta(**options)


def test_bad_clips_are_refused() -> None:
    model = on_meta()
    with torch.device("meta"):
        with pytest.raises(ModelError, match="in_frames=10"):
            model(torch.empty(1, 3, 10, 64, 64))
        with pytest.raises(ModelError, match="C=3"):
            model(torch.empty(1, 2, 8, 64, 64))
        with pytest.raises(ModelError, match="SlowFast has no 2D counterpart"):
            inflate(model, {"conv1.weight": torch.empty(64, 3, 7, 7)})
