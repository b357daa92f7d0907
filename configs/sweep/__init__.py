"""Choices of the config group `order`."""
