"""Schedules of the task `pix2pix`, one per order."""
