"""The real data sets, where a machine has them."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_root() -> Path:
    """The folder of the real data sets; without one the test is skipped."""
    root = os.environ.get("QPRUNE_DATA")
    if not root:
        pytest.skip("QPRUNE_DATA does not name a folder with the real data sets")
    return Path(root)
