import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio

from qprune.tasks.metrics.psnr import psnr_db


def test_psnr_of_a_constant_error_by_hand() -> None:
    target = torch.full((1, 1, 4, 4), 0.5)
    assert psnr_db(target + 0.1, target).item() == pytest.approx(20.0, abs=1e-4)  # -10 log10(0.01)


def test_predictions_are_clamped_to_the_range_of_a_picture() -> None:
    target = torch.tensor([[0.0, 1.0, 0.5, 0.5]])
    wild = torch.tensor([[-3.0, 7.0, 0.6, 0.4]])
    assert psnr_db(wild, target).item() == pytest.approx(psnr_db(wild.clamp(0, 1), target).item())


def test_half_precision_predictions_are_scored_in_float32() -> None:
    predicted = torch.full((1, 8), 0.5, dtype=torch.bfloat16)
    assert psnr_db(predicted, torch.full((1, 8), 0.501)).item() == pytest.approx(60.0, abs=0.01)


@pytest.mark.parametrize("shape", [(1, 1, 5, 7), (1, 1, 64, 48), (2, 3, 255, 256)])
def test_psnr_has_the_bits_of_torchmetrics(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    target = torch.rand(shape, generator=generator)
    for noise in (1e-4, 0.05, 3.0):
        predicted = target + noise * torch.randn(shape, generator=generator)
        assert psnr_db(predicted, target) == peak_signal_noise_ratio(predicted, target, data_range=(0.0, 1.0))
