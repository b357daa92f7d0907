"""Published rows: what is copied, what is not, and how they stand beside one's own."""

import json
import runpy
import subprocess
from pathlib import Path

import pytest
import yaml

from qprune.atomic_write import write_json
from qprune.config.compose import Composer
from qprune.errors import UserError
from qprune.runs.row import Row
from qprune.runs.store import Store
from tests.reporting.rows import store_row

SCRIPT = Path(__file__).parents[2] / "scripts" / "publish_results.py"
names = runpy.run_path(str(SCRIPT))
publish = names["publish"]


def runs_of(folder: Path, *seeds: int) -> list[Row]:
    with Composer() as composer:
        words = ["task=espcn", f"data.root={folder}/files"]
        rows = [store_row(composer, [*words, f"seed={seed}"], folder) for seed in seeds]
    for path in folder.rglob("config.yaml"):
        environment = {"command": ["qprune run", *words, f"results_dir={folder}"]}
        write_json(path.parent / "environment.json", environment)
        (path.parent / "network.safetensors").write_bytes(b"weights")
        (path.parent / "pictures").mkdir()
        (path.parent / "pictures" / "test.png").write_bytes(b"png")
        (path.parent / "metrics.csv").write_text("epoch,psnr_db\n1,30.0\n")
    return rows


def store_folder(folder: Path, row: Row) -> Path:
    return next(path.parent for path in folder.rglob("result.json") if row.signature in path.read_text())


def test_a_published_row_is_light_and_tells_no_folder_of_the_machine(tmp_path: Path) -> None:
    rows = runs_of(tmp_path / "runs", 0, 1)
    folder, new, problems = publish(tmp_path / "runs")
    assert (folder, len(new), problems) == (tmp_path / "published", 2, [])
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert {path.name for path in files} == {
        *("result.json", "config.yaml", "environment.json", "metrics.csv", "test.png", "SHA256SUMS")
    }
    for row in rows:
        place, command = store_folder(folder, row), ["sha256sum", "-c", "SHA256SUMS"]
        done = subprocess.run(command, cwd=place, capture_output=True, check=False)
        summed = {path.name for path in files if path.parts[1] == place.name} - {"SHA256SUMS"}
        assert {line.split(":")[0].rpartition("/")[2] for line in done.stdout.decode().splitlines()} == summed
        assert done.stdout.count(b": OK\n") == len(summed)
    assert [path.parts[1].split("-seed")[1][0] for path in files if path.name == "test.png"] == ["0"]
    for path in files:
        assert str(tmp_path) not in (folder / path).read_text(), path
    environment = json.loads(next(folder.rglob("environment.json")).read_bytes())
    assert environment["command"] == ["qprune run", "task=espcn"]
    assert yaml.safe_load(next(folder.rglob("config.yaml")).read_text())["data"]["root"] == "data"
    store = Store.read(tmp_path / "none")
    store.check(list(store.rows))
    assert set(store.rows) == {row.signature for row in rows}
    assert store.problems == []


def test_published_rows_count_where_no_own_ones_are(tmp_path: Path) -> None:
    first, second = runs_of(tmp_path / "runs", 0, 1)
    publish(tmp_path / "runs")
    for path in (tmp_path / "runs").rglob("result.json"):
        if json.loads(path.read_bytes())["seed"] == 1:
            path.unlink()
    store = Store.read(tmp_path / "runs")
    assert store.problems == []
    assert store.folders[first.signature].path.is_relative_to(tmp_path / "runs")
    assert store.folders[second.signature].path.is_relative_to(tmp_path / "published")
    (tmp_path / "runs").rename(tmp_path / "gone")
    assert len(Store.read(tmp_path / "runs").rows) == 2
    assert publish(tmp_path / "gone")[1] == []
    with pytest.raises(UserError, match="there is no folder"):
        Store.read(tmp_path / "gone" / "runs")


def test_a_published_row_that_was_edited_is_named(tmp_path: Path) -> None:
    (row,) = runs_of(tmp_path / "runs", 0)
    folder, _, _ = publish(tmp_path / "runs")
    path = store_folder(folder, row) / "result.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    store = Store.read(tmp_path / "none")
    assert store.rows == {}
    assert "SHA256SUMS" in store.problems[0]


def test_a_row_that_was_edited_is_not_published(tmp_path: Path) -> None:
    runs_of(tmp_path / "runs", 0)
    path = next((tmp_path / "runs").rglob("metrics.csv"))
    path.write_text("epoch,psnr_db\n1,29.0\n")
    _, new, problems = publish(tmp_path / "runs")
    assert new == []
    assert len(problems) == 1
    assert "the score is 30, and metrics.csv ends with 29" in problems[0]


def test_the_script_says_what_is_new(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs_of(tmp_path / "runs", 0)
    assert names["main"]([str(tmp_path / "runs")]) == 0
    assert capsys.readouterr().out == f"1 new rows in {tmp_path / 'published'}\n"
