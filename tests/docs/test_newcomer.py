"""A newcomer's script: the README's commands in order, in a fresh folder, with what each must print."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qprune.cli.main import VERBS
from tests.cli.shell import command
from tests.docs.pages import DOCS, blocks

# Each command of the README as it is typed there, and patterns of what it prints, in order
PRINTED = {
    "qprune run task=espcn data=synthetic budget=smoke": [
        r"run folder: results/runs/espcn/prune_first-P0\.5wf-Q8wf-seed0-[0-9a-f]{10}",
        r"espcn  P0\.5\(w,f\)->Q8\(w,f\)  seed 0\n  psnr \d+\.\d\d dB, 3\.0 times smaller: 35\.5 of 107 Mb",
    ],
    "qprune report": [r"1 run below results/runs: drawing the figures\nreport: results/runs/report\.html\n"],
    "qprune export RUN": [r"export/\S+\.onnx: 0\.\d+ MB"],
    "qprune verify RUN": [r"equal to .*: [\d,]+ of [\d,]+ outputs differ"],
    "qprune export RUN --form sparse": [r"export/\S+: 0\.\d+ MB"],
}


def commands() -> list[str]:
    """Return the lines of the README's fenced blocks that are typed in a shell."""
    return [re.sub(r"\s+#.*", "", line) for block in blocks("../README", "") for line in block.text.splitlines()]


def test_every_command_of_the_readme_prints_what_it_should(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    install, *typed = commands()
    assert install == "pip install '.[report,export]'"  # done already: the tests run in it
    assert typed == list(PRINTED)
    for line in typed:
        # RUN is a run folder, or six digits of its signature
        (run,) = tmp_path.glob("results/runs/espcn/*") if "RUN" in line else (Path(),)
        named = run.name.split("-")[-1][:6] if "verify" in line else str(run)
        words = [named if word == "RUN" else word for word in line.split()]
        done = command(*words, folder=tmp_path, timeout=600)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        assert done.stderr == ""
        rest = done.stdout
        for pattern in PRINTED[line]:
            found = re.search(pattern, rest)
            assert found, f"{line}: {pattern!r} is not in\n{rest}"
            rest = rest[found.end() :]
    assert not [path for path in tmp_path.iterdir() if path.name != "results"]  # nothing beside the results


def test_every_command_in_the_text_is_one_of_qprune() -> None:
    text = re.sub(r"```.*?```", "", (DOCS.parent / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    verbs = re.findall(r"`qprune ([^`\s]+)", text)
    assert len(verbs) >= 5
    assert {*verbs} <= {*VERBS, "--help"}
