"""Choices for Hydra itself."""
