"""A finished or interrupted run answers for its own data alone."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qprune.cli import main as cli
from tests.cli.errors import error_of


def pictures(root: Path, seed: int) -> Path:
    """Write two training pictures and a test picture of random pixels."""
    random = np.random.default_rng(seed)
    for name in ("t91/a.png", "t91/b.png", "set5/c.png"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (120, 120, 3), dtype=np.uint8)).save(path)
    return root


def test_a_finished_run_is_refused_for_other_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = ["task=espcn", "order=baseline", "budget=smoke", "budget.steps_per_epoch=2", "budget.batch_size=2"]
    keys += ["trainer.threads=1", f"results_dir={tmp_path / 'runs'}"]
    first, second = pictures(tmp_path / "first", seed=1), pictures(tmp_path / "second", seed=2)
    assert cli.main(["run", *keys, f"data.root={first}"]) == 0
    (folder,) = (tmp_path / "runs" / "espcn").iterdir()
    row = (folder / "result.json").read_bytes()
    shutil.copytree(first, tmp_path / "copy")
    capsys.readouterr()
    assert cli.main(["run", *keys, f"data.root={tmp_path / 'copy'}"]) == 0  # the same pictures in another place
    assert f"finished before: {folder}" in capsys.readouterr().out
    message = error_of(capsys, "run", *keys, f"data.root={second}")
    assert message == (
        f"{folder} is of other data: test and train of data.root are not what the run was trained on (checksums in "
        "environment.json); set data.root=FOLDER to that data, or type force=true to train again"
    )
    (tmp_path / "empty").mkdir()
    message = error_of(capsys, "run", *keys, f"data.root={tmp_path / 'empty'}")
    assert message.startswith(f"{folder} is finished, and its data cannot be compared: there is no folder")
    assert message.endswith("its row is shown by: qprune list runs")
    assert (folder / "result.json").read_bytes() == row

    (folder / "result.json").unlink()  # as if it had been interrupted after its checkpoint
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step-000000001-0123456789abcdef.pt").write_bytes(b"")
    assert "is of other data" in error_of(capsys, "run", *keys, f"data.root={second}")
    assert json.loads((folder / "environment.json").read_text())["dataset"].keys() == {"train", "test"}
    assert cli.main(["run", *keys, f"data.root={second}", "force=true"]) == 0
    assert (folder / "result.json").read_bytes() != row
