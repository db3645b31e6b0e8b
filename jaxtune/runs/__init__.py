"""The directory of a training run: config, checkpoints, metrics and chat settings."""
