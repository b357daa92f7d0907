"""A run of the toy task by the command line: 24 steps through every phase, in a fraction of a second."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from qprune.cli import failures
from qprune.runs.execute import execute
from qprune.runs.folder import RunFolder
from tests.attacks.conftest import Answer, explained
from tests.runs.test_execute import config
from tests.training.toy import Toy

_TASK = """\
# @package _global_
epochs: 8
prune: {window: 6}
task:
  _target_: tests.training.toy.Toy
  name: toy
  sites: {quantize_weights: ['**'], prune_weights: ['0'], quantize_features: [input, '1'], prune_features: ['1']}
  paper_size: {count_input: true, pruned_weights: ['**'], pruned_features: ['**']}
"""
_SCHEDULE = "# @package schedule\n{t_qw: 5, t_qf: 6, t_p: 0, dt_p: 1, n: 4}\n"
EQUAL = ("result.json", "network.safetensors", "metrics.csv", "operators.json", "config.yaml")
STEPS = 24


def toy_words(folder: Path) -> tuple[str, ...]:
    """Write the configs of the toy task below `folder`; return what chooses it."""
    (folder / "task").mkdir(parents=True)
    (folder / "task" / "toy.yaml").write_text(_TASK)
    (folder / "schedule" / "toy").mkdir(parents=True)
    (folder / "schedule" / "toy" / "prune_first.yaml").write_text(_SCHEDULE)
    keys = ("device=cpu", "threads=1", "keep_memory=false", "kernels=false", "warm_start=false")
    return ("--config-dir", str(folder), "task=toy", "data=synthetic", *(f"trainer.{key}" for key in keys))


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """What chooses the toy task, behind a verb."""
    return toy_words(tmp_path_factory.mktemp("configs") / "toy")


def files_of(results: Path) -> dict[str, bytes]:
    """The files of finished runs that must not differ, by run folder and name, once their checksums are found right."""
    found = {}
    for row in sorted(results.glob("toy/*/result.json")):
        assert RunFolder(row.parent).check(*EQUAL[1:])
        for name in EQUAL:
            content = (row.parent / name).read_bytes()
            found[f"{row.parent.name}/{name}"] = content.replace(str(results).encode(), b"")
    return found


def carry_out(results: Path) -> Answer:
    """Carry out a run in this process, with a checkpoint after each step, and answer as the command line does."""
    try:
        execute(config(results, "trainer.checkpoint_minutes=0", "trainer.kernels=false"))
    except Exception as error:
        code, message = failures.explain(error)
        return explained(Answer(code, "", message))
    return Answer(0, "", "")


class Dying(Toy):
    """Kills its process in the first step of seed 1, as a full memory does, while the file DIES is there."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.dies = arguments["seed"] == 1

    def train_step(self, batch: Any) -> dict[str, Tensor]:
        mark = Path(os.environ.get("DIES", ""))
        if self.dies and mark.is_file():
            time.sleep(1)  # so that the other worker has begun
            mark.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if not self.dies and mark.is_file():
            time.sleep(0.2)  # and has not ended
        return super().train_step(batch)
