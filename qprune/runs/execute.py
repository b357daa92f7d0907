"""One run, from a composed config to its result row: found, resumed or started, in a folder of its own."""

from __future__ import annotations

import io
import random
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Table
from safetensors.torch import save as safetensors_bytes

from qprune.atomic_write import (
    explained,
    json_bytes,
    png_bytes,
    remove_left_temporaries,
    write_atomically,
    write_json,
)
from qprune.compression.activation_trace import uncovered_features
from qprune.compression.compressor import Compressor
from qprune.compression.distributed import rank_and_world
from qprune.compression.fake_quantize import use_native
from qprune.compression.footprint import Footprint, actual_footprint, paper_footprint
from qprune.compression.plan import Plan, weight_place
from qprune.config import signature as identity
from qprune.config.build import Recipe
from qprune.config.schema import RunConfig
from qprune.errors import UserError
from qprune.runs import row as results
from qprune.runs.checksums import write_sums
from qprune.runs.decimals import finished_run, fix_decimals
from qprune.runs.environment import ENVIRONMENT_FILE, describe_environment
from qprune.runs.histograms import HISTOGRAMS_FILE
from qprune.training.allocator import keep_freed_memory
from qprune.training.distributed import choose_device, launch
from qprune.training.loggers import check_logger, log_curve
from qprune.training.setup import attach_operators, build_task, plan_of
from qprune.training.task import Task
from qprune.training.trainer import Loop, Trainer, Watch
from qprune.training.warm_start import Stem

# Files of a run whose checksums are kept: what a row is checked against, and what is read on for export and figures
SUMMED = ("config.yaml", "metrics.csv", "network.safetensors", "operators.json")


def execute(config: Recipe | identity.Config, wait: bool = False, watch: Watch | None = None) -> results.Row:
    """Carry out the run of a recipe, or of a config, and return its row, printed.

    A finished run is found by its signature and only printed; an interrupted one is resumed; `force=true` starts
    afresh. wait: whether to wait for another process that carries out the same run, and take its row, as the key
    `wait` asks for. watch: what may stop the run early, which raises StoppedEarly (sent to other ranks: it must
    pickle).
    """
    recipe = Recipe.from_config(config)
    config = recipe.config
    check_logger(config.logger.name)
    folder = identity.run_folder(config)
    console = Console(soft_wrap=True, highlight=False)
    if not config.force and (folder / results.ROW_FILE).exists():
        return _finished(folder, config, console)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=-1 if wait or config.wait else 0)
    except Timeout:
        raise UserError(
            f"{folder} is being run by another process; type wait=true to wait for it and take its row, or change "
            "seed or config"
        ) from None
    except OSError as error:
        raise explained(error, folder) from error
    try:
        if not config.force and (folder / results.ROW_FILE).exists():  # another process was faster
            return _finished(folder, config, console)
        if config.force:
            _empty(folder)
        remove_left_temporaries(folder)
        console.print(f"run folder: {folder}")
        try:
            row = results.make_row(**launch(config.trainer.ranks, _train, recipe, str(folder), watch))
        except UserError:
            # Refused before the first checkpoint: leave nothing half-written. Asked now and not before training: a
            # file that vanished in its course must not take the checkpoints with it.
            if not any((folder / "checkpoints").glob("*.pt")):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        _store(folder, row)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        console.print(results.format_row(row))
        return row
    finally:
        lock.release()


def _store(folder: Path, row: results.Row) -> None:
    """Write the row last, after the checksums of all that belongs to it: where a row is, its run is whole."""
    write_sums(folder, SUMMED, **{results.ROW_FILE: json_bytes(asdict(row))})
    results.save_row(folder / results.ROW_FILE, row)


def _finished(folder: Path, config: RunConfig, console: Console) -> results.Row:
    """The row of a finished run, printed."""
    row = results.load_row(folder / results.ROW_FILE)
    if row.signature != identity.signature(config):
        raise UserError(
            f"{folder / results.ROW_FILE} is the row of another run, whose signature begins with {row.signature[:10]}; "
            "delete the folder, or type force=true"
        )
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # its process was killed right after it wrote the row
    console.print(f"finished before: {folder} (force=true runs it again)")
    console.print(results.format_row(row))
    return row


def plan(config: Recipe | identity.Config) -> str:
    """The plan of a recipe, or of a config, as a table, without data or training; with schedule and notation."""
    recipe = Recipe.from_config(config).on_synthetic_data()
    task = build_task(recipe)
    text = io.StringIO()
    console = Console(file=text, width=120, highlight=False)
    times = ", ".join(f"{name} {value:g}" for name, value in asdict(recipe.schedule).items() if value is not None)
    console.print(identity.notation(recipe.config))
    console.print(f"{recipe.limits.epochs} epochs; schedule in epochs: {times}")
    sites = plan_of(recipe, task)
    attach_operators(recipe, task, sites)
    _print_plan(console, _plan_rows(task, sites))
    return text.getvalue()


