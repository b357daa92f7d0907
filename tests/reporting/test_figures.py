"""Figures are true to their data: what is drawn is read back from axes and compared with rows and schedules."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure
from matplotlib.text import Annotation
from PIL import Image

from qprune.compression.schedule import Timeline
from qprune.config.compose import Composer
from qprune.reporting import figures, report
from qprune.reporting.figures import save, search_fronts, with_unit
from qprune.runs.row import Row
from qprune.runs.store import Store
from tests.reporting.rows import store_row

CURVE = pd.DataFrame(
    {
        "epoch": [1, 2, 3, 4],
        "step": [10, 20, 30, 40],
        "phase": ["float", "P 2/2", "P 2/2 Q(w,f)", "P 2/2 Q(w,f)"],
        "weight_sparsity": [0.0, 0.5, 0.5, 0.5],
        "feature_sparsity": [0.0, 0.5, 0.5, 0.5],
        "loss": [4.0, 3.0, 2.0, 1.0],
        "psnr_db": [20.0, 21.0, 22.0, 23.0],
    }
)
TIMELINE = Timeline(prune_steps=(12, 18), weight_step=22, feature_step=25, steps_per_epoch=10)
OPERATORS = [
    {"site": "conv1", "kind": "weight", "operator": "quantize", "decimals": [8, 10]},
    {"site": "tanh1", "kind": "feature", "operator": "quantize", "decimals": [7]},
    {"site": "input", "kind": "feature", "operator": "quantize", "decimals": [6]},
]


@pytest.fixture
def row(tmp_path: Path) -> Row:
    with Composer() as composer:
        return store_row(composer, ["task=espcn", "budget=smoke", "order=prune_first"], tmp_path / "one", steps=40)


def lines(figure: Figure, axis: int) -> list[tuple[list[float], list[float]]]:
    data = [line.get_data() for line in figure.axes[axis].lines]
    return [(list(map(float, x)), list(map(float, y))) for x, y in data]


@pytest.mark.parametrize("epochs", [4, 200])
def test_every_epoch_has_a_tip_and_few_have_dots(epochs: int, row: Row) -> None:
    curve = pd.DataFrame({"epoch": range(1, epochs + 1), "phase": "float", "loss": 1.0, "psnr_db": np.nan})
    curve.loc[1, "psnr_db"] = 29.5  # the other epochs were not evaluated
    loss, score = (axis.lines[0] for axis in figures.training_curve(curve, None, row).axes)
    assert score.get_gid() == "tip: epoch 2: 29.5"
    assert loss.get_gid().removeprefix("tip: ").split(" | ")[-1] == f"epoch {epochs}: 1"
    assert [line.get_markerfacecolor() == (0, 0, 0, 0) for line in (loss, score)] == [epochs == 200] * 2


def test_zeros_step_at_the_events_and_meet_what_was_measured(row: Row) -> None:
    figure = figures.over_time(CURVE, OPERATORS, TIMELINE, row)
    dots, steps = lines(figure, 0)[:2]
    assert dots == ([1.0, 2.0, 3.0, 4.0], [0.0, 50.0, 50.0, 50.0])
    assert steps[0] == [0.0, 1.2, 1.8, 4.0]
    assert steps[1] == pytest.approx([0.0, 50 * (1 - 0.5**3), 50.0, 50.0])  # cubic, two events
    decimals = [line for line in lines(figure, 1) if len(line[0]) == 2]
    assert decimals == [([2.2, 4.0], [9.0, 9.0]), ([2.5, 4.0], [7.0, 7.0]), ([2.5, 4.0], [6.0, 6.0])]


def test_phases_are_shaded_from_event_to_event(row: Row) -> None:
    figure = figures.training_curve(CURVE, TIMELINE, row)
    spans = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in figure.axes[0].patches]
    assert np.allclose(spans, [(1.2, 2.2), (2.2, 4.0)])
    by_epoch = figures.training_curve(CURVE, None, row).axes[0].patches
    assert [(patch.get_x(), patch.get_width()) for patch in by_epoch] == [(1, 1), (2, 2)]


def test_the_timeline_of_a_run_is_that_of_its_config(row: Row, tmp_path: Path) -> None:
    store = Store.read(tmp_path / "one")
    timeline = store.timeline(row.signature)
    assert timeline is not None
    assert (timeline.steps_per_epoch, timeline.weight_step, timeline.feature_step) == (10, 32, 34)  # 160, 170 of 200
    assert timeline.prune_steps == (29, 30, 31, 32)  # 140 + 5 k of 200 epochs, in 40 steps
    path = store.folders[row.signature].path / "config.yaml"
    text = path.read_text(encoding="utf-8")
    try:
        path.write_text("seed: 1\n", encoding="utf-8")
        assert store.timeline(row.signature) is None
        assert "config.yaml is not the config of a run (epochs is missing; give it a value" in store.problems[-1]
        path.unlink()
        assert store.timeline(row.signature) is None
        assert len(store.problems) == 1
    finally:
        path.write_text(text, encoding="utf-8")


def test_recipes_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    with Composer() as composer:
        for words in ("prune_first seed=0", "prune_first seed=1", "prune_first prune.window=4"):
            store_row(composer, f"task=espcn order={words}".split(), tmp_path)
        for words in ("quantize_first", "quantize_first trainer.threads=1 seed=1"):
            store_row(composer, f"task=espcn order={words}".split(), tmp_path)
        store_row(composer, "task=espcn order=prune_first prune.window=4 prune.border=keep".split(), tmp_path)
    store = Store.read(tmp_path)
    rows = list(store.rows.values())
    found = sorted(report.recipes(store, rows).values())
    first = "P0.5(w,f)->Q8(w,f)"
    named = [f"{first}, T = {setting}" for setting in ("16", "16", "4", "4, rim not pruned")]
    assert found == [*named, *["Q8(w,f)->P0.5(w,f)"] * 2]
    windows = report.scores_by_window(store, rows)
    assert sorted(windows["window"]) == [4, 16, 16]  # quantize_first has one window only, and no other rim two


def test_window_means_and_deviations(tmp_path: Path) -> None:
    points = pd.DataFrame(
        [(1, "a", 30.0), (1, "a", 32.0), (4, "a", 33.0), (4, "a", 35.0)], columns=["window", "recipe", "score"]
    )
    axis = figures.score_by_window(points, "psnr_db", "espcn").axes[0]
    assert list(axis.lines[0].get_ydata()) == [31.0, 34.0]
    bar = axis.collections[0].get_segments()[0]
    assert bar[:, 1] == pytest.approx([31 - 2**0.5, 31 + 2**0.5])
    assert axis.get_xlabel() == "window T (samples)"
    assert axis.get_ylabel() == "PSNR (dB)"


def test_the_front_joins_means_over_seeds() -> None:
    runs = pd.DataFrame(
        [("a", "prune_first", 30.0, 9.0), ("a", "prune_first", 32.0, 9.0), ("b", "baseline", 35.0, 6.0)],
        columns=["recipe", "order", "score", "density"],
    )
    axis = figures.density_against_score(runs, "espcn", "psnr_db", True, "dB/ln(Mb)").axes[0]
    assert list(axis.lines[-1].get_xdata()) == [31.0, 35.0]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("PSNR (dB)", "performance density (dB/ln(Mb))")
    axis = figures.density_against_score(runs, "pix2pix", "fid", False).axes[0]
    assert axis.get_xlabel() == "FID, smaller is better"


def test_of_many_recipes_the_legend_names_the_front_by_numbers_in_its_points() -> None:
    points = [(f"r{i}", "prune_first", 30.0 + i, 5.0) for i in range(8)] + [("dense", "baseline", 31.5, 9.0)]
    runs = pd.DataFrame(points, columns=["recipe", "order", "score", "density"])
    figure = figures.density_against_score(runs, "espcn", "psnr_db", True)
    [axis], [legend] = figure.axes, figure.legends
    assert {(text.xy, text.get_text()) for text in axis.texts} == {((31.5, 9.0), "1"), ((37.0, 5.0), "2")}
    named = [text.get_text() for text in legend.get_texts()]
    assert sorted(named) == ["1  dense", "2  r7", "Pareto front", "baseline", "prune first"]


def test_the_histogram_shows_every_count_and_the_range(row: Row) -> None:
    site = {"site": "tanh1", "bits": 8, "decimal": 7, "low": -1.0, "high": 0.9921875, "elements": 8}
    site |= {"below": 0, "above": 2, "start": 0.0, "width": 0.5, "counts": [5, 1, 2]}
    axis = figures.feature_histograms([site], row).axes[0]
    [steps] = [patch for patch in axis.patches if hasattr(patch, "get_data")]
    values, edges, _ = steps.get_data()
    assert (list(values), list(edges)) == ([5, 1, 2], [0.0, 0.5, 1.0, 1.5])
    assert "8 bits, d* = 7, 25.00% outside" in axis.get_title()
    [span] = [patch for patch in axis.patches if not hasattr(patch, "get_data")]
    assert (span.get_x(), span.get_x() + span.get_width()) == (-1.0, 0.9921875)
    assert len(figures.feature_histograms([site] * 20, row).axes) == figures.SITES


def test_tails_are_shares_of_all_values_in_units_of_their_spread() -> None:
    near = {"start": -1.0, "width": 1.0, "counts": [50, 50]}  # at -0.5 and 0.5: a root mean square of 0.5
    far = {"start": 0.0, "width": 2.0, "counts": [99, 0, 0, 0, 1]}  # at 1 and 9
    axes = figures.feature_tails({"cifar": [near], "cyclegan": [near, far]}).axes
    for axis, expected in zip(axes, ({-1: 0.5, 1: 0.5}, {-1: 0.25, 0: 0.495, 1: 0.25, 6: 0.005}), strict=True):
        [steps] = [patch for patch in axis.patches if hasattr(patch, "get_data")]
        values, edges, _ = steps.get_data()
        found = {int(edge): value for value, edge in zip(values, edges, strict=False) if value}
        assert sum(values) == pytest.approx(1)
        assert len(found) == len(expected)
    assert axes[1].get_title() == "cyclegan\nup to 7"  # 9 / sqrt((99 + 81) / 100)


def test_what_all_pictures_share_is_shown_once() -> None:
    def shown(pictures: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        panels = figures.side_by_side(pictures).axes
        return {axis.get_title(): np.asarray(axis.images[0].get_array()) for axis in panels if axis.images}

    source, target = np.zeros((20, 10, 3), np.uint8), np.full((20, 10, 3), 255, np.uint8)
    made = [np.full((20, 12, 3), value, np.uint8) for value in (50, 100)]
    pictures = {name: np.concatenate([source, made[i], target], 1) for i, name in enumerate("ab")}
    panels = shown(pictures)
    assert list(panels) == ["input", "a", "b", "target"]
    assert np.array_equal(panels["input"], source)
    assert np.array_equal(panels["b"], made[1])
    assert np.array_equal(panels["target"], target)
    assert list(shown({"a": source, "b": target})) == ["a", "b"]
    twice = {name: np.concatenate([picture[:, :22]] * 2, 1) for name, picture in pictures.items()}
    titles = [axis.get_title() for axis in figures.side_by_side(twice).axes if axis.images]
    assert titles == ["input", "a", "b"] * 2  # two samples to a line, as in grids of CycleGAN
    assert list(shown({"a": source})) == ["a"]


def test_a_run_folder_gives_all_its_figures(row: Row, tmp_path: Path) -> None:
    store = Store.read(tmp_path / "one")
    place = store.folders[row.signature].path
    assert list(report.figures_of_run(store, row)) == []
    CURVE.to_csv(place / "metrics.csv", index=False)
    (place / "operators.json").write_text(json.dumps(OPERATORS), encoding="utf-8")
    (place / "histograms.json").write_text("[{", encoding="utf-8")  # not whole: no figure, no failure
    found = list(report.figures_of_run(store, row))
    assert [name.removeprefix(place.name) for name, _, _ in found] == ["-curve", "-time", "-decimals"]
    again = list(report.figures_of_run(store, row))
    for (name, _, figure), (_, _, other) in zip(found, again, strict=True):
        svg = save(figure, tmp_path, name)
        png = (tmp_path / f"{name}.png").read_bytes()
        assert save(other, tmp_path, name) == svg
        assert (tmp_path / f"{name}.png").read_bytes() == png
        assert b"<text" in svg  # text stays text
        assert png.startswith(b"\x89PNG")


def test_pictures_of_several_recipes_are_set_side_by_side(tmp_path: Path) -> None:
    with Composer() as composer:
        for i, order in enumerate(("baseline", "prune_first")):
            row = store_row(composer, ["task=espcn", f"order={order}"], tmp_path, density_actual=9.0 - i)
            [place] = tmp_path.glob(f"espcn/*{row.signature[:10]}")
            (place / "pictures").mkdir()
            Image.new("RGB", (30, 20), (i * 80, 0, 0)).save(place / "pictures" / "test.png")
            (place / "pictures" / "broken.png").write_bytes(b"\x89PNG")
    store = Store.read(tmp_path)
    found = list(report.figures_of_runs(store, list(store.rows.values())))
    assert [name for name, _, _ in found] == ["espcn-paper-real-density", "espcn-paper-real-test"]
    assert b"seed 0" in save(found[1][2], tmp_path, "found")


def test_of_many_recipes_the_pictures_of_those_with_most_seeds_are_shown(tmp_path: Path) -> None:
    words = [["order=baseline"], *(["order=quantize_only", f"quantize.bits={bits}"] for bits in range(2, 14))]
    with Composer() as composer:
        for recipe in [*words, [*words[-1], "seed=1"]]:
            row = store_row(composer, ["task=espcn", *recipe], tmp_path)
            [place] = tmp_path.glob(f"espcn/*{row.signature[:10]}")
            (place / "pictures").mkdir()
            Image.new("RGB", (30, 20)).save(place / "pictures" / "test.png")
    store = Store.read(tmp_path)
    *_, (_, _, figure) = report.figures_of_runs(store, list(store.rows.values()))
    svg = save(figure, tmp_path, "found")
    assert b"10 of 13 recipes, those of most seeds" in svg
    assert svg.count(b"seed 0") == 10
    assert b"Q13(w,f)" in svg  # the last by name


def test_a_name_with_unit() -> None:
    assert with_unit("psnr_db") == "PSNR (dB)"
    assert with_unit("top_1_accuracy_percent") == "top 1 accuracy (%)"
    assert with_unit("fid_proxy") == "FID proxy"
    assert with_unit("top1_percent") == "top-1 accuracy (%)"


TABLE = pd.DataFrame(
    {
        "order": ["prune_first", "prune_first", "quantize_first", "baseline"],
        "bits": [4, 6, 8, 32],
        "sparsity": [0.5, 0.75, 0.5, 0.0],
        "n": [1, 2, 1, 0],
        "mean": [30.0, 29.0, 31.0, float("nan")],
        "sd": [float("nan"), 0.5, float("nan"), float("nan")],
        "size_mb": [10.0, 12.0, 20.0, 100.0],
        "density_actual": [9.0, 8.0, 8.5, float("nan")],
        "front": ["yes", "no", "yes", ""],
        "density_front": ["yes", "no", "no", ""],
    }
)


def numbers(figure: Figure, panel: int) -> dict[tuple[float, float], Annotation]:
    return {text.xy: text for text in figure.axes[panel].texts if isinstance(text, Annotation)}


def test_each_finished_model_has_its_bits_inside() -> None:
    figure = search_fronts(TABLE, "psnr_db", "espcn", {}, True)
    by_size, by_density = ({at: text.get_text() for at, text in numbers(figure, i).items()} for i in range(2))
    assert by_size == {(10.0, 30.0): "4", (12.0, 29.0): "6", (20.0, 31.0): "8"}
    assert by_density == {(9.0, 30.0): "4", (8.0, 29.0): "6", (8.5, 31.0): "8"}
    for text in numbers(figure, 0).values():
        across, down = text.xyann
        assert across == 0
        assert abs(down) < 2  # points: within the marker
