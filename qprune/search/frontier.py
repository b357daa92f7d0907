"""The front of size against score: which models are worth a run.

Nothing here trains or reads files. A point is a model of so many bits and such a sparsity. Its size is known before
training, its score is not; the search leaves out points that cannot matter under two assumptions:

A1. Of two points of one family (say, of one order), the one with no more bits and no less sparsity is better by no
    more than `margin`.
A2. After its last event a run rises, in the epochs that are left, by no more than `margin` and what it rose in as many
    epochs before, or than the largest rise that finished runs like it have shown (see `training.early_stopping`).

Inside, scores are `quality`: the score, or its negative where lower is better.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from qprune.runs.row import Row
from qprune.runs.scores import unit_of_difference

FLOAT_BITS = 32  # the bits of a point that is not quantized
SAME_SIZE = 1e-3  # sizes so close, relatively, count as equal: the rim of a tiled mask moves them by less
SPREADS = 2.0  # the margin is at least so many standard deviations between seeds


@dataclass(frozen=True)
class Point:
    """A model of the grid."""

    name: str
    families: frozenset[str]  # in which it is compared
    bits: int
    sparsity: float
    size_bits: float  # of weights, features and input, as planned (accounting `actual`)

    @property
    def is_float(self) -> bool:
        """Whether this is the reference, which is neither quantized nor pruned."""
        return self.bits == FLOAT_BITS and self.sparsity == 0

    def compares_with(self, other: Point) -> bool:
        """Return whether the two share a family; the float network has none."""
        return bool(self.families & other.families) and not (self.is_float or other.is_float)

    def is_milder(self, other: Point) -> bool:
        """Return whether this has no fewer bits and no more zeros, or is the same."""
        milder = self.bits >= other.bits and self.sparsity <= other.sparsity
        return self is other or (milder and self.compares_with(other))


@dataclass(frozen=True)
class Known:
    """What is known of a point."""

    scores: Mapping[int, float] = field(default_factory=dict)  # by seed
    optimistic: float | None = None  # of a run that was stopped early: the best score within its reach, without margin
    rows: Sequence[Row] = ()  # of the same runs as `scores`

    @property
    def mean(self) -> float:
        """Mean score over seeds; NaN without any."""
        return statistics.fmean(self.scores.values()) if self.scores else math.nan

    @property
    def sd(self) -> float:
        """Standard deviation over seeds; NaN for fewer than two."""
        return statistics.stdev(self.scores.values()) if len(self.scores) > 1 else math.nan


@dataclass(frozen=True)
class Amount:
    """An amount of score, or per cent of the float network's score."""

    value: float
    percent: bool

    def of(self, reference: float) -> float:
        """Return the amount in the score's unit."""
        return abs(reference) * self.value / 100 if self.percent else self.value


@dataclass(frozen=True)
class Question:
    """What is asked; None: any loss, any size."""

    higher_is_better: bool
    max_loss: Amount | None = None
    max_size_bits: float | None = None
    margin: Amount = Amount(1.0, True)  # how far A1 and A2 may be off, and how much of a difference may be chance
    metric: str = field(default="score", repr=False)

    @property
    def unit(self) -> str:
        """The unit of a difference of scores, with a blank before it, if any."""
        return f" {unit_of_difference(self.metric)}".rstrip()

    def amount_text(self, amount: Amount) -> str:
        """Write an amount with its unit."""
        return f"{amount.value:g}" + (" % of the float network's score" if amount.percent else self.unit)

    def limits_text(self, lose: str, be: str) -> str:
        """Say what is asked of a model, if anything. lose, be: the verbs."""
        limits = [] if self.max_loss is None else [f"{lose} at most {self.amount_text(self.max_loss)}"]
        limits += [] if self.max_size_bits is None else [f"{be} no larger than {self.max_size_bits / 1e6:.4g} Mb"]
        return " and ".join(limits)


