import pytest
import torch

from qprune.tasks.data.parts import part, training_part
from qprune.training.task import Limits


def test_part_is_spread_evenly_and_marked() -> None:
    indices, marks = part("test set", 10, 4)
    assert indices.tolist() == [0, 2, 5, 7]
    assert marks == ["test set: 4 of 10"]


@pytest.mark.parametrize("wanted", [None, 10, 64])
def test_whole_set_is_not_marked(wanted: int | None) -> None:
    indices, marks = part("test set", 10, wanted)
    assert torch.equal(indices, torch.arange(10))
    assert marks == []


def test_without_limits_the_recipe_is_left_as_it_is() -> None:
    indices, batch, marks = training_part(50_000, 128, Limits(epochs=250))
    assert (len(indices), batch, marks) == (50_000, 128, [])


def test_limits_cap_batch_and_steps() -> None:
    indices, batch, marks = training_part(50_000, 128, Limits(epochs=4, steps_per_epoch=16, batch_size=32))
    assert (len(indices), batch) == (512, 32)
    assert marks == ["batch size: 32 instead of 128", "training set: 512 of 50000"]


def test_a_limit_above_the_recipe_changes_nothing() -> None:
    assert training_part(2701, 16, Limits(epochs=4, steps_per_epoch=400, batch_size=32))[1:] == (16, [])
