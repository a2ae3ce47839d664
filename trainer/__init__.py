"""One training loop, its engines, stages and checkpoints."""
