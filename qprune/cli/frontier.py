"""`qprune frontier`: the smallest model for a score, or the best for a size."""

import argparse
import math
import time
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import Path

import qprune
from qprune.atomic_write import csv_bytes, write_atomically
from qprune.cli import failures, signals
from qprune.config.signature import short_hash
from qprune.errors import Interrupted, StoppedEarly, UserError, counted
from qprune.runs.folder import ROW_FILE
from qprune.runs.jobs import Job, time_left_text
from qprune.runs.row import Row
from qprune.runs.scores import scored_by
from qprune.search.frontier import Known, Point, Search
from qprune.search.grid import Grid, Run, grid_of
from qprune.search.text import asked_text, outcome, outcome_text, plan_text
from qprune.training.early_stopping import Watch, after, rises, rows_of
from qprune.training.progress import print_text

SECONDS_BETWEEN_LOOKS = 2.0  # at runs that other processes carry out


def show(arguments: Sequence[str]) -> int:
    """Search the grid. Exit code 1 when runs failed, 75 when a signal stopped it."""
    parser = argparse.ArgumentParser(
        "qprune frontier",
        description="Search a grid of bits and sparsities for the models that no other beats in both size and score, "
        "and name the one that is asked for: the smallest that loses at most max_loss against the float network, or "
        "the best that is no larger than max_size. Runs that cannot change the answer are skipped or stopped early.",
        epilog="Own keys: bits=3,4,6,8 (32: not quantized); sparsity=0,0.25,0.5,0.75; max_loss=1% or 0.3dB; "
        "max_size=20Mb (10^6 bits); margin=1% (what may be chance); stop=early or never. Several values of order, "
        "seed or any key of qprune run are searched too: qprune frontier task=espcn order=prune_first,quantize_first "
        '"seed=range(3)" max_loss=1%',
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="own keys, and keys of qprune run")
    parser.add_argument("--plan", action="store_true", help="print models, sizes and runs, and run nothing")
    parser.add_argument("--finished", action="store_true", help="run nothing; table, figure and answer so far")
    parser.add_argument("--exhaustive", action="store_true", help="carry out every run of the grid to its end")
    parser.add_argument("--config-dir", metavar="DIR", help="a further folder of configs")
    options = parser.parse_intermixed_args(arguments)
    if not arguments:
        example = "task=espcn data=synthetic budget=smoke bits=4,8"
        raise UserError(failures.NOTHING_TYPED.format(verb="frontier", example=example))
    arithmetic = None if options.finished else qprune.ARITHMETIC
    grid = grid_of(options.overrides, options.config_dir, options.exhaustive, arithmetic)
    for text in grid.left_out:
        print_text(f"left out: {text}", stderr=True)
    print_text(asked_text(grid, runs=not options.finished))
    if not options.finished:
        jobs = {run: Job((), grid.configs[run], folder.path, *folder.state()) for run, folder in grid.folders.items()}
        done = [run for run, job in jobs.items() if job.state == "done"]
        print_text(plan_text(grid, done, time_left_text(list(jobs.values()))))
    if options.plan:
        return 0
    failed: dict[Run, str] = {}
    try:
        if not options.finished:
            _run_all(grid, failed)
    finally:
        _print_outcome(grid, searched(grid), failed)
        for run, reason in failed.items():
            print_text(f"failed: {' '.join(grid.overrides[run])}: {reason}", stderr=True)
    return failures.FAILURE if failed else 0


def searched(grid: Grid) -> Search:
    """Read what is known by now, also from other processes. Raises UserError.

    The note of a run that was stopped early counts unless the run was finished later.
    """
    known = {}
    for point in grid.points:
        rows: dict[int, Row] = {}
        notes = []
        for seed in grid.seeds:
            folder = grid.folders[point, seed]
            if folder.finished:
                rows[seed] = folder.row()
                if rows[seed].signature != grid.signatures[point, seed]:
                    path = folder.path / ROW_FILE
                    raise UserError(f"{path} is the row of another run; delete it, or run with force=true")
            elif grid.stops and (note := folder.stopped()):
                notes.append(note.optimistic_score)
        rows = {seed: scored_by(row, grid.question.metric, grid.task.density) for seed, row in rows.items()}
        scores = {seed: row.score for seed, row in rows.items()}
        known[point] = Known(scores, notes[0] if notes else None, list(rows.values()))
    return Search(grid.points, known, grid.question)


