"""The search for the front of size against score: which points are worth a run, in which order, and what came out.

Nothing here trains or reads files. A point is a model of so many bits and such a sparsity. Its size is known before
training, its score only afterwards; the search leaves out points that cannot matter under two stated assumptions:

A1. Of two points of one family (say, of one order), the one with no more bits and no less sparsity is better by no
    more than `margin`.
A2. After its last event a run rises, in the epochs that are left, by no more than `margin` and what it rose in as many
    epochs before, or than the largest rise that finished runs like it have shown (see `stopping`).

Inside, scores are `quality`: the score, or its negative where lower is better.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

FLOAT_BITS = 32  # the bits of a point that is not quantized
SAME_SIZE = 1e-3  # sizes so close, relatively, count as equal: the rim of a tiled mask moves them by less
SPREADS = 2.0  # the margin is at least so many standard deviations between seeds


@dataclass(frozen=True)
class Point:
    """A model of the grid. families: those whose scale of compression it stands on; a model that is not pruned is
    the same in every order. size_bits: of weights, features and input, as planned (accounting `actual`)."""

    name: str
    families: frozenset[str]
    bits: int
    sparsity: float
    size_bits: float

    @property
    def is_float(self) -> bool:
        """Whether this is the reference, which is neither quantized nor pruned."""
        return self.bits == FLOAT_BITS and self.sparsity == 0

    def compares_with(self, other: Point) -> bool:
        """Whether the two stand on one scale. The float network is the reference and on none."""
        return bool(self.families & other.families) and not (self.is_float or other.is_float)

    def is_milder(self, other: Point) -> bool:
        """Whether this point has no fewer bits and no more sparsity than `other`, or is the same one."""
        if self is other:
            return True
        return self.compares_with(other) and self.bits >= other.bits and self.sparsity <= other.sparsity


@dataclass(frozen=True)
class Known:
    """What is known of a point. scores: of finished runs by seed. size_bits: of their rows (mean).

    optimistic: of a run that was stopped early, the best score that it could still have reached but for the margin.
    """

    scores: Mapping[int, float] = field(default_factory=dict)
    size_bits: float | None = None
    optimistic: float | None = None

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
    """An amount of score: `value` in the score's unit, or in per cent of the float network's score."""

    value: float
    percent: bool

    def of(self, reference: float) -> float:
        """In the score's unit."""
        return abs(reference) * self.value / 100 if self.percent else self.value


@dataclass(frozen=True)
class Question:
    """What is asked: how much may be lost against the float network, how large the model may be (bits; None: any).

    margin: how far A1 and A2 may be off, and how much of a difference may be chance.
    """

    higher_is_better: bool
    max_loss: Amount | None = None
    max_size_bits: float | None = None
    margin: Amount = Amount(1.0, True)


@dataclass(frozen=True)
class Verdict:
    """Why a point is not worth (another) run. kind: `too large`, `loses too much` or `dominated`.

    by: the point whose score shows it (A1), or the point itself. rival: the one that dominates.
    """

    kind: str
    by: Point
    rival: Point | None = None


