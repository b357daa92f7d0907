"""Choices of the config group `hydra/launcher`."""
