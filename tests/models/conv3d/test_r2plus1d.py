"""R(2+1)D: published counts and sizes, a block against its formula, and the names of the four kinds of weight files."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cliplift.models import ModelError, create_model
from cliplift.models.conv3d.r2plus1d import FactoredBlock, R2Plus1D, middle_channels
from cliplift.models.factory import load_pretrained
from cliplift.models.image.resnet import LAYERS
from cliplift.models.inflate import inflate
from cliplift.models.measure import measure_model
from cliplift.models.state_dicts import load_state


def test_published_counts_and_sizes() -> None:
    """torchvision's r2plus1d_18 (31,505,325; 40.52 GMAC); the IG65M port's r2plus1d_34, head of 51 and of 359."""
    small = measure_model("r2plus1d_18")
    assert small.parameters == 31_505_325
    assert small.gmacs == pytest.approx(40.52, abs=0.01)
    large = measure_model("r2plus1d_34", num_classes=51)
    assert large.parameters == 63_518_138
    assert large.gmacs == pytest.approx(152.36, abs=0.01)
    assert large.input_shape == (3, 32, 112, 112)
    assert large.feature_shape == (512, 4, 7, 7)
    published = measure_model("r2plus1d_34")
    assert (published.num_classes, published.parameters) == (359, 63_676_142)
    assert measure_model("r2plus1d_34", in_frames=64).feature_shape == (512, 8, 7, 7)


def test_middle_channels_are_the_papers() -> None:
    """M makes the two factors cost a 3x3x3; 144, 230/288, 460/576 and 921/1152 are the released widths."""
    pairs = [(64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512), (512, 512)]
    assert [middle_channels(*pair) for pair in pairs] == [144, 230, 288, 460, 576, 921, 1152]
    for inside, outside in pairs:
        m = middle_channels(inside, outside)
        factored, whole = 9 * inside * m + 3 * m * outside, 27 * inside * outside
        assert whole - 9 * inside - 3 * outside < factored <= whole


def test_the_two_rules_differ_in_the_second_convolution_of_a_downsampling_block() -> None:
    with torch.device("meta"):
        models = {rule: create_model("r2plus1d_34", mid_channels=rule) for rule in ("block", "convolution")}
    shapes = {rule: {k: v.shape for k, v in m.state_dict().items()} for rule, m in models.items()}
    different = {k.split(".0.")[0] for k, v in shapes["block"].items() if shapes["convolution"][k] != v}
    assert different == {"layer2", "layer3", "layer4"}
    for rule, widths in (("block", (230, 460, 921)), ("convolution", (288, 576, 1152))):
        assert tuple(shapes[rule][f"layer{s}.0.conv2.0.0.weight"][0] for s in (2, 3, 4)) == widths


def normalised(x: Tensor, bn: nn.Module) -> Tensor:
    """BatchNorm by its definition, with the running statistics."""
    view = (1, -1, 1, 1, 1)
    centred = (x - bn.running_mean.view(view)) / (bn.running_var.view(view) + bn.eps).sqrt()
    return centred * bn.weight.view(view) + bn.bias.view(view)


def over_time(x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    """A 3x1x1 convolution as a sum over the three neighbours: einsum per neighbour, zeros outside."""
    padded = F.pad(x, (0, 0, 0, 0, 1, 1))
    frames = range(0, x.shape[2], stride)
    rows = [
        sum(torch.einsum("bchw,oc->bohw", padded[:, :, t + d], kernel[:, :, d, 0, 0]) for d in range(3))
        for t in frames
    ]
    return torch.stack(rows, dim=2)


def over_space(x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    """A 1x3x3 convolution: a 2D one on every frame."""
    frames = [F.conv2d(x[:, :, t], kernel[:, :, 0], stride=stride, padding=1) for t in range(x.shape[2])]
    return torch.stack(frames, dim=2)


def factored(x: Tensor, part: nn.Module, stride: int) -> Tensor:
    middle = normalised(over_space(x, part[0].weight, stride), part[1]).relu()
    return over_time(middle, part[3].weight, stride)


@pytest.mark.parametrize(("in_channels", "stride"), [(4, 1), (3, 2)])
def test_a_block_is_its_formula(in_channels: int, stride: int) -> None:
    torch.manual_seed(0)

    def norm(channels: int) -> nn.Module:
        return nn.BatchNorm3d(channels, eps=1e-3)

    block = FactoredBlock(in_channels, 4, stride=stride, mid_channels="convolution", norm=norm)
    for part in block.modules():
        if isinstance(part, nn.BatchNorm3d):
            part.running_mean.normal_(0, 0.2)
            part.running_var.uniform_(0.5, 2)
            nn.init.normal_(part.bias, 0, 0.2)
    block = block.double().eval()
    x = torch.randn(2, in_channels, 5, 6, 7, dtype=torch.float64)
    y = normalised(factored(x, block.conv1[0], stride), block.conv1[1]).relu()
    y = normalised(factored(y, block.conv2[0], 1), block.conv2[1])
    kept = x
    if stride == 2:
        taken = torch.einsum("bcthw,oc->bothw", x[:, :, ::2, ::2, ::2], block.downsample[0].weight.flatten(1))
        kept = normalised(taken, block.downsample[1])
    torch.testing.assert_close(block(x), (y + kept).relu(), rtol=1e-10, atol=1e-10)


def small_net(depth: int = 18, *, channels: int = 3, classes: int = 7) -> R2Plus1D:
    return R2Plus1D(
        depth=depth,
        frame_stride=1,
        num_classes=classes,
        in_frames=8,
        in_channels=channels,
        mid_channels="convolution",
        bn_eps=1e-3,
    )


CAFFE2_NORM = {"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv"}


def caffe2_blobs(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """VMZ's names, after its lib/models/r3d_model.py: component n, convolution j, "middle" for the first factor."""
    blobs: dict[str, Tensor] = {}

    def norm(ours: str, blob: str) -> None:
        blobs.update({f"{blob}_{short}": state[f"{ours}.{tensor}"] for tensor, short in CAFFE2_NORM.items()})

    for ours, blob in (("stem.0", "conv1_middle"), ("stem.3", "conv1")):
        blobs[f"{blob}_w"] = state[f"{ours}.weight"]
        norm(f"stem.{int(ours[-1]) + 1}", f"{blob}_spatbn_relu")
    n = 0
    for stage, count in enumerate(LAYERS[depth], start=1):
        for i in range(count):
            block = f"layer{stage}.{i}"
            for j in (1, 2):
                blobs[f"comp_{n}_conv_{j}_middle_w"] = state[f"{block}.conv{j}.0.0.weight"]
                norm(f"{block}.conv{j}.0.1", f"comp_{n}_spatbn_{j}_middle")
                blobs[f"comp_{n}_conv_{j}_w"] = state[f"{block}.conv{j}.0.3.weight"]
                norm(f"{block}.conv{j}.1", f"comp_{n}_spatbn_{j}")
            if stage > 1 and i == 0:
                blobs[f"shortcut_projection_{n}_w"] = state[f"{block}.downsample.0.weight"]
                norm(f"{block}.downsample.1", f"shortcut_projection_{n}_spatbn")
            n += 1
    classes = state["fc.weight"].shape[0]
    blobs[f"last_out_L{classes}_w"], blobs[f"last_out_L{classes}_b"] = state["fc.weight"], state["fc.bias"]
    return blobs


