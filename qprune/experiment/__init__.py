"""Runs, files and processes: what turns a task and a config into a result row."""
