"""What a run says of its numbers on the terminal: what it is at the start, a line an evaluation, a block at the end."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

NAMES = {
    "accuracy": "accuracy",
    "mean_class_accuracy": "mean class accuracy",
    "top5_accuracy": "top-5 accuracy",
    "mean_average_precision": "mean average precision",
    "global_average_precision": "global average precision",
    "calibration_error": "calibration error",
    "area_under_curve": "area under the ROC curve",
    "f1": "F1",
    "loss": "loss",
    "matching_accuracy": "matching accuracy",
    "auc": "AUC",
    "probe_knn_accuracy": "k-NN probe",
    "probe_linear_accuracy": "linear probe",
    "probe_attentive_accuracy": "attentive probe, best head",
    "probe_attentive_median_accuracy": "attentive probe, median head",
}
SHARES = ("accuracy", "precision", "recall", "share", "chance", "_at_1", "_at_5", "error")
# What explains other numbers, or is printed beside them.
SILENT = ("samples", "chance", "probe_chance", "runs")
SILENT_ENDINGS = ("_low", "_high", "_sd", "_sigmas", "_prior")


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def formatted(name: str, value: float) -> str:
    """A number as a person reads it: shares in percent, everything else with four digits."""
    if name.endswith(SHARES):
        return percent(value)
    return f"{value:.4g}"


def metric_name(name: str) -> str:
    """``val_mean_class_accuracy`` -> ``val mean class accuracy``."""
    for prefix in ("val_", "test_"):
        if name.startswith(prefix):
            return f"{prefix[:-1]} {metric_name(name.removeprefix(prefix))}"
    return NAMES.get(name, name.replace("_", " "))


def metric_phrase(name: str, metrics: Mapping[str, float]) -> str:
    """A number with what says how much it is worth: its interval over videos, its spread over runs, chance."""
    text = f"{metric_name(name)} {formatted(name, metrics[name])}"
    low, high, spread = (metrics.get(f"{name}_{end}") for end in ("low", "high", "sd"))
    prefix = "val_" if name.startswith("val_") else "probe_" if name.startswith("probe_") else ""
    chance = metrics.get(f"{prefix}chance") if name.endswith("accuracy") else None
    notes = []
    if spread is not None:
        notes.append(f"sd {formatted(name, spread)} over {metrics['runs']:.0f} runs")
    elif low is not None and high is not None:
        notes.append(f"95 % interval {formatted(name, low)} to {formatted(name, high)}")
    if chance is not None and "class" not in name and "top5" not in name:
        notes.append(f"chance {formatted('chance', chance)}")
    return text + (f" ({', '.join(notes)})" if notes else "")


def worth_saying(metrics: Mapping[str, float], *, first: str) -> list[str]:
    """The names of the numbers to say, the one that counts first."""
    names = [name for name in metrics if not name.endswith(SILENT_ENDINGS)]
    names = [name for name in names if name.removeprefix("val_") not in SILENT]
    return sorted(names, key=lambda name: (name.removeprefix("val_") != first, name.startswith("val_")))


def evaluation_line(
    step: int, metrics: Mapping[str, float], *, best_metric: str, before: float | None
) -> str | None:
    """``step 25: val accuracy 57.1 %, best so far``; None for an evaluation without numbers.

    Args:
        before: the best value of ``best_metric`` before this evaluation.
    """
    if not metrics:
        return None
    found = metrics.get(best_metric)
    if found is None:
        best_metric = worth_saying(metrics, first="loss")[0]
        return f"step {step}: val {metric_name(best_metric)} {formatted(best_metric, metrics[best_metric])}"
    words = f"val {metric_name(best_metric)} {formatted(best_metric, found)}"
    if best_metric != "loss" and "loss" in metrics:
        words += f", loss {formatted('loss', metrics['loss'])}"
    if before is None or found > before:
        return f"step {step}: {words}, best so far"
    return f"step {step}: {words} (best {formatted(best_metric, before)})"


def result_block(
    name: str,
    metrics: Mapping[str, float],
    *,
    best_metric: str,
    folder: str | Path,
    next_commands: Sequence[str] = (),
) -> str:
    """What a finished stage leaves on the terminal: its numbers, where they are, what can be done with them."""
    lines = [f"{name}: finished"]
    lines += [f"  {metric_phrase(each, metrics)}" for each in worth_saying(metrics, first=best_metric)]
    lines += [f"  written to {folder}"]
    lines += [f"  next: {next_commands[0]}"] if next_commands else []
    lines += [f"        {command}" for command in next_commands[1:]]
    return "\n".join(lines)


def commands_after(stage: str, folder: str | Path, *, offline_run: Path | None) -> list[str]:
    """The commands that go on from a finished run, as they are typed."""
    where = shlex.quote(str(folder))
    if stage == "finetune":
        commands = [f"cliplift predict {where} VIDEO", f"cliplift report {where}"]
    else:
        commands = [f"cliplift finetune CONFIG initialise_from={where}", f"cliplift report {where}"]
    if offline_run is not None:
        commands.append(f"wandb sync {shlex.quote(str(offline_run))}")
    return commands
