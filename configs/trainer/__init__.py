"""Choices of the config group `trainer`."""
