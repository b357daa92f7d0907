"""Shell completion, in a real shell."""

import os
import shutil
from pathlib import Path

import pytest

from tests.cli.shell import command


@pytest.mark.skipif(os.name == "nt" or shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("line", "completions"),
    [
        ("qprune pl", ["plan"]),
        ("qprune run ord", ["order.", "order="]),
        (
            "qprune run order=qu",
            ["quantize_first", "quantize_only", "quantize_only_late"],
        ),  # readline replaces what follows '='
        ("qprune sweep task=espcn quantize.bi", ["quantize.bits="]),
        ("qprune frontier bits=4,8 max_", ["max_loss=", "max_size="]),
        ("qprune frontier bits=4,8 quantize.bi", ["quantize.bits="]),
        ("qprune sweep task=espcn +sweep=table", ["table2", "table3", "table4", "table6"]),
        ("qprune plan +sweep=table4 quantize.bi", ["quantize.bits="]),
        ("qprune tables 1 v", ["variants"]),
        ("qprune list bu", ["budgets"]),
        ("qprune list sw", ["sweeps"]),
        ("qprune completion z", ["zsh"]),
    ],
)
def test_bash_completes(tmp_path: Path, line: str, completions: list[str]) -> None:
    script = """
        eval "$(qprune completion bash)"
        COMP_LINE="$1" COMP_POINT=${#1}
        _qprune
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    done = command("bash", "--norc", "-c", script, "bash", line, folder=tmp_path)
    assert done.stderr == ""
    assert done.stdout.split() == completions
