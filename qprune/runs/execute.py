"""One run, from its config to its row: found, resumed or started, in its folder."""

import io
import math
import random
import shutil
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from rich.console import Console
from rich.table import Table
from safetensors.torch import save as safetensors_bytes

import qprune
from qprune.atomic_write import csv_bytes, json_bytes, png_bytes
from qprune.compression.activation_trace import uncovered_features
from qprune.compression.cost import cost
from qprune.compression.distributed import rank_and_world
from qprune.compression.fake_quantize import use_native
from qprune.compression.footprint import actual_footprint, paper_footprint
from qprune.compression.plan import Plan, weight_place
from qprune.config import signature as identity
from qprune.config.build import Recipe
from qprune.config.schema import RunConfig
from qprune.errors import Interrupted, RunFailure, StoppedEarly, UserError, counted
from qprune.runs import folder as files
from qprune.runs.environment import describe_environment, marks_of_trees
from qprune.runs.folder import RunFolder
from qprune.runs.histograms import feature_histograms
from qprune.runs.load import copy_fraction_bits
from qprune.runs.lookup import float_row, folder_of, require_same_data, superseded
from qprune.runs.row import SCHEMA_VERSION, Row, make_row
from qprune.runs.row_text import cost_lines, format_row, recovery_lines
from qprune.training.allocator import keep_freed_memory
from qprune.training.distributed import choose_device, launch
from qprune.training.loggers import check_logger, log_curve
from qprune.training.progress import plain, print_text
from qprune.training.setup import attach_operators, build_task, learning_rates, plan_of
from qprune.training.task import Task
from qprune.training.trainer import Loop, Trainer, Watch
from qprune.training.warm_start import WarmStart


def execute(config: Recipe | identity.Config, wait: bool = False, watch: Watch | None = None) -> Row:
    """Carry out, resume or find a run by its signature; return its row, printed.

    Args:
        config: Of the run, or its recipe.
        wait: Whether to wait for another process with the same run, and take its row, as the key `wait` says.
        watch: What may stop the run early, with StoppedEarly; ranks get it pickled.

    Raises:
        UserError: The config cannot be right; nothing is written.
    """
    recipe = Recipe.from_config(config)
    config = recipe.config
    check_logger(config.logger.name)
    folder = folder_of(config)
    if folder.finished and not config.force:
        return _finished(folder, recipe)
    if version := superseded(config):
        print_text(f"published with version {version} of the arithmetic; trained again with {qprune.ARITHMETIC}")
    with folder.locked(wait or config.wait):
        if folder.finished and not config.force:  # another process was faster
            return _finished(folder, recipe)
        if config.force:
            folder.empty()
        folder.note_failed(None)
        print_text(f"run folder: {folder.path}")
        try:
            fields, sums = launch(config.trainer.ranks, _train, recipe, folder, watch)
            row = make_row(**fields)
        except UserError:
            # Refused before the first checkpoint: leave nothing half-written. Looked at only now: a data file that
            # vanished in the middle of training must not take the checkpoints with it.
            if not folder.resumable:
                shutil.rmtree(folder.path, ignore_errors=True)
            raise
        except (Interrupted, StoppedEarly):
            raise
        except Exception as error:
            with suppress(OSError, UserError, RunFailure):  # on a full disk
                if folder.path.is_dir():  # or its folder was taken away
                    folder.note_failed(str(error))
            raise
        folder.store(row, sums)
        folder.remove_checkpoints()
        _say_row(folder, row, config)
        return row


def _finished(folder: RunFolder, recipe: Recipe) -> Row:
    """Return the row of a finished run, printed. Raises UserError if it is of other data."""
    row, config = folder.row(), recipe.config
    if row.signature != identity.signature(config):
        raise UserError(
            f"{folder.path / files.ROW_FILE} is the row of another run, whose signature begins with "
            f"{row.signature[:10]}; delete the folder, or type force=true"
        )
    if config.data.source == "real":
        try:
            dataset = build_task(recipe).dataset
        except UserError as error:
            raise UserError(
                f"{folder.path} is finished, and its data cannot be compared: {error}; its row is shown by: qprune "
                "list runs"
            ) from error
        require_same_data(folder, dataset)
    folder.remove_checkpoints()  # its process was killed right after it wrote the row
    other = f"; it has arithmetic {row.arithmetic}, this code {qprune.ARITHMETIC}"
    other = "" if row.arithmetic == qprune.ARITHMETIC else other
    print_text(f"finished before: {folder.path} (force=true runs it again{other})")
    _say_row(folder, row, config)
    return row


def _say_row(folder: RunFolder, row: Row, config: RunConfig) -> None:
    [marks] = marks_of_trees([folder.environment().model_dump()])
    print_text(format_row(replace(row, marks=[*row.marks, *marks]), float_row(config)))


