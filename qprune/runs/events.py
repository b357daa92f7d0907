"""The states before a run's events (`trainer.keep_events`), and figures of its tensors in such a state."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qprune.compression.fake_quantize import shaped_along
from qprune.compression.functional import fake_quantize, integer_range, optimal_decimal
from qprune.compression.prepare import FeatureOperators
from qprune.compression.pruner import Pruner
from qprune.compression.quantizer import Quantizer
from qprune.compression.schedule import Timeline
from qprune.errors import UserError
from qprune.runs.folder import EVENTS
from qprune.runs.histograms import Enough
from qprune.runs.load import FinishedRun
from qprune.training import checkpoint
from qprune.training.distributed import autocast

ELEMENTS = 1 << 20  # of a feature that is looked at, evenly spread over the batch
Site = tuple[str, str]  # kind and path


@dataclass(frozen=True)
class Event:
    """A step at which operators of one kind change.

    Attributes:
        step, epoch: When; what was trained before it.
        kind: `prune`, `quantize weights` or `quantize features`.
        phase: What is active from that step on.
    """

    step: int
    epoch: float
    kind: str
    phase: str


def events_of(timeline: Timeline) -> list[Event]:
    """List the events of a run in their order; of one step, pruning comes first."""
    kinds = [(step, "prune") for step in timeline.prune_steps]
    kinds += [] if timeline.weight_step is None else [(timeline.weight_step, "quantize weights")]
    kinds += [] if timeline.feature_step is None else [(timeline.feature_step, "quantize features")]
    ordered = sorted(kinds, key=lambda each: each[0])
    return [Event(step, step / timeline.steps_per_epoch, kind, timeline.phase(step)) for step, kind in ordered]


def set_active(run: FinishedRun, kind: str, active: bool) -> None:
    """Let the operators of an event's kind act, or not."""
    pruners = run.compressor.pruners("weight") + run.compressor.pruners("feature")
    for placed in pruners if kind == "prune" else run.compressor.quantizers(kind.split()[1].removesuffix("s")):
        placed.operator.active = active


def kept_steps(run: FinishedRun) -> list[int]:
    """Return the steps before which the run's state was kept, rising; the first is that of the warm start."""
    return sorted(checkpoint.steps(run.folder / EVENTS))


def restore(run: FinishedRun, step: int) -> None:
    """Put a run's networks and operators into the state before `step`, which was kept."""
    state = checkpoint.load_newest(run.folder / EVENTS, latest=step)
    if state is None or state["step"] != step:
        raise UserError(f"the state before step {step} in {run.folder / EVENTS} is damaged; train the run again")
    run.task.load_state_dict(state["task"])
    run.compressor.load_state_dict(state["compressor"])


def weights(run: FinishedRun) -> dict[str, Tensor]:
    """Return a copy of each raw weight that has operators, by site."""
    return {path: chain.original.detach().cpu().clone() for path, chain in _chains(run).items()}


def masks(run: FinishedRun) -> dict[Site, Tensor]:
    """Return a copy of each mask as bool, True where it keeps, by site."""
    pruners = ((p, p.operator) for p in run.compressor.placed if isinstance(p.operator, Pruner))
    return {(p.kind, p.path): operator.mask.cpu() > 0.5 for p, operator in pruners}


def first_features(run: FinishedRun) -> dict[str, Tensor]:
    """Return each feature behind its operators, in the first pass of an evaluation."""
    found: dict[str, Tensor] = {}

    def note(operators: Any, args: Any, output: Tensor) -> None:
        found.setdefault(operators.site, _sample(output).cpu().clone())

    def stop(*_: Any) -> None:
        raise Enough

    with _hooked(run.task.network, FeatureOperators, note):
        handle = run.task.network.register_forward_hook(stop)
        try:
            with run.evaluating(), suppress(Enough):
                run.task.evaluate()
        finally:
            handle.remove()
    return found


