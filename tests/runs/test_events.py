"""States kept before events: the run is not changed, a state comes again, and figures of tensors are those by hand."""

import math
from pathlib import Path

import pytest
import torch

from qprune.compression.functional import fake_quantize, optimal_decimal
from qprune.compression.quantizer import Quantizer
from qprune.errors import UserError
from qprune.runs import events
from qprune.runs.execute import execute
from qprune.runs.load import FinishedRun
from tests.runs.test_execute import config

KEEP = "trainer.keep_events=true"


@pytest.fixture
def run(tmp_path: Path) -> FinishedRun:
    """Masks change before the steps 3, 6, 9 and 12; weights are quantized from 15 and features from 18."""
    return FinishedRun.load(execute(config(tmp_path, KEEP)).signature, tmp_path)


def test_states_are_kept_before_each_event_and_change_no_bit(run: FinishedRun, tmp_path: Path) -> None:
    assert events.kept_steps(run) == [0, 3, 6, 9, 12, 15, 18]
    found = events.events_of(run.compressor.timeline)
    assert [(event.step, event.epoch, event.kind) for event in found[3:]] == [
        (12, 4.0, "prune"),
        (15, 5.0, "quantize weights"),
        (18, 6.0, "quantize features"),
    ]
    assert [event.phase for event in found[2:5]] == ["P 3/4", "P 4/4", "P 4/4 Q(w)"]
    plain = execute(config(tmp_path / "plain"))
    assert plain.signature == run.row.signature
    other = FinishedRun.load(plain.signature, tmp_path / "plain")
    assert other.network_digest == run.network_digest
    assert events.kept_steps(other) == []


def test_the_event_of_a_restored_state_is_that_of_the_run(run: FinishedRun) -> None:
    final = events.masks(run)
    score = run.evaluate()
    events.restore(run, 12)
    before = events.masks(run)
    assert {site: int((~mask).sum()) for site, mask in before.items()} == {
        ("weight", "0"): math.floor(0.5 * 63 / 64 * 72),
        ("feature", "1"): math.floor(0.5 * 63 / 64 * 100),
    }
    run.compressor.at(12)
    assert all(torch.equal(mask, final[site]) for site, mask in events.masks(run).items())
    assert run.evaluate() != score


def test_figures_of_a_weight_are_those_by_hand(run: FinishedRun) -> None:
    events.restore(run, 15)
    run.compressor.at(15)
    raw, mask = events.weights(run)["0"], events.masks(run)["weight", "0"]
    [quantizer] = [p.operator for p in run.compressor.quantizers("weight") if p.path == "0"]
    assert isinstance(quantizer, Quantizer)
    found = events.tensor_figures(run, 15)
    weight = found["weight", "0"]
    assert weight["zeros"] == 0.5
    for name, x in (("pruned", raw * mask), ("unpruned", raw)):
        assert weight[f"decimals_{name}"] == float(optimal_decimal(x, axis=1, decimals=range(20)).double().mean())
        error = fake_quantize(x, 8, quantizer.decimal, axis=1) - x
        expected = 20 * math.log10(float(x.double().norm() / error.double().norm()))
        assert weight[f"sqnr_{name}"] == pytest.approx(expected, rel=1e-9)
    assert weight["decimals"] == weight["decimals_pruned"]  # d* was chosen for the pruned weight, at this event
    assert found["feature", "1"].keys() == {"zeros"}  # not quantized yet


@pytest.mark.parametrize(("decimal", "saturated"), [(-20, 0.0), (60, 1.0)])
def test_nothing_is_cut_on_a_vast_grid_and_all_but_zeros_on_a_tiny_one(
    decimal: int, saturated: float, run: FinishedRun
) -> None:
    events.restore(run, 18)
    run.compressor.at(18)
    [placed] = [p for p in run.compressor.quantizers("weight") if p.path == "4"]
    placed.operator.get_buffer("decimal").fill_(decimal)
    found = events.tensor_figures(run, 18)["weight", "4"]
    assert found["saturated"] == saturated
    assert placed.chain is not None
    gradient = placed.chain.original.grad
    assert found["clipped"] == (float((gradient != 0).double().mean()) if decimal == 60 else 0.0)


def test_features_are_those_of_the_first_pass(run: FinishedRun) -> None:
    found = events.first_features(run)
    assert {site: feature.numel() for site, feature in found.items()} == {"input": 400, "1": 800}
    x = torch.randn(8, 2, 5, 5, generator=torch.Generator().manual_seed(5))
    [quantizer] = [p.operator for p in run.compressor.quantizers("feature") if p.path == "input"]
    assert torch.equal(found["input"], fake_quantize(x, 8, quantizer.get_buffer("decimal")).flatten())


def test_a_damaged_state_is_named(run: FinishedRun) -> None:
    [path] = (run.folder / "events").glob("step-000000012-*")
    path.write_bytes(b"")
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(UserError, match="the state before step 12 in "):
        events.restore(run, 12)
