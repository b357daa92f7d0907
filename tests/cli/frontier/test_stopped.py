"""Runs that a search stops early: which are watched, and what is left of them."""

from pathlib import Path

import pandas as pd

from qprune.cli.frontier import next_run, searched, watch_of
from qprune.config.signature import run_folder
from qprune.search.grid import grid_of
from tests.cli.frontier.runs import EARLY, SHORT, SMALL, SMOKE, store


def test_a_stopped_run_is_no_result_and_goes_on_when_more_may_be_lost(tmp_path: Path, made_up: list[str]) -> None:
    words = [*SMOKE, *SMALL, "max_loss=1%", "margin=0.1dB", f"results_dir={tmp_path}"]
    grid = grid_of(words)
    [point] = [point for point in grid.points if point.name == "Q4(w,f)"]
    store(grid.configs[grid.points[0], 0], 30.0)
    grid.folders[point, 0].note_stopped("hopeless", 28.0)
    verdict = searched(grid).verdict(point)
    assert verdict is not None
    assert verdict.startswith("loses too much: it was stopped when it could still reach psnr_db 28, and ")
    assert not searched(grid).known[point].scores
    patient = grid_of([*words, "max_loss=10%"])
    assert searched(patient).verdict(point) is None
    assert searched(grid_of([*words, "stop=never"])).verdict(point) is None
    store(grid.configs[point, 0], 29.9)  # finished later: the note is history
    assert searched(grid).known[point].optimistic is None
    assert searched(grid).known[point].mean == 29.9


def test_what_is_watched_and_what_is_not(tmp_path: Path, made_up: list[str]) -> None:
    words = [*SMOKE, *SHORT, *EARLY, "bits=3,4,8", "sparsity=0", "seed=0,1", "max_loss=1%", f"results_dir={tmp_path}"]
    grid = grid_of(words)
    points = {point.name: point for point in grid.points}

    def finish(name: str, seed: int, scores: list[float]) -> None:
        config = grid.configs[points[name], seed]
        store(config, scores[-1], epochs=12, steps=72)
        curve = pd.DataFrame({"epoch": range(1, 13), "step": range(6, 73, 6), "psnr_db": [20.0] * 6 + scores})
        curve.to_csv(run_folder(config) / "metrics.csv", index=False)

    finish("Baseline", 0, [30.0] * 6)
    finish("Q8(w,f)", 0, [27.0, 28.0, 29.0, 29.5, 29.8, 30.0])
    assert watch_of(grid, searched(grid), points["Q4(w,f)"]) is None  # none that is finished is as compressed
    finish("Q3(w,f)", 0, [20.0, 22.0, 24.0, 25.0, 26.0, 26.5])
    watch = watch_of(grid, searched(grid), points["Q4(w,f)"])
    assert watch is not None
    assert watch.last_event == 36  # t_qf = 100 of 200 epochs: epoch 6 of 12, of 6 steps each
    assert (watch.epochs, watch.needed, watch.margin) == (12, 29.7, 0.3)
    assert watch.rises == {7: 6.5, 8: 4.5, 9: 2.5, 10: 1.5, 11: 0.5, 12: 0.0}
    assert watch_of(grid, searched(grid), points["Q8(w,f)"]) is None  # a further seed
    assert watch_of(grid, searched(grid), points["Baseline"]) is None
    for free in (grid_of([*words, "stop=never"]), grid_of(words, exhaustive=True)):
        assert watch_of(free, searched(free), points["Q4(w,f)"]) is None
    assert next_run(grid, searched(grid), ()) == ((points["Q4(w,f)"], 0), 0)
