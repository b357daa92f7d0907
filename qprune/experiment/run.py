"""One run, from a composed config to its result row: found, resumed or started, in a folder of its own."""

from __future__ import annotations

import io
import json
import random
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from safetensors.torch import save as safetensors_bytes

from qprune.compression.compressor import Compressor, attach
from qprune.compression.footprint import Footprint, actual_footprint, paper_footprint
from qprune.compression.plan import Plan, weight_of
from qprune.compression.ranks import rank_and_world
from qprune.errors import UserError
from qprune.experiment import results
from qprune.experiment.environment import describe_environment
from qprune.experiment.files import explained, write_atomically, write_json
from qprune.experiment.processes import choose_device, launch
from qprune.experiment.recipe import Recipe
from qprune.experiment.task import Task
from qprune.experiment.trainer import Loop, Trainer


def execute(cfg: DictConfig) -> results.Row:
    """Carry out the run that `cfg` describes and return its row, printed.

    A finished run is found by its signature and only printed; an interrupted one is resumed; `force=true` starts
    afresh. Raises UserError before anything is written when the config cannot be right.
    """
    config = _plain(cfg)
    Recipe.from_config(config)  # refuses what cannot be right, before anything is written
    folder = results.run_folder(cfg)
    console = Console(soft_wrap=True, highlight=False)
    if not config["force"] and (folder / results.ROW_FILE).exists():
        row = results.load_row(folder / results.ROW_FILE)
        console.print(f"finished before: {folder} (force=true runs it again)")
        console.print(results.format_row(row))
        return row
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{folder} is being run by another process; wait for it, or change seed or config") from None
    except OSError as error:
        raise explained(error, folder) from error
    try:
        if config["force"]:
            _empty(folder)
        console.print(f"run folder: {folder}")
        fresh = not any((folder / "checkpoints").glob("*.pt"))
        try:
            row = results.make_row(**launch(config["trainer"]["ranks"], _train, config, str(folder)))
        except UserError:
            if fresh:  # refused before the first checkpoint: leave nothing half-written
                shutil.rmtree(folder, ignore_errors=True)
            raise
        results.save_row(folder / results.ROW_FILE, row)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        console.print(results.format_row(row))
        return row
    finally:
        lock.release()


def plan(cfg: DictConfig) -> str:
    """The plan of `cfg` as a table, the schedule and the notation, without data or training."""
    config = _plain(cfg)
    config["data"] |= {"source": "synthetic"}
    recipe = Recipe.from_config(config)
    task = recipe.task()
    text = io.StringIO()
    console = Console(file=text, width=120, highlight=False)
    times = ", ".join(f"{name} {value:g}" for name, value in asdict(recipe.schedule).items() if value is not None)
    console.print(results.notation(recipe.order, config["prune"], config["quantize"]))
    console.print(f"{recipe.limits.epochs} epochs; schedule in epochs: {times}")
    _print_plan(console, task, recipe.plan(task))
    return text.getvalue()


def _train(config: dict[str, Any], folder_name: str) -> dict[str, Any]:
    """The work of one rank. Returns the row's fields."""
    folder, recipe, rank = Path(folder_name), Recipe.from_config(config), rank_and_world()[0]
    trainer_config = config["trainer"]
    device = choose_device(trainer_config["device"], rank)
    if trainer_config["threads"]:
        torch.set_num_threads(trainer_config["threads"])
    random.seed(config["seed"])
    torch.manual_seed(config["seed"])
    task = recipe.task().to(device)
    sites = recipe.plan(task)
    compressor = attach(task.network, sites, recipe.timeline(task), task.example, recipe.pruning, recipe.quantization)
    task.to(device)
    loop = Loop(
        epochs=recipe.limits.epochs,
        folder=folder,
        seed=config["seed"],
        precision=trainer_config["precision"],
        evaluate_every=trainer_config["evaluate_every"],
        checkpoint_minutes=trainer_config["checkpoint_minutes"],
    )
    if rank == 0:
        _describe(config, folder, task, sites, device)
    with _deterministic():
        trainer = Trainer(task, compressor, loop, device)
        metrics = trainer.fit()
        row = _row(config, recipe, task, compressor, metrics, trainer)
    if rank == 0:
        tensors = {name: t.detach().cpu().contiguous() for name, t in task.network.state_dict().items()}
        write_atomically(folder / "network.safetensors", safetensors_bytes(tensors))
        write_json(folder / "operators.json", compressor.describe())
        write_json(folder / "timing.json", {"steps": trainer.steps, "training_seconds": trainer.state.seconds})
    return row


class _deterministic:  # noqa: N801  (reads as a statement)
    """Deterministic kernels inside; a run's row is the same each time (on a CPU to the last bit)."""

    def __enter__(self) -> None:
        self.before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *error: object) -> None:
        torch.use_deterministic_algorithms(self.before)


def _row(
    config: dict[str, Any],
    recipe: Recipe,
    task: Task,
    compressor: Compressor,
    metrics: dict[str, float],
    trainer: Trainer,
) -> dict[str, Any]:
    score = metrics[task.metric]
    sizes: dict[str, Footprint] = {
        "paper": paper_footprint(
            task.network, task.size_example, recipe.paper_size, recipe.pruning, recipe.quantization
        ),
        "actual": actual_footprint(task.network, task.size_example),
    }
    marks = list(task.marks)
    if recipe.limits.epochs != recipe.paper_epochs:
        marks.append(f"{recipe.limits.epochs} of {recipe.paper_epochs} epochs (budget={config['budget']['name']})")
    row: dict[str, Any] = {
        "schema_version": results.SCHEMA_VERSION,
        "signature": results.signature(OmegaConf.create(config)),
        "task": config["task"]["name"],
        "order": config["order"]["name"],
        "notation": results.notation(recipe.order, config["prune"], config["quantize"]),
        "seed": config["seed"],
        "metric": task.metric,
        "score": score,
        "higher_is_better": task.higher_is_better,
        "epochs": recipe.limits.epochs,
        "steps": trainer.steps,
        "budget": config["budget"]["name"],
        "data_source": config["data"]["source"],
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


def _describe(config: dict[str, Any], folder: Path, task: Task, sites: Plan, device: torch.device) -> None:
    """Write what is known before training, and print the plan."""
    write_atomically(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False).encode())
    table = pd.DataFrame(
        [{"tensor": s.path, "kind": s.kind, "prune": s.prune, "quantize": s.quantize} for s in sites.sites]
    )
    write_atomically(folder / "plan.csv", table.to_csv(index=False).encode())
    write_json(folder / "environment.json", describe_environment(config["seed"], device, task.dataset))
    _print_plan(Console(soft_wrap=True, highlight=False), task, sites)


def _print_plan(console: Console, task: Task, sites: Plan) -> None:
    """The number of operators by kind, and one line per tensor with what is done to it, in structural order."""
    counts = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in sites.counts().items())
    console.print(f"plan: {counts}; {len(sites.left_alone)} tensors left alone")
    table = Table("tensor", "kind", "shape", "prune", "quantize", box=None, pad_edge=False)
    for site in sites.sites:
        weight = weight_of(task.network.get_submodule(site.path)) if site.kind == "weight" else None
        shape = "" if weight is None else "x".join(map(str, weight.shape))
        table.add_row(site.path, site.kind, shape, *("yes" if on else "-" for on in (site.prune, site.quantize)))
    console.print(table)


def _plain(cfg: DictConfig) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(json.dumps(OmegaConf.to_container(cfg, resolve=True)))
    return config


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != ".lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