def tensor_figures(run: FinishedRun, step: int) -> dict[Site, dict[str, float]]:
    """Measure every tensor that has operators, on the training batch of `step`; the state is trained a step further.

    Returns:
        By site, as far as its operators act: `zeros` of the mask; `decimals`, and those that would be chosen for the
        tensor pruned and unpruned, each the mean over channels; `sqnr_pruned` and `sqnr_unpruned`, signal to
        quantization noise in dB; `saturated`, the share of kept values outside the grid; `clipped`, the share of
        gradients that Eq. 2 cuts.
    """
    found: dict[Site, dict[str, float]] = {}
    gradients: dict[Site, _Clipped] = {}
    sites = {p.operator: (p.kind, p.path) for p in run.compressor.placed}
    for path, chain in _chains(run).items():
        pruner = next((each for each in chain if isinstance(each, Pruner)), None)
        quantizer = next((each for each in chain if isinstance(each, Quantizer)), None)
        found["weight", path] = _figures(chain.original.detach(), pruner, quantizer)

    def note_feature(operators: Any, args: Any) -> None:
        placed = [each for each in (operators.pruner, operators.quantizer) if each is not None]
        found.setdefault(sites[placed[0]], _figures(args[0].detach(), operators.pruner, operators.quantizer))

    def note_gradient(quantizer: Any, args: Any, output: Tensor) -> None:
        if quantizer.acts and output.requires_grad:
            output.register_hook(gradients.setdefault(sites[quantizer], _Clipped(quantizer)).count)

    task, length = run.task, len(run.task.train_batches)
    epoch, offset = divmod(step, length)
    task.optimizers()
    task.begin_epoch(epoch)
    task.train()
    with ExitStack() as hooks, torch.random.fork_rng():
        torch.manual_seed(run.config.seed)
        for operators in (module for module in task.network.modules() if isinstance(module, FeatureOperators)):
            hooks.callback(operators.register_forward_pre_hook(note_feature).remove)
        hooks.enter_context(_hooked(task.network, Quantizer, note_gradient))
        batch = next(iter(task.train_batches.epoch(epoch, start=offset)))
        with autocast(run.device, run.config.trainer.precision):
            task.train_step(batch)
    for site, clipped in gradients.items():
        found[site]["clipped"] = clipped.share
    return found


@dataclass
class _Clipped:
    """Counts the gradients at a quantizer's output that Eq. 2 cuts."""

    quantizer: Quantizer
    cut: int = 0
    elements: int = 0

    def count(self, gradient: Tensor) -> None:
        self.cut += int(_outside(gradient, self.quantizer).sum())
        self.elements += gradient.numel()

    @property
    def share(self) -> float:
        return self.cut / self.elements if self.quantizer.grid.gradient == "clip_value" else 0.0


def _chains(run: FinishedRun) -> dict[str, parametrize.ParametrizationList]:
    """Return the operators of each weight that has some, by site."""
    return {p.path: p.chain for p in run.compressor.placed if p.chain is not None}


def _figures(x: Tensor, pruner: Pruner | None, quantizer: Quantizer | None) -> dict[str, float]:
    """Return the figures of one tensor, as it reaches its operators."""
    found: dict[str, float] = {}
    mask = None
    if pruner is not None and pruner.acts:
        found["zeros"] = 1.0 - pruner.density
        mask = pruner.fitted(x).expand_as(x)
    if quantizer is None or not quantizer.acts:
        return found
    if quantizer.axis is None:
        x, mask = _sample(x), None if mask is None else _sample(mask)
    pruned = x if mask is None else x * mask
    found["decimals"] = float(quantizer.fraction_bits.double().mean())
    for name, values in (("pruned", pruned), ("unpruned", x)):
        arguments = (quantizer.bits, quantizer.saturate, quantizer.decimals, quantizer.rounding, quantizer.axis)
        found[f"decimals_{name}"] = float(optimal_decimal(values, *arguments).double().mean())
        on_grid = fake_quantize(
            values, quantizer.bits, quantizer.fraction_bits, quantizer.rounding, "ste", quantizer.axis
        )
        found[f"sqnr_{name}"] = _decibels(values, on_grid)
    kept = _outside(x, quantizer) if mask is None else _outside(x, quantizer)[mask > 0.5]
    found["saturated"] = float(kept.double().mean()) if kept.numel() else 0.0
    return found


def _outside(x: Tensor, quantizer: Quantizer) -> Tensor:
    """Return where x lies outside the range of a quantizer's grid."""
    low, high = integer_range(quantizer.bits)
    scaled = torch.ldexp(x.float(), shaped_along(quantizer.fraction_bits, x, quantizer.axis))
    return (scaled < low) | (scaled > high)


def _decibels(values: Tensor, on_grid: Tensor) -> float:
    signal = float(values.double().square().sum())
    noise = float((on_grid.double() - values.double()).square().sum())
    return math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal else -math.inf


def _sample(x: Tensor) -> Tensor:
    """Return at most ELEMENTS of x, evenly spread, flat."""
    flat = x.detach().flatten()
    return flat[:: -(-flat.numel() // ELEMENTS)]


@contextmanager
def _hooked(network: nn.Module, kind: type[nn.Module], hook: Any) -> Iterator[None]:
    """Call `hook(module, args, output)` after every pass of the modules of a kind."""
    with ExitStack() as hooks:
        for module in network.modules():
            if isinstance(module, kind):
                hooks.callback(module.register_forward_hook(hook).remove)
        yield
