"""What `qprune frontier` says: what is asked, the plan, why a model is left out, and the table with its answer."""

from __future__ import annotations

import math
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from qprune.atomic_write import write_atomically
from qprune.config.signature import short_hash
from qprune.reporting.front import pareto_front
from qprune.runs.jobs import time_left_text
from qprune.runs.row import Row
from qprune.search.frontier import SPREADS, Amount, Point, Search, Verdict
from qprune.search.grid import Grid, Run

_NAMES = {"weights_mb": "weights", "features_mb": "features", "size_mb": "size Mb", "density_paper": "(paper)"}
MISSING = "runs missing"


def asked_text(grid: Grid, runs: bool) -> str:
    """The question in a sentence, and if there are to be runs, how they are spared."""
    question = grid.question
    better = "higher" if question.higher_is_better else "lower"
    limits = _limits(grid, "lose", "are")
    which = "models that no other one beats in size and score"
    spared = (
        "every run is carried out to its end"
        if grid.exhaustive
        else (
            f"models that cannot matter are left out{' or stopped early' if grid.stops else ''}; "
            f"margin for chance: {_amount(grid, question.margin)}"
        )
    )
    return f"{grid.task}, {grid.metric} ({better} is better): {which}{', and that ' if limits else ''}{limits}" + (
        f"\n{spared}" if runs else ""
    )


def plan_text(grid: Grid) -> str:
    """The models in the order in which they are tried, their sizes, how many of their runs are done, the time left."""
    width = max(len(point.name) for point in grid.points)
    lines = [f"{'model':<{width}}  {'size Mb':>8}  runs done"]
    limit = grid.question.max_size_bits
    for point in grid.points:
        jobs = [grid.jobs[point, seed] for seed in grid.seeds]
        done = sum(job.state == "done" for job in jobs)
        large = "  too large" if limit is not None and point.size_bits > limit and not point.is_float else ""
        lines.append(f"{point.name:<{width}}  {point.size_bits / 1e6:>8.4g}  {done} of {len(jobs)}{large}")
    done = sum(job.state == "done" for job in grid.jobs.values())
    lines.append(f"{len(grid.points)} models, {len(grid.jobs)} runs: {done} done, at most {len(grid.jobs) - done} left")
    if done < len(grid.jobs):
        lines.append(f"{time_left_text(list(grid.jobs.values()))}; less by what is left out")
    return "\n".join(lines)


def need_text(grid: Grid, search: Search, rival: Point | None) -> str:
    """What a model would have to reach."""
    if rival is not None:
        return f"{rival.name} is no larger and has {search.known[rival].mean:.4g}"
    return f"{search.quality(search.least_quality):.4g} is needed to lose no more than is allowed"


def reason_text(grid: Grid, search: Search, point: Point, verdict: Verdict) -> str:
    """Why a model is left out, or gets no further seeds."""
    if verdict.kind == "too large":
        return f"too large ({search.size(point) / 1e6:.4g} Mb)"
    known, who = search.known[verdict.by], "it" if verdict.by is point else verdict.by.name
    if known.scores:
        shown = f"{who} has {grid.metric} {known.mean:.4g}"
    else:
        shown = f"{who} was stopped when it could still reach {grid.metric} {known.optimistic:.4g}"
    return f"{verdict.kind}: {shown}, and {need_text(grid, search, verdict.rival)}"


