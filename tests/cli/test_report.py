"""The report: self-contained, escaped, and in a real browser where this machine has one."""

import base64
import gzip
import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from qprune.cli import main as cli
from qprune.config.compose import Composer
from qprune.reporting.report import summaries
from qprune.runs.folder import ROW_FILE
from qprune.runs.row import Row
from tests.reporting.rows import FIELDS, store_row

CURVE = """epoch,step,phase,weight_sparsity,feature_sparsity,learning_rate,loss,psnr_db
1,16,float,0.0,0.0,0.001,0.08,29.0
2,32,P 2/4,0.4375,0.4375,0.001,0.03,29.5
3,48,"P 4/4 Q(w,f)",0.5,0.5,0.001,0.02,{score}
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six runs of espcn: three orders and two seeds, with curves; one carries a mark that is markup."""
    folder = tmp_path_factory.mktemp("report")
    runs = folder / "runs"
    with Composer() as composer:
        for i, order in enumerate(("baseline", "prune_first", "quantize_first")):
            for seed in range(2):
                score = 30.0 + i + seed / 10
                marks = ["<script>console.error('x')</script>"] if (i, seed) == (0, 0) else []
                words = ["task=espcn", f"order={order}", f"seed={seed}"]
                densities = {"density_actual": 9.0 - i, "density_effective_bops": 4.5 - i if i else None}
                row = store_row(composer, words, runs, score=score, marks=marks, **densities)
                [place] = runs.glob(f"espcn/*{row.signature[:10]}")
                (place / "metrics.csv").write_text(CURVE.format(score=score), encoding="utf-8")
    assert cli.main(["report", f"results_dir={runs}", "task=espcn", "seed=range(5)", "--runs", "4"]) == 0
    return runs / "report.html"


