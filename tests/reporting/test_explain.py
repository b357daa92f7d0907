"""`explain`: terms that add up to the scores, masks exchanged and put back, and sentences that say so."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from qprune.reporting.explain import Explanation, explain, sentences
from qprune.runs.execute import execute
from qprune.runs.load import FinishedRun
from tests.runs.test_execute import config

SECOND = ("order.name=quantize_first", "order.steps=[quantize,prune]", "schedule.t_qw=2", "schedule.t_qf=4")
SECOND += ("schedule.t_p=4", "schedule.dt_p=2")


def loaded(folder: Path, *changes: str) -> FinishedRun:
    return FinishedRun.load(execute(config(folder, *changes)).signature, folder)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Explanation:
    """Of a toy run that prunes first and one that quantizes first, with the states around events."""
    folder = tmp_path_factory.mktemp("runs")
    return explain(loaded(folder, "trainer.keep_events=true"), loaded(folder, "trainer.keep_events=true", *SECOND))


def test_the_terms_add_up_to_the_scores(found: Explanation) -> None:
    for name, label in zip("AB", found.labels, strict=True):
        assert f"{found.terms[name].sum():.4g}" == label.split()[-1]
    assert set(found.terms["term"]) == {
        "before the first event",
        "event: prune",
        "event: quantize weights",
        "event: quantize features",
        "training between events",
        "training after the last event",
    }


def test_events_stand_with_what_they_cost_and_what_was_left(found: Explanation) -> None:
    first = found.events[found.events["run"] == "A"]
    assert first["phase"].tolist() == ["P 1/4", "P 2/4", "P 3/4", "P 4/4", "P 4/4 Q(w)", "P 4/4 Q(w,f)"]
    assert first["epochs_left"].tolist() == [7, 6, 5, 4, 3, 2]
    rates = [0.01 * 0.9**epoch for epoch in range(8)]
    assert first["rate_left"].tolist() == pytest.approx([sum(rates[epoch:]) for epoch in range(1, 7)])
    assert (first["churn"][:4] > 0).all()
    assert (first["churn"][4:] == 0).all()
    assert (first["shift"] > 0).all()
    assert found.events["before"].notna().all()


def test_events_of_one_step_are_told_apart(tmp_path: Path) -> None:
    """As in the paper's ESPCN, whose weights are quantized at the last pruning event."""
    run = loaded(tmp_path, "trainer.keep_events=true", "schedule.t_qw=8")
    found = explain(run, FinishedRun.load(run.row.signature, tmp_path))
    events = found.events[(found.events["run"] == "A") & (found.events["epoch"] == 4)]
    assert events["kind"].tolist() == ["prune", "quantize weights"]
    assert events["after"].iloc[0] == events["before"].iloc[1] != events["after"].iloc[1]
    assert events["churn"].iloc[0] > 0 == events["churn"].iloc[1]
    assert f"{found.terms['A'].sum():.4g}" == found.labels[0].split()[-1]


def test_tensors_stand_after_each_event_and_at_the_end(found: Explanation) -> None:
    last = found.tensors[(found.tensors["event"] == "end") & (found.tensors["run"] == "A")].set_index("tensor")
    assert last.index.tolist() == ["0", "4", "input", "1"] or set(last.index) == {"0", "4", "input", "1"}
    assert last.loc["0", "zeros"] == last.loc["1", "zeros"] == 0.5
    assert (last["distance"].dropna() > 0).all()
    assert last["sqnr_pruned"].notna().all()
    assert len(found.tensors) == 2 * (6 + 1) * 4


def test_masks_are_compared_and_exchanged(found: Explanation) -> None:
    assert found.masks[["zeros_A", "zeros_B", "by_chance"]].to_numpy().tolist() == [[0.5] * 3] * 2
    scores = found.exchanged.set_index(["network", "masks"])["score"]
    assert f"{scores['A', 'A']:.4g}" == found.labels[0].split()[-1]
    assert scores["A", "B"] != scores["A", "A"]
    assert len(scores) == 4


def test_a_run_and_itself_differ_in_nothing(tmp_path: Path) -> None:
    first = loaded(tmp_path, "trainer.keep_events=true")
    before = {name: value.clone() for name, value in first.task.state_dict().items()}
    found = explain(first, FinishedRun.load(first.row.signature, tmp_path))
    assert (found.terms["A"] == found.terms["B"]).all()
    assert (found.masks["shared"] == 1).all()
    assert found.exchanged["score"].nunique() == 1
    own = found.tensors.drop(columns="run")
    half = len(own) // 2
    pd.testing.assert_frame_equal(own[:half].reset_index(drop=True), own[half:].reset_index(drop=True))
    assert found.differing == ("", "")
    masks = [name for name in before if name.endswith("mask")]
    assert all(torch.equal(before[name], first.task.state_dict()[name]) for name in masks)


def test_what_was_not_kept_is_said(tmp_path: Path) -> None:
    found = explain(loaded(tmp_path), loaded(tmp_path, *SECOND))
    assert not len(found.terms)
    assert found.events["before"].isna().all()
    said = list(sentences(found))
    assert said[-2:] == [
        f"not measured: {name} kept no states: train it again with trainer.keep_events=true force=true" for name in "AB"
    ]
    assert "order.name=prune_first" in said[0]


def test_the_sentences_name_the_largest_terms_first(found: Explanation) -> None:
    said = list(sentences(found))
    total = found.terms["A"].sum() - found.terms["B"].sum()
    assert said[2] == f"A minus B is {total:+.3g}, made of:"
    values = [abs(float(line.split()[0])) for line in said[3:9]]
    assert values == sorted(values, reverse=True)