class Search:
    """The points, what is known of each, and what follows from it.

    margin: in the score's unit, as asked for, and at least SPREADS deviations between seeds (pooled over points);
    infinite without the float network's score, when nothing is judged.
    """

    def __init__(self, points: Sequence[Point], known: Mapping[Point, Known], question: Question) -> None:
        self.points, self.question = list(points), question
        self.known = {point: known.get(point, Known()) for point in points}
        self.finished = [point for point in points if self.known[point].scores]
        self.reference = next((point for point in points if point.is_float), None)
        self.reference_score: float | None = None
        self.margin, self.least_quality = math.inf, -math.inf  # the least: to lose no more than is allowed
        if self.reference in self.finished:
            self.reference_score = self.known[self.reference].mean
            found = [self.known[point] for point in self.finished]
            deviations = [score - one.mean for one in found for score in one.scores.values()]
            freedom = len(deviations) - len(found)
            spread = math.sqrt(sum(d * d for d in deviations) / freedom) if freedom else 0.0
            self.margin = max(question.margin.of(self.reference_score), SPREADS * spread)
            if question.max_loss is not None:
                self.least_quality = self.reached(self.reference) - question.max_loss.of(self.reference_score)

    def quality(self, score: float) -> float:
        """Turn a score so that more is better (and back)."""
        return score if self.question.higher_is_better else -score

    def reached(self, point: Point) -> float:
        """Return the quality of a finished point: its mean over seeds."""
        return self.quality(self.known[point].mean)

    def size(self, point: Point) -> float:
        """Return the size in bits: of the rows where there are some, else as planned."""
        rows = self.known[point].rows
        return statistics.fmean(row.size_bits() for row in rows) if rows else point.size_bits

    def exceeds(self, point: Point, size: float) -> bool:
        """Return whether a point is larger than `size` by more than chance."""
        return self.size(point) > size * (1 + SAME_SIZE)

    def is_allowed(self, point: Point) -> bool:
        """Return whether a finished point keeps within the limits of the question."""
        limit = self.question.max_size_bits
        return self.reached(point) >= self.least_quality and (limit is None or self.size(point) <= limit)

    def ceiling(self, point: Point) -> tuple[float, Point]:
        """Return the best quality that A1 leaves to a point, and what shows it."""
        found = [(math.inf, point)]
        for other in self.points:
            if other.is_milder(point) and self.known[other].scores:
                found.append((self.reached(other), other))
            elif other.is_milder(point) and (optimistic := self.known[other].optimistic) is not None:
                # A2 has a margin of its own, which holds for the point itself but not for another one
                found.append((self.quality(optimistic) + (0.0 if other is point else self.margin), other))
        return min(found, key=lambda pair: pair[0])

    def needed(self, point: Point) -> tuple[float, Point | None]:
        """Return the quality that a point needs to matter, and the rival that sets it."""
        found: list[tuple[float, Point | None]] = [(self.least_quality, None)]
        rivals = (p for p in self.finished if p is not point and not self.exceeds(p, self.size(point)))
        return max([*found, *((self.reached(rival), rival) for rival in rivals)], key=lambda pair: pair[0])

    def need_text(self, rival: Point | None) -> str:
        """Say what a model would have to reach."""
        if rival is not None:
            return f"{rival.name} is no larger and has {self.known[rival].mean:.4g}"
        return f"{self.quality(self.least_quality):.4g} is needed to lose no more than is allowed"

    def verdict(self, point: Point) -> str | None:
        """Return why a point is not worth a run; None where it is.

        It is too large, loses too much, or is dominated, as its own score shows or another one (A1).
        """
        if point.is_float:
            return None
        if self.question.max_size_bits is not None and self.exceeds(point, self.question.max_size_bits):
            return f"too large ({self.size(point) / 1e6:.4g} Mb)"
        (ceiling, by), (needed, rival) = self.ceiling(point), self.needed(point)
        if ceiling >= needed - self.margin:
            return None
        shown, metric = self.known[by], self.question.metric
        what = f"has {metric} {shown.mean:.4g}"
        if not shown.scores:
            what = f"was stopped when it could still reach {metric} {shown.optimistic:.4g}"
        who, kind = "it" if by is point else by.name, "dominated" if rival else "loses too much"
        return f"{kind}: {who} {what}, and {self.need_text(rival)}"

    def dominated_by(self, point: Point) -> Point | None:
        """Return the best finished point that beats this one, if any."""
        mine, size = self.reached(point), self.size(point)
        better = [p for p in self.finished if self.reached(p) > mine and not self.exceeds(p, size)]
        smaller = [p for p in self.finished if self.reached(p) == mine and self.exceeds(point, self.size(p))]
        return max(better + smaller, key=self.reached, default=None)

    def front(self) -> list[Point]:
        """Return the finished points that none dominates, the smallest first."""
        return sorted((p for p in self.finished if self.dominated_by(p) is None), key=self.size)

    def answer(self) -> Point | None:
        """Return the smallest allowed point; with a limit of size alone, the best."""
        allowed = [point for point in self.front() if self.is_allowed(point) and not point.is_float]
        if self.question.max_loss is None and self.question.max_size_bits is not None:
            return max(allowed, key=self.reached, default=None)
        return allowed[0] if allowed else None

    def close_calls(self, answer: Point) -> list[Point]:
        """Return smaller points that miss the score by less than the margin."""
        least = self.least_quality
        close = [p for p in self.finished if least - self.margin <= self.reached(p) < least]
        return sorted((p for p in close if self.size(p) < self.size(answer)), key=self.size)


def in_order(points: Iterable[Point]) -> list[Point]:
    """Order points: the reference, then by family the farthest from all before.

    So both ends and the corners come first, and what they show spares runs between them. Of equally far points the
    milder comes first, since A1 says more from it.
    """
    remaining = sorted(points, key=lambda point: not point.is_float)
    ordered = [remaining.pop(0)] if remaining[0].is_float else []
    bits, sparsities = sorted({-p.bits for p in remaining}), sorted({p.sparsity for p in remaining})
    place = {  # of bits and sparsity, from 0 (mild) to 1 (harsh)
        p: (bits.index(-p.bits) / max(1, len(bits) - 1), sparsities.index(p.sparsity) / max(1, len(sparsities) - 1))
        for p in remaining
    }

    def rank(point: Point, family: str) -> tuple[float, float]:
        near = [math.dist(place[point], place[other]) for other in ordered if family in other.families]
        return min(near, default=math.inf), -sum(place[point])

    families = list(dict.fromkeys(family for point in remaining for family in sorted(point.families)))
    while remaining:
        for family in families:
            if own := [point for point in remaining if family in point.families]:
                ordered.append(max(own, key=lambda point: rank(point, family)))
                remaining.remove(ordered[-1])
    return ordered
