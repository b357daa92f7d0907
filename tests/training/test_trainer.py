"""The loop: resumed equals uninterrupted, signals, losses that are not finite, what is logged."""

import os
import signal
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from qprune.errors import Interrupted, StoppedEarly, UserError
from qprune.training import checkpoint
from qprune.training import distributed as processes
from qprune.training.distributed import share_of
from tests.training.toy import Toy, assert_same_state, before_step, killed, prepared


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, float], Toy, str]:
    """Metrics, task and curve of a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    task, _, trainer = prepared(folder)
    return trainer.fit(), task, (folder / "metrics.csv").read_text()


@pytest.mark.parametrize("killed_at", range(1, 24))
@pytest.mark.parametrize("every_step", [False, True])
def test_resumed_equals_uninterrupted(killed_at: int, every_step: bool, expected: Any, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    killed(prepared(folder, checkpoint_minutes=0.0 if every_step else 5.0)[2], killed_at)
    task, _, trainer = prepared(folder)
    assert trainer.fit() == expected[0]
    assert_same_state(task, expected[1])
    assert (folder / "metrics.csv").read_text() == expected[2]
    assert len(list((folder / "checkpoints").iterdir())) == checkpoint.KEPT


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [7, 21, 23], ids=["in the middle", "in the last epoch", "in its last step"])
def test_signals_finish_the_step_and_save(step: int, number: signal.Signals, expected: Any, tmp_path: Path) -> None:
    _, _, trainer = prepared(tmp_path / "stopped")
    before_step(trainer, step, lambda: os.kill(os.getpid(), number))
    with pytest.raises(Interrupted, match=f"stopped by {number.name} after step {step + 1} of 24, with everything"):
        trainer.fit()
    task, _, trainer = prepared(tmp_path / "stopped")
    assert trainer.fit() == expected[0]
    assert_same_state(task, expected[1])


def test_a_signal_that_the_shell_ignores_stays_ignored(tmp_path: Path) -> None:
    """As SIGINT in `nohup qprune run ... &`."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _, _, trainer = prepared(tmp_path)
        before_step(trainer, 7, lambda: os.kill(os.getpid(), signal.SIGINT))
        trainer.fit()
    finally:
        signal.signal(signal.SIGINT, before)
    assert trainer.step == 24


def test_a_signal_in_the_last_evaluation_stops_with_everything_saved(expected: Any, tmp_path: Path) -> None:
    task, _, trainer = prepared(tmp_path / "stopped", evaluate_every=8)
    evaluate = task.evaluate

    def acting() -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate()

    task.evaluate = acting  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match="stopped by SIGTERM after step 24 of 24, with everything saved"):
        trainer.fit()
    task, _, trainer = prepared(tmp_path / "stopped", evaluate_every=8)
    assert trainer.fit() == expected[0]
    assert_same_state(task, expected[1])


def test_a_watch_sees_every_epoch_and_stops_without_loss(expected: Any, tmp_path: Path) -> None:
    seen: list[int] = []

    def watch(epochs: list[dict[str, Any]]) -> str | None:
        seen.append(len(epochs))
        assert epochs[-1]["epoch"] == len(epochs)
        return "it is hopeless" if len(epochs) == 6 else None

    _, _, trainer = prepared(tmp_path / "stopped", watch=watch)
    with pytest.raises(StoppedEarly, match="^stopped early after step 18 of 24: it is hopeless$"):
        trainer.fit()
    task, _, trainer = prepared(tmp_path / "stopped", watch=watch)
    assert trainer.fit() == expected[0]
    assert_same_state(task, expected[1])
    assert seen == [1, 2, 3, 4, 5, 6, 7]  # not asked after the last epoch: there is nothing left to stop


def test_metrics_are_logged_per_epoch(tmp_path: Path) -> None:
    _, _, trainer = prepared(tmp_path, evaluate_every=3)
    final = trainer.fit()
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert table["epoch"].tolist() == list(range(1, 9))
    assert table["phase"].tolist() == [
        *("float", "P 1/4", "P 2/4", "P 3/4", "P 4/4"),
        *("P 4/4 Q(w)", "P 4/4 Q(w,f)", "P 4/4 Q(w,f)"),
    ]
    assert table["negative_mse"].notna().tolist() == [False, False, True, False, False, True, False, True]
    assert table["negative_mse"].iloc[-1] == pytest.approx(final["negative_mse"])
    assert set(final) == {"negative_mse", "noise"}
    assert (table["loss_twice"] / table["loss_loss"]).tolist() == pytest.approx([2.0] * 8)


def test_evaluation_changes_no_random_number_of_training(tmp_path: Path) -> None:
    often, _, first = prepared(tmp_path / "often", evaluate_every=1)
    first.fit()
    seldom, _, second = prepared(tmp_path / "seldom", evaluate_every=8)
    second.fit()
    assert_same_state(often, seldom)


def test_one_process_takes_the_whole_batch() -> None:
    batch = (torch.arange(6), {"a": torch.ones(6, 2)})
    part, share = share_of(batch)
    assert part is batch
    assert share == 1.0


def test_ranks_share_a_list_of_samples_of_different_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = [(torch.ones(3, side, side), side) for side in range(5)]
    parts = []
    for rank in range(2):
        monkeypatch.setattr(processes, "rank_and_world", lambda rank=rank: (rank, 2))
        parts.append(share_of(batch))
    assert [([side for _, side in part], share) for part, share in parts] == [([0, 1, 2], 0.6), ([3, 4], 0.4)]
    with pytest.raises(UserError, match="a batch of 1 samples leaves rank 1 of 2 without any"):
        share_of(batch[:1])