@pytest.mark.parametrize("depth", [18, 34])
def test_caffe2s_blobs_load_completely(depth: int) -> None:
    with torch.device("meta"):
        model = small_net(depth)
        state = model.state_dict()
    blobs = caffe2_blobs(state, depth)
    counters = {key for key in state if key.endswith("num_batches_tracked")}
    assert len(blobs) == len(state) - len(counters)
    renamed, notes = model.adapt_state_dict(blobs)
    assert renamed.keys() == state.keys() - counters
    assert all(renamed[key] is state[key] for key in renamed), "a blob went to another layer"
    assert "Caffe2" in notes[0]


def test_an_unknown_blob_is_refused_by_name() -> None:
    with torch.device("meta"):
        model = small_net()
        blobs = caffe2_blobs(model.state_dict(), 18)
    blobs["comp_8_conv_1_w"] = blobs["comp_7_conv_1_w"]
    with pytest.raises(ModelError, match="comp_8_conv_1_w"):
        load_state(model, blobs, source="r2.5d_d34.pt")


def test_the_names_are_torchvisions_and_late_temporals_are_read() -> None:
    """Literal names of torchvision's VideoResNet; LateTemporalModeling3DCNN numbers its children."""
    with torch.device("meta"):
        model = small_net()
        state = model.state_dict()
    assert {
        "stem.0.weight",
        "stem.4.running_var",
        "layer1.0.conv1.0.0.weight",
        "layer1.0.conv1.0.1.bias",
        "layer1.0.conv1.0.3.weight",
        "layer1.1.conv2.1.running_mean",
        "layer4.0.downsample.1.weight",
        "fc.bias",
    } <= set(state)
    parts = {"stem": 0, "layer1": 1, "layer2": 2, "layer3": 3, "layer4": 4}
    numbered = {}
    for key, value in state.items():
        part, _, rest = key.partition(".")
        numbered[f"features.{parts[part]}.{rest}" if part in parts else f"fc_action.{rest}"] = value
    renamed, notes = model.adapt_state_dict(numbered)
    assert renamed.keys() == state.keys()
    assert all(renamed[key] is state[key] for key in state)
    assert notes


