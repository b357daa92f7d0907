"""Exact texts for what was mistyped, before anything is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qprune.cli import main as cli
from qprune.cli.list import choices
from tests.cli.errors import error_of

SMOKE = ("task=espcn", "data=synthetic", "budget=smoke")
TASKS = [name for name, _ in choices("task")]
GROUPS = (
    "the groups are budget, data, logger, order, schedule, task, trainer, "
    "and the keys seed, epochs, results_dir, force, wait, prune, quantize"
)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (
            "lst",
            f"'lst' is not a verb of qprune; did you mean 'list'?; the verbs are {', '.join(cli.VERBS)}",
        ),
        (
            "task=espcn",
            (
                "'task=espcn' is not a verb of qprune; type: qprune run task=espcn; the verbs are "
                f"{', '.join(cli.VERBS)}"
            ),
        ),
        ("run task=epscn", f"task='epscn' is not one of {', '.join(TASKS)}; did you mean 'espcn'?"),
        (
            "run order=prune_frist",
            (
                "order='prune_frist' is not one of baseline, prune_first, prune_only, quantize_first, quantize_only; "
                "did you mean 'prune_first'?"
            ),
        ),
        (
            "sweep order=baseline,prun_only",
            (
                "order='prun_only' is not one of baseline, prune_first, prune_only, quantize_first, quantize_only; did "
                "you mean 'prune_only'?"
            ),
        ),
        (
            "run quantize.bit=4",
            (
                "unknown key 'quantize.bit'; did you mean 'quantize.bits'?; the keys of quantize are bits, "
                "feature_bits, targets, rounding, gradient, saturate, weight_axis, decimal, decimal_from"
            ),
        ),
        ("run sparsity=0.25", f"unknown key 'sparsity'; did you mean 'prune.sparsity'?; {GROUPS}"),
        ("run oder=baseline", f"unknown key 'oder'; did you mean 'order'?; {GROUPS}"),
        ("run +sead=1", f"unknown key 'sead'; did you mean 'seed'?; {GROUPS}"),
        ("run +seed=1", "+seed=1: seed is a key already; type seed=1"),
        ("run ~seed", "~seed: a key cannot be taken away; give it a value, or null where that is legal"),
        ("run ~order", "~order: a run needs a choice of order; type order=... instead"),
        ("run seed=1,2", "seed=1,2 gives several values, which make several runs; type: qprune sweep ..."),
        ("run budget=null", "budget='null' is not one of paper, short, smoke"),
        ("run results_dir=", "results_dir= is empty, and a run needs a value; the default is results_dir=results/runs"),
        ("run force=no", "force='no' is not true or false; type force=true or force=false"),
        ("run seed=abc", "seed='abc' is not a number; the default is seed=0"),
        ("sweep seed=1,abc", "seed='abc' is not a number; the default is seed=0"),
        (
            "run prune=3",
            (
                "prune=3: prune is a section, with the keys sparsity, targets, window, granularity, rule, border; set "
                "one of them"
            ),
        ),
        (
            "run quantize.saturate=0.1",
            (
                "quantize.saturate=0.1 is not a list; type it as quantize.saturate=[...], for example "
                "quantize.saturate=[0.0,1.0]"
            ),
        ),
        (
            "run results_dir=[a,b]",
            "results_dir=['a', 'b'] is not a single value; the default is results_dir=results/runs",
        ),
        (
            "run seed",
            (
                "'seed' is not of the form KEY=VALUE (missing EQUAL at '<EOF>'); quote what Hydra reads as special, "
                "for example 'data.root=\"/a folder\"'"
            ),
        ),
        ("run --cfg job -m", "--multirun and --cfg cannot be given together; type one of them"),
        ("run --resolve", "--resolve belongs to --cfg; type --cfg job --resolve"),
        ("run schedule=cifar/prune", None),
        (
            "sweep hydra.sweep.dir=x",
            "hydra.sweep.dir is chosen by qprune sweep; set results_dir=... instead, the folder above it",
        ),
        (
            "run data.root=${oc.env:NO_SUCH_VARIABLE}",
            (
                'a value cannot be resolved (data.root): KeyError raised while resolving interpolation: "Environment '
                "variable 'NO_SUCH_VARIABLE' not found\""
            ),
        ),
        (
            "list order",
            (
                "qprune list: WHAT='order' is not one of tasks, orders, budgets, data, schedules, runs; did you mean "
                "'orders'?"
            ),
        ),
        (
            "list runs results_dir=nowhere",
            "there is no folder nowhere; name the one that holds the runs with results_dir=...",
        ),
        ("completion tcsh", "qprune completion: SHELL='tcsh' is not one of bash, zsh, fish; did you mean 'zsh'?"),
    ],
)
def test_wrong_input_says_what_is_legal(
    capsys: pytest.CaptureFixture[str], started: list[dict[str, Any]], typed: str, said: str | None
) -> None:
    error = error_of(capsys, *typed.split())
    if said is None:
        assert "did you mean 'cifar/prune_" in error
    else:
        assert error == said
    assert not started


def test_a_schedule_that_is_missing_says_where_to_write_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "mine.yaml").write_text("# @package _global_\ntask: {name: mine}\n", encoding="utf-8")
    assert error_of(capsys, "run", "--config-dir", str(tmp_path), "task=mine", "order=prune_first") == (
        "there is no schedule 'mine/prune_first' for this task in this order; write one as "
        "schedule/mine/prune_first.yaml "
        "in a folder given with --config-dir, or borrow one with schedule=TASK/ORDER (qprune list schedules)"
    )


def test_an_argument_of_an_own_task_may_be_added(started: list[dict[str, Any]]) -> None:
    assert cli.main(["run", *SMOKE, "+task.width=3"]) == 0
    assert len(started) == 1
