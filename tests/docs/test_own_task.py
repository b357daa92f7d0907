"""The tutorial on a task of one's own, typed as it says, in a folder outside the repository."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qprune.cli import main as cli
from tests.cli.errors import error_of
from tests.docs.pages import blocks

PAGE = "own-task"
SETTINGS = "export PYTHONPATH=$PWD QPRUNE_TRUST=my_task"
WORDS = ("--config-dir", "configs", "task=my_task")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the files that the page's first command writes."""
    place = tmp_path_factory.mktemp("outside")
    first, *_ = commands()
    done = typed(place, first)
    assert done.returncode == 0, done.stderr
    written, *_ = (block.text for block in blocks(PAGE, "text"))
    assert done.stdout.startswith(written)
    assert {line.split(":")[0] for line in written.splitlines()} == {
        str(path.relative_to(place)) for path in place.rglob("*.*")
    }
    return place


def commands() -> list[str]:
    """Return the blocks of commands that the page has a reader type."""
    return [block.text for block in blocks(PAGE, "sh") if "only-shown" not in block.options]


def typed(folder: Path, commands: str) -> subprocess.CompletedProcess[str]:
    """Carry out lines in a shell, in the folder."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands], cwd=folder, env=environment, text=True, capture_output=True
    )


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Be in the folder with the page's settings but for the path; the module is imported anew by each test."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("QPRUNE_TRUST", "my_task")
    monkeypatch.delitem(sys.modules, "my_task", raising=False)
    return monkeypatch


def test_the_tutorial_as_it_is_typed(
    here: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a shell up to the first row; what follows in this process."""
    _, first, then = commands()
    assert first.startswith(SETTINGS)
    done = typed(folder, first)
    assert done.returncode == 0, done.stderr
    (row_text,) = (b.text.strip() for b in blocks(PAGE, "text") if b.text.startswith("my_task  "))
    assert row_text in done.stdout
    (stored,) = folder.glob("results/runs/my_task/*/result.json")
    row = json.loads(stored.read_text())
    assert row["score"] > 90
    assert (row["weight_sparsity"], row["feature_sparsity"]) == (0.5, 0.5)
    # by hand: weights 2x32 and 32x2 at 8 bits, 32x32 at 8 bits and half of it, 66 biases as floats
    assert row["weight_bits_actual"] == 8 * 128 + 4 * 1024 + 32 * 66
    assert row["density_actual"] == pytest.approx(
        row["score"] * 1e3 / sum(row[f"{kind}_bits_actual"] for kind in ("weight", "feature", "input"))
    )

    here.syspath_prepend(folder)
    for line in then.splitlines():
        assert cli.main(shlex.split(line)[1:]) == 0, line
    printed = capsys.readouterr().out
    assert "finished before: results/runs/my_task/prune_first" in printed
    assert "4 runs: 4 finished, 0 failed" in printed
    assert len(list(folder.glob("results/runs/my_task/*/result.json"))) == 6


def test_a_schedule_of_an_order_takes_the_place_of_the_slots(
    here: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = blocks(PAGE, "yaml")
    path = folder / block.caption
    path.parent.mkdir(parents=True)
    path.write_text(block.text, encoding="utf-8")
    assert cli.main(["run", *WORDS, "--cfg", "job"]) == 0
    path.unlink()
    schedule = yaml.safe_load(capsys.readouterr().out)["schedule"]
    assert (schedule["t_p"], schedule["slots"]) == (8, None)


def test_every_error_of_the_page_is_met(
    here: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = error_of(capsys, "run", *WORDS, "epochs=21")
    assert "task._target_=my_task.MyTask cannot be imported" in said
    here.syspath_prepend(folder)
    said = error_of(capsys, "plan", *WORDS, "schedule.slots=null")
    assert "there is no schedule 'my_task/prune_first' for this task in this order; " in said
    said = error_of(capsys, "plan", *WORDS, "task.sites.prune_features=[3x]")
    assert "sites.prune_features: the glob '3x' matches none of the network's 6 paths" in said
