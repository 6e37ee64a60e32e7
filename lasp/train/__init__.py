"""Training: configuration, data, loop, checkpoints, metrics."""
