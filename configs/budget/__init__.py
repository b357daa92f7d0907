"""Choices of the config group `budget`."""
