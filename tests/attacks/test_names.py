"""Names that a terminal, a plot, HTML, LaTeX, Markdown or a spreadsheet would read as markup: they are only shown."""

import csv
import io
import json
import random
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from safetensors.numpy import save_file

from qprune.atomic_write import csv_bytes
from qprune.errors import visible
from qprune.reporting import figures, table_text, tables
from qprune.reporting.report import figures_of_run, figures_of_runs
from qprune.reporting.table_text import print_table
from qprune.runs.row import Row
from qprune.runs.store import Store
from qprune.training.progress import print_text
from tests.attacks import hostile
from tests.attacks.conftest import TRIALS, Answer, Attacks, LostRowError, SilentDifferenceError, verb
from tests.reporting.rows import FIELDS


def only_shown(answer: Answer) -> Answer:
    """Return an answer in which nothing acts on a terminal."""
    for text in (answer.out, answer.err):
        if not text.replace("\n", "").isprintable():
            raise SilentDifferenceError(repr(text))
    return answer


def renamed(draw: random.Random, runs: list[Path], place: Path) -> tuple[Path, list[str]]:
    """Copy the runs to where folders, marks, metrics and sites have drawn names; return folder and the run's names."""
    shutil.rmtree(place, ignore_errors=True)
    results = place / hostile.name(draw) / "runs"
    names = []
    for number, copy in enumerate(hostile.copied(runs, results)):
        row = hostile.row_of(copy)
        texts = [hostile.name(draw, path=False).encode(errors="replace").decode() for _ in range(8)]
        row |= {"notation": texts[0], "marks": texts[1:3], "density_unit": texts[3], "metrics": {texts[4]: 1.0}}
        if draw.random() < 0.5:
            (copy / "metrics.csv").unlink()
            row["metric"] = texts[5]
        (copy / "result.json").write_text(json.dumps(row), encoding="utf-8")
        operators = json.loads((copy / "operators.json").read_bytes())
        histograms = json.loads((copy / "histograms.json").read_bytes())
        for each in (*operators, *histograms):
            each["site"] = draw.choice(texts)
        (copy / "operators.json").write_text(json.dumps(operators), encoding="utf-8")
        (copy / "histograms.json").write_text(json.dumps(histograms), encoding="utf-8")
        picture = hostile.name(draw)[:20]
        (copy / "pictures" / "test.png").rename(copy / "pictures" / f"{picture}.png")
        masks = {f"{texts[6]}.output_operators.pruner.mask": np.ones((2, 3, 4), np.float32)}
        save_file(masks, copy / "network.safetensors")
        named = copy.with_name(f"{hostile.name(draw)[:30]}-{number}")
        copy.rename(named)
        (named / "SHA256SUMS").unlink()
        names.append(f"{named.parent.name}/{named.name}")
    return results, names


