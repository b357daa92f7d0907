"""Which order is better: intervals by hand, sentences, and what may not be paired."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qprune.cli import main as cli
from qprune.config.compose import Composer
from qprune.reporting.comparison import bootstrap_interval, compare_orders
from qprune.runs.store import Store
from tests.reporting.rows import store_row


def stored(folder: Path, first: list[float], second: list[float], *overrides: str, better: bool = True) -> Store:
    """Runs of espcn in both orders with these scores, one seed each."""
    with Composer() as composer:
        for order, scores in (("prune_first", first), ("quantize_first", second)):
            for seed, score in enumerate(scores):
                words = ["task=espcn", f"order={order}", f"seed={seed}", *overrides]
                store_row(composer, words, folder, score=score, higher_is_better=better)
    return Store.read(folder)


def test_an_interval_of_two_values_by_hand() -> None:
    """The means over resamples of (0, 1) are 0, 1/2 and 1 with probabilities 1/4, 1/2, 1/4."""
    assert bootstrap_interval([0.0, 1.0]) == (0.0, 1.0)
    assert bootstrap_interval([0.0, 1.0], level=0.4) == (0.5, 0.5)
    assert bootstrap_interval([2.0] * 6) == (2.0, 2.0)


def test_a_difference_in_every_seed_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored(tmp_path / "runs", [31.0, 31.1, 31.2, 31.0, 31.1], [30.0, 30.0, 30.0, 30.0, 30.0])
    assert cli.main(["tables", "order", f"results_dir={tmp_path / 'runs'}"]) == 0
    line = capsys.readouterr().out.splitlines()[2]
    assert line.startswith(
        "- espcn, P0.5(w,f) and Q8(w,f) (paper, real data): prune first is better by 1.08 +- 0.06 dB (95 % "
    )
    assert line.endswith("5 seeds)")
    assert (tmp_path / "runs" / "tables" / "order.md").exists()


def test_smaller_is_better_where_the_metric_says_so(tmp_path: Path) -> None:
    store = stored(tmp_path, [31.0] * 5, [30.0] * 5, better=False)
    [comparison] = compare_orders(store)
    assert comparison.better == "quantize_first"
    assert "quantize first is better by 1 +- 0 dB" in comparison.sentence()


@pytest.mark.parametrize(
    ("metric", "said"), [("accuracy_percent", "1 +- 0 pp "), ("psnr_db", "1 +- 0 dB "), ("fid", "1 +- 0 fid ")]
)
def test_a_difference_has_its_unit_or_else_the_metric_s_name(metric: str, said: str, tmp_path: Path) -> None:
    [comparison] = compare_orders(stored(tmp_path, [31.0] * 5, [30.0] * 5))
    assert f"prune first is better by {said}" in replace(comparison, metric=metric).sentence()


def test_noise_is_no_difference(tmp_path: Path) -> None:
    [comparison] = compare_orders(stored(tmp_path, [31, 29, 31, 29, 31, 29], [30.0] * 6))
    assert comparison.better is None
    assert "no difference shown (prune_first minus quantize_first is +0 dB, 95 % interval -0." in comparison.sentence()


def test_few_seeds_show_no_difference(tmp_path: Path) -> None:
    [comparison] = compare_orders(stored(tmp_path, [40.0, 40.0], [30.0, 30.0, 30.0]))
    assert comparison.seeds == (0, 1)
    assert comparison.sentence().endswith(
        "no difference shown (prune_first minus quantize_first is +10 dB over 2 seeds; an interval needs at least 5)"
    )


def test_pairs_of_too_few_seeds_share_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    stored(runs, [31.0] * 5, [30.0] * 5)
    stored(runs, [31.0] * 4, [30.0] * 4, "quantize.bits=9")
    command = ["tables", "order", f"results_dir={runs}"]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[3:] == [
        "- 1 pair of fewer than 5 seeds: too few to decide; shown by: qprune tables order --all-pairs",
        "",
    ]
    assert (tmp_path / "runs" / "tables" / "order.md").read_text(encoding="utf-8") == shown.removesuffix("\n")
    assert cli.main([*command, "--all-pairs"]) == 0
    every = capsys.readouterr().out
    assert every.splitlines()[:3] == shown.splitlines()[:3]
    assert "Q9(w,f) (paper, real data): no difference shown (prune_first minus quantize_first is +1 dB over 4" in every
    assert "too few to decide" not in every
    stored(runs, [31.0], [30.0], "quantize.bits=7")
    assert cli.main(command) == 0
    assert "- 2 pairs of fewer than 5 seeds: too few to decide; shown by" in capsys.readouterr().out


def test_only_runs_of_one_setting_are_paired(tmp_path: Path) -> None:
    stored(tmp_path, [31.0], [], "prune.window=16")
    store = stored(tmp_path, [], [30.0], "prune.window=32")
    assert compare_orders(store) == []
    assert store.problems == []


def test_settings_that_read_the_same_are_told_apart(tmp_path: Path) -> None:
    stored(tmp_path, [31.0], [30.0])
    store = stored(tmp_path, [32.0], [30.0], "prune.border=keep")
    said = [comparison.sentence() for comparison in compare_orders(store)]
    assert sorted(text.partition(" data)")[2].partition(":")[0] for text in said) == [
        ", prune.border=keep",
        ", prune.border=tile",
    ]


def test_settings_of_most_seeds_come_first(tmp_path: Path) -> None:
    stored(tmp_path, [31.0], [30.0])
    stored(tmp_path, [31.0] * 3, [30.0] * 3, "quantize.bits=9")
    store = stored(tmp_path, [31.0] * 2, [30.0] * 2, "quantize.bits=2")
    assert [len(comparison.seeds) for comparison in compare_orders(store)] == [3, 2, 1]


def test_a_run_of_before_a_key_is_paired_with_one_of_after(tmp_path: Path) -> None:
    store = stored(tmp_path, [31.0], [30.0])
    old = next(path for path in tmp_path.rglob("config.yaml") if "prune_first" in str(path))
    text = old.read_text(encoding="utf-8")
    assert "  compile: false\n" in text
    old.write_text(text.replace("  compile: false\n", ""), encoding="utf-8")
    assert [comparison.difference for comparison in compare_orders(store)] == [1.0]


def test_two_schedules_of_one_setting_are_named(tmp_path: Path) -> None:
    stored(tmp_path, [31.0], [30.0])
    store = stored(tmp_path, [32.0], [], "schedule.t_p=120")
    assert compare_orders(store) == []
    assert store.problems == [
        "espcn P0.5(w,f)->Q8(w,f): several runs of seed 0 differ only in their schedule; they are not compared"
    ]
