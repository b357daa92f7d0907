"""`qprune evaluate`: the stored score again on the run's own data, and every score of other data."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qprune.cli import main as cli
from tests.cli.errors import error_of


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of espcn on pictures of noise, with two sets to test on."""
    root = tmp_path_factory.mktemp("data")
    for place, name in enumerate(("t91", "set5", "set14")):
        (root / name).mkdir()
        for index in range(2):
            pixels = np.random.default_rng([place, index]).integers(0, 256, (60, 63, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    keys = ["task=espcn", "order=quantize_only", "budget=smoke", "budget.batch_size=1", "prune.window=2"]
    runs = root / "runs"
    assert cli.main(["run", *keys, "trainer.threads=1", f"data.root={root}", f"results_dir={runs}"]) == 0
    [folder] = runs.glob("espcn/*")
    return folder


def scores(run: Path, capsys: pytest.CaptureFixture[str], *keys: str) -> dict[str, list[str]]:
    capsys.readouterr()
    assert cli.main(["evaluate", str(run), *keys]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    return {line[0]: line[1:] for line in lines if line[0].startswith("psnr_db")}


def test_the_stored_score_comes_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(run.rglob("*"))
    [[now, stored]] = scores(run, capsys).values()
    assert float(now) == pytest.approx(float(stored), abs=1e-4)
    assert sorted(run.rglob("*")) == before


def test_every_set_is_scored(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [[own, _]] = scores(run, capsys).values()
    [[other, stored]] = scores(run, capsys, "task.test_folder=set14").values()
    assert (own, other) == (stored, other)
    assert other != stored
    assert cli.main(["evaluate", "task.test_folder=set14", str(run)]) == 0  # keys may come first
    assert other in capsys.readouterr().out
    both = scores(run, capsys, "task.further_test_folders=[set14]")
    assert both == {"psnr_db": [own, stored], "psnr_db_set14": [other, "-"]}


def test_a_folder_for_data_that_is_made_in_memory_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ["task=espcn", "order=baseline", "data=synthetic", "budget=smoke", "budget.steps_per_epoch=1"]
    assert cli.main(["run", *keys, "trainer.threads=1", f"results_dir={tmp_path}"]) == 0
    [folder] = tmp_path.glob("espcn/*")
    capsys.readouterr()
    assert cli.main(["evaluate", str(folder), "task.test_folder=set14"]) == 2
    text = "the run was trained on synthetic data, which is made in memory; leave the key out"
    assert capsys.readouterr().err == f"error: task.test_folder=set14: {text}\n"


def test_marks_of_the_data_are_printed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert cli.main(["evaluate", str(run)]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith("not comparable with the paper: ")
    assert "; test images: not those of the published Set5; " in last


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("task.patch=9", "'task.patch=9' is not KEY=VALUE with one of results_dir, data.root, data.verify, "),
        ("task.test_folder=nowhere", "there is no folder "),
    ],
)
def test_bad_input(word: str, said: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert error_of(capsys, "evaluate", str(run), word).startswith(said)
