"""A newcomer's script: the README's commands in order, in a fresh folder, with what each must print."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cli.shell import command

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
# Each command of the README as it is typed there, and patterns of what it prints, in order
PRINTED = {
    "qprune run task=espcn data=synthetic budget=smoke": [
        r"run folder: results/runs/espcn/prune_first-P0\.5wf-Q8wf-seed0-[0-9a-f]{10}",
        r"espcn  P0\.5\(w,f\)->Q8\(w,f\)  seed 0  psnr_db \d+",
    ],
    "qprune report": [r"report: (\S+)"],
    "qprune export RUN": [r"integer\.onnx: 0\.\d+ MB"],
    "qprune verify RUN": [r"yes, all \d+ outputs"],
    "qprune export RUN --to sparse": [r"0\.\d+ MB"],
}


def commands() -> list[str]:
    """Return the lines of the README's fenced blocks that are typed in a shell."""
    blocks = re.findall(r"^```\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    return [re.sub(r"\s+#.*", "", line) for block in blocks for line in block.splitlines()]


def test_every_command_of_the_readme_prints_what_it_should(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    install, *typed = commands()
    assert install == "pip install '.[report,export]'"  # done already: the tests run in it
    assert typed == list(PRINTED)
    for line in typed:
        (run,) = tmp_path.glob("results/runs/espcn/*") if "RUN" in line else (Path(),)
        done = command(
            *line.replace("RUN", str(run.relative_to(tmp_path) if "RUN" in line else "")).split(), folder=tmp_path
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        assert done.stderr == ""
        rest = done.stdout
        for pattern in PRINTED[line]:
            found = re.search(pattern, rest)
            assert found, f"{line}: {pattern!r} is not in\n{rest}"
            rest = rest[found.end() :]
    assert not [path for path in tmp_path.iterdir() if path.name != "results"]  # nothing beside the results
