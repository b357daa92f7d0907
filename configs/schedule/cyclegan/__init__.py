"""Schedules of the task `cyclegan`, one per order."""
