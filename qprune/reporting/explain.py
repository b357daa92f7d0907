"""Why two runs differ: what each event cost, what training regained, and what became of every tensor."""

import copy
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd
import torch
from rich.table import Table

from qprune.errors import UserError
from qprune.reporting.recipes import differing_keys
from qprune.runs import events as snapshots
from qprune.runs.events import Event, events_of
from qprune.runs.folder import METRICS_FILE, RunFolder
from qprune.runs.load import FinishedRun
from qprune.runs.scores import unit_of_difference
from qprune.training.progress import plain

NAMES = ("A", "B")
# Terms of a score, in the order in which they occur: they add up to it
START, BETWEEN, AFTER = "before the first event", "training between events", "training after the last event"

# Short enough for every table to fit 80 columns
_HEADINGS = {
    "regained": "regain",
    "epochs_left": "left",
    "rate_left": "rates",
    "decimals": "d",
    "decimals_pruned": "d-p",
    "decimals_unpruned": "d-u",
    "sqnr_pruned": "SQNR-p",
    "sqnr_unpruned": "SQNR-u",
    "saturated": "satur.",
    "distance": "dist.",
}


@dataclass(frozen=True)
class Explanation:
    """What was measured, as tables; runs are called A and B.

    Attributes:
        labels: Recipe, seed and score of A and of B.
        differing: The config keys in which they differ, of A and of B.
        unit: Of a difference of scores, with a blank before it.
        terms: Columns term, A, B: what each score is made of. Empty without kept states.
        events: A line per run and event: epoch, kind, phase, score before and after it, `regained` (epochs until the
            score was there again, NaN: never), epochs and sum of learning rates that were left, `shift` of features
            and `churn` of masks.
        tensors: A line per run, state and tensor: the figures of `tensor_figures`; `distance` of a weight from the warm
            start and `shift` of a feature by the event, both relative; `churn`, the share of mask entries that changed.
        masks: A line per mask: share of zeros, share of A's zeros that are B's too, and what chance would give.
        exchanged: Columns network, masks, score: each network with either run's masks.
        missing: What was not measured, and why.
    """

    labels: tuple[str, str]
    differing: tuple[str, str]
    unit: str
    terms: pd.DataFrame
    events: pd.DataFrame
    tensors: pd.DataFrame
    masks: pd.DataFrame
    exchanged: pd.DataFrame
    missing: list[str]


def explain(first: FinishedRun, second: FinishedRun) -> Explanation:
    """Measure two runs of one task, at their ends and around the events whose states they kept."""
    runs = dict(zip(NAMES, (first, second), strict=True))
    final_masks = {name: snapshots.masks(run) for name, run in runs.items()}
    metric = first.task.metric
    scores = {name: run.evaluate()[metric] for name, run in runs.items()}
    exchanged = _exchanged(runs, scores, final_masks)
    events, tensors, terms, missing = [], [], {}, []
    for name, run in runs.items():
        final = copy.deepcopy(run.task.state_dict())
        kept = snapshots.kept_steps(run)
        start = None
        if kept:
            snapshots.restore(run, kept[0])
            start = snapshots.weights(run)
        else:
            missing.append(f"{name} kept no states: train it again with trainer.keep_events=true force=true")
        lines, figures = _around_events(run, set(kept), start)
        run.task.load_state_dict(final)
        run.compressor.load_state_dict({"step": None, "windows": {}})
        run.compressor.at(run.row.steps)
        distances = {} if start is None else _distances(snapshots.weights(run), start)
        for site, found in snapshots.tensor_figures(run, run.row.steps - 1).items():
            figures.append({"event": "end", "kind": site[0], "tensor": site[1], **found, **distances.get(site, {})})
        events += [{"run": name} | line for line in lines]
        tensors += [{"run": name} | line for line in figures]
        if lines and not any(math.isnan(line["before"]) for line in lines):
            terms[name] = _terms(lines, scores[name])
    labels = (_label(first, scores["A"]), _label(second, scores["B"]))
    one, other = differing_keys([run.config.model_dump(by_alias=True) for run in runs.values()])
    return Explanation(
        labels=labels,
        differing=(one, other),
        unit=f" {unit_of_difference(metric)}".rstrip(),
        terms=pd.DataFrame(terms).rename_axis("term").reset_index() if len(terms) == len(NAMES) else pd.DataFrame(),
        events=pd.DataFrame(events),
        tensors=pd.DataFrame(tensors),
        masks=_overlap(final_masks),
        exchanged=exchanged,
        missing=missing,
    )


def _label(run: FinishedRun, score: float) -> str:
    return f"{run.row.notation}, seed {run.row.seed}: {run.row.metric} {score:.4g}"