def plan(config: Recipe | identity.Config) -> str:
    """Return the plan of a run as a table, with schedule and notation."""
    recipe = Recipe.from_config(config).on_synthetic_data()
    task = build_task(recipe)
    text = io.StringIO()
    console = Console(file=text, width=120, highlight=False)
    sites = plan_of(recipe, task)
    compressor = attach_operators(recipe, task, sites)
    console.print(identity.notation(recipe.config))
    console.print(f"{counted(recipe.limits.epochs, 'epoch')}; {recipe.schedule}")
    for line in recovery_lines(compressor.timeline.recovery(learning_rates(task, recipe.limits.epochs))):
        console.print(line)
    sites_table = _plan_table(task, sites)
    console.print(_plan_line(sites_table))
    _print_plan(console, sites_table)
    compressor.preview()
    size = actual_footprint(task.network, task.size_example, count_masks=True)
    megabits = ", ".join(f"{kind}s {size.size_bits(kind) / 1e6:.4g}" for kind in ("weight", "feature", "input", "mask"))
    counts, rest = cost_lines(cost(task.network, task.size_example).total())
    console.print(f"sizes in Mb once trained: {megabits}\n{counts}\n{rest}; with masks drawn at random")
    return text.getvalue().rstrip("\n")


def _train(recipe: Recipe, folder: RunFolder, watch: Watch | None) -> tuple[dict[str, Any], dict[str, str]]:
    """Do the work of one rank; return the row's fields and the checksums of the files that were written."""
    config, first_rank = recipe.config, rank_and_world()[0] == 0
    device = _set_up_process(config)
    task = build_task(recipe, device)
    if folder.resumable:
        require_same_data(folder, task.dataset)
    sites = plan_of(recipe, task)
    compressor = attach_operators(recipe, task, sites)
    if recipe.quantization and config.quantize.decimal_from:
        source = RunFolder.by_signature(config.quantize.decimal_from, Path(config.results_dir))
        copy_fraction_bits(task.network, source)
    task.to(device)
    if first_rank:
        _describe(config, folder, task, sites, device)
    names = {"precision", "evaluate_every", "checkpoint_minutes", "warm_start_at", "compile"}
    options = config.trainer.model_dump(include=names)
    options["events"] = folder.path / files.EVENTS if config.trainer.keep_events else None
    curve, checkpoints = folder.path / files.METRICS_FILE, folder.path / files.CHECKPOINTS
    run = identity.signature(config)
    loop = Loop(recipe.limits.epochs, checkpoints, curve, config.seed, watch=watch, run=run, **options)
    # Compiled, the float prefix depends on the schedule too: steps that collect for it run eagerly.
    shared = config.trainer.warm_start and config.trainer.ranks == 1 and not config.trainer.compile
    trainer = Trainer(task, compressor, loop, device, WarmStart.of(config, task, device) if shared else None)
    metrics = trainer.fit()
    fields = _row_fields(recipe, trainer, metrics)
    if first_rank:
        _write_results(config, folder, trainer)
    return fields, folder.written


def _set_up_process(config: RunConfig) -> torch.device:
    device = choose_device(config.trainer.device, rank_and_world()[0])
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    if device.type == "cpu":
        if config.trainer.keep_memory:
            keep_freed_memory()
        if config.trainer.kernels:
            use_native()
    torch.backends.cudnn.benchmark = True  # sizes stay the same from step to step; has no effect on a CPU
    random.seed(config.seed)
    torch.manual_seed(config.seed)
    return device


def _describe(config: RunConfig, folder: RunFolder, task: Task, sites: Plan, device: torch.device) -> None:
    """Write what is known before training, and print the plan."""
    folder.write(files.CONFIG_FILE, _config_bytes(config))
    table = _plan_table(task, sites)
    folder.write(files.PLAN_FILE, csv_bytes(table))
    environment = describe_environment(config.seed, device, task.dataset)
    folder.write(files.ENVIRONMENT_FILE, json_bytes(environment))
    print_text(f"{_plan_line(table)} ({files.PLAN_FILE})")


def _config_bytes(config: RunConfig) -> bytes:
    return yaml.safe_dump(config.plain(), sort_keys=False).encode()


def _write_results(config: RunConfig, folder: RunFolder, trainer: Trainer) -> None:
    """Write what a trained run leaves beside its row."""
    task = trainer.task
    tensors = {name: t.detach().cpu().contiguous() for name, t in task.network.state_dict().items()}
    folder.write(files.NETWORK_FILE, safetensors_bytes(tensors))
    with trainer.evaluation_context():
        pictures = task.pictures()
    for name, picture in pictures.items():
        folder.write(f"{files.PICTURES}/{name}.png", png_bytes(picture))
    folder.write(files.OPERATORS_FILE, json_bytes(trainer.compressor.describe()))
    folder.written[files.METRICS_FILE] = files.sum_of(trainer.curve)
    if folder.content(files.CONFIG_FILE) != (written := _config_bytes(config)):
        path = folder.path / files.CONFIG_FILE
        print_text(f"{path} was changed while the run trained; it is written again as it was used")
        folder.write(files.CONFIG_FILE, written)
    log_curve(config.logger.name, folder.path, config.plain(), trainer.metrics)
    timing = {
        "steps": trainer.steps,
        "steps_taken_over": trainer.steps_taken_over,
        "training_seconds": trainer.seconds,
        "compile_seconds": trainer.compiled.seconds if trainer.compiled else 0.0,
    }
    folder.write(files.TIMING_FILE, json_bytes(timing))
    with trainer.evaluation_context(), torch.no_grad():
        folder.write(files.HISTOGRAMS_FILE, json_bytes(feature_histograms(task.network, task.evaluate)))


