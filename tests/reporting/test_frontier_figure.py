"""The figure of a search: bits stand in their points, those of the front above others, and words in the legend."""

from __future__ import annotations

import pandas as pd
import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure
from matplotlib.text import Annotation

from qprune.reporting.frontier_figure import fronts

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


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_each_finished_model_has_its_bits_inside() -> None:
    figure = fronts(TABLE, "psnr_db", "espcn")
    assert {at: text.get_text() for at, text in numbers(figure, 0).items()} == {
        (10.0, 30.0): "4",
        (12.0, 29.0): "6",
        (20.0, 31.0): "8",
    }
    assert {at: text.get_text() for at, text in numbers(figure, 1).items()} == {
        (9.0, 30.0): "4",
        (8.0, 29.0): "6",
        (8.5, 31.0): "8",
    }
    for text in numbers(figure, 0).values():
        across, down = text.xyann
        assert across == 0
        assert abs(down) < 2  # points: within the marker


def test_points_of_the_front_are_filled_and_lie_above_others() -> None:
    axis = fronts(TABLE, "psnr_db", "espcn").axes[0]
    points = {(line.get_xdata()[0], line.get_ydata()[0]): line for line in axis.lines if len(line.get_xdata()) == 1}
    dominated = points[12.0, 29.0]
    assert dominated.get_markerfacecolor() == "#ffffff"
    for place in ((10.0, 30.0), (20.0, 31.0)):
        assert points[place].get_markerfacecolor() != "#ffffff"
        assert points[place].get_zorder() > numbers(axis.figure, 0)[12.0, 29.0].get_zorder() > dominated.get_zorder()


def test_what_was_asked_is_told_in_the_legend() -> None:
    asked = fronts(TABLE, "psnr_db", "espcn", least=30.5, max_size_bits=15e6, whole=False)
    assert {"score that is needed; beyond it the front may lack models", "largest size that is allowed"} <= {
        *words(asked)
    }
    assert "score that is needed" in words(fronts(TABLE, "psnr_db", "espcn", least=30.5))
    assert not any("needed" in text for text in words(fronts(TABLE, "psnr_db", "espcn")))
