"""The state of training: what a checkpoint holds, taken from a trainer and given back to one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from qprune.errors import UserError
from qprune.training import checkpoint

if TYPE_CHECKING:
    from qprune.training.trainer import Trainer


@dataclass
class State:
    """How far training is: steps done, losses summed since the epoch began, a row per epoch, seconds of training."""

    step: int = 0
    loss_count: int = 0
    metrics: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


def everything(trainer: Trainer) -> dict[str, Any]:
    """All that training depends on, as tensors and plain values."""
    state = trainer.state
    return {
        "run": trainer.loop.run,
        "step": state.step,
        "seconds": state.seconds,
        "metrics": state.metrics,
        "loss_count": state.loss_count,
        "sums": trainer.sums,
        "task": trainer.task.state_dict(),
        "memory": trainer.task.memory(),
        "optimizers": {name: optimizer.state_dict() for name, optimizer in trainer.optimizers.items()},
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all() if trainer.device.type == "cuda" else [],
    }


def on_cpu(saved: dict[str, Any]) -> dict[str, Any]:
    """A copy that training does not change, in the memory of the CPU."""
    copied: dict[str, Any] = tree_map(
        lambda leaf: leaf.to("cpu", copy=True) if isinstance(leaf, Tensor) else leaf, saved
    )
    return copied


def restore(trainer: Trainer) -> bool:
    """Take the state of the newest good checkpoint, or else of a stem, if there is one. UserError for an odd one."""
    folder = trainer.loop.folder / "checkpoints"
    try:
        saved = checkpoint.load_newest(folder)
        if saved is not None and saved.get("run", trainer.loop.run) != trainer.loop.run:  # older ones do not say
            raise ValueError("it is of a run with another signature")
        if saved is None and trainer.stem is not None:
            folder = trainer.stem.folder
            saved = trainer.stem.load(trainer.float_steps, trainer.optimizers)
            trainer.steps_taken_over = saved["step"] if saved else 0
        if saved is None:
            return False
        take(trainer, saved)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"the newest checkpoint in {folder} does not fit this run ({error}); delete the folder, and the same "
            "command starts afresh"
        ) from error
    return True


def rewind(trainer: Trainer) -> None:
    """Go back to the newest checkpoint, or to the beginning of training where there is none yet."""
    if trainer.first is not None:
        take(trainer, trainer.first)
    else:
        restore(trainer)


def take(trainer: Trainer, saved: dict[str, Any]) -> None:
    """Make `saved`, as `everything` gives it, the present state."""
    trainer.task.load_state_dict(saved["task"])
    trainer.task.restore_memory(saved["memory"])
    for name, optimizer in trainer.optimizers.items():
        optimizer.load_state_dict(saved["optimizers"][name])
    trainer.sums = {name: total.to(trainer.device) for name, total in saved["sums"].items()}
    trainer.state = State(saved["step"], saved["loss_count"], saved["metrics"], saved["seconds"])
    if trainer.main:
        torch.set_rng_state(saved["random"])
        if saved["random_cuda"] and trainer.device.type == "cuda":
            torch.cuda.set_rng_state_all(saved["random_cuda"])
    else:
        trainer.compressor.forget_windows()  # rank 0 carries what all ranks had observed
