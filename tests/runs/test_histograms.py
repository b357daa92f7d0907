"""Histograms of features: counts by hand, wider bins for far values, pruned elements left out, nothing changed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qprune.compression.prepare import FeatureOperators
from qprune.compression.quantizer import Quantizer
from qprune.runs import histograms
from qprune.runs.histograms import Counts, feature_histograms
from tests.training.toy import prepared


def test_bins_are_a_fraction_of_the_grids_range() -> None:
    counts = Counts("1", bits=8, decimal=7)  # range [-1, 127/128], bins of 1/64
    counts.add(torch.tensor([[-1.0, -1.01, 0.0], [0.0, 0.99, 1.5]]))
    plain = counts.as_plain()
    assert (plain["low"], plain["high"], plain["width"]) == (-1.0, 127 / 128, 1 / 64)
    assert (plain["elements"], plain["below"], plain["above"]) == (6, 1, 1)  # 0.99 is below 127/128
    assert (plain["least"], plain["largest"]) == pytest.approx((-1.01, 1.5))
    expected = {-1.01: 1, -1.0: 1, 0.0: 2, 0.99: 1, 1.5: 1}
    edges = [plain["start"] + i * plain["width"] for i in range(len(plain["counts"]))]
    for value, number in expected.items():
        [held] = [c for c, edge in zip(plain["counts"], edges, strict=True) if edge <= value < edge + 1 / 64]
        assert held == number
    assert sum(plain["counts"]) == 6
    assert plain["counts"][0] == plain["counts"][-1] == 1  # no empty ends


def test_a_far_value_doubles_the_bins_and_loses_nothing() -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    counts, at_once = Counts("1", 8, 6), Counts("1", 8, 6)
    counts.add(values)
    counts.add(torch.tensor([-1000.0]))
    at_once.add(torch.cat([values, torch.tensor([-1000.0])]))
    assert counts.as_plain() == at_once.as_plain()
    assert counts.width == 4.0  # 512 bins of 2 would end at 512
    assert int(counts.counts.sum()) == 10_001


def test_values_that_are_not_finite_are_not_counted() -> None:
    counts = Counts("1", 8, 6)
    counts.add(torch.tensor([float("nan"), float("inf"), 0.25]))
    assert counts.elements == 1
    json.dumps(counts.as_plain(), allow_nan=False)


def test_only_what_the_mask_keeps_is_counted_and_nothing_is_changed(tmp_path: Path) -> None:
    task, compressor, trainer = prepared(tmp_path)
    trainer.fit()
    before = {name: tensor.clone() for name, tensor in task.network.state_dict().items()}
    random, score = torch.get_rng_state(), task.evaluate()["negative_mse"]
    torch.set_rng_state(random)
    with trainer.evaluation_context():
        found = {entry["site"]: entry for entry in feature_histograms(task.network, task.evaluate)}
    assert torch.equal(torch.get_rng_state(), random)
    assert task.evaluate()["negative_mse"] == score
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.network.state_dict().items())
    assert not any(module._forward_pre_hooks for path, module in task.network.named_modules() if "operators" in path)
    assert list(found) == ["input", "1"]
    assert found["input"]["elements"] == 8 * 2 * 5 * 5  # the test pictures; not pruned
    [pruner] = compressor.pruners("feature")
    assert found["1"]["elements"] == 8 * 50 == 8 * int(pruner.operator.mask.sum())
    quantizers = {placed.path: placed.operator for placed in compressor.quantizers("feature")}
    for site, entry in found.items():
        assert entry["decimal"] == int(quantizers[site].decimal)
        assert sum(entry["counts"]) == entry["elements"]


def test_an_evaluation_is_broken_off_when_enough_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(histograms, "ELEMENTS", 25)
    quantizers = Quantizer(8, decimal=4), Quantizer(4, decimal=0)
    network = nn.Sequential(*[FeatureOperators(None, each, site) for site, each in zip("13", quantizers, strict=True)])
    calls: list[int] = []

    def evaluate() -> Any:
        for _ in range(10):
            calls.append(1)
            network(torch.ones(2, 5))

    found = feature_histograms(network, evaluate)
    assert [entry["site"] for entry in found] == ["1", "3"]
    assert [entry["elements"] for entry in found] == [25, 25]
    assert len(calls) == 3


def test_without_feature_quantizers_nothing_is_evaluated() -> None:
    def never() -> None:
        raise AssertionError

    assert feature_histograms(nn.Conv2d(1, 1, 1), never) == []
