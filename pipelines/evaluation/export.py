"""Export: a run's weights as ``model.safetensors`` + ``config.json`` + a model card filled from the run."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from cliplift.configs.runs import ExportRun
from cliplift.configs.sections import ConfigError
from cliplift.models.factory import from_pretrained
from cliplift.models.weight_files import has_weights
from cliplift.pipelines.runs.folder import CONFIG, Record, RunFolder, classes_of, metrics_of, write_text
from cliplift.sharding.storage import whole_file


def run_export(run: ExportRun) -> Path:
    """``cliplift export``: write and read back.

    Raises:
        ConfigError: the run has no weights yet.
        OSError: a file cannot be written; none of them is left.
    """
    source = RunFolder(Path(run.run))
    if not has_weights(source.weights):
        raise ConfigError(
            f"{run.run!r} has no weights", key="run", value=run.run, hint="give the folder of a finished run"
        )
    output = RunFolder.create(run.output, writes=True).path
    copy_files(sorted(source.weights.iterdir()), output)
    write_card(source, output, result=source.result() or {})
    _check_equal(source.weights, output)
    return output


def copy_files(files: Sequence[Path], output: Path) -> None:
    """Copy files into a folder, all of them or, where the disk is full, none."""
    written: list[Path] = []
    try:
        for file in files:
            with whole_file(output / file.name) as temporary:
                shutil.copyfile(file, temporary)
            written.append(output / file.name)
    except OSError:
        for path in written:
            path.unlink(missing_ok=True)
        raise


def write_card(source: RunFolder, output: Path, *, result: Record) -> None:
    """Write the run's config and a model card beside the weights."""
    if (source.path / CONFIG).is_file():
        shutil.copyfile(source.path / CONFIG, output / "run.yaml")
    write_text(output / "README.md", model_card(source, result))


def model_card(source: RunFolder, result: Record) -> str:
    """A model card with the numbers of the run's own result, and nothing else."""
    record = source.start_record() or {}
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics_of(result).items())
    classes = ", ".join(classes_of(result)) or "none (features only)"
    return f"""---
library_name: cliplift
pipeline_tag: video-classification
---

# {record.get("name", source.path.name)}

{result.get("model", "model")}, stage `{result.get("stage", "?")}`, trained with `{record.get("command_line", "?")}`
(cliplift {record.get("cliplift_version", "?")}, torch {record.get("torch_version", "?")}).
The full config is in `run.yaml`.

```python
from cliplift.models import from_pretrained

model = from_pretrained("PATH OF THIS FOLDER")
```

Classes: {classes}

| metric | value |
| --- | --- |
{rows}
"""


def _check_equal(weights: Path, output: Path) -> None:
    """An export is read back through the public loader and must hold the same tensors."""
    before, after = from_pretrained(str(weights)).state_dict(), from_pretrained(str(output)).state_dict()
    assert before.keys() == after.keys(), output
    assert all(torch.equal(before[k], after[k]) for k in before), output
