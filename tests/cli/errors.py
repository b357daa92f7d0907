"""Bad input and failing runs: what tests ask of the command line's answer to them."""

import pytest

from qprune.cli import main as cli
from qprune.config.schema import RunConfig
from qprune.runs import execute as runner


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a command that the user got wrong."""
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err.removeprefix("error: ").rstrip("\n")


def fails_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run raises this error."""

    def execute(cfg: RunConfig, wait: bool = False) -> None:
        raise error

    monkeypatch.setattr(runner, "execute", execute)
