"""A newcomer's first commands: the README's in order, in a fresh folder, and what the quick start says of the first."""

import contextlib
import io
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from qprune.cli import main as cli
from tests.docs.pages import DOCS, blocks

# Each command of the README as it is typed there, and patterns of what it prints, in order
FIRST = "qprune run task=espcn data=synthetic budget=smoke"
PRINTED = {
    FIRST: [
        r"run folder: results/runs/espcn/prune_first-P0\.5wf-Q8wf-seed0-[0-9a-f]{10}",
        r"espcn  P0\.5\(w,f\)->Q8\(w,f\)  seed 0\n  psnr \d+\.\d\d dB, 3\.0 times smaller: 35\.5 of 107 Mb",
    ],
    "qprune report": [r"1 run below results/runs: drawing the figures\nreport: results/runs/report\.html\n"],
    "qprune export RUN": [r"export/\S+\.onnx: 0\.\d+ MB"],
    "qprune verify RUN": [r"equal to .*: [\d,]+ of [\d,]+ outputs differ"],
    "qprune export RUN --form sparse": [r"export/\S+: 0\.\d+ MB"],
}


@dataclass(frozen=True)
class Typed:
    """A folder, and what the README's first command printed there."""

    folder: Path
    printed: str

    def command(self, line: str) -> str:
        """Carry out a command in the folder, and return what it prints."""
        with (
            contextlib.chdir(self.folder),
            contextlib.redirect_stdout(io.StringIO()) as out,
            contextlib.redirect_stderr(io.StringIO()) as err,
        ):
            code = cli.main(line.split()[1:])
        assert (code, err.getvalue()) == (0, ""), line
        return out.getvalue()


@pytest.fixture(scope="module")
def typed(tmp_path_factory: pytest.TempPathFactory) -> Typed:
    folder = tmp_path_factory.mktemp("new")
    return Typed(folder, Typed(folder, "").command(FIRST))


def commands() -> list[str]:
    """Return the lines of the README's fenced blocks that are typed in a shell."""
    return [re.sub(r"\s+#.*", "", line) for block in blocks("../README", "") for line in block.text.splitlines()]


def test_every_command_of_the_readme_prints_what_it_should(typed: Typed) -> None:
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    install, *lines = commands()
    assert install == "pip install '.[report,export]'"  # done already: the tests run in it
    assert lines == list(PRINTED)
    [run] = typed.folder.glob("results/runs/espcn/*")
    for line in lines:
        # RUN is a run folder, or six digits of its signature
        named = run.name.split("-")[-1][:6] if "verify" in line else str(run)
        rest = typed.printed if line == FIRST else typed.command(line.replace("RUN", named))
        for pattern in PRINTED[line]:
            found = re.search(pattern, rest)
            assert found, f"{line}: {pattern!r} is not in\n{rest}"
            rest = rest[found.end() :]
    assert [path.name for path in typed.folder.iterdir()] == ["results"]  # nothing beside the results


def test_the_quick_start(typed: Typed) -> None:
    command = blocks("quickstart", "")[0].text.splitlines()[1]
    assert command == f"{FIRST} order=prune_first"  # which is the default
    plan, row, files = (block.text for block in blocks("quickstart", "text"))

    def figures_aside(text: str) -> list[str]:
        """Lines without spaces at the end, and without scores, which differ from machine to machine."""
        lines = [re.sub(r"psnr(_db)? [\d.]+|[\d.]+ dB/ln\(Mb\)", "", line) for line in text.strip().splitlines()]
        learned = ("  with masks", "  cost", "  sums")
        return [re.sub(r"(?<= )\d[\d.]*", "#", line) if line.startswith(learned) else line.rstrip() for line in lines]

    for text in (plan, row):
        assert "\n".join(figures_aside(text)) in "\n".join(figures_aside(typed.printed))
    (stored,) = typed.folder.glob("results/runs/espcn/*")
    folder, *names = (line.split()[0] for line in files.strip().splitlines())
    assert folder == f"{stored.relative_to(typed.folder)}/"
    assert {*names} <= {path.name for path in stored.iterdir()}


def test_every_command_in_the_text_is_one_of_qprune() -> None:
    text = re.sub(r"```.*?```", "", (DOCS.parent / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    verbs = re.findall(r"`qprune ([^`\s]+)", text)
    assert len(verbs) >= 5
    assert {*verbs} <= {*cli.VERBS, "--help"}
