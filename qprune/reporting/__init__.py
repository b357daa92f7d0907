"""What came out: finished rows as tables, comparisons, figures and pages, and what of them is published."""