class Search:
    """The points, what is known of each, and what follows from it."""

    def __init__(self, points: Sequence[Point], known: Mapping[Point, Known], question: Question) -> None:
        self.points, self.question = list(points), question
        self.known = {point: known.get(point, Known()) for point in points}
        self.reference = next((point for point in points if point.is_float), None)

    def quality(self, score: float) -> float:
        """The score, turned so that more is better (and back)."""
        return score if self.question.higher_is_better else -score

    def size(self, point: Point) -> float:
        """In bits: of the rows where there are some, else as planned."""
        measured = self.known[point].size_bits
        return point.size_bits if measured is None else measured

    @property
    def finished(self) -> list[Point]:
        """Points with a finished run."""
        return [point for point in self.points if self.known[point].scores]

    @property
    def reference_score(self) -> float | None:
        """The float network's mean score, once there is one."""
        known = self.known[self.reference] if self.reference else Known()
        return known.mean if known.scores else None

    @property
    def margin(self) -> float:
        """In the score's unit: as asked for, and at least SPREADS deviations between seeds (pooled over points).

        Infinite as long as the reference has no score: nothing is judged before.
        """
        if self.reference_score is None:
            return math.inf
        groups = [list(self.known[point].scores.values()) for point in self.finished]
        squares = sum(statistics.variance(group) * (len(group) - 1) for group in groups if len(group) > 1)
        freedom = sum(len(group) - 1 for group in groups)
        spread = math.sqrt(squares / freedom) if freedom else 0.0
        return max(self.question.margin.of(self.reference_score), SPREADS * spread)

    @property
    def least_quality(self) -> float:
        """What a model must reach to lose no more than is allowed."""
        if self.question.max_loss is None or self.reference_score is None:
            return -math.inf
        return self.quality(self.reference_score) - self.question.max_loss.of(self.reference_score)

    def is_allowed(self, point: Point) -> bool:
        """Whether a finished point keeps within the loss and the size that are asked for."""
        limit = self.question.max_size_bits
        return self.quality(self.known[point].mean) >= self.least_quality and (
            limit is None or self.size(point) <= limit
        )

    def ceiling(self, point: Point) -> tuple[float, Point]:
        """The quality that the point reaches at best, but for the margin (A1), and the point that says so."""
        found = (math.inf, point)
        for other in self.points:
            known = self.known[other]
            if not other.is_milder(point):
                continue
            if known.scores:
                found = min(found, (self.quality(known.mean), other), key=lambda pair: pair[0])
            elif known.optimistic is not None:
                # A2 has its own margin, which the point itself shares and another one does not
                value = self.quality(known.optimistic) + (0.0 if other is point else self.margin)
                found = min(found, (value, other), key=lambda pair: pair[0])
        return found

    def needed(self, point: Point) -> tuple[float, Point | None]:
        """The quality below which the point does not matter, and the rival of no larger size that sets it, if any."""
        best: tuple[float, Point | None] = (self.least_quality, None)
        for rival in self.finished:
            if rival is not point and self.size(rival) <= self.size(point) * (1 + SAME_SIZE):
                quality = self.quality(self.known[rival].mean)
                best = max(best, (quality, rival), key=lambda pair: pair[0])
        return best

    def verdict(self, point: Point) -> Verdict | None:
        """Why the point is not worth a run, or further seeds; None where it is. The reference always is."""
        if point.is_float:
            return None
        limit = self.question.max_size_bits
        if limit is not None and self.size(point) > limit * (1 + SAME_SIZE):
            return Verdict("too large", point)
        ceiling, by = self.ceiling(point)
        needed, rival = self.needed(point)
        if ceiling < needed - self.margin:
            return Verdict("dominated" if rival else "loses too much", by, rival)
        return None

    def dominated_by(self, point: Point) -> Point | None:
        """Of the finished points that are no larger and better (or smaller and as good), the best; else None."""
        mine = self.quality(self.known[point].mean), self.size(point)
        rivals = []
        for other in self.finished:
            quality, size = self.quality(self.known[other].mean), self.size(other)
            better = quality > mine[0] and size <= mine[1] * (1 + SAME_SIZE)
            smaller = quality == mine[0] and size * (1 + SAME_SIZE) < mine[1]
            if better or smaller:
                rivals.append(other)
        return max(rivals, key=lambda other: self.quality(self.known[other].mean), default=None)

    @property
    def front(self) -> list[Point]:
        """The finished points that no other one dominates, from the smallest to the largest."""
        return sorted((p for p in self.finished if self.dominated_by(p) is None), key=self.size)

    def answer(self) -> Point | None:
        """The smallest point that is allowed; with a limit of size alone, the best; None when none is."""
        allowed = [point for point in self.front if self.is_allowed(point) and not point.is_float]
        if self.question.max_loss is None and self.question.max_size_bits is not None:
            return max(allowed, key=lambda point: self.quality(self.known[point].mean), default=None)
        return allowed[0] if allowed else None

    def close_calls(self, answer: Point) -> list[Point]:
        """Points that would have been the answer, and miss it by less than the margin."""
        if self.question.max_loss is None:
            return []
        missed = [
            point
            for point in self.finished
            if self.size(point) < self.size(answer)
            and self.least_quality - self.margin <= self.quality(self.known[point].mean) < self.least_quality
        ]
        return sorted(missed, key=self.size)


def in_order(points: Iterable[Point]) -> list[Point]:
    """The reference, then within each family the mildest point and, one by one, that which is farthest from all before.

    So both ends and the corners come first, and what they show spares runs between them. Of equally far points the
    milder comes first, since A1 tells more from it. Families take turns.
    """
    remaining = list(points)
    ordered = [point for point in remaining if point.is_float]
    remaining = [point for point in remaining if not point.is_float]
    bits, sparsities = sorted({-p.bits for p in remaining}), sorted({p.sparsity for p in remaining})

    def place(point: Point) -> tuple[float, float]:
        """Ranks of bits and sparsity, from 0 (mild) to 1 (harsh)."""
        ranks = bits.index(-point.bits), sparsities.index(point.sparsity)
        return ranks[0] / max(1, len(bits) - 1), ranks[1] / max(1, len(sparsities) - 1)

    def distance(point: Point, family: str) -> float:
        near = [math.dist(place(point), place(other)) for other in ordered if family in other.families]
        return min(near, default=math.inf)

    families = list(dict.fromkeys(family for point in remaining for family in sorted(point.families)))
    while remaining:
        for family in families:
            own = [point for point in remaining if family in point.families]
            if own:
                far = {point: (distance(point, family), -sum(place(point))) for point in own}
                chosen = max(own, key=far.__getitem__)
                ordered.append(chosen)
                remaining.remove(chosen)
    return ordered