def outcome_text(grid: Grid, search: Search, rows: Mapping[Point, Mapping[int, Row]], failed: Collection[Run]) -> str:
    """The table of models with their place on the front, what was left out, the answer; CSV and figure are written."""
    table = outcome(grid, search, rows, failed)
    done = table[table["n"] > 0]
    if not len(done):
        return "no run is finished"
    shown = done[["#", "model", "n", "mean", "sd", *_NAMES, "front", "dominated_by"]].rename(columns=_NAMES)
    shown.insert(8, "density", done["density_actual"])
    lines = [shown.to_string(index=False, float_format=lambda value: f"{value:.4g}", na_rep="-")]
    lines += [f"{row['model']}: {row['state']}" for _, row in table.iterrows() if row["state"] not in ("done",)]
    if grid.question.max_loss is not None and not grid.exhaustive:
        lines.append("models that lose more than is allowed are not looked for: among them the front may lack some")
    if grid.question.margin.of(search.reference_score or 0.0) < search.margin < math.inf:
        lines.append(f"margin for chance: {search.margin:.2g}{grid.unit}, {SPREADS:g} deviations between seeds")
    lines += [f"mark: {mark}" for mark in _marks(rows)]
    lines.append(answer_text(grid, search, rows))
    if missing := sum(state.endswith(MISSING) or state == "failed" for state in table["state"]):
        lines.append(f"not the last word: runs of {missing} models that could matter are missing")
    name = short_hash(
        [
            *(job.folder.name for job in grid.jobs.values()),
            str(grid.question),
            f"stops {grid.stops}",
            f"exhaustive {grid.exhaustive}",
        ]
    )
    path = grid.results_dir / "frontier" / f"{grid.task}-{name}.csv"
    write_atomically(path, table.to_csv(index=False, lineterminator="\n").encode())
    lines.append(f"table: {path}")
    lines += [f"figure: {file}" for file in _drawn(grid, search, table, path.with_suffix(""))]
    return "\n".join(lines)


def outcome(
    grid: Grid, search: Search, rows: Mapping[Point, Mapping[int, Row]], failed: Collection[Run]
) -> pd.DataFrame:
    """One line per model, from the smallest to the largest. mean, sd, n: of the score over seeds; sizes in Mb."""
    points = sorted(grid.points, key=search.size)
    numbers = {point: number for number, point in enumerate(points, 1)}
    found: list[dict[str, Any]] = []
    for point in points:
        known, own = search.known[point], list(rows[point].values())
        rival = search.dominated_by(point) if own else None
        found.append(
            {
                "#": numbers[point],
                "model": point.name,
                "order": grid.orders[point],
                "bits": point.bits,
                "sparsity": point.sparsity,
                "n": len(own),
                "mean": known.mean,
                "sd": known.sd,
                "weights_mb": _mean(row.weight_bits_actual / 1e6 for row in own),
                "features_mb": _mean(row.feature_bits_actual / 1e6 for row in own),
                "size_mb": search.size(point) / 1e6,
                "density_actual": _mean(row.density_actual for row in own),
                "density_paper": _mean(row.density_paper for row in own),
                "front": "" if not own else "no" if rival else "yes",
                "dominated_by": "" if rival is None else str(numbers[rival]),
                "allowed": "" if not own else "yes" if search.is_allowed(point) else "no",
                "state": _state(grid, search, point, failed),
            }
        )
    table = pd.DataFrame(found)
    place = list(table.columns).index("front") + 1
    table.insert(place, "density_front", density_front(table, search.question.higher_is_better))
    return table


def answer_text(grid: Grid, search: Search, rows: Mapping[Point, Mapping[int, Row]]) -> str:
    """The model that answers the question, or that none does, and how sure that is."""
    question, reference = grid.question, search.reference_score
    if reference is None:
        return "no answer: the float network has no result to compare with"
    answer = search.answer()
    tried = [point for point in search.finished if not point.is_float]
    if answer is None or not tried:
        if not tried:
            return "no answer: no compressed model is finished"
        best = max(tried, key=lambda point: search.quality(search.known[point].mean))
        return f"answer: no model {_limits(grid, 'loses', 'is')}; the best one is {_described(grid, search, best)}"
    kind = "best" if question.max_loss is None and question.max_size_bits is not None else "smallest"
    if question.max_loss is None and question.max_size_bits is None:
        dense = max(tried, key=lambda point: _mean(row.density_actual for row in rows[point].values()))
        return f"the greatest density has {_described(grid, search, dense)}\nmax_loss=1% or max_size=20Mb asks for more"
    lines = [f"answer: the {kind} model that {_limits(grid, 'loses', 'is')} is {_described(grid, search, answer)}"]
    words = [word for word in grid.jobs[answer, grid.seeds[0]].overrides if not word.startswith("seed=")]
    lines.append(f"its runs: qprune list runs results_dir={grid.results_dir}; again: qprune run {shlex.join(words)}")
    for point in search.close_calls(answer):
        missing = search.least_quality - search.quality(search.known[point].mean)
        lines.append(
            f"close: {point.name} ({search.size(point) / 1e6:.4g} Mb) misses it by {missing:.2g}{grid.unit}, less "
            f"than the margin of {search.margin:.2g}{grid.unit}; more seeds could change the answer"
        )
    return "\n".join(lines)


