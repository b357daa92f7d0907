"""A result row for people: the score, what was saved, and why the row may not be comparable."""

from __future__ import annotations

from collections.abc import Mapping

from rich.text import Text

from qprune.errors import counted
from qprune.runs.row import Row
from qprune.runs.scores import unit_of_score

KINDS = {"weight": "weights", "feature": "features", "input": "input"}


def format_row(row: Row, reference: Row | None = None) -> Text:
    """Return a row as a few lines. reference: the row of the float network, if it is there."""
    sizes = {name: row.size_bits(name) for name in ("actual", "paper")}
    parts = ", ".join(f"{name} {_mb(getattr(row, f'{kind}_bits_actual'))} Mb" for kind, name in KINDS.items())
    zeros = ", ".join(f"{KINDS[kind]} {100 * getattr(row, f'{kind}_sparsity'):.4g} %" for kind in ("weight", "feature"))
    unit = f" {row.density_unit}" if row.density_unit else ""
    as_paper = f"as the paper counts, {digits(row.density_paper)}{unit} at {_mb(sizes['paper'])} Mb"
    lines = [
        f"{row.task}  {row.notation}  seed {row.seed}",
        f"  {gain_text(row, reference)}",
        f"  {parts} (Mb: 10^6 bits)",
        f"  density {digits(row.density_actual)}{unit}; {as_paper}",
        f"  zeros: {zeros}; {counted(row.epochs, 'epoch')}, {counted(row.steps, 'step')}",
    ]
    if row.mask_bits_actual:
        density = _or_dash(row.density_with_masks)
        lines.append(f"  with masks stored: {_mb(row.mask_bits_actual)} Mb more, density {density}")
    if row.costs:
        counts, rest = cost_lines(row.costs)
        lines += [f"  {counts}", f"  {rest}; density per effective BOP {_or_dash(row.density_effective_bops)}"]
    lines += [f"  {line}" for line in recovery_lines(row.recovery)] if row.recovery else []
    if row.marks:
        lines.append(f"  not comparable with the paper: {'; '.join(row.marks)}")
    return Text("\n".join(lines))


def gain_text(row: Row, reference: Row | None = None) -> str:
    """Say what compression cost in score and saved in size."""
    text, size = score_text(row.metric, row.score), row.size_bits()
    whole = reference.size_bits() if reference is not None else row.float_bits_actual
    if reference is not None and reference.signature != row.signature and reference.metric == row.metric:
        text += f" (float {score_text(row.metric, reference.score, name=False)})"
    if not whole or whole <= size:
        return f"{text}, {_mb(size)} Mb ({_mb(size / 8)} MB)"
    return (
        f"{text}, {digits(whole / size, 2)} times smaller: {_mb(size)} of {_mb(whole)} Mb "
        f"({_mb(size / 8)} of {_mb(whole / 8)} MB)"
    )


def score_text(metric: str, score: float, name: bool = True) -> str:
    """Write a score with its name and unit: `psnr 31.38 dB`."""
    unit = unit_of_score(metric)
    shown = metric.rpartition("_")[0] if unit else metric
    number = f"{score:.2f}" if abs(score) >= 1 or score == 0 else digits(score)
    return f"{f'{shown} ' if name else ''}{number}{f' {unit}' if unit else ''}"


def digits(value: float, count: int = 3) -> str:
    """Write a number in significant digits, zeros at the end included: 7.30, 127, 0.0909."""
    text = f"{value:#.{count}g}"
    return f"{value:,.0f}" if "e" in text and abs(value) >= 1 else text.rstrip(".")


def _mb(bits: float) -> str:
    return digits(bits / 1e6)


def cost_lines(costs: Mapping[str, float]) -> tuple[str, str]:
    """Return the total of a `Cost` in two lines."""
    moved = digits((costs["weight_bytes"] + costs["feature_bytes"]) / 1e6)
    products, effective = (digits(costs[name] / 1e6) for name in ("macs", "effective_macs"))
    bops, effective_bops = (digits(costs[name] / 1e9) for name in ("bops", "effective_bops"))
    width = f"accumulators of {costs['accumulator_bits']:.0f} bits; " if "accumulator_bits" in costs else ""
    return (
        f"cost: {products} M products, {effective} M effective; {bops} GBOPs, {effective_bops} effective",
        f"{width}{moved} MB moved; {digits(costs['energy_pj'] / 1e6)} uJ by Horowitz's table",
    )


def _or_dash(value: float | None) -> str:
    return "-" if value is None else digits(value)


def recovery_lines(recovery: Mapping[str, float]) -> list[str]:
    """Say how much training is left after the last event of each operator."""
    return [
        f"after the last {name} event: {counted(round(recovery[f'epochs_after_{name}'], 4), 'epoch')}, "
        f"with learning rates that sum to {recovery[f'rates_after_{name}']:.3g}"
        for name in ("pruning", "quantization")
        if f"epochs_after_{name}" in recovery
    ]
