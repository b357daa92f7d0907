"""What `qprune frontier` prints: plan, reasons, table and answer."""

import math
import shlex
import statistics
from collections.abc import Collection
from typing import Any

import pandas as pd

from qprune.errors import counted
from qprune.runs.scores import pareto_front
from qprune.search.frontier import SPREADS, Point, Search
from qprune.search.grid import Grid, Run

_NAMES = {"size_mb": "size Mb", "density_actual": "density", "density_paper": "(paper)"}
MISSING = "runs missing"


def asked_text(grid: Grid, runs: bool) -> str:
    """Say what is asked, and if there are to be runs, how they are spared."""
    asked = grid.question
    better, limits = "higher" if asked.higher_is_better else "lower", asked.limits_text("lose", "are")
    text = f"{grid.config().task.name}, {asked.metric} ({better} is better): models that no other one beats"
    text += f" in size and score{f', and that {limits}' if limits else ''}"
    if runs and grid.exhaustive:
        text += "\nevery run is carried out to its end"
    elif runs:
        text += f"\nmodels that cannot matter are left out{' or stopped early' if grid.stops else ''}"
        text += f"; margin for chance: {asked.amount_text(asked.margin)}"
    if grid.task.validates and asked.metric == grid.task.metric:
        text += "\nmodels are chosen by their test score; data.validation=0.1 holds out training samples for that"
    return text


def plan_text(grid: Grid, done: Collection[Run], time_left: str) -> str:
    """Write the models in the order of trying, their sizes, and runs done."""
    width = max(len(point.name) for point in grid.points)
    lines = [f"{'model':<{width}}  {'size Mb':>8}  runs done"]
    limit = grid.question.max_size_bits
    for point in grid.points:
        number = f"{sum((point, seed) in done for seed in grid.seeds)} of {len(grid.seeds)}"
        large = "  too large" if limit is not None and point.size_bits > limit and not point.is_float else ""
        lines.append(f"{point.name:<{width}}  {point.size_bits / 1e6:>8.4g}  {number}{large}")
    left = len(grid.folders) - len(done)
    numbers = f"{counted(len(grid.points), 'model')}, {counted(len(grid.folders), 'run')}"
    lines.append(f"{numbers}: {len(done)} done, at most {left} left")
    return "\n".join([*lines, *([f"{time_left}; less by what is left out"] if left else [])])


def outcome(grid: Grid, search: Search, failed: Collection[Run]) -> pd.DataFrame:
    """Make a line per model, from the smallest to the largest; sizes in Mb."""
    points = sorted(grid.points, key=search.size)
    found: list[dict[str, Any]] = []
    for number, point in enumerate(points, 1):
        known = search.known[point]
        rival = search.dominated_by(point) if known.scores else None
        line = {"#": number, "model": point.name, "order": grid.config(point).order.name, "bits": point.bits}
        line |= {"sparsity": point.sparsity, "n": len(known.scores), "mean": known.mean, "sd": known.sd}
        if grid.question.metric != grid.task.metric:
            line["test"] = statistics.fmean([r.metrics[grid.task.metric] for r in known.rows] or [math.nan])
        line |= {f"{kind}s_mb": _mean(search, point, f"{kind}_bits_actual") / 1e6 for kind in ("weight", "feature")}
        line |= {"size_mb": search.size(point) / 1e6}
        line |= {name: _mean(search, point, name) for name in ("density_actual", "density_paper")}
        line |= {"front": "", "density_front": "", "dominated_by": "", "allowed": ""}
        if known.scores:
            line |= {"front": "no" if rival else "yes", "allowed": "yes" if search.is_allowed(point) else "no"}
            line["dominated_by"] = str(points.index(rival) + 1) if rival else ""
        found.append(line | {"state": _state(grid, search, point, failed)})
    table = pd.DataFrame(found)
    table["density_front"] = density_front(table, search.question.higher_is_better)
    return table


def density_front(table: pd.DataFrame, higher_is_better: bool) -> list[str]:
    """Return `yes` for models on the front of score and density, else `no`."""
    done = table[table["n"] > 0]
    front = done.index[pareto_front(done["mean"].tolist(), done["density_actual"].tolist(), higher_is_better)]
    return ["" if n == 0 else "yes" if i in front else "no" for i, n in table["n"].items()]


