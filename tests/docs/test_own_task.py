"""The tutorial on a task of one's own, typed as it says, in a folder outside the repository."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.docs.pages import blocks

PAGE = "own-task"
SETTINGS = "export PYTHONPATH=$PWD QPRUNE_TRUST=my_task"
ORDERS = ("baseline", "prune_only", "quantize_only", "prune_first", "quantize_first")


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


def test_the_tutorial_as_it_is_typed(folder: Path) -> None:
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

    done = typed(folder, f"{SETTINGS}\n{then}")
    assert done.returncode == 0, done.stderr
    assert "finished before: results/runs/my_task/prune_first" in done.stdout
    assert "4 runs: 4 finished, 0 failed" in done.stdout
    assert len(list(folder.glob("results/runs/my_task/*/result.json"))) == 6


def test_a_schedule_of_an_order_takes_the_place_of_the_slots(folder: Path) -> None:
    (block,) = blocks(PAGE, "yaml")
    path = folder / block.caption
    path.parent.mkdir(parents=True)
    path.write_text(block.text, encoding="utf-8")
    done = typed(folder, f"{SETTINGS}\nqprune run --config-dir configs task=my_task --cfg job")
    path.unlink()
    assert done.returncode == 0, done.stderr
    schedule = yaml.safe_load(done.stdout)["schedule"]
    assert (schedule["t_p"], schedule["slots"]) == (8, None)


def test_every_error_of_the_page_is_met(folder: Path) -> None:
    plan = "qprune plan --config-dir configs task=my_task"
    no_path = typed(folder, f"{SETTINGS}; unset PYTHONPATH; qprune run --config-dir configs task=my_task epochs=21")
    assert no_path.returncode == 2
    assert "task._target_=my_task.MyTask cannot be imported" in no_path.stderr
    no_schedule = typed(folder, f"{SETTINGS}\n{plan} schedule.slots=null")
    assert no_schedule.returncode == 2
    assert "there is no schedule 'my_task/prune_first' for this task in this order; " in no_schedule.stderr
    no_site = typed(folder, f"{SETTINGS}\n{plan} 'task.sites.prune_features=[3x]'")
    assert no_site.returncode == 2
    assert "sites.prune_features: the glob '3x' matches none of the network's 6 paths" in no_site.stderr
