"""`qprune plan`: what a run or a sweep would do, without running anything."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from qprune.config.compose import Composer, compose_run
from qprune.runs.jobs import duration, expand, jobs_of, seconds_left, time_left_text


def show(arguments: Sequence[str]) -> int:
    """Print which tensor gets which operator, and when; or the runs of a sweep."""
    parser = argparse.ArgumentParser(
        "qprune plan",
        description="Print which tensor gets which operator, and when; or, with several values, the runs of the sweep, "
        "which of them are done, and about how long the others take.",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for qprune run")
    parser.add_argument("--config-dir", help="a further folder of configs")
    options = parser.parse_intermixed_args(arguments)
    overrides = expand(options.overrides, options.config_dir)
    with Composer() as composer:
        is_sweep = any(override.is_sweep_override() for override in composer.parse(overrides))
    if is_sweep:
        print(_sweep_text(overrides, options.config_dir))
        return 0
    config = compose_run(overrides, options.config_dir)
    from qprune.runs import execute as runner  # late: it imports torch, and the checks above need not wait for it

    print(runner.plan(config))
    return 0


def _sweep_text(overrides: Sequence[str], config_dir: str | None) -> str:
    jobs = jobs_of(overrides, config_dir)
    left = seconds_left(jobs)
    done = sum(job.state == "done" for job in jobs)
    lines = [f"{len(jobs)} runs: {done} done, {len(jobs) - done} left"]
    for job in jobs:
        seconds = left.get(job.folder)
        state = job.state + ("" if seconds is None else f", about {duration(seconds)}")
        lines.append(f"  {' '.join(job.overrides)}  [{state}]")
    if done < len(jobs):
        lines.append(time_left_text(jobs))
    return "\n".join(lines)
