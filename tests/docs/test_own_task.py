"""The tutorial on a task of one's own, typed as it says, in a folder outside the repository."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import blocks

PAGE = "own-task"
SETTINGS = "export PYTHONPATH=$PWD QPRUNE_TRUST=spirals"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the tutorial's files."""
    place = tmp_path_factory.mktemp("outside") / "spirals"
    files = [block for language in ("python", "yaml") for block in blocks(PAGE, language)]
    for block in files:
        path = place / block.caption
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text, encoding="utf-8")
    (tree,) = (block.text for block in blocks(PAGE, "text") if block.text.startswith("spirals/"))
    told = {line.strip() for line in tree.splitlines()[1:]}
    assert told == {block.caption for block in files}
    return place


def typed(folder: Path, commands: str) -> subprocess.CompletedProcess[str]:
    """What a shell says to these lines, typed in the folder."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands], cwd=folder, env=environment, text=True, capture_output=True
    )


def test_the_tutorial_as_it_is_typed(folder: Path) -> None:
    first, then = (block.text for block in blocks(PAGE, "sh") if "only-shown" not in block.options)
    assert first.startswith(SETTINGS)
    done = typed(folder, first)
    assert done.returncode == 0, done.stderr
    assert "plan: 3 weight quantizers, 1 weight pruners, 3 feature quantizers, 1 feature pruners" in done.stdout
    (row_text,) = (b.text.strip() for b in blocks(PAGE, "text") if b.text.startswith("spirals  "))
    assert row_text in done.stdout
    (stored,) = folder.glob("results/runs/spirals/*/result.json")
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
    assert "finished before: results/runs/spirals/prune_first" in done.stdout
    assert "3 runs: 3 finished, 0 failed" in done.stdout
    assert len(list(folder.glob("results/runs/spirals/*/result.json"))) == 5


def test_what_may_go_wrong_is_what_goes_wrong(folder: Path) -> None:
    text = Path(folder / "configs/task/spirals.yaml").read_text()
    run = "qprune run --config-dir configs task=spirals"
    no_path = typed(folder, f"{SETTINGS}; unset PYTHONPATH; {run} order=prune_first epochs=21")
    assert no_path.returncode == 2
    assert "task._target_=spirals.Spirals cannot be imported" in no_path.stderr
    no_schedule = typed(folder, f"{run} order=quantize_first")
    assert no_schedule.returncode == 2
    assert "there is no schedule 'spirals/quantize_first' for this task in this order; write" in no_schedule.stderr
    assert "prune_features" in text
    plan = "qprune plan --config-dir configs task=spirals order=prune_first 'task.sites.prune_features=[3x]'"
    no_site = typed(folder, f"{SETTINGS}\n{plan}")
    assert no_site.returncode == 2
    assert "sites.prune_features: the glob '3x' matches none of the network's 6 paths" in no_site.stderr
