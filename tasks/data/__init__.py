"""Data sets that are decoded once, live in memory and hand out whole batches; real ones and synthetic ones."""
