"""trainer.channels_last: weights, features and masks lie in memory as it says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qprune.compression.compressor import attach
from qprune.compression.config import PruneConfig
from qprune.compression.plan import Plan
from qprune.compression.schedule import Schedule
from qprune.training.layout import arrange
from tests.training.toy import Toy

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def lies_last(task: Toy) -> bool:
    weight = next(p for p in task.network.parameters() if p.dim() == 4)
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


@pytest.mark.parametrize(
    ("channels_last", "compiled", "device", "expected"),
    [
        (True, False, CPU, True),
        (None, False, CPU, False),
        (None, True, CPU, True),
        (None, True, CUDA, False),
        (False, True, CPU, False),
    ],
)
def test_weights_lie_as_the_key_says(
    channels_last: bool | None, compiled: bool, device: torch.device, expected: bool
) -> None:
    task = Toy()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    arrange(task, channels_last, compiled, device)
    assert lies_last(task) == expected
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())


def test_false_takes_back_what_a_task_chose() -> None:
    task = Toy()
    arrange(task, True, False, CPU)
    arrange(task, False, False, CPU)
    assert not lies_last(task)


def test_none_leaves_what_a_task_chose() -> None:
    task = Toy()
    arrange(task, True, False, CPU)
    arrange(task, None, False, CPU)
    assert lies_last(task)


def test_masks_lie_as_their_features_do() -> None:
    task = Toy()
    arrange(task, True, False, CPU)
    timeline = Schedule(t_p=0, dt_p=1, n=1).in_steps(3, 4, window=4, samples_per_epoch=10)
    plan = Plan.from_globs(task.network, [], [], [], ["0"])
    compressor = attach(task.network, plan, timeline, task.example, PruneConfig(window=4))
    [placed] = compressor.pruners("feature")
    mask = placed.operator.mask
    assert mask.stride()[0] == 1  # (C, h, w): channels last
    with torch.no_grad():
        feature = nn.Sequential(*list(task.network)[:1])(task.example)  # type: ignore[call-overload]
    assert feature.stride()[1:] == mask.stride()