def _row_fields(recipe: Recipe, trainer: Trainer, metrics: dict[str, float]) -> dict[str, Any]:
    config, task, sparsity = recipe.config, trainer.task, trainer.compressor.sparsity
    score = metrics[task.metric]
    marks = list(task.marks)
    if recipe.limits.epochs != config.epochs:
        marks.append(f"{recipe.limits.epochs} of {config.epochs} epochs (budget={config.budget.name})")
    if config.order.steps and (slots := config.schedule.slots):
        marks.append(f"{slots}, not the paper's times")
    row: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "arithmetic": qprune.ARITHMETIC,
        "signature": trainer.loop.run,
        "task": config.task.name,
        "order": config.order.name,
        "notation": identity.notation(config),
        "seed": config.seed,
        "metric": task.metric,
        "score": score,
        "higher_is_better": task.higher_is_better,
        "epochs": recipe.limits.epochs,
        "steps": trainer.steps,
        "budget": config.budget.name,
        "data_source": config.data.source,
        "marks": marks,
        "weight_sparsity": sparsity["weight"],
        "feature_sparsity": sparsity["feature"],
        "metrics": {name: value for name, value in metrics.items() if name != task.metric},
        "recovery": trainer.compressor.timeline.recovery([row["learning_rate"] for row in trainer.metrics]),
    }
    paper = paper_footprint(
        task.paper_network, task.size_example, recipe.paper_size, recipe.pruning, recipe.quantization
    )
    actual, kinds = actual_footprint(task.network, task.size_example, count_masks=True), ("weight", "feature", "input")
    costs = cost(task.network, task.size_example).total()
    row |= {"float_bits_actual": 32.0 * actual.elements(*kinds), "density_unit": task.density_unit}
    row |= {"mask_bits_actual": actual.size_bits("mask"), "costs": costs}
    for name, footprint in (("paper", paper), ("actual", actual)):
        row |= {f"{kind}_bits_{name}": footprint.size_bits(kind) for kind in kinds}
        row[f"density_{name}"] = task.density(score, footprint.size_bits(*kinds))
    for name, bits in (("with_masks", actual.size_bits()), ("effective_bops", costs["effective_bops"])):
        density = task.density(score, bits) if bits > 0 else math.nan
        row[f"density_{name}"] = density if math.isfinite(density) else None
    return row


def _plan_table(task: Task, sites: Plan) -> pd.DataFrame:
    """Return a row per tensor with operators, then one per feature without."""
    rows = []
    for site in (s for s in sites.sites if s.kind == "weight" or s in sites.active):
        shape = ""
        if site.kind == "weight":
            shape = "x".join(map(str, getattr(*weight_place(task.network, site.path)).shape))
        rows.append((site.path, site.kind, shape, site.prune, site.quantize))
    others = uncovered_features(task.network, task.example)
    times = Counter(stored.name for stored in others)
    for stored in others:
        # A module whose forward makes several has one name for all of them.
        several = times[stored.name] > 1 and stored.readers
        name = f"{stored.name}, read by {stored.readers[0]}" if several else stored.name
        rows.append((name, "feature", f"{stored.elements} elements", False, False))
    return pd.DataFrame(rows, columns=["tensor", "kind", "shape", "prune", "quantize"])


def _plan_line(plan: pd.DataFrame) -> str:
    """Count the operators by kind."""
    sums = plan.groupby("kind")[["quantize", "prune"]].sum()
    counts = [f"{counted(sums['quantize'][kind], kind)} quantized, {sums['prune'][kind]} pruned" for kind in sums.index]
    if not sums.to_numpy().any():
        return "plan: no tensor is pruned or quantized"
    without = int((~(plan["prune"] | plan["quantize"])).sum())
    return f"plan: {'; '.join(counts)}; {counted(without, 'tensor')} not compressed"


def _print_plan(console: Console, plan: pd.DataFrame) -> None:
    table = Table(*plan.columns, box=None, pad_edge=False)
    for *row, prune, quantize in plan.itertuples(index=False):
        table.add_row(*map(plain, row), "yes" if prune else "-", "yes" if quantize else "-")
    console.print(table)
