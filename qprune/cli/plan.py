"""`qprune plan`: what a run would do, or which runs a sweep would make."""

import argparse
from collections.abc import Sequence

from qprune.config.compose import Composer, compose_run
from qprune.errors import counted
from qprune.runs.jobs import expand, jobs_of, seconds_left, time_left_text
from qprune.training.progress import duration, print_text


def plan(arguments: Sequence[str]) -> int:
    """Print which tensor gets which operator, and when; or the runs of a sweep."""
    parser = argparse.ArgumentParser(
        "qprune plan",
        description="Print which tensor gets which operator, and when; or, with several values, the runs of the sweep, "
        "which of them are done, and about how long the others take.",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for qprune run")
    parser.add_argument("--config-dir", metavar="DIR", help="a further folder of configs")
    options = parser.parse_intermixed_args(arguments)
    overrides = expand(options.overrides, options.config_dir)
    with Composer() as composer:
        is_sweep = any(override.is_sweep_override() for override in composer.parse(overrides))
    if is_sweep:
        print_text(_sweep_text(overrides, options.config_dir))
        return 0
    config = compose_run(overrides, options.config_dir)
    from qprune.runs import execute as runner  # late: it imports torch, and the checks above need not wait for it

    print(runner.plan(config))
    return 0


def _sweep_text(overrides: Sequence[str], config_dir: str | None) -> str:
    """List the runs of a sweep, how far each is, and the time that is left."""
    jobs = jobs_of(overrides, config_dir)
    left = seconds_left(jobs)
    done = sum(job.state == "done" for job in jobs)
    common = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    lines = [f"{counted(len(jobs), 'run')}: {done} done, {len(jobs) - done} left"]
    lines += [f"  each with {' '.join(text for text in jobs[0].overrides if text in common)}"] if common else []
    for job in jobs:
        seconds = left.get(job.folder)
        state = job.state + ("" if seconds is None else f", about {duration(seconds)}")
        lines.append(f"  {' '.join(text for text in job.overrides if text not in common)}  [{state}]")
    return "\n".join([*lines, *([time_left_text(jobs)] if done < len(jobs) else [])])
