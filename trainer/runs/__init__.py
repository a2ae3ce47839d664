"""What a run leaves on disk: checkpoints, logs, models."""
