"""A callback for the `Trainer` of Hugging Face's transformers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qprune.atomic_write import write_atomically
from qprune.compression.compressor import Compressor

FILE = "compressor.pt"  # in a checkpoint's folder


class CompressorCallback(TrainerCallback):
    """Drives a compressor by the trainer's optimizer step, and saves its state in the trainer's checkpoints.

    Compress the model before the trainer is made. `steps_per_epoch` is the number of optimizer steps, which
    `gradient_accumulation_steps` divides.

    Args:
        compressor: What `qprune.compress` returned.
    """

    def __init__(self, compressor: Compressor) -> None:
        self.compressor = compressor

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Continue from the checkpoint of this step, if training is resumed."""
        path = self._path(args, state)
        if state.global_step and path.exists():  # without it, `at` refuses to begin inside a window
            self.compressor.load_state_dict(torch.load(path, map_location=args.device, weights_only=True))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put operators into their state for the optimizer step that begins."""
        self.compressor.at(state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the compressor's state into the checkpoint."""
        self.compressor.collect_on_first_rank()
        if state.is_world_process_zero:
            content = io.BytesIO()
            torch.save(self.compressor.state_dict(), content)
            write_atomically(self._path(args, state), content.getvalue())

    @staticmethod
    def _path(args: TrainingArguments, state: TrainerState) -> Path:
        return Path(args.output_dir or ".", f"checkpoint-{state.global_step}", FILE)