def next_run(grid: Grid, search: Search, failed: Collection[Run]) -> tuple[Run | None, int]:
    """Return the next run, seed by seed, model by model, and how many run elsewhere."""
    elsewhere = 0
    for run in ((point, seed) for seed in grid.seeds for point in grid.points):
        is_done = run in failed or run[1] in search.known[run[0]].scores
        if not is_done and (grid.exhaustive or not search.verdict(run[0])):
            if grid.folders[run].state()[0] != "running":
                return run, elsewhere
            elsewhere += 1
    return None, elsewhere


def watch_of(grid: Grid, search: Search, point: Point) -> Watch | None:
    """Make the watch of a model's first run; None while too few runs are finished.

    Further seeds are run to their end: to drop only those that do badly would flatter the mean.
    """
    if not grid.stops or point.is_float or search.known[point].scores:
        return None
    needed, rival = search.needed(point)
    name = grid.config(point).order.name
    peers = [p for p in search.finished if p.compares_with(point) and grid.config(p).order.name == name]
    if not math.isfinite(needed) or not any(point.is_milder(peer) for peer in peers):
        return None
    row = search.known[peers[0]].rows[0]
    timeline = grid.config(point).events().in_steps(row.steps // row.epochs)
    event = max(timeline.events, default=0)
    folders = [grid.folders[peer, seed] for peer in peers for seed in search.known[peer].scores]
    curves = [after(rows_of(folder.metrics()), grid.question.metric, event) for folder in folders]
    sign = 1 if grid.question.higher_is_better else -1
    shown, why = rises([curve for curve in curves if row.epochs in curve], sign), search.need_text(rival)
    return Watch(grid.question.metric, sign, event, row.epochs, shown, needed, search.margin, why)


def _run_all(grid: Grid, failed: dict[Run, str]) -> None:
    """Carry out runs until none is worth it; those that fail go to `failed`."""
    from qprune.runs.execute import execute  # late: it imports torch, which bad input need not wait for

    left_out: set[Point] = set()
    waiting = False
    while True:
        signals.stop_if_asked()
        search = searched(grid)
        for point in [] if grid.exhaustive else grid.points:
            is_open = point not in left_out and len(search.known[point].scores) < len(grid.seeds)
            if is_open and (verdict := search.verdict(point)):
                left_out.add(point)
                print_text(f"left out: {point.name}: {verdict}")
        run, elsewhere = next_run(grid, search, failed)
        if run is None and not elsewhere:
            return
        if run is None:
            if not waiting:
                print_text(f"waiting for {counted(elsewhere, 'run')} of other processes")
            waiting = True
            time.sleep(SECONDS_BETWEEN_LOOKS)
            continue
        waiting = False
        print_text(f"next run: {run[0].name}, seed {run[1]}")
        watch, folder = watch_of(grid, search, run[0]), grid.folders[run]
        try:
            execute(grid.configs[run], wait=True, watch=watch)
        except StoppedEarly as stop:
            quality = watch.optimistic(rows_of(folder.metrics())) if watch is not None else None
            assert quality is not None, "only a watch with an optimistic end stops a run"
            folder.note_stopped(str(stop), search.quality(quality))
        except (UserError, Interrupted):  # would hold for the other runs as well
            raise
        except Exception as error:
            failed[run] = failures.report(error)[1]
            if run[0].is_float:
                print_text("the float network has failed, and nothing can be compared with it", stderr=True)
                return


def _print_outcome(grid: Grid, search: Search, failed: Collection[Run]) -> None:
    """Print table and answer, and write the table as CSV and the figure."""
    if not search.finished:
        print_text("no run is finished")
        return
    table = outcome(grid, search, failed)
    print_text(outcome_text(grid, search, table))
    asked = [str(grid.question), f"stops {grid.stops}", f"exhaustive {grid.exhaustive}"]
    name = short_hash([*(folder.path.name for folder in grid.folders.values()), *asked])
    task = grid.config().task.name
    path = Path(grid.config().results_dir, "frontier", f"{task}-{name}.csv")
    write_atomically(path, csv_bytes(table))
    print_text(f"table: {path}")
    if find_spec("matplotlib") is not None:  # installed with the extra `report`
        from qprune.reporting.figures import save, search_fronts

        limits = {} if grid.question.max_loss is None else {"score": search.quality(search.least_quality)}
        limits |= {} if grid.question.max_size_bits is None else {"size_mb": grid.question.max_size_bits / 1e6}
        figure = search_fronts(table, grid.question.metric, task, limits, grid.exhaustive)
        save(figure, path.parent, path.stem)
        print_text(f"figure: {path.with_suffix('.png')}\nfigure: {path.with_suffix('.svg')}")
