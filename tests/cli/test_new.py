"""`qprune new task NAME`: the files, and that their own test passes."""

import sys
from pathlib import Path

import pytest

from qprune.cli import main as cli
from tests.cli.errors import error_of
from tests.cli.shell import command

WRITTEN = ["configs/task/two_arms.yaml", "test_two_arms.py", "two_arms.py"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    assert cli.main(["new", "task", "two_arms", "--folder", str(tmp_path)]) == 0
    return tmp_path


def test_it_writes_a_task_its_config_and_its_test(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new"
    assert cli.main(["new", "task", "two_arms", "--folder", str(folder)]) == 0
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*")) == WRITTEN
    printed = capsys.readouterr().out
    assert all(f"{folder / name}: " in printed for name in WRITTEN)
    assert printed.endswith(
        f"to run it:\n  cd {folder}\n  export PYTHONPATH=$PWD QPRUNE_TRUST=two_arms\n"
        "  qprune run --config-dir configs task=two_arms\n"
    )
    text = "".join((folder / name).read_text() for name in WRITTEN)
    assert "class TwoArms(Task)" in text
    assert "my_task" not in text.lower()


def test_its_own_test_passes_which_trains_it_in_all_five_orders(folder: Path) -> None:
    done = command(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_two_arms.py", folder=folder)
    assert done.returncode == 0, done.stdout
    assert "5 passed" in done.stdout


def test_it_replaces_nothing_and_takes_no_name_that_is_taken(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    before = (folder / "two_arms.py").read_bytes()
    assert "would be replaced; choose another name" in error_of(
        capsys, "new", "task", "two_arms", "--folder", str(folder)
    )
    assert (folder / "two_arms.py").read_bytes() == before
    assert error_of(capsys, "new", "task", "cifar") == "cifar is a task of qprune; choose another name"
    assert error_of(capsys, "new", "task", "torch") == "torch is a module that can be imported; choose another name"
    assert "'My-Task' is no name of a module; type lower-case letters" in error_of(capsys, "new", "task", "My-Task")
    assert "qprune new: WHAT='tsk' is not one of task" in error_of(capsys, "new", "tsk", "two_arms")
