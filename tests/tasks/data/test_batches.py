import pytest
import torch
from torch import Tensor

from qprune.tasks.data.augment import CropAndFlip
from qprune.tasks.data.batches import TensorBatches

SAMPLES, BATCH = 23, 5


@pytest.fixture
def batches() -> TensorBatches:
    pictures = torch.randint(1, 256, (SAMPLES, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return TensorBatches(pictures, torch.arange(SAMPLES), batch_size=BATCH, seed=3, augmentation=CropAndFlip(8, 8, 2))


def epoch(batches: TensorBatches, number: int, start: int = 0) -> list[tuple[Tensor, Tensor]]:
    return list(batches.epoch(number, start))


def test_an_epoch_holds_every_sample_once_and_ends_with_a_smaller_batch(batches: TensorBatches) -> None:
    labels = [targets for _, targets in batches.epoch(0)]
    assert [len(x) for x in labels] == [5, 5, 5, 5, 3]
    assert len(batches) == 5
    assert sorted(torch.cat(labels).tolist()) == list(range(SAMPLES))


@pytest.mark.parametrize("start", range(6))
def test_a_resumed_epoch_is_the_tail_of_the_uninterrupted_one(batches: TensorBatches, start: int) -> None:
    whole = epoch(batches, 4)
    torch.rand(100)  # nothing depends on the global generator
    tail = epoch(batches, 4, start)
    assert len(tail) == 5 - start
    for (a, b), (c, d) in zip(whole[start:], tail, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)


def test_epochs_and_seeds_differ_in_order_and_in_augmentation(batches: TensorBatches) -> None:
    other = TensorBatches(batches.inputs, batches.targets, batch_size=BATCH, seed=4, augmentation=CropAndFlip(8, 8, 2))
    orders = [torch.cat([t for _, t in x.epoch(e)]).tolist() for x, e in ((batches, 0), (batches, 1), (other, 0))]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    pictures = []  # of sample 0
    for e in range(8):
        inputs, targets = (torch.cat(tensors) for tensors in zip(*batches.epoch(e), strict=True))
        pictures.append(inputs[targets == 0].numpy().tobytes())
    assert len(set(pictures)) > 4


def test_data_stays_out_of_the_state_dict_and_moves_with_the_module(batches: TensorBatches) -> None:
    assert batches.state_dict() == {}
    assert batches.to("meta").inputs.device.type == "meta"
