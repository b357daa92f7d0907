"""Which order is better: verdicts, sentences, and what may not be paired."""

from dataclasses import replace
from pathlib import Path

import pytest

from qprune.cli import main as cli
from qprune.config.compose import Composer
from qprune.reporting.comparison import compare_orders
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


SIX = [31.0, 31.1, 31.2, 31.0, 31.1, 31.2]
SETTING = "P0.5(w,f) and Q8(w,f) (paper, real data)"


def test_a_difference_in_every_seed_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored(tmp_path / "runs", SIX, [30.0] * 6)
    assert cli.main(["tables", "order", f"results_dir={tmp_path / 'runs'}"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[2] == "### espcn, times of each order's own"
    line, p = printed[4].split("; p = ")
    assert line == (
        f"- {SETTING}: prune first is better (prune first minus quantize first is +1.1 dB, 95 % interval +1.01 to "
        "+1.19, 6 seeds"
    )
    assert p.endswith(", 0.031 (sign flips))")
    assert printed[6].startswith(
        "Differences are paired by seed; intervals are 95 % t intervals of the mean. A verdict"
    )
    assert (tmp_path / "runs" / "tables" / "order.md").exists()


def test_smaller_is_better_where_the_metric_says_so(tmp_path: Path) -> None:
    store = stored(tmp_path, [31.0] * 6, [30.0] * 6, better=False)
    [comparison] = compare_orders(store)
    assert comparison.verdict == "quantize first is better"


def test_a_difference_has_its_unit_or_else_the_metric_s_name(tmp_path: Path) -> None:
    [comparison] = compare_orders(stored(tmp_path, [31.0] * 6, [30.0] * 6))
    for metric, said in (("accuracy_percent", "is +1 pp,"), ("psnr_db", "is +1 dB,"), ("fid", "is +1 fid,")):
        assert said in replace(comparison, metric=metric).sentence()


def test_noise_is_undecided_unless_a_margin_was_chosen(tmp_path: Path) -> None:
    noise = [30.1, 29.9, 30.1, 29.9, 30.1, 29.9]
    store = stored(tmp_path, noise, [30.0] * 6)
    [comparison] = compare_orders(store)
    assert comparison.verdict == "undecided"
    assert "undecided (prune first minus quantize first is +0 dB, 95 % interval -0.1" in comparison.sentence()
    assert compare_orders(store, margin=0.08)[0].verdict == "undecided"
    assert compare_orders(store, margin=0.1)[0].verdict == "no difference of 0.1 dB or more"
    shown = stored(tmp_path / "other", [30.01, 30.02, 30.03] * 2, [30.0] * 6)
    assert compare_orders(shown, margin=0.1)[0].verdict == "prune first is better, by less than 0.1 dB"


def test_few_seeds_show_nothing(tmp_path: Path) -> None:
    [comparison] = compare_orders(stored(tmp_path, [40.0, 40.1], [30.0, 30.0, 30.0]))
    assert comparison.values.index.tolist() == [0, 1]
    assert comparison.sentence() == (
        f"{SETTING}: too few seeds, a verdict needs 6 (prune first minus quantize first is +10.1 dB, 95 % interval "
        "+9.41 to +10.7, 2 seeds)"
    )


def test_comparisons_of_too_few_seeds_share_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    stored(runs, SIX, [30.0] * 6)
    stored(runs, [31.0] * 4, [30.0] * 4, "quantize.bits=9")
    command = ["tables", "order", f"results_dir={runs}"]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[5] == (
        "- 1 comparison of fewer than 6 seeds: too few to decide; shown by: qprune tables order --all-pairs"
    )
    assert (tmp_path / "runs" / "tables" / "order.md").read_text(encoding="utf-8") == shown.removesuffix("\n")
    assert cli.main([*command, "--all-pairs"]) == 0
    every = capsys.readouterr().out
    assert every.splitlines()[:5] == shown.splitlines()[:5]
    assert "Q9(w,f) (paper, real data): too few seeds, a verdict needs 6 (prune first minus" in every
    assert "too few to decide" not in every


def test_several_comparisons_of_a_table_are_corrected(tmp_path: Path) -> None:
    stored(tmp_path, SIX, [30.0] * 6)
    store = stored(tmp_path, [30.3, 30.0, 30.3, 30.0, 30.3, 30.3], [30.0] * 6, "quantize.bits=9")
    tested = [comparison.tested for comparison in compare_orders(store)]
    for one, other in (tested, tested[::-1]):
        assert one.p_table == (2 * one.p_t if one.p_t < other.p_t else max(one.p_t, 2 * other.p_t))


CELLS = {  # P loses 1 dB late and 0.2 early, Q 0.5 and 0.1; the order itself gives prune first another 0.3
    "prune_first": 33 - 0.2 - 0.5 + 0.15,
    "quantize_first": 33 - 0.1 - 1.0 - 0.15,
    "joint": 33 - 0.3,
    "joint_late": 33 - 1.5,
    "prune_only": 33 - 0.2,
    "prune_only_late": 33 - 1.0,
    "quantize_only": 33 - 0.1,
    "quantize_only_late": 33 - 0.5,
}


def stored_cells(folder: Path, *overrides: str, bits: int = 8, seeds: int = 6) -> Store:
    """Runs of the factorial protocol; those without an operator that bits belong to are shared, as in a sweep."""
    with Composer() as composer:
        for order, score in CELLS.items():
            for seed in range(seeds):
                own = bits if "prune_only" not in order else 8
                words = ["task=espcn", f"order={order}", f"seed={seed}", f"quantize.bits={own}", *overrides]
                store_row(composer, words, folder, score=score + 0.01 * (seed % 3) * (-1 if "late" in order else 1))
    return Store.read(folder)


def test_the_factorial_protocol_subtracts_what_time_alone_predicts(tmp_path: Path) -> None:
    store = stored_cells(tmp_path, "protocol=factorial", bits=4)
    found = {comparison.contrast.name: comparison for comparison in compare_orders(store)}
    difference, time, interaction, together = (comparison.tested for comparison in found.values())
    assert difference.mean == pytest.approx(0.7)
    assert time.mean == pytest.approx(0.4)  # (1 - 0.2) - (0.5 - 0.1), and the seeds' part cancels
    assert interaction.mean == pytest.approx(0.3)
    assert together.mean == pytest.approx(-0.9 + 0.9 - 0.0, abs=0.02)
    assert [comparison.verdict for comparison in found.values()][:3] == [
        "prune first is better",
        "time alone favors prune first",
        "the order itself favors prune first",
    ]
    assert {comparison.heading for comparison in found.values()} == {
        "espcn, slots 140-155 and 160-175 (factorial protocol)"
    }
    assert [comparison.contrast.name for comparison in compare_orders(store, "mirrored")] == [
        "prune first minus quantize first"
    ]
    assert compare_orders(store, "paper") == []


def test_protocols_are_never_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    stored(runs, SIX, [30.0] * 6)
    stored(runs, [30.0] * 6, SIX, "protocol=mirrored")
    stored(runs, [30.0] * 6, [30.0], "protocol=mirrored", "schedule.slots.length=10")
    store = Store.read(runs)
    assert {comparison.heading: comparison.verdict for comparison in compare_orders(store)} == {
        "espcn, slots 140-150 and 160-170 (mirrored protocol)": "too few seeds, a verdict needs 6",
        "espcn, slots 140-155 and 160-175 (mirrored protocol)": "quantize first is better",
        "espcn, times of each order's own": "prune first is better",
    }
    assert store.problems == []
    assert cli.main(["tables", "order", "protocol=paper", "task=espcn", f"results_dir={runs}"]) == 0
    assert "slots" not in capsys.readouterr().out
    assert cli.main(["tables", "order", "task=cifar", f"results_dir={runs}"]) == 0
    assert "no seed has been trained in both orders" in capsys.readouterr().out
    assert cli.main(["tables", "order", "margin=0", f"results_dir={runs}"]) == 2
    assert capsys.readouterr().err.startswith("error: margin=0 is no difference of scores; type a number > 0")


def test_versions_of_the_arithmetic_are_never_mixed(tmp_path: Path) -> None:
    with Composer() as composer:
        for seed in range(8):
            for order, score in (("prune_first", 31.0), ("quantize_first", 30.0)):
                words = ["task=espcn", f"order={order}", f"seed={seed}"]
                store_row(composer, words, tmp_path, score=score + seed, arithmetic=2 if seed < 2 else 1)
    [comparison] = compare_orders(Store.read(tmp_path))
    assert comparison.values.index.tolist() == [0, 1]
    assert comparison.marks == ("12 runs of arithmetic version 1 left out",)
    [older] = compare_orders(Store.read(tmp_path, arithmetic=1))
    assert older.values.index.tolist() == [2, 3, 4, 5, 6, 7]
    assert older.marks == ()


def test_what_is_left_of_training_is_said(tmp_path: Path) -> None:
    with Composer() as composer:
        for order, left in (("prune_first", (40.0, 30.0)), ("quantize_first", (25.0, 50.0))):
            recovery = {"epochs_after_pruning": left[0], "rates_after_pruning": left[0] / 1000}
            recovery |= {"epochs_after_quantization": left[1], "rates_after_quantization": left[1] / 1000}
            store_row(composer, ["task=espcn", f"order={order}"], tmp_path, recovery=recovery)
    [comparison] = compare_orders(Store.read(tmp_path))
    assert comparison.sentence().endswith(
        "; left after the last pruning and quantization: prune first 40 and 30 epochs (rates 0.04 and 0.03), quantize "
        "first 25 and 50 epochs (rates 0.025 and 0.05)"
    )


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
        ", masks tiled to the edge",
        ", rim not pruned",
    ]


def test_settings_of_most_seeds_come_first(tmp_path: Path) -> None:
    stored(tmp_path, [31.0], [30.0])
    stored(tmp_path, [31.0] * 3, [30.0] * 3, "quantize.bits=9")
    store = stored(tmp_path, [31.0] * 2, [30.0] * 2, "quantize.bits=2")
    assert [len(comparison.values) for comparison in compare_orders(store)] == [3, 2, 1]


def test_a_run_of_before_a_key_is_paired_with_one_of_after(tmp_path: Path) -> None:
    store = stored(tmp_path, [31.0], [30.0])
    old = next(path for path in tmp_path.rglob("config.yaml") if "prune_first" in str(path))
    text = old.read_text(encoding="utf-8")
    assert "  compile: false\n" in text
    old.write_text(text.replace("  compile: false\n", ""), encoding="utf-8")
    assert [comparison.tested.mean for comparison in compare_orders(store)] == [1.0]


def test_two_schedules_of_one_setting_are_named(tmp_path: Path) -> None:
    stored(tmp_path, [31.0], [30.0])
    store = stored(tmp_path, [32.0], [], "schedule.t_p=120")
    assert compare_orders(store) == []
    assert store.problems == [
        "espcn P0.5(w,f)->Q8(w,f): several runs of seed 0 differ only in their schedule; they are not compared"
    ]