def test_a_terminal_shows_names_and_acts_on_none(
    attacks: Attacks, runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trial(draw: random.Random) -> None:
        results, names = renamed(draw, runs, tmp_path / "place")
        monkeypatch.chdir(results.parent)
        what = draw.choice(("list", "list", "tables", "evaluate", "export"))
        if what == "list":
            answer = only_shown(verb("list", "runs", "results_dir=runs"))
            # a name that is wider than its column is folded
            flat = "".join(answer.out.split())
            for name in names if answer.code == 0 else ():
                if max(map(len, names)) < 60 and "".join(visible(name).split()) not in flat:
                    raise LostRowError(f"{name!r} is not in {answer.out}")
        elif what == "tables":
            only_shown(verb("tables", "order", "results_dir=runs"))
        else:
            only_shown(verb(what, f"runs/{names[0]}", *(("--form", "sparse") if what == "export" else ())))

    attacks.run("name: terminal", trial, 2 * TRIALS)


def test_text_is_printed_as_it_is(attacks: Attacks, capsys: pytest.CaptureFixture[str]) -> None:
    def trial(draw: random.Random) -> None:
        text = hostile.name(draw, path=False)
        print_text(text)
        assert capsys.readouterr().out == f"{visible(text)}\n"
        if text.isprintable() and visible(text) != text:
            raise SilentDifferenceError(text)
        assert visible(text).isprintable()

    attacks.run("name: a line", trial, 2 * TRIALS)


class _Page(HTMLParser):
    """Counts the elements and attributes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not any(name.startswith("on") for name, _ in attrs), attrs
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_a_report_shows_names(
    attacks: Attacks, runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    legal = set()

    def tags_of(path: Path) -> set[str]:
        page = _Page()
        page.feed(path.read_text(encoding="utf-8"))
        assert page.tags.count("script") == 2
        return set(page.tags)

    hostile.copied(runs, tmp_path / "plain")
    verb("report", f"results_dir={tmp_path / 'plain'}", "--runs", "0")
    legal |= tags_of(tmp_path / "plain" / "report.html") | {"details", "summary", "span", "ul", "li"}

    def trial(draw: random.Random) -> None:
        results, _ = renamed(draw, runs, tmp_path / "place")
        monkeypatch.chdir(results.parent)
        answer = only_shown(verb("report", "results_dir=runs", "--runs", "1"))
        if tags_of(results / "report.html") - legal:
            raise SilentDifferenceError(f"{tags_of(results / 'report.html') - legal}")
        for path in (results / "figures").glob("*.svg"):
            ElementTree.parse(path)
        assert "2 runs below" in answer.out

    attacks.run("name: report", trial, -(-TRIALS // 10))


def test_a_plot_shows_names(attacks: Attacks, tmp_path: Path) -> None:
    def trial(draw: random.Random) -> None:
        text = hostile.name(draw, path=False)
        operators = [{"site": text, "kind": "weight", "operator": "quantize", "decimals": [3]}]
        table = pd.DataFrame(
            [(text, "a", 1.0, 2.0), ("b", "b", 2.0, 1.0)], columns=["recipe", "order", "score", "density"]
        )
        row = Row(**FIELDS | {"notation": text})
        windows = pd.DataFrame([(1, text, 1.0), (2, text, 2.0)], columns=["window", "recipe", "score"])
        figure = draw.choice(
            (
                lambda: figures.fraction_bits(operators, row),
                lambda: figures.density_against_score(table, "espcn", text, True, text),
                lambda: figures.score_by_window(windows, text, "x"),
                lambda: figures.feature_masks({text: np.ones((2, 3, 4))}),
                lambda: figures.side_by_side({text: np.zeros((4, 4, 3), np.uint8)}, text),
            )
        )()
        svg = figures.save(figure, tmp_path, "plot")
        shown = ["".join(element.itertext()) for element in ElementTree.fromstring(svg).iter()]
        expected = figures.plotted(text).replace(r"\$", "$").strip()
        if len(text) < 12 and not any(expected in each for each in shown) and "\n" not in text:
            raise SilentDifferenceError(f"{expected!r} is not in {[each for each in shown if each.strip()][:20]}")

    attacks.run("name: plot", trial, -(-TRIALS // 2))


def joined_of(draw: random.Random) -> tuple[tables.Table, list[pd.DataFrame]]:
    """A table of one part whose texts are drawn."""
    empty = tables.Part(name="p", metric="m", unit="u", density_unit="d", overrides=[])
    columns = list(tables.join(empty, [], Store(Path(), {}, {}, [])).columns)
    labels = [hostile.name(draw, path=False) for _ in range(3)]
    lines = []
    for label in labels:
        marks = [hostile.name(draw, path=False) for _ in range(draw.randint(0, 2))]
        line = dict.fromkeys(columns, 1.0) | {"label": label, "marks": marks, "missing_seeds": [0]}
        texts = {key: hostile.name(draw, path=False) for key in ("part", "metric", "unit", "density_unit", "command")}
        printed = {"printed_score": "1.0", "printed_density": ""}
        lines.append(line | texts | printed | {"best": draw.random() < 0.3, "n": 1})
    part = pd.DataFrame(lines, columns=columns)
    title = hostile.name(draw, path=False).encode(errors="replace").decode()
    return tables.Table(name="x", title=title, parts=[]), [part]


def test_latex_markdown_csv_and_terminal_tables_show_names(attacks: Attacks) -> None:
    def trial(draw: random.Random) -> None:
        table, parts = joined_of(draw)
        text = table_text.latex(table, parts)
        plain = re.sub(r"\\[\\%&$#_{}]|\\\w+\{\}|\$\\(?:to|pm|mid)\$", "", text)
        body = plain.split(r"\midrule")[1].split(r"\bottomrule")[0]
        assert not re.search(r"[%$#~^]|\\(?!\\|text|multicolumn)", body.replace(r"\ ", "")), body
        assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")
        columns = len(table_text.layout(parts)[0])
        for line in (line for line in body.splitlines() if line.endswith(r"\\") and "multicolumn" not in line):
            assert line.count("&") == columns - 1, line
        lines = table_text.markdown(table, parts).splitlines()
        for line in (line for line in lines if line.startswith("|")):
            assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == columns + 1, line
        assert not re.search(r"(?<!\\)[<$]", "\n".join(line for line in lines if not line.startswith("- missing"))), (
            lines
        )
        rows = list(csv.reader(io.StringIO(table_text.csv(parts))))
        assert len({len(row) for row in rows}) == 1
        assert len(rows) == 4
        for cell in (cell for row in rows for cell in row):
            assert not re.match(r"[=+@\t\r]|-(?![\d.])", cell), cell
        printed = io.StringIO()
        print_table(Console(file=printed, width=400), table, parts)
        for label in parts[0]["label"]:
            if visible(label).strip() not in printed.getvalue():
                raise SilentDifferenceError(f"{label!r} is not in {printed.getvalue()}")

    attacks.run("name: LaTeX, Markdown, CSV, table", trial, 2 * TRIALS)


def test_a_spreadsheet_finds_no_formula(attacks: Attacks) -> None:
    def trial(draw: random.Random) -> None:
        texts = [hostile.name(draw, path=False) for _ in range(4)]
        table = pd.DataFrame({"text": texts, "number": [-1.0, 2, float("nan"), 1e9]})
        read = list(csv.reader(io.StringIO(csv_bytes(table).decode())))[1:]
        assert [row[1] for row in read] == ["-1.0", "2.0", "", "1000000000.0"]
        for text, row in zip(texts, read, strict=True):
            assert row[0].removeprefix("'") == visible(text).removeprefix("'"), (row, text)
            assert not row[0].startswith(("=", "+", "-", "@")), row

    attacks.run("name: CSV", trial)


def test_figures_of_renamed_runs_are_drawn(attacks: Attacks, runs: list[Path], tmp_path: Path) -> None:
    def trial(draw: random.Random) -> None:
        results, _ = renamed(draw, runs, tmp_path / "place")
        store = Store.read(results)
        rows = list(store.rows.values())
        pictures = [*figures_of_run(store, rows[0]), *figures_of_runs(store, rows)]
        name, _, figure = draw.choice(pictures)
        figures.save(figure, tmp_path / "figures", name[:80])
        assert store.problems == []
        assert len(pictures) >= 3

    attacks.run("name: figures of runs", trial, -(-TRIALS // 3))