def density_front(table: pd.DataFrame, higher_is_better: bool) -> list[str]:
    """`yes` for models that no other one beats in score and density, `no` for others with a result."""
    done = table.index[table["n"] > 0]
    scores, densities = table.loc[done, "mean"].tolist(), table.loc[done, "density_actual"].tolist()
    front = {done[i] for i in pareto_front(scores, densities, higher_is_better)}
    return ["" if n == 0 else "yes" if i in front else "no" for i, n in table["n"].items()]


def _described(grid: Grid, search: Search, point: Point) -> str:
    reference, known = search.reference_score, search.known[point]
    assert reference is not None
    loss = search.quality(reference) - search.quality(known.mean)
    verb = "loses" if loss >= 0 else "gains"
    share = f", {abs(loss / reference):.2%} of {reference:.4g}" if reference else ""
    size = search.size(point)
    smaller = f", 1/{search.size(search.reference) / size:.3g} of the float network" if search.reference else ""
    spread = "" if math.isnan(known.sd) else f" +- {known.sd:.2g}"
    seeds = f"{len(known.scores)} seed{'s' if len(known.scores) > 1 else ''}"
    return (
        f"{point.name}: {size / 1e6:.4g} Mb{smaller}; {grid.metric} {known.mean:.4g}{spread} ({seeds}), "
        f"{verb} {abs(loss):.2g}{grid.unit}{share}"
    )


def _limits(grid: Grid, lose: str, be: str) -> str:
    """What is asked of a model; empty when only the front is asked for. lose, be: the verbs, for one or for many."""
    limits = []
    if grid.question.max_loss is not None:
        limits.append(f"{lose} at most {_amount(grid, grid.question.max_loss)}")
    if grid.question.max_size_bits is not None:
        limits.append(f"{be} no larger than {grid.question.max_size_bits / 1e6:.4g} Mb")
    return " and ".join(limits)


def _state(grid: Grid, search: Search, point: Point, failed: Collection[Run]) -> str:
    """`done`, or why runs of this model are missing."""
    jobs = [grid.jobs[point, seed] for seed in grid.seeds]
    done = len(search.known[point].scores)
    if done == len(jobs):
        return "done"
    if any((point, seed) in failed for seed in grid.seeds):
        return "failed"
    if not grid.exhaustive and (verdict := search.verdict(point)):
        stopped = search.known[point].optimistic is not None
        what = f"dropped after {done} of {len(jobs)} seeds" if done else "stopped early" if stopped else "left out"
        return f"{what}, {reason_text(grid, search, point, verdict)}"
    return f"{len(jobs) - done} of {len(jobs)} {MISSING}"


def _drawn(grid: Grid, search: Search, table: pd.DataFrame, path: Path) -> list[Path]:
    """The figure's files, written; none without matplotlib."""
    try:
        from qprune.reporting.drawing import drawn
        from qprune.reporting.frontier_figure import fronts
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        return []
    least = search.quality(search.least_quality) if grid.question.max_loss is not None else None
    figure = fronts(table, grid.metric, grid.task, least, grid.question.max_size_bits, grid.exhaustive)
    drawn(figure, path.name, caption="").save(path.parent)
    return [path.with_suffix(suffix) for suffix in (".png", ".svg")]


def _amount(grid: Grid, amount: Amount) -> str:
    return f"{amount.value:g} % of the float network's score" if amount.percent else f"{amount.value:g}{grid.unit}"


def _marks(rows: Mapping[Point, Mapping[int, Row]]) -> list[str]:
    return list(dict.fromkeys(mark for own in rows.values() for row in own.values() for mark in row.marks))


def _mean(values: Any) -> float:
    return float(pd.Series(list(values), dtype="float64").mean())
