"""What must hold on a GPU as it does on a CPU; skipped where there is none."""

import copy
from pathlib import Path

import pytest
import torch

from qprune.compression.functional import fake_quantize, magnitude_mask, optimal_decimal
from qprune.runs.execute import execute
from tests.compression.test_convert import converted, mobilenet, pictures
from tests.runs.test_execute import config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


@pytest.mark.parametrize("rounding", ["trunc", "floor", "nearest"])
def test_equations_give_the_same_bits(rounding: str) -> None:
    x = torch.randn(3, 5, 1000, generator=torch.Generator().manual_seed(0)) * 30
    decimals = torch.tensor([1, 4, 9, 0, -2])
    here, there = (fake_quantize(x.to(d), 8, decimals.to(d), rounding, axis=1) for d in ("cpu", "cuda"))
    assert torch.equal(here, there.cpu())
    assert int(optimal_decimal(x, rounding=rounding)) == int(optimal_decimal(x.cuda(), rounding=rounding))
    score = x.abs().round()  # many ties
    assert torch.equal(magnitude_mask(score, 0.37), magnitude_mask(score.cuda(), 0.37).cpu())


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_run_goes_through_all_phases(precision: str, tmp_path: Path) -> None:
    row = execute(config(tmp_path, "trainer.device=cuda", f"trainer.precision={precision}"))
    assert (row.weight_sparsity, row.feature_sparsity, row.steps) == (0.5, 0.5, 24)


def test_the_device_is_no_part_of_the_identity(tmp_path: Path) -> None:
    on_gpu = execute(config(tmp_path / "gpu", "trainer.device=cuda"))
    on_cpu = execute(config(tmp_path / "cpu", "trainer.device=cpu"))
    assert on_gpu.signature == on_cpu.signature
    assert on_gpu.weight_bits_actual == on_cpu.weight_bits_actual


def test_a_converted_network_gives_the_bits_of_the_attached_one() -> None:
    """On a GPU too, 2^d is exact."""
    plain, attached = (copy.deepcopy(network).cuda() for network in converted(mobilenet))
    assert torch.equal(plain(pictures(4).cuda()), attached(pictures(4).cuda()))
    decimals = torch.arange(-100.0, 101.0)
    assert torch.equal(torch.exp2(decimals.cuda()).cpu(), torch.ldexp(torch.ones(201), decimals.int()))
