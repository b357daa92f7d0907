"""Shell completion: in a real shell, and what the shell is answered."""

import os
import shutil
from pathlib import Path

import pytest

from qprune.cli import main as cli
from tests.cli.shell import command


@pytest.mark.skipif(os.name == "nt" or shutil.which("bash") is None, reason="needs bash")
def test_bash_completes(tmp_path: Path) -> None:
    script = """
        eval "$(qprune completion bash)"
        for COMP_LINE in "qprune pl" "qprune run order=quantize_f"; do
            COMP_POINT=${#COMP_LINE}
            _qprune
            printf '%s\\n' "${COMPREPLY[@]}"
        done
    """
    done = command("bash", "--norc", "-c", script, folder=tmp_path)
    assert done.stderr == ""
    assert done.stdout.split() == ["plan", "quantize_first"]  # readline replaces what follows '='


@pytest.mark.parametrize(
    ("line", "completions"),
    [
        ("run ord", ["order.", "order="]),
        ("run order=qu", ["order=quantize_first", "order=quantize_only", "order=quantize_only_late"]),
        ("sweep task=espcn quantize.bi", ["quantize.bits="]),
        ("frontier bits=4,8 max_", ["max_loss=", "max_size="]),
        ("frontier bits=4,8 quantize.bi", ["quantize.bits="]),
        ("sweep task=espcn +sweep=table", [f"+sweep=table{number}" for number in (2, 3, 4, 6)]),
        ("plan +sweep=table4 quantize.bi", ["quantize.bits="]),
        ("tables 1 v", ["variants"]),
        ("list bu", ["budgets"]),
        ("list sw", ["sweeps"]),
        ("completion z", ["zsh"]),
    ],
)
def test_a_shell_is_answered(line: str, completions: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "query", f"qprune {line}"]) == 0
    word = line.split()[-1]
    assert [each for each in capsys.readouterr().out.split() if each.startswith(word)] == completions
