"""How weights lie in memory, which decides how their features do (`trainer.channels_last`).

Sums are added in another order in another layout, so results differ in their last bits: the key is part of a run's
identity.
"""

from __future__ import annotations

import torch

from qprune.training.task import Task


def arrange(task: Task, channels_last: bool | None, compiled: bool, device: torch.device) -> None:
    """Lay out the weights (O, I, h, w) of all networks of `task` with channels last, or first (False).

    None: as the task has them, but channels last for steps that are compiled for a CPU, where a compiler chooses that
    for convolutions anyway: masks then lie as their features do. Call this before operators are attached.
    """
    if channels_last is None:
        if not compiled or device.type != "cpu":
            return
        channels_last = True
    kind = torch.channels_last if channels_last else torch.contiguous_format
    for weight in task.parameters():
        if weight.dim() == 4:
            weight.data = weight.data.to(memory_format=kind)
