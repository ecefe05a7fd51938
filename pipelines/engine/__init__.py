"""The training loop on DeepSpeed, with checkpoints, guards and telemetry."""
