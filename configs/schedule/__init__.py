"""Choices of the config group `schedule`: one folder per task, one file per order, in epochs of the task's recipe."""
