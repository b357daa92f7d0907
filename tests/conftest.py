"""What holds for all tests: one thread per test process, and nothing left behind by a test of the command line."""

import logging
import os
import signal
import sys
from collections.abc import Iterator

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hypothesis import settings

# No deadline: the first example pays for torch's start. Derandomized: a change that breaks a property fails at once,
# for everyone, and not by chance for someone later.
settings.register_profile("qprune", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("qprune")
os.environ["QPRUNE_TRUST"] = "tests"  # tasks that tests define
torch.set_num_threads(1)  # test processes run side by side, one per core,
os.environ["OMP_NUM_THREADS"] = "1"  # and those that they start
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell ignores it


@pytest.fixture(autouse=True)
def _clean_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start without the variables that the command line sets, and put back what it and Hydra change."""
    torch.manual_seed(0)  # whatever a test draws without a generator, it draws alone and in any order
    before = dict(os.environ)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    for name in ("QPRUNE_DEBUG", "HYDRA_FULL_ERROR", "COMP_LINE"):
        os.environ.pop(name, None)
    monkeypatch.setattr(sys, "argv", sys.argv)
    yield
    os.environ.clear()
    os.environ.update(before)
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
    root.setLevel(level)  # which Hydra configures for a sweep
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
