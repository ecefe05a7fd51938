"""The table of ``cliplift models``: everything in it is measured when it is printed.

``cliplift import-weights``: a foreign weights file becomes an export folder of a registered model.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cliplift.launch.commands.command import Command

if TYPE_CHECKING:
    from torch import Tensor

    from cliplift.models import VideoNetwork
    from cliplift.models.state_dicts import LoadReport, WeightMatch

HEADER = ("model", "dims", "classes", "parameters", "input", "GMACs", "features", "weights", "paper")
CHECK_FAILED = 1
LISTED = 40  # keys printed of each kind


def add_models_options(models: argparse.ArgumentParser) -> None:
    models.add_argument("--markdown", action="store_true", help="print a Markdown table")


def add_import_options(weights: argparse.ArgumentParser) -> None:
    weights.add_argument("--model", required=True, help="registered name of the model; see `cliplift models`")
    weights.add_argument("--output", default=None, help="folder to write: model.safetensors and config.json")
    weights.add_argument(
        "--option",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="option of the model; may be repeated",
    )
    weights.add_argument(
        "--num-classes",
        type=int,
        default=None,
        help="classes; default: the source's; 0 leaves the classifier out",
    )
    weights.add_argument("--in-frames", type=int, default=None, help="frames of a clip; default: the model's")
    weights.add_argument("--dry-run", action="store_true", help="print which tensors fit, and write nothing")


def run_models(arguments: argparse.Namespace) -> int:
    from cliplift.launch.commands.subject import prepare_environment

    prepare_environment()
    print(zoo_table(arguments.subject or "*", markdown=arguments.markdown))
    return 0


def zoo_table(pattern: str, *, markdown: bool) -> str:
    """One row per model that matches the pattern. Raises ConfigError when none does."""
    from cliplift.configs.sections import ConfigError
    from cliplift.models import list_models
    from cliplift.models.registry import model_plugins

    names = list_models(pattern)
    if not names:
        raise ConfigError(
            f"no model matches {pattern!r}", file="command line", hint="`cliplift models` lists all of them"
        )
    rows = [HEADER, *(_row(name) for name in names)]
    if markdown:
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join([lines[0], "|" + " --- |" * len(HEADER), *lines[1:]])
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    origins = {plugin.name: plugin.origin for plugin in model_plugins() if not plugin.fault}
    lines += [f"plug-in {name}: {origins[name]}" for name in names if name in origins]
    return "\n".join(lines)


def _row(name: str) -> tuple[str, ...]:
    from cliplift.models.measure import measure_model
    from cliplift.models.registry import model_entry

    entry = model_entry(name)
    facts = measure_model(name)
    return (
        name,
        entry.dims,
        str(entry.default_classes),
        f"{facts.parameters:,}",
        "x".join(map(str, facts.input_shape)),
        f"{facts.gmacs:.2f}",
        str(facts.feature_dim),
        " ".join(_weights_at_hand(name)),
        entry.paper,
    )


def _weights_at_hand(name: str) -> list[str]:
    """What ``pretrained`` takes for a model without a file of one's own, of packages that are installed.

    "2d:" stands before the tags of its 2D counterpart, whose weights are inflated.
    """
    import torch

    from cliplift.models import ModelError, create_model
    from cliplift.models.protocol import published_weights

    with torch.device("meta"):
        tags = tuple(published_weights(create_model(name)))
    found = []
    for word in (word for tag in tags for word in (tag, f"2d:{tag}")):
        try:
            create_model(name, pretrained=word)
        except ModelError:  # its package is not installed, or these are not all of its tensors
            continue
        found.append(word)
    return found[:1]


def run_import_weights(arguments: argparse.Namespace) -> int:
    """Prints what fits, writes the folder, reads it back. Exit code 1 for a dry run of weights that do not fit."""
    from cliplift.models.factory import FLAT_PREFIX
    from cliplift.models.state_dicts import load_state, read_state

    options = parsed_options(arguments.option)
    if not arguments.dry_run:
        _check_output(arguments.output)
    if arguments.subject.startswith(FLAT_PREFIX):
        return _import_inflated(arguments, options)
    state = read_state(_build(arguments, options, classes=0, device="meta"), arguments.subject)
    classes, match = _matched(arguments, options, state)
    print(describe_match(match, classes=classes, title=f"{arguments.subject} -> {arguments.model}"))
    if arguments.dry_run:
        return 0 if match.loads else CHECK_FAILED
    model = _build(arguments, options, classes=classes)
    report = load_state(model, state, source=arguments.subject)
    _write(arguments, options, model, report)
    return 0


def parsed_options(words: Sequence[str]) -> dict[str, object]:
    """``key=value`` words, their values read as YAML as in a config."""
    from cliplift.configs.load import COMMAND_LINE
    from cliplift.configs.sections import ConfigError
    from cliplift.configs.yaml_text import YamlTextError, read_word

    options: dict[str, object] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key.isidentifier():
            raise ConfigError(
                f"{word!r} is not an option", key="--option", file=COMMAND_LINE, hint="write key=value"
            )
        if key in options:
            raise ConfigError(f"{key!r} is given twice", key="--option", file=COMMAND_LINE)
        try:
            options[key] = read_word(text)
        except YamlTextError:
            raise ConfigError(f"{word!r} has no readable value", key="--option", file=COMMAND_LINE) from None
    return options


def describe_match(match: WeightMatch, *, classes: int, title: str) -> str:
    """The comparison as lines: counts, then the keys of every kind that does not fit."""
    lines = [f"{title}: {len(match.matched)} tensors match"]
    lines += [f"  note: {note}" for note in match.notes]
    for what, keys in (
        ("missing in the source", match.missing),
        ("unknown to the model", match.unexpected),
        ("of another shape", match.reshaped),
    ):
        if keys:
            lines.append(f"  {len(keys)} {what}:")
            lines += [f"    {key}" for key in keys[:LISTED]]
            lines += [f"    and {len(keys) - LISTED} more"] if len(keys) > LISTED else []
    return "\n".join([*lines, f"  {_head(match, classes)}"])


def _head(match: WeightMatch, classes: int) -> str:
    if classes == 0:
        left = f"; left out: {', '.join(match.head_given)}" if match.head_given else ""
        return f"no classifier: the model gives features{left}"
    if match.head_fits:
        return f"classifier: {classes} classes, from the source"
    return f"classifier: {classes} classes, FRESHLY INITIALISED; the source has {', '.join(match.head_given) or 'none'}"


def _matched(
    arguments: argparse.Namespace, options: dict[str, object], state: dict[str, Tensor]
) -> tuple[int, WeightMatch]:
    """The number of classes (asked for, else the source's own, else none) and the comparison with that many."""
    from cliplift.models.state_dicts import match_weights

    classes: int | None = arguments.num_classes
    if classes is None:
        probe = _build(arguments, options, classes=None, device="meta")
        classes = match_weights(probe, state).classes or 0
    return classes, match_weights(_build(arguments, options, classes=classes, device="meta"), state)


def _build(
    arguments: argparse.Namespace, options: dict[str, object], *, classes: int | None, device: str = "cpu"
) -> VideoNetwork:
    import torch

    from cliplift.models import create_model

    given: dict[str, object] = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    with torch.device(device):
        return create_model(
            arguments.model, num_classes=classes, in_frames=arguments.in_frames, pretrained=None, **given
        )


def _import_inflated(arguments: argparse.Namespace, options: dict[str, object]) -> int:
    """2D weights: the classifier is never carried over, so there is none unless ``--num-classes`` asks for one."""
    from cliplift.models.factory import load_pretrained

    model = _build(arguments, options, classes=arguments.num_classes or 0)
    report = load_pretrained(model, arguments.subject)
    print(f"{arguments.subject} -> {arguments.model}: {report.loaded} tensors loaded")
    for note in report.notes:
        print(f"  note: {note}")
    if not arguments.dry_run:
        _write(arguments, options, model, report)
    return 0


def _write(
    arguments: argparse.Namespace, options: dict[str, object], model: VideoNetwork, report: LoadReport
) -> None:
    """The export folder, read back through the public loader, which must give the same tensors."""
    import torch

    from cliplift.models.factory import from_pretrained, save_pretrained
    from cliplift.models.state_dicts import CONFIG
    from cliplift.models.weight_files import weight_files

    extra = {"imported_from": Path(arguments.subject).name, "notes": list(report.notes)}
    folder = save_pretrained(model, arguments.output, name=arguments.model, options=options, extra=extra)
    before, after = model.state_dict(), from_pretrained(folder).state_dict()
    assert before.keys() == after.keys(), folder
    assert all(torch.equal(before[k], after[k]) for k in before), folder
    print(f"written: {folder} ({', '.join(file.name for file in weight_files(folder))}, {CONFIG})")


def _check_output(output: str | None) -> None:
    from cliplift.configs.load import COMMAND_LINE
    from cliplift.configs.sections import ConfigError
    from cliplift.models.state_dicts import CONFIG
    from cliplift.models.weight_files import INDEX, WEIGHTS

    if output is None:
        raise ConfigError(
            "is needed", key="--output", file=COMMAND_LINE, hint="name the folder to write, or give --dry-run"
        )
    taken = [name for name in (WEIGHTS, INDEX, CONFIG) if (Path(output) / name).exists()]
    if taken or (Path(output).exists() and not Path(output).is_dir()):
        raise ConfigError(
            f"{output!r} holds {taken[0] if taken else 'a file'} already",
            key="--output",
            value=output,
            file=COMMAND_LINE,
            hint="name another folder",
        )


COMMANDS = (
    Command(
        name="import-weights",
        summary="turn another project's weights file into an export folder of one of our models",
        subject="SOURCE",
        subject_help="weights file (.safetensors, .pth, .pyth, .bin), export folder, or 2d: and a 2D network's file",
        rest="",
        add_options=add_import_options,
        run=run_import_weights,
    ),
    Command(
        name="models",
        summary="list the models, with parameters and GMACs measured",
        subject="PATTERN",
        subject_help="shell pattern of names, such as 't3d*'",
        subject_required=False,
        rest="",
        add_options=add_models_options,
        run=run_models,
    ),
)