def outcome_text(grid: Grid, search: Search, table: pd.DataFrame) -> str:
    """Write the table of models, what was left out, and the answer."""
    done = table[table["n"] > 0]
    columns = ["#", "model", "n", "mean", "sd", "test", *_NAMES, "front", "dominated_by"]
    shown = done[[name for name in columns if name in done]].rename(columns=_NAMES | {"dominated_by": "beaten by"})
    lines = [shown.to_string(index=False, float_format=lambda value: f"{value:.4g}", na_rep="-")]
    lines += [f"{row['model']}: {row['state']}" for _, row in table.iterrows() if row["state"] != "done"]
    if grid.question.max_loss is not None and not grid.exhaustive:
        lines.append("models that lose more than is allowed were not searched, so the front may lack some of them")
    if grid.question.margin.of(search.reference_score or 0.0) < search.margin < math.inf:
        margin = f"{search.margin:.2g}{grid.question.unit}"
        lines.append(f"margin for chance: {margin}, {SPREADS:g} deviations between seeds")
    marks = dict.fromkeys(mark for known in search.known.values() for row in known.rows for mark in row.marks)
    lines += [*(f"not comparable with the paper: {mark}" for mark in marks), answer_text(grid, search)]
    if missing := sum(state.endswith(MISSING) or state == "failed" for state in table["state"]):
        lines.append(f"not final: runs of {counted(missing, 'model')} that could matter are missing")
    return "\n".join(lines)


def answer_text(grid: Grid, search: Search) -> str:
    """Name the model that answers the question, and how sure that is."""
    if search.reference_score is None:
        return "no answer: the float network has no result to compare with"
    tried = [point for point in search.finished if not point.is_float]
    if not tried:
        return "no answer: no compressed model is finished"
    limits, answer, unit = grid.question.limits_text("loses", "is"), search.answer(), grid.question.unit
    if not limits:
        dense = max(tried, key=lambda point: _mean(search, point, "density_actual"))
        return f"the greatest density has {_described(grid, search, dense)}\nmax_loss=1% or max_size=20Mb asks for more"
    if answer is None:
        best = max(tried, key=search.reached)
        return f"answer: no model {limits}; the best one is {_described(grid, search, best)}"
    kind = "best" if grid.question.max_loss is None else "smallest"
    lines = [f"answer: the {kind} model that {limits} is {_described(grid, search, answer)}"]
    words = shlex.join(word for word in grid.overrides[answer, grid.seeds[0]] if not word.startswith("seed="))
    lines.append(f"its runs: qprune list runs results_dir={grid.config().results_dir}; again: qprune run {words}")
    for point in search.close_calls(answer):
        missing = f"misses it by {search.least_quality - search.reached(point):.2g}{unit}"
        lines.append(
            f"close: {point.name} ({search.size(point) / 1e6:.4g} Mb) {missing}, less than the margin of "
            f"{search.margin:.2g}{unit}; more seeds could change the answer"
        )
    return "\n".join(lines)


def _described(grid: Grid, search: Search, point: Point) -> str:
    reference, known, size = search.reference, search.known[point], search.size(point)
    assert reference is not None
    score = search.known[reference].mean
    loss, seeds = search.reached(reference) - search.reached(point), counted(len(known.scores), "seed")
    spread = "" if math.isnan(known.sd) else f" ± {known.sd:.2g}"
    return (
        f"{point.name}: {size / 1e6:.4g} Mb, 1/{search.size(reference) / size:.3g} of the float network; "
        f"{grid.question.metric} {known.mean:.4g}{spread} ({seeds}), {'loses' if loss >= 0 else 'gains'} "
        f"{abs(loss):.2g}{grid.question.unit}" + (f", {abs(loss / score):.2%} of {score:.4g}" if score else "")
    )


def _state(grid: Grid, search: Search, point: Point, failed: Collection[Run]) -> str:
    """Say `done`, or why runs of this model are missing."""
    total, done = len(grid.seeds), len(search.known[point].scores)
    if done == total:
        return "done"
    if any((point, seed) in failed for seed in grid.seeds):
        return "failed"
    if not grid.exhaustive and (verdict := search.verdict(point)):
        stopped = search.known[point].optimistic is not None
        what = f"dropped after {done} of {total} seeds" if done else "stopped early" if stopped else "left out"
        return f"{what}, {verdict}"
    return f"{total - done} of {total} {MISSING}"


def _mean(search: Search, point: Point, field: str) -> float:
    return float(pd.Series([getattr(row, field) for row in search.known[point].rows], dtype=float).mean())
