"""The folder of a run: its files, its result row, and what is read back from it."""
