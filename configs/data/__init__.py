"""Choices of the config group `data`."""
