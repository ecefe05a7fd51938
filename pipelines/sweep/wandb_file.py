"""A sweep as W&B's sweeps have it: a YAML file for ``wandb sweep``, whose agents run cliplift for each trial.

Keys: https://docs.wandb.ai/guides/sweeps/sweep-config-keys
"""

from __future__ import annotations

import yaml

from cliplift.configs.sections import ConfigError
from cliplift.configs.sweeps import Range
from cliplift.configs.training import TrainingRun
from cliplift.pipelines.sweep.run import Sweep
from cliplift.pipelines.sweep.trials import grid_values


def wandb_sweep(sweep: Sweep, base: TrainingRun, *, config_file: str) -> str:
    """The text of the file.

    Agents start ``cliplift STAGE CONFIG`` with the trial's values as ``key=value`` words; every trial has a folder
    named by its W&B run. Halving and hyperband become random draws that W&B stops early by its own rule, which counts
    evaluations.

    Args:
        sweep: from :func:`~cliplift.pipelines.sweep.run.plan_sweep`.
        base: the run without the trials' values.
        config_file: what ``cliplift STAGE`` is given.

    Raises:
        ConfigError: early stopping is asked for, and the runs are evaluated at their end alone.
    """
    config = sweep.config
    words = [f"output={config.output}/$WANDB_RUN_ID", f"track.group={config.name}", *config.overrides]
    if "test_split" in type(base).model_fields:
        words.append(f"test_split={base.data.val_split}")
    tree: dict[str, object] = {
        "name": config.name,
        "method": "grid" if config.method == "grid" else "random",
        "metric": {"name": f"eval/{sweep.metric}", "goal": "maximize" if sweep.maximise else "minimize"},
        "parameters": {key: _parameter(values, config.method) for key, values in config.parameters.items()},
        "command": ["${env}", "cliplift", base.stage, config_file, *words, "${args_no_hyphens}"],
    }
    if config.method == "random":
        tree["run_cap"] = config.trials
    if config.least_steps is not None:
        every = base.evaluation.every_steps
        if every is None:
            raise ConfigError(
                "is evaluated at its end alone, and W&B stops trials by their evaluations",
                key="run",
                value=config.run,
                hint="set evaluation.every_steps in overrides",
            )
        least = max(1, round(config.least_steps / every))
        tree["early_terminate"] = {"type": "hyperband", "min_iter": least, "eta": config.factor}
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=110)


def _parameter(values: object, method: str) -> dict[str, object]:
    if not isinstance(values, Range):
        assert isinstance(values, tuple)
        # An agent writes Python's None, which YAML takes for text.
        return {"values": ["null" if value is None else value for value in values]}
    if method == "grid":
        return {"values": list(grid_values(values))}
    bounds: dict[str, object] = {"min": values.low, "max": values.high}
    if values.whole:
        bounds = {"min": int(values.low), "max": int(values.high)}
        if values.scale == "log":
            return {"distribution": "q_log_uniform_values", **bounds, "q": 1}
        return {"distribution": "int_uniform", **bounds}
    return {"distribution": "log_uniform_values" if values.scale == "log" else "uniform", **bounds}
