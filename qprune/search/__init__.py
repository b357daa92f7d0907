"""The search for the smallest model that reaches a score."""
