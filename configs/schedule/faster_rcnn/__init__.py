"""Schedules of the task `espcn`, one per order."""
