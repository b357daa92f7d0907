"""Finished rows as tables, comparisons, figures and pages."""
