"""`qprune frontier`: the smallest model for a score, or the best for a size, found without running the whole grid."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Collection, Sequence

from qprune.cli import exit_codes as failures
from qprune.config import signature as identity
from qprune.errors import Interrupted, StoppedEarly, UserError
from qprune.runs.folder import ROW_FILE, RunFolder
from qprune.runs.row import Row
from qprune.search.frontier import Known, Point, Search
from qprune.search.grid import Grid, Run, grid_of
from qprune.search.text import asked_text, need_text, outcome_text, plan_text, reason_text
from qprune.training.early_stopping import Watch, after, last_event, rises, rows_of

SECONDS_BETWEEN_LOOKS = 2.0  # at runs that other processes carry out


def show(arguments: Sequence[str]) -> int:
    """Search the grid, and print and write what came out. Exit code 1 when runs failed, 75 when a signal stopped it."""
    parser = argparse.ArgumentParser(
        "qprune frontier",
        description="Find the models that no other one of a grid of bits and sparsities beats in size and score, and "
        "the one that answers the question: the smallest that loses no more than max_loss against the float network, "
        "or the best that is no larger than max_size. Runs that cannot matter are left out or stopped early.",
        epilog="own keys: bits=3,4,6,8 (32: not quantized); sparsity=0,0.25,0.5,0.75; max_loss=1% or 0.3dB; "
        "max_size=20Mb (10^6 bits); margin=1% (what may be chance); stop=early or never. Several values of order, "
        "seed or any key of qprune run are searched too: qprune frontier task=espcn order=prune_first,quantize_first "
        '"seed=range(3)" max_loss=1%',
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="own keys, and keys of qprune run")
    parser.add_argument("--plan", action="store_true", help="print models, sizes and runs, and run nothing")
    parser.add_argument("--finished", action="store_true", help="run nothing; table, figure and answer so far")
    parser.add_argument("--exhaustive", action="store_true", help="carry out every run of the grid to its end")
    parser.add_argument("--config-dir", help="a further folder of configs")
    options = parser.parse_intermixed_args(arguments)
    grid = grid_of(options.overrides, options.config_dir, options.exhaustive)
    print(asked_text(grid, runs=not options.finished))
    if not options.finished:
        print(plan_text(grid))
    if options.plan:
        return 0
    failed: dict[Run, str] = {}
    try:
        if not options.finished:
            _run_all(grid, failed)
    finally:
        print(outcome_text(grid, searched(grid), rows_by_point(grid), failed))
        for run, reason in failed.items():
            print(f"failed: {' '.join(grid.jobs[run].overrides)}: {reason}", file=sys.stderr)
    return failures.FAILURE if failed else 0


def rows_by_point(grid: Grid) -> dict[Point, dict[int, Row]]:
    """The finished rows of every model by seed. Raises UserError for a row that is broken or of another run."""
    found: dict[Point, dict[int, Row]] = {point: {} for point in grid.points}
    for (point, seed), job in grid.jobs.items():
        folder = RunFolder(job.folder)
        if folder.finished:
            row = folder.row()
            if row.signature != identity.signature(job.config):
                raise UserError(f"{job.folder / ROW_FILE} is the row of another run; delete it, or run with force=true")
            found[point][seed] = row
    return found


def searched(grid: Grid) -> Search:
    """The search with all that is known by now, also from other processes."""
    known = {}
    for point, rows in rows_by_point(grid).items():
        sizes = [row.weight_bits_actual + row.feature_bits_actual + row.input_bits_actual for row in rows.values()]
        note = stopped_note(grid, point) if grid.stops else None
        known[point] = Known(
            scores={seed: row.score for seed, row in rows.items()},
            size_bits=sum(sizes) / len(sizes) if sizes else None,
            optimistic=note[1] if note else None,
        )
    return Search(grid.points, known, grid.question)


def stopped_note(grid: Grid, point: Point) -> tuple[str, float] | None:
    """Reason and optimistic score of a run of this model that was stopped early, unless it was finished later."""
    for seed in grid.seeds:
        folder = RunFolder(grid.jobs[point, seed].folder)
        if not folder.finished and (note := folder.stopped()):
            return note
    return None


def next_run(grid: Grid, search: Search, failed: Collection[Run]) -> tuple[Run | None, int]:
    """The model and seed to run next, and the number of runs that other processes are at.

    All models once, in their order, then those that are still worth it with the next seed.
    """
    elsewhere = 0
    for seed in grid.seeds:
        for point in grid.points:
            if (
                (point, seed) in failed
                or seed in search.known[point].scores
                or (not grid.exhaustive and search.verdict(point))
            ):
                continue
            if RunFolder(grid.jobs[point, seed].folder).state()[0] != "running":
                return (point, seed), elsewhere
            elsewhere += 1
    return None, elsewhere


def watch_of(grid: Grid, search: Search, point: Point) -> Watch | None:
    """What watches a model's first run; None while finished runs do not tell how far it may still rise.

    Further seeds are run to their end: to drop only those that do badly would flatter the mean.
    """
    if not grid.stops or point.is_float or search.known[point].scores:
        return None
    needed, rival = search.needed(point)
    peers = [p for p in search.finished if p.compares_with(point) and grid.orders[p] == grid.orders[point]]
    if not math.isfinite(needed) or not any(point.is_milder(peer) for peer in peers):
        return None
    rows = rows_by_point(grid)
    some = next(iter(rows[peers[0]].values()))
    event = last_event(grid.configs[point], some.steps // some.epochs)
    curves = [
        after(rows_of(RunFolder(grid.jobs[peer, seed].folder).metrics()), grid.metric, event)
        for peer in peers
        for seed in rows[peer]
    ]
    sign = 1 if grid.question.higher_is_better else -1
    whole = [curve for curve in curves if some.epochs in curve]
    return Watch(
        metric=grid.metric,
        sign=sign,
        last_event=event,
        epochs=some.epochs,
        rises=rises(whole, sign),
        needed=needed,
        margin=search.margin,
        why=need_text(grid, search, rival),
    )


def _run_all(grid: Grid, failed: dict[Run, str]) -> None:
    """Carry out runs until none is worth it; those that fail are noted in `failed`, and the others go on."""
    from qprune.runs import execute as runner  # late: it imports torch, which bad input need not wait for

    told: set[Point] = set()
    waiting = False
    while True:
        search = searched(grid)
        if not grid.exhaustive:
            _tell(grid, search, told)
        chosen, elsewhere = next_run(grid, search, failed)
        if chosen is None and not elsewhere:
            return
        if chosen is None:
            if not waiting:
                print(f"waiting for {elsewhere} runs of other processes", flush=True)
            waiting = True
            time.sleep(SECONDS_BETWEEN_LOOKS)
            continue
        waiting = False
        point, job = chosen[0], grid.jobs[chosen]
        print(f"next run: {point.name}, seed {chosen[1]}", flush=True)
        watch = watch_of(grid, search, point)
        try:
            runner.execute(job.config, wait=True, watch=watch)
        except StoppedEarly as stop:
            assert watch is not None
            quality = watch.optimistic(rows_of(RunFolder(job.folder).metrics()))
            assert quality is not None, "a watch that knows of no end stops no run"
            RunFolder(job.folder).note_stopped(str(stop), search.quality(quality))
        except (UserError, Interrupted):  # would hold for the other runs as well
            raise
        except Exception as error:
            failed[chosen] = failures.report(error)[1]
            if point.is_float:
                print("the float network has failed, and nothing can be compared with it", file=sys.stderr)
                return


def _tell(grid: Grid, search: Search, told: set[Point]) -> None:
    """Say once for every model with runs to do why it gets none."""
    for point in grid.points:
        left = len(search.known[point].scores) < len(grid.seeds)
        if left and point not in told and (verdict := search.verdict(point)):
            told.add(point)
            print(f"left out: {point.name}: {reason_text(grid, search, point, verdict)}", flush=True)
