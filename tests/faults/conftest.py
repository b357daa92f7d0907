"""How much of the suite is run, and the figures that it prints at its end."""

import os
from collections.abc import Callable
from typing import Any

import pytest

LONG = os.environ.get("QPRUNE_FAULTS") == "long"  # `make faults`


@pytest.fixture
def figure(record_property: Callable[[str, Any], None]) -> Callable[[str], None]:
    """Record a line that is printed at the end of the suite, from whichever process."""
    return lambda text: record_property("figure", text)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    called = [report for report in reports if getattr(report, "when", "") == "call"]
    figures = [value for report in called for name, value in report.user_properties if name == "figure"]
    if figures:
        terminalreporter.section("figures of the fault suite")
        for line in figures:
            terminalreporter.write_line(line)
