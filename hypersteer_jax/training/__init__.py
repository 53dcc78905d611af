"""Training: loss, step and loop, checkpoints, metrics."""