def test_the_page_needs_no_network_and_escapes_what_it_shows(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert "http://" not in text
    assert "https://" not in text
    assert "&lt;script&gt;console.error" in text
    assert text.count("<script>") == 1
    assert "<script>console" not in text
    assert len(list((report.parent / "figures").glob("*.svg"))) == len(list((report.parent / "figures").glob("*.png")))
    for path in (report.parent / "figures").glob("*.svg"):
        assert "<text" in path.read_text(encoding="utf-8"), "text stays text"


def test_the_density_per_bit_operation_stands_beside_that_per_bit_where_runs_have_costs(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    cells = re.findall(r'"density">([^<]*)</td><td data-heading="density per effective BOP">([^<]*)<', text)
    assert sorted(cells) == sorted([("9.00", "")] * 2 + [("8.00", "3.50")] * 2 + [("7.00", "2.50")] * 2)


def test_comparisons_of_too_few_seeds_are_folded(report: Path) -> None:
    before, _, after = report.read_text(encoding="utf-8").partition(
        "<details><summary>1 comparison of fewer than 6 seeds: too few to decide</summary>"
    )
    assert "too few seeds, a verdict needs 6" not in before
    assert "too few seeds, a verdict needs 6" in after.partition("</details>")[0]
    assert "Differences are paired by seed; intervals are 95 % t intervals" in after


def test_every_run_has_its_config_and_the_first_seeds_have_figures(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    packed = re.search(r'id="details">(.*?)</script>', text)[1]
    details = json.loads(gzip.decompress(base64.b64decode(packed)))
    assert [sorted(run["files"])[:1] for run in details.values()] == [["config.yaml"]] * 6
    assert sorted(len(run["figures"]) > 0 for run in details.values()) == [False] * 2 + [True] * 4
    assert all(figure["svg"].startswith("<svg viewBox=") for run in details.values() for figure in run["figures"])
    for run in details.values():
        for figure in run["figures"]:
            assert ("<title>epoch 2: 0.03</title>" in figure["svg"]) == figure["name"].endswith("-curve")
    assert len(text) < 3e6 / 180 * 6 + 3e5  # 180 runs stay below 3 MB
    curves = sorted(path.name for path in (report.parent / "figures").glob("*-curve.svg"))
    assert [sum(f"seed{seed}" in name for name in curves) for seed in range(2)] == [3, 1]
    assert "The page has no figures of 2 further runs" in text


def test_the_summary_names_the_float_network_and_the_models_to_look_at(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    summary = text[text.index('id="summary"') : text.index('id="order"')]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", summary)
    assert "<title>Q8(w,f)-&gt;P0.5(w,f): 32.05 ± 0.07 at density 7</title>" in summary, "shown at the pointer"
    assert "Too few seeds to decide." in summary
    assert cells[:6] == ["float network", "Baseline", "30.05 ± 0.07, n = 2", "3.00", "", "9.00"]
    assert cells[6:9] == ["best score", "Q8(w,f)-&gt;P0.5(w,f)", "32.05 ± 0.07, n = 2"]
    assert [cells[12], cells[18]] == ["densest", "smallest that loses at most 1%"]


def test_the_recipe_of_most_seeds_comes_first(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with Composer() as composer:
        for order, seed in (("baseline", 0), ("quantize_first", 1), ("quantize_first", 2)):
            words = ["task=espcn", f"order={order}", f"seed={seed}"]
            row = store_row(composer, words, runs, score=30.0, density_actual=9.0, marks=[])
            [place] = runs.glob(f"espcn/*{row.signature[:10]}")
            (place / "metrics.csv").write_text(CURVE.format(score=30.0), encoding="utf-8")
    assert cli.main(["report", f"results_dir={runs}", "task=espcn", "--runs", "1"]) == 0
    [curve] = (tmp_path / "runs" / "figures").glob("*-curve.png")
    assert curve.name.startswith("quantize_first-Q8wf-P0.5wf-seed1-")


@pytest.mark.parametrize(
    ("number", "said"),
    [("-1", "--runs=-1 is not a whole number >= 0"), ("few", "argument --runs: invalid int value: 'few'")],
)
def test_the_number_of_runs_is_checked(
    number: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", f"results_dir={tmp_path}", f"--runs={number}"]) == 2
    assert said in capsys.readouterr().err


def test_bad_rows_are_named_in_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Composer() as composer:
        store_row(composer, ["task=espcn", "order=baseline"], tmp_path / "runs")
    (tmp_path / "runs" / "bad").mkdir()
    (tmp_path / "runs" / "bad" / ROW_FILE).write_text("{", encoding="utf-8")
    assert cli.main(["report", f"results_dir={tmp_path / 'runs'}", "task=espcn"]) == 1
    assert "result.json: not readable JSON" in capsys.readouterr().err
    assert "result.json: not readable JSON" in (tmp_path / "runs" / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium; without it the tests are skipped."""
    webdriver = pytest.importorskip("selenium.webdriver")
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("there is no chromedriver on this machine")
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chromium = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chromium
    chromium.quit()


def becomes_true(browser: Any, script: str) -> None:
    """Wait for what the browser does in its own time."""
    deadline = time.monotonic() + 10
    while not browser.execute_script(script):
        assert time.monotonic() < deadline, script
        time.sleep(0.02)


def column(browser: Any, place: int) -> list[str]:
    script = "return [...document.querySelectorAll('#runs tbody tr')].map((line) => line.cells[arguments[0]].innerText)"
    cells: list[str] = browser.execute_script(script, place)
    return cells


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # selenium's own sockets
def test_in_chromium(report: Path, browser: Any) -> None:
    """No console error; a click sorts by number, a second one turns round; a phone scrolls down only."""
    browser.get(report.as_uri())
    heads = browser.find_elements("css selector", "#runs th button")
    by_score = sorted(30.0 + i + seed / 10 for i in range(3) for seed in range(2))
    heads[4].click()
    assert column(browser, 4) == [f"{score:.2f} dB" for score in by_score]
    heads[4].click()
    assert column(browser, 4) == [f"{score:.2f} dB" for score in reversed(by_score)]
    heads[0].click()
    assert column(browser, 0) == sorted(column(browser, 0))
    browser.find_element("css selector", "input[type=search]").send_keys("baseline seed")
    becomes_true(browser, "return document.querySelector('#runs output').textContent === '0 of 6'")
    browser.find_element("css selector", "input[type=search]").clear()
    browser.find_element("css selector", "input[type=search]").send_keys("Q8(w,f)->P0.5")
    becomes_true(browser, "return document.querySelector('#runs output').textContent === '2 of 6'")
    browser.find_element("css selector", "#runs tbody tr:not([hidden]) a").click()
    becomes_true(browser, "return document.querySelector('dialog').open")
    becomes_true(browser, "return document.querySelectorAll('dialog pre').length > 0")
    becomes_true(browser, "return [...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    browser.get(report.as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth <= 390")
    assert browser.get_log("browser") == []


def test_a_summary_names_its_arithmetic_and_prefers_rows_with_a_float_network() -> None:
    old = [Row(**(FIELDS | {"notation": "Baseline", "score": 33.0, "arithmetic": 1}))]
    new = [Row(**(FIELDS | {"seed": seed, "arithmetic": 2})) for seed in range(3)]
    [found] = summaries([*new, *old], lambda rows: {row.signature: row.notation for row in rows})
    assert found["heading"] == "espcn, budget paper, real data, arithmetic version 1: score is PSNR (dB)"
    assert [line[0] for line in found["lines"]] == ["float network"]
    [found] = summaries(new, lambda rows: {row.signature: row.notation for row in rows})
    assert "arithmetic version 2" in found["heading"]
    assert [line[0] for line in found["lines"]] == ["best score", "densest"]
