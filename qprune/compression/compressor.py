"""Drive all operators of a network: every mode is derived from the optimizer step that is passed in."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from qprune.compression.auto_plan import auto_plan
from qprune.compression.config import PruneConfig, QuantizeConfig, is_target
from qprune.compression.convert import convert
from qprune.compression.coverage import Coverage, coverage
from qprune.compression.distributed import rank_and_world, summed
from qprune.compression.fake_quantize import working_dtype
from qprune.compression.functional import all_finite
from qprune.compression.operator import Operator
from qprune.compression.plan import Plan
from qprune.compression.prepare import Placed, all_or_nothing, find_operators, prepare, run_example
from qprune.compression.pruner import Pruner
from qprune.compression.quantizer import WINDOW_CAPACITY, Quantizer
from qprune.compression.schedule import Schedule, Timeline, Window
from qprune.errors import RunFailure, UserError


class Compressor:
    """Drives all operators of a network, placed by a plan or by hand, along a timeline.

    Call `at(step)` before each training step, and once after loading a checkpoint. `print` shows a summary.

    Args:
        network: A network with operators.
        timeline: When they act, in optimizer steps.
        example: A tensor, a tuple of arguments or a dict of named ones; it sizes feature masks.

    Attributes:
        calls: How often one pass of the example calls each feature's operators, by site.
        coverage: What stays float, and why, as of `compress`; None in a compressor that was made otherwise.

    Raises:
        UserError: An operator never fires, a mask would have to fit several sizes, or the timeline does not fit.
    """

    def __init__(self, network: nn.Module, timeline: Timeline, example: Any) -> None:
        self.network, self.timeline = network, timeline
        self.placed = tuple(find_operators(network))
        self._step: int | None = None
        self._quiet_until: float = 0  # the step before which nothing changes, as of `_step`
        self.calls: dict[str, int] = {}
        self.coverage: Coverage | None = None
        if not self.placed:
            return
        for placed in self.placed:
            placed.operator.owner = (network,)
        self._size(example)
        self._check_timeline()

    def pruners(self, kind: str) -> list[Placed]:
        """Return the pruners of `weight` or `feature` tensors."""
        return [p for p in self.placed if p.kind == kind and isinstance(p.operator, Pruner)]

    def quantizers(self, kind: str) -> list[Placed]:
        """Return the quantizers of `weight` or `feature` tensors."""
        return [p for p in self.placed if p.kind == kind and isinstance(p.operator, Quantizer)]

    def at(self, step: int) -> None:
        """Put every operator into its state for optimizer step `step` (from 0), events of that step included.

        Steps follow one another; after loading a state (`load_state_dict`), any step may be the first. An event that
        the loaded state has behind it does not fire again.

        Raises:
            UserError: An event was skipped, `step` is lower than before, or no training batch was observed.
            RunFailure: An event found values that are not finite.
        """
        if step == self._step:
            return
        if self._step is not None and self._step < step < self._quiet_until:
            self._step = step  # every operator stays as it is
            return
        if self._step is not None and step < self._step:
            raise UserError(
                f"at({step}) after at({self._step}): pass the optimizer step since training began, not that within an "
                "epoch; to go back, load the states of that step into the network and the compressor first"
            )
        self._check_history(step)
        timeline = self.timeline
        prune_events = timeline.prune_events(step)
        if step in timeline.prune_steps:
            self._prune(step, timeline.fraction(prune_events))
        for placed in self.placed:
            if isinstance(placed.operator, Pruner):
                placed.operator.active = prune_events > 0
        for kind, start in (("weight", timeline.weight_step), ("feature", timeline.feature_step)):
            if step == start:
                self._quantize(step, kind)
            for placed in self.quantizers(kind):
                placed.operator.active = start is not None and step >= start
        for operators, window in (
            (self.pruners("feature"), timeline.prune_window(step)),
            (self.quantizers("feature"), timeline.quantize_window(step)),
        ):
            self._require_whole(operators, window, step)
            self._observe(operators, window)
        self._step, self._quiet_until = step, timeline.next_action(step)

    def _observe(self, placed: Sequence[Placed], window: Window | None) -> None:
        rank, world = rank_and_world()
        for operator in (p.operator for p in placed):
            operator.observing = window is not None
            if window is None:
                continue
            local = -(-window.batch // world)  # ranks take equal shares, the last one what is left
            operator.first_sample = rank * local
            inside = min(max(window.samples - rank * local, 0), local)
            operator.sample_limit = None if inside == local else inside
            if isinstance(operator, Quantizer):
                operator.budget = WINDOW_CAPACITY // (window.steps * world)
            if window.first:
                operator.start_window()

    def _require_whole(self, placed: Sequence[Placed], window: Window | None, step: int) -> None:
        """Raise UserError where training resumes inside a window without what was observed before."""
        resumed = self._step is None and window is not None and not window.first and rank_and_world()[0] == 0
        if resumed and placed and all(p.operator.window is None for p in placed):
            raise UserError(
                f"step {step} lies inside a window of observations, and nothing of the steps before is known: load the "
                "compressor's state too (save compressor.state_dict() beside the network's)"
            )

    def _prune(self, step: int, fraction: Fraction) -> None:
        for placed in self.pruners("weight") + self.pruners("feature"):
            pruner = placed.operator
            assert isinstance(pruner, Pruner)
            if int(pruner.updates) >= self.timeline.prune_events(step):
                continue  # a state from after this event was loaded
            if placed.kind == "weight":
                score = placed.weight_in().abs()
            else:
                self._require_observed(pruner.window is not None, placed, step)
                assert pruner.window is not None
                score = summed(pruner.window)
            self._require_finite(score, placed, step)
            pruner.update(score, fraction)
            pruner.start_window()

    def _quantize(self, step: int, kind: str) -> None:
        for placed in self.quantizers(kind):
            quantizer = placed.operator
            assert isinstance(quantizer, Quantizer)
            if int(quantizer.updates):
                continue  # a state from after this event was loaded
            seen = placed.weight_in() if kind == "weight" else quantizer.observed()
            self._require_finite(seen, placed, step)
            self._require_observed(not quantizer.searches or seen.numel() > 0, placed, step)
            quantizer.update(seen) if kind == "weight" else quantizer.update_by_window(seen)

    def _require_observed(self, observed: bool, placed: Placed, step: int) -> None:
        if not observed:
            mode = "in training mode" if self.network.training else "in evaluation mode"
            raise UserError(
                f"the feature of {placed.path!r} was not observed before the event of step {step}; the network is "
                f"{mode} now: operators observe while it trains (network.train(), then .eval() on the modules to "
                "freeze), and a run that resumes inside a window needs the compressor's state too"
            )

    def _require_finite(self, values: Tensor, placed: Placed, step: int) -> None:
        if not all_finite(values):
            name = type(placed.operator).__name__.lower()
            raise RunFailure(
                f"the {placed.kind} of {placed.path!r} has values that are not finite at its {name}'s event in "
                f"step {step} (phase {self.timeline.phase(step)}); try a lower learning rate"
            )

    def _check_history(self, step: int) -> None:
        """Raise UserError unless events fired in order, in this process or in the one whose state was loaded."""
        timeline = self.timeline
        if self._step is not None and self._step < step:
            missed = [event for event in timeline.events if self._step < event < step]
        else:
            missed = [event for event in timeline.events if event < step] if self._behind(step) else []
        if missed:
            raise UserError(
                f"at({step}) jumps over the event of step {missed[0]}: call at(step) before every step, and load the "
                "network's state before the first call when training is resumed"
            )

    def _behind(self, step: int) -> bool:
        for placed in self.placed:
            if isinstance(placed.operator, Pruner):
                expected = self.timeline.prune_events(step - 1)
            else:
                start = self.timeline.weight_step if placed.kind == "weight" else self.timeline.feature_step
                expected = int(start is not None and step > start)
            if int(placed.operator.updates) < expected:
                return True
        return False

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Observe nothing inside, in any mode of the network: masks and d come from training data only."""
        observing = [placed.operator.observing for placed in self.placed]
        for placed in self.placed:
            placed.operator.observing = False
        try:
            yield
        finally:
            for placed, before in zip(self.placed, observing, strict=True):
                placed.operator.observing = before

    def collect_on_first_rank(self) -> None:
        """Gather what all ranks observed on rank 0, before it is saved; the other ranks discard theirs."""
        rank, world = rank_and_world()
        if world == 1:
            return
        for placed in self.placed:
            operator = placed.operator
            if isinstance(operator, Pruner) and operator.window is not None:
                operator.window = summed(operator.window)
            elif isinstance(operator, Quantizer) and placed.kind == "feature":
                observed = operator.observed()
                operator.window = observed if observed.numel() else None
            if rank:
                operator.clear_window()

    def state_dict(self) -> dict[str, Any]:
        """Return what training needs beside the network's state: the step, and what windows hold so far."""
        windows = {placed.name: placed.operator.window for placed in self.placed if placed.operator.window is not None}
        return {"step": self._step, "windows": windows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state that `state_dict` returned; load the network's state as well.

        With several ranks, rank 0 carries on what all had observed, see `collect_on_first_rank`.

        Raises:
            UserError: It is the state of other operators.
        """
        if unknown := sorted(state["windows"].keys() - {placed.name for placed in self.placed}):
            raise UserError(f"the state is of a network with another plan: it has a window of the {unknown[0]}")
        for placed in self.placed:
            operator, window = placed.operator, state["windows"].get(placed.name)
            operator.window = None if window is None else window.to(operator.updates.device)
            if rank_and_world()[0]:
                operator.clear_window()
        self._step, self._quiet_until = None, 0

    @property
    def sparsity(self) -> dict[str, float]:
        """Fraction of zeros in the masks over all pruned elements, for `weight` and `feature`."""
        found = {}
        for kind in ("weight", "feature"):
            masks = [p.operator.mask for p in self.pruners(kind) if isinstance(p.operator, Pruner)]
            entries, kept = sum(mask.numel() for mask in masks), sum(float(mask.double().sum()) for mask in masks)
            found[kind] = 1.0 - kept / entries if entries else 0.0
        return found

    def preview(self) -> None:
        """Have every operator act as after its last event, before any training: sizes and costs are then known.

        Masks are random, which no size depends on and a cost only by chance; grids hold the largest weight.
        """
        generator = torch.Generator().manual_seed(0)
        for placed in self.placed:
            operator = placed.operator
            operator.active = True
            if isinstance(operator, Pruner):
                operator.update(torch.rand(operator.mask.shape, generator=generator).to(operator.mask.device), 1.0)
                continue
            assert isinstance(operator, Quantizer)
            operator.updates += 1
            if placed.kind == "weight" and operator.searches:
                fitting = torch.log2(operator.grid.bounds[1] / placed.weight_in().abs().max())
                operator.decimal.fill_(int(fitting.floor().clamp(-100, 100)))

    def convert(self) -> nn.Module:
        """Return a copy with the present state built in, see `convert`."""
        return convert(self.network)

    bake = convert  # its name up to version 0.1

    def describe(self) -> list[dict[str, Any]]:
        """Return one row per operator: site, kind, operator, elements and state (sparsity, d), as plain values."""
        rows = []
        for placed in self.placed:
            operator = placed.operator
            row: dict[str, Any] = {"site": placed.path, "kind": placed.kind, "active": operator.acts}
            if isinstance(operator, Pruner):
                state = {"operator": "prune", "elements": operator.mask.numel(), "sparsity": 1.0 - operator.density}
            else:
                assert isinstance(operator, Quantizer)
                state = {
                    "operator": "quantize",
                    "bits": operator.bits,
                    "decimals": operator.fraction_bits.flatten().tolist(),
                }
            rows.append(row | state)
        return rows

    def __str__(self) -> str:
        """Summarize what was taken, at which size, and what was not and why."""
        kinds = ("weight", "feature")
        if self.coverage is None:
            lines = [f"{kind}s: {sum(placed.kind == kind for placed in self.placed)} operators" for kind in kinds]
        else:
            lines = [self.coverage.summary(kind) for kind in kinds]
        several = [f"{site} ({calls} calls)" for site, calls in self.calls.items() if calls > 1]
        if several:
            lines.append(f"one set of decimals and one mask for all calls: {', '.join(several)}")
        if self.coverage is not None:
            lines.append(str(self.coverage))
        return "\n".join(lines)

    def _size(self, example: Any) -> None:
        """Size feature masks by the example, and require each feature operator to fire."""
        calls: dict[Operator, list[tuple[int, ...]]] = {p.operator: [] for p in self.placed if p.chain is None}

        def count(operator: nn.Module, args: tuple[Any, ...]) -> None:
            assert isinstance(operator, Operator)
            calls[operator].append(tuple(args[0].shape[1:]))
            if isinstance(operator, Pruner):
                operator.size_for_feature(args[0])

        handles = [operator.register_forward_pre_hook(count) for operator in calls]
        try:
            run_example(self.network, example)
        finally:
            for handle in handles:
                handle.remove()
        for placed in self.placed:
            operator, shapes = placed.operator, calls.get(placed.operator)
            if shapes is None:
                continue
            if not shapes:
                raise UserError(
                    f"the operator at {placed.path!r} never fires in one pass of the example; take the site out of the "
                    "plan"
                )
            if isinstance(operator, Pruner) and operator.granularity == "element" and len(set(shapes)) > 1:
                raise UserError(
                    f"{placed.path!r} is called {len(shapes)} times, with features of {len(set(shapes))} sizes, which "
                    "one mask does not fit; prune it with granularity='channel', or quantize it alone"
                )
            self.calls[placed.path] = len(shapes)

    def _check_timeline(self) -> None:
        features = {"prune": self.pruners("feature"), "quantize": self.quantizers("feature")}
        if features["prune"] and self.timeline.prune_steps and self.timeline.prune_steps[0] < 1:
            raise UserError("the first pruning event is at step 0, before any feature was seen; raise t_p or dt_p")
        searching = any(isinstance(p.operator, Quantizer) and p.operator.searches for p in features["quantize"])
        if searching and self.timeline.feature_step == 0:
            raise UserError(
                "t_qf is at step 0, before any feature was seen; raise t_qf, or fix the decimal bits (decimal=7 for "
                "example)"
            )


def attach(
    network: nn.Module,
    plan: Plan,
    timeline: Timeline,
    example: Any,
    prune: PruneConfig | None = None,
    quantize: QuantizeConfig | None = None,
) -> Compressor:
    """Insert the plan's operators into `network`, in place, and return their compressor.

    Args:
        network: Any module.
        plan: Its sites; those of operators that are not asked for are skipped.
        timeline: When operators act, in optimizer steps.
        example: One input, as in `compress`.
        prune, quantize: What the operators do; None for none of the kind.

    Raises:
        UserError: As in `prepare` and `Compressor`.
    """
    network = _uncompiled(network)
    _check_types(network, quantize)
    with all_or_nothing(network):
        prepare(network, plan.restricted(prune, quantize), prune, quantize)
        return Compressor(network, timeline, example)


def _uncompiled(network: nn.Module) -> nn.Module:
    """Return the network that `torch.compile` put into another module, or `network` itself."""
    # Torch has no public way to it but its name, by which states have it too.
    inner = dict(network.named_children())
    return inner["_orig_mod"] if inner.keys() == {"_orig_mod"} else network


def _check_types(network: nn.Module, quantize: QuantizeConfig | None) -> None:
    """Raise UserError where parameters are of a type that grids do not fit into."""
    if quantize is None:
        return
    bits = max(quantize.bits, quantize.bits_of_features)
    for name, parameter in network.named_parameters():
        if parameter.is_floating_point() and working_dtype(parameter.dtype, bits) != parameter.dtype:
            raise UserError(
                f"{name} is of {parameter.dtype}, which does not hold a grid of {bits} bits; keep the parameters "
                "in float32 (network.float()) and train under torch.autocast"
            )


def compress(  # noqa: PLR0913  (the library's one entry point, called with keywords)
    network: nn.Module,
    example: Any,
    schedule: Schedule,
    steps_per_epoch: int,
    batch_size: int,
    prune: PruneConfig | None = PruneConfig(),  # noqa: B008  (frozen)
    quantize: QuantizeConfig | None = QuantizeConfig(),  # noqa: B008
    plan: Plan | None = None,
    include: Sequence[str] = ("**",),
    exclude: Sequence[str] = (),
    samples: int | None = None,
) -> Compressor:
    """Prune and quantize a network in a training loop of your own.

    `print(compressor)` shows what was taken, and what was not and why. A warning is issued where operators cannot reach
    half of the elements of weights or of features. If an error is raised, the network stays as it was.

    Args:
        network: Any module; operators are inserted in place.
        example: One input as training gives it, a batch of any size: a tensor, a tuple of arguments or a dict of
            named ones.
        schedule: Times in epochs.
        steps_per_epoch: Optimizer steps per epoch.
        batch_size: Samples per step.
        prune, quantize: How much; None leaves it out.
        plan: Where; default `auto_plan(network, example, include, exclude)`.
        include, exclude: Globs over module paths (`*` matches within one name, `**` crosses dots):
            `exclude=["head.**"]` keeps a head in float.
        samples: Samples of the example; default: the first dimension that most arguments (and results) share, where a
            list of tensors has one for each sample.

    Returns:
        The compressor; call `at(step)` before each step.

    Raises:
        UserError: No layer can be compressed, a glob matches nothing, or an argument is not legal.
    """
    if plan is not None and (tuple(include) != ("**",) or exclude):
        raise UserError("plan= says which tensors are taken, and include= and exclude= too; give one or the other")
    timeline = schedule.in_steps(steps_per_epoch, batch_size, prune.window if prune else 1)
    network = _uncompiled(network)
    with all_or_nothing(network):
        found = plan or auto_plan(network, example, include, exclude, samples)
        compressor = attach(network, found, timeline, example, prune, quantize)
        compressor.coverage = coverage(network, example, samples)
    for kind in ("weight", "feature"):
        wanted = is_target(kind, prune) or is_target(kind, quantize)
        if wanted and compressor.coverage.reachable(kind) < 0.5:
            summary = compressor.coverage.summary(kind)
            warnings.warn(f"most elements stay float: {summary}; print(compressor) says why", stacklevel=2)
    return compressor