def _around_events(
    run: FinishedRun, kept: set[int], start: Mapping[str, torch.Tensor] | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the lines of a run's events and of its tensors right after each."""
    if (curve := RunFolder(run.folder).metrics()) is None:
        raise UserError(f"{run.folder / METRICS_FILE} is missing; name a run that has a curve")
    lines, figures = [], []
    for step, group in itertools.groupby(events_of(run.compressor.timeline), key=lambda event: event.step):
        together = list(group)
        changes: dict[tuple[str, str], dict[str, float]] = {}
        if step in kept:
            snapshots.restore(run, step)
            before = _state(run)
            run.compressor.at(step)
        for place, event in enumerate(together):
            line: dict[str, Any] = {"epoch": event.epoch, "kind": event.kind, "phase": event.phase}
            line |= _recovery(curve, event, run) | dict.fromkeys(("before", "after", "shift", "churn"), math.nan)
            if step in kept:
                for later, other in enumerate(together):  # one kind after the other, to see what each of them does
                    snapshots.set_active(run, other.kind, later <= place)
                after = _state(run)
                found = _changes(before, after)
                line |= {"before": before.score, "after": after.score}
                for name in ("shift", "churn"):
                    values = [each[name] for each in found.values() if name in each]
                    line[name] = sum(values) / len(values) if values else math.nan
                for site, each in found.items():
                    own = changes.setdefault(site, {})
                    own.update({name: max(value, own.get(name, 0.0)) for name, value in each.items()})
                before = after
            lines.append(line)
        if step in kept and start is not None:
            for site, own in _distances(snapshots.weights(run), start).items():
                changes.setdefault(site, {}).update(own)
            for site, own in snapshots.tensor_figures(run, step).items():
                of_event: dict[str, Any] = {"event": together[-1].phase, "kind": site[0], "tensor": site[1]}
                figures.append(of_event | own | changes.get(site, {}))
    return lines, figures


class _State(NamedTuple):
    """The score of a run's present state, its features in one pass, and its masks by kind and tensor."""

    score: float
    features: dict[str, torch.Tensor]
    masks: dict[tuple[str, str], torch.Tensor]


def _state(run: FinishedRun) -> _State:
    return _State(run.evaluate()[run.task.metric], snapshots.first_features(run), snapshots.masks(run))


def _changes(before: _State, after: _State) -> dict[tuple[str, str], dict[str, float]]:
    """Return the shift of each feature, relative, and the share of each mask's entries that an event changed."""
    changes: dict[tuple[str, str], dict[str, float]] = {}
    for path, old in before.features.items():
        new, length = after.features[path], float(old.double().norm())
        if length and new.shape == old.shape:  # regions of pictures may be more or fewer than before
            changes["feature", path] = {"shift": float((new.double() - old.double()).norm()) / length}
    for site, mask in before.masks.items():
        changes.setdefault(site, {})["churn"] = float((after.masks[site] != mask).double().mean())
    return changes


def _distances(
    weights: Mapping[str, torch.Tensor], start: Mapping[str, torch.Tensor]
) -> dict[tuple[str, str], dict[str, float]]:
    """Return how far each raw weight is from that of the warm start, relative to its length there."""
    return {
        ("weight", path): {"distance": float((weight - start[path]).double().norm() / start[path].double().norm())}
        for path, weight in weights.items()
    }


def _recovery(curve: pd.DataFrame, event: Event, run: FinishedRun) -> dict[str, float]:
    """Return when the score of before an event was there again, and how much training was left at the event."""
    sign, metric = (1 if run.task.higher_is_better else -1), run.row.metric
    scored = curve.dropna(subset=[metric]) if metric in curve else curve[:0]
    before, later = scored[scored["epoch"] <= event.epoch], scored[scored["epoch"] > event.epoch]
    regained = math.nan
    if len(before):
        there = later[sign * later[metric] >= sign * before[metric].iloc[-1]]
        regained = float(there["epoch"].iloc[0]) - event.epoch if len(there) else math.nan
    shares = (curve["epoch"] - event.epoch).clip(0, 1)  # of each epoch, what lies behind the event
    rates = curve.get("learning_rate", math.nan)  # which runs of older versions did not note
    return {"regained": regained, "epochs_left": shares.sum(), "rate_left": (shares * rates).sum(min_count=1)}


def _terms(lines: list[dict[str, Any]], final: float) -> dict[str, float]:
    """Split a final score into what it was before the first event and what each kind of step changed since."""
    terms = {START: lines[0]["before"]}
    for line in lines:
        name = f"event: {line['kind']}"
        terms[name] = terms.get(name, 0.0) + line["after"] - line["before"]
    terms[BETWEEN] = sum(line["before"] for line in lines[1:]) - sum(line["after"] for line in lines[:-1])
    return terms | {AFTER: final - lines[-1]["after"]}


def _overlap(masks: Mapping[str, Mapping[Any, torch.Tensor]]) -> pd.DataFrame:
    """Return for each mask that both runs have how many zeros they share."""
    lines = []
    for site, mine in masks["A"].items():
        other = masks["B"].get(site)
        if other is None or other.shape != mine.shape:
            continue
        zeros, theirs = int((~mine).sum()), int((~other).sum())
        shared = int((~mine & ~other).sum()) / zeros if zeros else math.nan
        lines.append((*site, zeros / mine.numel(), theirs / mine.numel(), shared, theirs / mine.numel()))
    return pd.DataFrame(lines, columns=["kind", "tensor", "zeros_A", "zeros_B", "shared", "by_chance"])


def _exchanged(
    runs: Mapping[str, FinishedRun], scores: Mapping[str, float], masks: Mapping[str, Mapping[Any, torch.Tensor]]
) -> pd.DataFrame:
    """Score each final network with its own masks and with those of the other run."""
    lines = [(name, name, score) for name, score in scores.items()]
    for name, other in (NAMES, NAMES[::-1]):
        run = runs[name]
        pruners = [p for kind in ("weight", "feature") for p in run.compressor.pruners(kind)]
        fitting = [p for p in pruners if (p.kind, p.path) in masks[other]]
        if not fitting or any(masks[other][p.kind, p.path].shape != masks[name][p.kind, p.path].shape for p in fitting):
            continue
        for source in (masks[other], masks[name]):
            for placed in fitting:
                placed.operator.get_buffer("mask").copy_(source[placed.kind, placed.path])
            if source is masks[other]:
                lines.append((name, other, run.evaluate()[run.task.metric]))
    return pd.DataFrame(lines, columns=["network", "masks", "score"])


def sentences(found: Explanation) -> Iterable[str]:
    """Say what the numbers show, the largest terms first."""
    for name, label, keys in zip(NAMES, found.labels, found.differing, strict=True):
        yield f"{name}: {label}" + (f"  ({keys})" if keys else "")
    if len(found.terms):
        total = found.terms["A"].sum() - found.terms["B"].sum()
        yield f"A minus B is {total:+.3g}{found.unit}, made of:"
        difference = (found.terms["A"].fillna(0) - found.terms["B"].fillna(0)).set_axis(found.terms["term"])
        for term, value in difference.sort_values(key=abs, ascending=False).items():
            yield f"  {value:+.3g}{found.unit}  {term}"
    if len(found.masks):
        shared, chance = found.masks["shared"].mean(), found.masks["by_chance"].mean()
        yield f"of the zeros of A, {shared:.0%} are zeros of B too (mean over masks; {chance:.0%} by chance)"
    yield from (f"not measured: {text}" for text in found.missing)


def tables(found: Explanation) -> list[Table]:
    """Return what was measured for the terminal: terms, events, tensors at the end, masks, exchanged masks."""
    last = found.tensors[found.tensors["event"] == "end"] if len(found.tensors) else found.tensors
    last = last.drop(columns=["event"], errors="ignore").dropna(axis=1, how="all")
    if len(last):
        last = last.sort_values(["kind", "tensor", "run"])
        last = last.assign(tensor=last["kind"].str[0] + " " + last["tensor"]).drop(columns="kind")
    events = found.events.rename(columns={"kind": "event"}).drop(columns="phase", errors="ignore")
    shown = {
        "What the scores are made of": found.terms,
        "Events (left: epochs; rates: sum of the learning rates left)": events,
        "Tensors at the end (d: fraction bits, SQNR in dB; -p, -u: pruned, unpruned)": last,
        "Masks at the end": found.masks,
        "Masks of one run in the other's network": found.exchanged,
    }
    return [_table(title, frame) for title, frame in shown.items() if len(frame)]


def _table(title: str, frame: pd.DataFrame) -> Table:
    table = Table(title=title, box=None, pad_edge=False, collapse_padding=True, title_justify="left")
    for name in frame.columns:
        numbers = pd.api.types.is_numeric_dtype(frame[name])
        heading = _HEADINGS.get(str(name), str(name).replace("_", " "))
        table.add_column(heading, justify="right" if numbers else "left", no_wrap=True)
    for line in frame.itertuples(index=False, name=None):
        table.add_row(*("-" if pd.isna(v) else _digits(v) if isinstance(v, float) else plain(v) for v in line))
    return table


def _digits(value: float) -> str:
    if value.is_integer():
        return f"{value:.0f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.2g}"
