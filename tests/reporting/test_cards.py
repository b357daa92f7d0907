"""Results cards and the completeness list: every figure is that of the rows, and CITATION.cff is well formed."""

import json
import runpy
from pathlib import Path

import pytest
import yaml

pytest.importorskip("matplotlib")

from qprune.atomic_write import write_json
from qprune.config.compose import Composer
from tests.reporting.rows import store_row

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_cards_say_what_was_run_with_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Composer() as composer:
        for seed, score in ((0, 31.0), (1, 33.0)):
            words = ["task=espcn", "order=baseline", f"seed={seed}"]
            row = store_row(composer, words, tmp_path / "published", score=score, arithmetic=2)
            [folder] = (tmp_path / "published").glob(f"espcn/*{row.signature[:10]}")
            git = {"commit": COMMIT, "changed": seed == 1}
            note = {"git": git, "command": ["qprune run", *words], "packages": {"torch": "2.14.1"}}
            write_json(folder / "environment.json", note | {"dataset": {"train": "ab", "test": "cd"}})
            write_json(folder / "timing.json", {"training_seconds": 1800.0})
        store_row(
            composer, ["task=espcn", "order=baseline", "seed=2"], tmp_path / "published", score=40.0, arithmetic=1
        )
    assert runpy.run_path(str(ROOT / "scripts" / "write_cards.py"))["main"]([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"1 card in {tmp_path / 'cards'}"
    card = (tmp_path / "cards" / "espcn.md").read_text()
    assert (
        "| `Baseline, arithmetic version 1` | paper, real | 1 | psnr 40.00 dB | 1 |" in card
    )  # versions of the arithmetic are never averaged
    assert "| `Baseline` | paper, real | 2 | psnr 32.00 dB ± 1.4 | 2 |" in card
    assert "- `qprune run order=baseline task=espcn`\n" in card
    found = json.loads((tmp_path / "completeness.json").read_text())["tasks"]["espcn"]
    assert (found["rows"], found["rows_from_changed_trees"], found["training_hours"]) == (3, 2, 1.0)
    assert found["commits"] == {COMMIT: 2, "unknown": 1}
    assert found["data"] == {"test": "cd", "train": "ab"}


def test_the_citation_has_what_its_format_asks_for() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0"
    assert all("title" in each and each["authors"] for each in citation["references"])
