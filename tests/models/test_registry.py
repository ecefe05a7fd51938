"""The registry: names, options and the messages for wrong ones."""

import pytest
import torch

from cliplift.models import (
    ModelError,
    UnknownModelError,
    VideoModel,
    create_model,
    list_models,
    model_options,
    protocol,
    registry,
)
from cliplift.models.registry import model_entry, register_model, variant


def test_patterns_and_dimensions_select_models() -> None:
    assert list_models("t3d_*") == ["t3d_121", "t3d_169", "t3d_tiny"]
    assert {"densenet_121", "resnet_50", "efficientnet_lite0"} <= set(list_models(dims="2d"))
    assert not set(list_models(dims="2d")) & set(list_models(dims="3d"))
    assert list_models("no_such_*") == []
    assert list_models() == sorted(list_models())


def test_an_unknown_name_is_answered_with_near_ones() -> None:
    with pytest.raises(UnknownModelError, match=r"unknown model 't3d_12': did you mean 't3d_121'"):
        create_model("t3d_12")
    with pytest.raises(UnknownModelError, match="cliplift models"):
        create_model("zzzzzzzz")
    assert issubclass(UnknownModelError, ModelError)
    assert issubclass(ModelError, ValueError)


def test_an_unknown_option_is_answered_with_the_near_one() -> None:
    with pytest.raises(ModelError, match=r"'t3d_tiny' has no option 'fussion': did you mean 'fusion'\?"):
        create_model("t3d_tiny", fussion=True)
    with pytest.raises(ModelError, match="it takes"):
        create_model("t3d_tiny", zzz=1)


def test_classes_and_frames_are_checked_and_recorded() -> None:
    with pytest.raises(ModelError, match="num_classes=-1"):
        create_model("t3d_tiny", num_classes=-1)
    with torch.device("meta"):
        model = create_model("t3d_tiny", in_frames=12)
    assert isinstance(model, VideoModel)
    assert model.input_spec.frames == 12
    assert model.num_classes == 400, "None means the published number of classes"


def test_every_entry_has_a_paper_and_a_docstring() -> None:
    for name in list_models():
        entry = model_entry(name)
        assert entry.paper, name
        assert entry.build.__doc__, name
        for option, parameter in model_options(name).items():
            assert parameter.default is not parameter.empty, f"{name}: option {option} has no default"


def test_a_name_cannot_be_registered_twice() -> None:
    list_models()
    with pytest.raises(AssertionError, match="registered twice"):

        @register_model()
        def t3d_121(**_: object) -> torch.nn.Module:
            return torch.nn.Identity()


def test_a_variant_is_its_family_with_other_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fixed arguments are no options; the other defaults are the variant's, and what the caller gives wins."""
    list_models()
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))

    def family(*, depth: int, num_classes: int = 400, in_frames: int = 16, width: int = 8) -> torch.nn.Module:
        """What the options mean."""
        return torch.nn.Linear(width, num_classes + depth)

    build = variant("family_50", family, paper="a paper", fixed={"depth": 50}, width=4, num_classes=10)
    entry = model_entry("family_50")
    assert (entry.default_classes, entry.paper, entry.build.__doc__) == (
        10,
        "a paper",
        "What the options mean.",
    )
    assert {name: option.default for name, option in model_options("family_50").items()} == {"width": 4}
    assert build().weight.shape == (60, 4)
    assert build(width=3, num_classes=2).weight.shape == (52, 3)
    with pytest.raises(AssertionError, match="no such arguments"):
        variant("family_51", family, paper="a paper", fixed={"deep": 50})


def test_a_model_that_lacks_part_of_the_protocol_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    list_models()
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))

    @register_model(paper="a paper")
    def half_a_model(*, num_classes: int = 400, in_frames: int = 16) -> torch.nn.Module:
        return torch.nn.Identity()

    with pytest.raises(
        ModelError, match=r"'half_a_model': Identity lacks feature_dim, num_classes, input_spec"
    ):
        create_model("half_a_model")


def test_hooks_are_recognised_by_what_a_model_has() -> None:
    with torch.device("meta"):
        t3d, slowfast, lite = (
            create_model(n) for n in ("t3d_tiny", "slowfast_r50_8x8", "efficientnet_lite0")
        )
    assert not isinstance(t3d, protocol.HasPathways)
    assert isinstance(slowfast, protocol.HasPathways)
    assert not protocol.published_weights(t3d)
    assert list(protocol.published_weights(lite)) == ["imagenet"]
    state = {"key": torch.zeros(1)}
    assert protocol.adapt_2d_state(t3d, state) is state
    assert protocol.adapt_state_dict(torch.nn.Identity(), state) == (state, [])
