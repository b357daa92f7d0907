"""Fixtures shared with the tests of the command line."""

from tests.cli.conftest import started

__all__ = ["started"]
