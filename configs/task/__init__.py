"""Choices of the config group `task`."""
