"""Data sets that are decoded once, stay in memory and yield whole batches; real ones and synthetic ones."""
