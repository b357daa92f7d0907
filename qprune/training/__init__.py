"""The training loop, its checkpoints, and the contract of a task."""
