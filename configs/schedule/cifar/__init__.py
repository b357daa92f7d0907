"""Schedules of the task `cifar`, one per order."""