def _train(recipe: Recipe, folder_name: str, watch: Watch | None = None) -> dict[str, Any]:
    """The work of one rank. Returns the row's fields."""
    folder, config, rank = Path(folder_name), recipe.config, rank_and_world()[0]
    device = choose_device(config.trainer.device, rank)
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
    task = build_task(recipe, device)
    sites = plan_of(recipe, task)
    compressor = attach_operators(recipe, task, sites)
    if recipe.quantization and (source := config.quantize.decimal_from):
        fix_decimals(task.network, finished_run(Path(config.results_dir), source))
    task.to(device)
    loop = Loop(
        epochs=recipe.limits.epochs,
        folder=folder,
        seed=config.seed,
        precision=config.trainer.precision,
        evaluate_every=config.trainer.evaluate_every,
        checkpoint_minutes=config.trainer.checkpoint_minutes,
        compile=config.trainer.compile,
        watch=watch,
        run=identity.signature(config),
    )
    if rank == 0:
        _describe(config, folder, task, sites, device)
    # Compiled, the float part too depends on the schedule: steps that collect for it are not.
    shared = config.trainer.warm_start and config.trainer.ranks == 1 and not config.trainer.compile
    trainer = Trainer(task, compressor, loop, device, Stem.of(config, task, device) if shared else None)
    metrics = trainer.fit()
    row = _row(recipe, task, compressor, metrics, trainer)
    if rank == 0:
        tensors = {name: t.detach().cpu().contiguous() for name, t in task.network.state_dict().items()}
        write_atomically(folder / "network.safetensors", safetensors_bytes(tensors))
        for name, picture in trainer.pictures().items():
            write_atomically(folder / "pictures" / f"{name}.png", png_bytes(picture))
        write_json(folder / "operators.json", compressor.describe())
        log_curve(config.logger.name, folder, config.plain(), trainer.state.metrics)
        timing: dict[str, float] = {"steps": trainer.steps, "steps_taken_over": trainer.steps_taken_over}
        timing |= {"training_seconds": trainer.state.seconds, "compile_seconds": trainer.ways.compile_seconds}
        write_json(folder / "timing.json", timing)
        write_json(folder / HISTOGRAMS_FILE, trainer.histograms())  # last: row and network are what they are by now
    return row


def _row(
    recipe: Recipe,
    task: Task,
    compressor: Compressor,
    metrics: dict[str, float],
    trainer: Trainer,
) -> dict[str, Any]:
    config, score = recipe.config, metrics[task.metric]
    sizes: dict[str, Footprint] = {
        "paper": paper_footprint(
            task.paper_network, task.size_example, recipe.paper_size, recipe.pruning, recipe.quantization
        ),
        "actual": actual_footprint(task.network, task.size_example),
    }
    marks = list(task.marks)
    if recipe.limits.epochs != config.epochs:
        marks.append(f"{recipe.limits.epochs} of {config.epochs} epochs (budget={config.budget.name})")
    row: dict[str, Any] = {
        "schema_version": results.SCHEMA_VERSION,
        "signature": identity.signature(config),
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
        "weight_sparsity": compressor.sparsity["weight"],
        "feature_sparsity": compressor.sparsity["feature"],
        "metrics": {name: value for name, value in metrics.items() if name != task.metric},
    }
    for accounting, footprint in sizes.items():
        for kind in ("weight", "feature", "input"):
            row[f"{kind}_bits_{accounting}"] = footprint.size_bits(kind)
        row[f"density_{accounting}"] = task.density(score, footprint.size_bits())
    return row


def _describe(config: RunConfig, folder: Path, task: Task, sites: Plan, device: torch.device) -> None:
    """Write what is known before training, and print the plan."""
    write_atomically(folder / "config.yaml", yaml.safe_dump(config.plain(), sort_keys=False).encode())
    rows = _plan_rows(task, sites)
    write_atomically(folder / "plan.csv", pd.DataFrame(rows).to_csv(index=False).encode())
    write_json(folder / ENVIRONMENT_FILE, describe_environment(config.seed, device, task.dataset))
    _print_plan(Console(soft_wrap=True, highlight=False), rows)


def _plan_rows(task: Task, sites: Plan) -> list[dict[str, Any]]:
    """One row per tensor, in structural order: what is done to it; features that nothing is done to come last."""
    rows = []
    for site in (s for s in sites.sites if s.kind == "weight" or s in sites.active):
        weight = getattr(*weight_place(task.network, site.path)) if site.kind == "weight" else None
        shape = "" if weight is None else "x".join(map(str, weight.shape))
        rows.append(
            {"tensor": site.path, "kind": site.kind, "shape": shape, "prune": site.prune, "quantize": site.quantize}
        )
    alone = uncovered_features(task.network, task.example)
    times = Counter(stored.name for stored in alone)
    for stored in alone:
        # A module whose forward makes several has one name for all of them.
        several = times[stored.name] > 1 and stored.readers
        name = f"{stored.name}, read by {stored.readers[0]}" if several else stored.name
        size = f"{stored.elements} elements"
        rows.append({"tensor": name, "kind": "feature", "shape": size, "prune": False, "quantize": False})
    return rows


def _print_plan(console: Console, rows: list[dict[str, Any]]) -> None:
    """The number of operators by kind, and the rows as a table."""
    counts = {
        f"{kind} {word}": sum(row[operator] for row in rows if row["kind"] == kind)
        for kind in ("weight", "feature")
        for operator, word in (("quantize", "quantizers"), ("prune", "pruners"))
    }
    alone = sum(not (row["prune"] or row["quantize"]) for row in rows)
    console.print(f"plan: {', '.join(f'{n} {name}' for name, n in counts.items())}; {alone} tensors left alone")
    table = Table("tensor", "kind", "shape", "prune", "quantize", box=None, pad_edge=False)
    for row in rows:
        table.add_row(
            row["tensor"], row["kind"], row["shape"], *("yes" if row[key] else "-" for key in ("prune", "quantize"))
        )
    console.print(table)


def _empty(folder: Path) -> None:
    (folder / results.ROW_FILE).unlink(missing_ok=True)  # first: where a row is, its run is whole
    for path in folder.iterdir():
        if path.name != ".lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
