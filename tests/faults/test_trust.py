"""Code that a config names does not run unless the user said so: tasks, and what Hydra and logging would call."""

import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from qprune.cli import main as cli
from qprune.config.build import Recipe
from qprune.errors import UserError
from qprune.training.setup import build_task
from tests.faults.recipes import config_of, small

STRANGER = """\
from pathlib import Path

Path(r"{called}").touch()

from qprune.tasks.espcn import Espcn


class Mine(Espcn):
    pass
"""


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of a task that leaves a file when it is imported; returns that file."""
    called = tmp_path / "called"
    (tmp_path / "strange_tasks.py").write_text(STRANGER.format(called=called))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("QPRUNE_TRUST", raising=False)
    monkeypatch.delitem(__import__("sys").modules, "strange_tasks", raising=False)
    return called


PLAN = ("plan", "task=espcn", "data=synthetic", "budget=smoke", "task._target_=strange_tasks.Mine")


def test_a_task_of_another_package_is_refused(stranger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(PLAN) == 2
    assert capsys.readouterr().err == (
        "error: task._target_=strange_tasks.Mine is code outside qprune, and a run would execute it; if you trust the "
        "package strange_tasks, add --trust strange_tasks to the command, or for good: export "
        "QPRUNE_TRUST=strange_tasks\n"
    )
    assert not stranger.exists()


@pytest.mark.parametrize("how", ["flag", "flag=", "environment"])
def test_a_user_may_trust_it(
    how: str, stranger: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"flag": ["--trust", "strange_tasks"], "flag=": ["--trust=other,strange_tasks"], "environment": []}[how]
    if how == "environment":
        monkeypatch.setenv("QPRUNE_TRUST", "other, strange_tasks")
    assert cli.main([*PLAN, *flags]) == 0
    assert "P0.5(w,f)->Q8(w,f)" in capsys.readouterr().out
    assert stranger.exists()


def test_a_trusted_name_covers_no_longer_one(stranger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QPRUNE_TRUST", "strange,strange_tasks.inner")
    assert cli.main(PLAN) == 2
    assert not stranger.exists()


def test_a_package_that_is_none_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--trust"], ["--trust", "a b"]):
        assert cli.main(["list", *words]) == 2
        assert "is not a package; type for example --trust my_tasks" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["", "Mine", "os..system", "qprune.tasks", "qprune.tasks.espcn.Espcn()", None, 3])
def test_what_is_no_path_of_a_class_is_named(target: object) -> None:
    config = config_of(*small("espcn"))
    config["task"]["_target_"] = target
    with pytest.raises(UserError, match="task._target_="):
        build_task(Recipe.from_config(config))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hydra: {callbacks: {x: {_target_: strange_tasks.Mine}}}", "hydra.callbacks.x._target_=strange_tasks.Mine is"),
        ("hydra: {job_logging: {handlers: {x: {class: strange_tasks.Mine}}}}", "x.class=strange_tasks.Mine is"),
        ("hydra: {job_logging: {handlers: {x: {(): strange_tasks.Mine}}}}", "handlers.x.()=strange_tasks.Mine is"),
        (
            "hydra: {hydra_logging: {handlers: {x: {stream: 'ext://strange_tasks.Mine'}}}}",
            "handlers.x.stream=ext://strange_tasks.Mine names an object of this process",
        ),
    ],
)
@pytest.mark.parametrize("verb", ["run", "plan"])
def test_hydra_calls_nothing_that_a_stranger_s_config_names(
    verb: str, text: str, said: str, stranger: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "configs" / "budget").mkdir(parents=True)
    path = tmp_path / "configs" / "budget" / "evil.yaml"
    path.write_text(f"# @package _global_\nbudget: {{name: evil}}\n{text}\n")
    assert cli.main([verb, "--config-dir", str(tmp_path / "configs"), "task=espcn", "budget=evil"]) == 2
    assert said in capsys.readouterr().err
    assert not stranger.exists()
    assert OmegaConf.load(path)
    assert os.environ.get("QPRUNE_TRUST") is None
