"""Whole loops: each by itself, there and back, with the ratios of both runs together."""

from __future__ import annotations

import multiprocessing
import os
from itertools import cycle

import pytest

from bench import loops as module
from bench.loops import EPOCHS, Measured, Setting, _alone, loops

SETTING = Setting(threads=1, real=False)


def its_process(setting: Setting) -> Measured:
    return 1.0, 0.0, 0.0, os.getpid()


def bad_loop(setting: Setting) -> Measured:
    raise ValueError("this loop cannot go on")


def test_each_loop_has_a_process_of_its_own_that_ends_with_it() -> None:
    before = set(multiprocessing.active_children())
    assert len({os.getpid(), _alone(its_process, SETTING)[3], _alone(its_process, SETTING)[3]}) == 3
    assert set(multiprocessing.active_children()) <= before


def test_a_loop_that_fails_says_why_and_leaves_no_process() -> None:
    before = set(multiprocessing.active_children())
    with pytest.raises(ValueError, match="this loop cannot go on"):
        _alone(bad_loop, SETTING)
    assert set(multiprocessing.active_children()) <= before


def test_loops_run_there_and_back_and_ratios_are_of_both_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, int]] = []
    seconds = {"_ours": cycle((60.0, 90.0)), "_compiled": cycle((31.5, 48.0, 66.0)), "_authors": cycle((180.0, 120.0))}
    parts = {"_ours": (0.0, 15.0), "_compiled": (21.0, 6.0), "_authors": (0.0, 30.0)}

    def measured(name: str, setting: Setting) -> Measured:
        order.append((name, setting.epochs))
        return next(seconds[name]), *parts[name], 169

    for name in seconds:
        monkeypatch.setattr(module, name, name)
    monkeypatch.setattr(module, "_alone", measured)
    monkeypatch.delenv("QPRUNE_DATA", raising=False)
    text = loops(threads=1, rounds=4)
    whole = ["_ours", "_compiled", "_authors", "_authors", "_compiled", "_ours"]
    assert order == [("_compiled", EPOCHS // 20), *((name, EPOCHS) for name in whole)]
    assert text.startswith(f"Synthetic patches: {EPOCHS} epochs of 169 steps")
    assert "with an empty one the same graphs took 21.0 s" in text
    assert text.splitlines()[-3:] == [
        "| ours | 1.00 and 1.50 | 0.500 | 0.0 | 15.0 | 0.400 |",
        "| ours, compiled | 0.80 and 1.10 | 0.380 | 21.0 | 6.0 | 0.200 |",
        "| authors | 3.00 and 2.00 | 1.000 | 0.0 | 30.0 | 0.800 |",
    ]
