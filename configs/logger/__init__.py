"""Choices of the config group `logger`."""