def test_a_file_saved_from_ddp_loads_and_a_head_of_other_classes_stays_fresh(tmp_path: Path) -> None:
    torch.manual_seed(0)
    published, model = small_net(classes=359), small_net(classes=51)
    state = published.state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "ig65m.pth")
    head = model.state_dict()["fc.weight"].clone()
    report = load_pretrained(model, tmp_path / "ig65m.pth")
    assert report.loaded == len(state) - 2
    assert set(report.head_skipped) == {"fc.weight", "fc.bias"}
    assert torch.equal(model.state_dict()["fc.weight"], head)
    loaded = model.state_dict()
    assert all(torch.equal(v, loaded[k]) for k, v in state.items() if not k.startswith("fc."))


def test_rgb_weights_start_a_flow_stream() -> None:
    """Every colour's kernel averaged and repeated (TSN, section 3.2); nothing but the stem changes."""
    torch.manual_seed(0)
    rgb, flow = small_net(), small_net(channels=2)
    report = load_state(flow, rgb.state_dict(), source="rgb")
    stem = rgb.state_dict()["stem.0.weight"]
    expected = (stem[:, 0] + stem[:, 1] + stem[:, 2]) / 3
    for plane in range(2):
        torch.testing.assert_close(flow.state_dict()["stem.0.weight"][:, plane], expected)
    assert any("flow" in note for note in report.notes)
    assert all(
        torch.equal(v, flow.state_dict()[k]) for k, v in rgb.state_dict().items() if k != "stem.0.weight"
    )
    assert flow.eval()(torch.randn(1, 2, 4, 16, 16)).shape == (1, 7)


def test_the_flow_streams_input() -> None:
    with torch.device("meta"):
        spec = create_model("r2plus1d_34", in_channels=2).input_spec
    assert (spec.channels, spec.mean, spec.std) == (2, (0.5, 0.5), (0.226, 0.226))


def test_bad_input_is_refused() -> None:
    with pytest.raises(ModelError, match=r"in_channels=4 must be 3 .* or 2"):
        create_model("r2plus1d_18", in_channels=4)
    with pytest.raises(ModelError, match="mid_channels='vmz'"):
        create_model("r2plus1d_18", mid_channels="vmz")
    with pytest.raises(ModelError, match="bn_momentum=0"):
        create_model("r2plus1d_34", bn_momentum=0)
    with torch.device("meta"):
        model = create_model("r2plus1d_18")
        with pytest.raises(ModelError, match="C=3"):
            model(torch.empty(1, 2, 8, 32, 32))
        with pytest.raises(ModelError, match="R\\(2\\+1\\)D has no 2D counterpart"):
            inflate(model, {"conv1.weight": torch.empty(64, 3, 7, 7)})
