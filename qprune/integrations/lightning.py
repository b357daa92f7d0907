"""A callback for Lightning's `Trainer.fit`."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from qprune.compression.compressor import Compressor


class CompressorCallback(pl.Callback):
    """Drives a compressor by the trainer's optimizer step, and saves its state in Lightning's checkpoints.

    Compress the module, or a network in it, before `fit`: a checkpoint then finds the operators that it has values for,
    and `configure_optimizers` the parameters. `steps_per_epoch` is the number of optimizer steps, which
    `accumulate_grad_batches` divides. With several optimizers, each is taken to step once per step of the compressor.

    Args:
        compressor: What `qprune.compress` returned.
    """

    def __init__(self, compressor: Compressor) -> None:
        self.compressor = compressor

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Put operators into their state for the optimizer step that this batch belongs to."""
        self.compressor.at(trainer.global_step // max(1, len(trainer.optimizers)))

    def state_dict(self) -> dict[str, Any]:
        """Return the compressor's state; all ranks call this."""
        self.compressor.collect_on_first_rank()
        return self.compressor.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.compressor.load_state_dict(state_dict)
