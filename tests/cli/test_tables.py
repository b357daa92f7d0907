"""`qprune tables`: the paper's densities from the paper's scores, marks, missing runs, and folders with bad rows."""

import io
import json
import re
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from qprune.cli import main as cli
from qprune.cli.tables import join_all
from qprune.compression.footprint import paper_footprint
from qprune.config.build import Recipe
from qprune.config.compose import TABLE, Composer
from qprune.reporting.table_text import latex, markdown, missing_text, print_table
from qprune.reporting.tables import OtherMethod, table_from
from qprune.runs.folder import ROW_FILE, read_rows
from qprune.runs.jobs import presets, yaml_value
from qprune.runs.store import Store
from qprune.training.setup import build_task
from qprune.training.task import Task
from tests.cli.errors import error_of
from tests.reporting.networks_of_table_5 import COUNTED, NAMED, elements
from tests.reporting.rows import store_row

ESPCN = ["task=espcn"]
# Table, task, and the rows whose printed density cannot be had from the paper's own rule (spec 5.3).
TABLES = {name: table_from(name, yaml_value(text, name)) for name, text in presets(TABLE).items()}
BUILT = ("cifar", "espcn")


def paper_sizes(recipe: Recipe, task: Task) -> dict[str, float]:
    """Sizes in bits of a task's network in the paper's accounting."""
    size = paper_footprint(task.network, task.size_example, recipe.paper_size, recipe.pruning, recipe.quantization)
    return {f"{kind}_bits_paper": size.size_bits(kind) for kind in ("weight", "feature", "input")}


def test_the_paper_s_scores_give_the_paper_s_densities(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through stored rows, the verb and its CSV; every printed digit, for all rows of two tasks."""
    with Composer() as composer:
        tasks = {
            name: build_task(Recipe.from_config(composer.config([f"task={name}"])).on_synthetic_data())
            for name in BUILT
        }
        for table in (TABLES["3"], TABLES["4"], TABLES["5"]):
            for part in (part for part in table.parts if part.task in BUILT):
                for row in part.rows:
                    overrides, task = [*part.overrides, *row.overrides], tasks[part.task]
                    bits = paper_sizes(Recipe.from_config(composer.config(overrides)), task)
                    density = task.density(float(row.score), sum(bits.values()))
                    fields = {"metric": part.metric, "score": float(row.score), "density_paper": density, **bits}
                    store_row(composer, overrides, tmp_path / "runs", **fields)
    for task_name in BUILT:
        assert cli.main(["tables", f"task={task_name}", f"results_dir={tmp_path / 'runs'}"]) == 0
        for name in ("3", "4") if task_name == "espcn" else ("3", "4", "5"):
            table = pd.read_csv(tmp_path / "runs" / "tables" / f"table{name}.csv")
            ours = table[table["n"] > 0]
            assert ours["difference"].abs().max() == 0
            assert ours["density_paper"].round(2).tolist() == ours["paper_density"].tolist()
    five = pd.read_csv(tmp_path / "runs" / "tables" / "table5.csv")
    sizes = five[["weight_mb_paper", "feature_mb_paper"]].round(2).to_numpy().tolist()
    assert sizes[:2] == [[9.19, 55.20], [9.19, 27.60]]
    assert "missing" not in (tmp_path / "runs" / "tables" / "table4.md").read_text(encoding="utf-8")


OTHERS = TABLES["5"].parts[0].other


@pytest.mark.parametrize("method", OTHERS, ids=lambda method: method.label)
def test_other_methods_of_table_5(method: OtherMethod) -> None:
    """Elements are counted in the networks themselves; those of the paper's networks give its sizes to each digit."""
    named, _, sizes = method.label.partition(", ")[2].removesuffix(")").partition(" (sizes: ")
    build = NAMED[named] if sizes in ("", "as named") else COUNTED[sizes]
    assert elements(build) == (method.weights, method.features)
    weight, feature = method.sizes_mb()
    if sizes != "as named":
        assert (round(weight, 2), round(feature, 2)) == (method.weight_mb, method.feature_mb)
        density = float(method.score) / (weight + feature)
        assert round(density, 2) == pytest.approx(float(method.density), abs=0.0101)


def test_table_5_has_the_sizes_of_all_networks_as_they_are_named() -> None:
    named = {method.label.partition(" (")[0] for method in OTHERS}
    assert len(named) == 13
    assert len([method for method in OTHERS if "(sizes: as named)" in method.label]) == 9
    densities = {m.label: float(m.score) / sum(m.sizes_mb()) for m in OTHERS if m.label.endswith("(sizes: as named)")}
    assert round(max(densities.values()), 2) == 3.74  # ResNet-20, above the paper's best, 2.49
    assert max(densities, key=densities.__getitem__) == "Yang et al. 2020, ResNet-20 (sizes: as named)"


def test_a_marked_row_never_passes_for_the_paper_s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Even one whose own marks were taken out."""
    with Composer() as composer:
        store_row(composer, [*ESPCN, "order=baseline", "data=synthetic", "budget=smoke"], tmp_path / "runs")
    keys = ["task=espcn", "data=synthetic", "budget=smoke", f"results_dir={tmp_path / 'runs'}"]
    assert cli.main(["tables", "4", *keys]) == 0
    printed = capsys.readouterr().out
    assert "| Baseline [a,b] | 30.00 | 1 | 32.84 | -2.84 |" in printed
    assert "- [a] synthetic data\n- [b] budget=smoke\n" in printed
    tex = (tmp_path / "runs" / "tables" / "table4-smoke-synthetic.tex").read_text(encoding="utf-8")
    assert "[a] synthetic data" in tex
    assert r"\toprule" in tex
    assert r"P0.5(w,f)$\to$Q8(w,f)" in tex


def test_rows_of_another_budget_are_no_rows_of_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Composer() as composer:
        store_row(composer, [*ESPCN, "order=baseline", "data=synthetic", "budget=smoke"], tmp_path / "runs")
    assert cli.main(["tables", "4", "task=espcn", f"results_dir={tmp_path / 'runs'}"]) == 0
    printed = capsys.readouterr()
    assert "| Baseline | missing | 0 | 32.84 |" in printed.out
    assert printed.err.endswith(f"by: qprune tables budget=smoke data=synthetic results_dir={tmp_path / 'runs'}\n")


def test_mean_deviation_and_missing_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Composer() as composer:
        for seed, score in ((0, 31.0), (1, 33.0), (7, 32.0)):  # 7 was not asked for, and counts
            store_row(composer, [*ESPCN, "order=baseline", f"seed={seed}"], tmp_path / "runs", score=score)
    assert cli.main(["tables", "4", "task=espcn", "seed=range(4)", f"results_dir={tmp_path / 'runs'}"]) == 0
    printed = capsys.readouterr().out
    assert "| Baseline | 32.00 ± 1.00 | 3 | 32.84 | -0.84 |" in printed
    command = f"`qprune sweep task=espcn order=baseline seed=2,3 results_dir={tmp_path / 'runs'}`"
    assert f"- missing: Baseline: {command}" in printed


def test_densities_have_deviations_and_recovery_is_shown_where_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recovery = {"epochs_after_pruning": 40.0, "rates_after_pruning": 0.004}
    recovery |= {"epochs_after_quantization": 30.0, "rates_after_quantization": 0.003}
    with Composer() as composer:
        for seed, density in ((0, 8.0), (1, 8.2)):
            words = [*ESPCN, "order=prune_first", f"seed={seed}"]
            store_row(composer, words, tmp_path / "runs", density_paper=density, recovery=recovery)
    keys = ["4", "task=espcn", f"results_dir={tmp_path / 'runs'}"]
    assert cli.main(["tables", *keys]) == 0
    printed = capsys.readouterr().out
    assert "| 8.10 ± 0.14 \\| 9.00 ± 0.00 | 8.34 |\n" in printed
    assert "epochs after the last P" not in printed
    assert cli.main(["tables", *keys, "--recovery"]) == 0
    printed = capsys.readouterr().out
    assert "| epochs after the last P \\| Q | sum of their learning rates |\n" in printed
    assert "| 8.34 | 40 \\| 30 | 0.004 \\| 0.003 |\n" in printed


def test_a_part_has_one_version_of_the_arithmetic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Composer() as composer:
        for order, versions in (("baseline", (1, 1, 2)), ("prune_first", (1, 1))):
            for seed, version in enumerate(versions):
                words = [*ESPCN, f"order={order}", f"seed={seed}"]
                store_row(composer, words, tmp_path / "runs", score=30.0 + seed, arithmetic=version)
    keys = ["4", "task=espcn", f"results_dir={tmp_path / 'runs'}"]
    assert cli.main(["tables", *keys]) == 0
    printed = capsys.readouterr().out
    assert "| Baseline [a] | 32.00 | 1 |" in printed
    assert "| P0.5(w,f)->Q8(w,f) [a] | missing | 0 |" in printed
    assert "- [a] 2 runs of arithmetic version 1 left out\n" in printed
    assert cli.main(["tables", *keys, "arithmetic=1"]) == 0
    printed = capsys.readouterr().out
    assert "| Baseline | 30.50 ± 0.71 | 2 |" in printed
    assert "left out" not in printed
    assert cli.main(["tables", *keys, "arithmetic=x"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: arithmetic=x is no version of the arithmetic; type a whole number"
    )


def test_runs_of_unknown_code_are_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As their environments say: of a changed tree, and of a commit that this repository does not have."""
    with Composer() as composer:
        row = store_row(composer, [*ESPCN, "order=baseline"], tmp_path / "runs")
    [place] = (tmp_path / "runs").glob(f"espcn/*{row.signature[:10]}")
    git = {"commit": "0123456789" * 4, "changed": True}
    (place / "environment.json").write_text(json.dumps({"git": git}), encoding="utf-8")
    assert cli.main(["tables", "4", "task=espcn", f"results_dir={tmp_path / 'runs'}"]) == 0
    printed = capsys.readouterr().out
    assert "trained from a tree with uncommitted changes\n" in printed
    shallow = subprocess.run(
        ["git", "rev-parse", "--is-shallow-repository"], capture_output=True, text=True, check=False
    )
    if shallow.stdout.strip() == "false":
        assert "its commit 0123456789 is not in this repository\n" in printed


def test_costs_have_columns_where_a_run_has_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    costs = {"costs": {"effective_bops": 3e9}, "density_effective_bops": 4.5}
    with Composer() as composer:
        store_row(composer, [*ESPCN, "order=baseline"], tmp_path / "runs", score=31.0)
        store_row(composer, [*ESPCN, "order=prune_first"], tmp_path / "runs", score=30.0, **costs)
    assert cli.main(["tables", "4", "task=espcn", f"results_dir={tmp_path / 'runs'}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    [heading] = [line for line in lines if line.startswith("| recipe ")]
    assert heading.endswith("| paper's density | effective GBOPs | density per effective BOP |")
    assert [line for line in lines if line.endswith("| 3.00 | 4.50 |")]
    assert [line for line in lines if line.startswith("| Baseline | 31.00 ") and line.endswith(" | 6.22 |  |  |")]
    table = pd.read_csv(tmp_path / "runs" / "tables" / "table4.csv")
    assert table["effective_gbops"].dropna().tolist() == [3.0]
    tex = (tmp_path / "runs" / "tables" / "table4.tex").read_text(encoding="utf-8")
    assert r"\begin{tabular}{lrrrrrrrrrr}" in tex
    assert cli.main(["tables", "3", "task=espcn", f"results_dir={tmp_path / 'runs'}"]) == 0
    assert "GBOPs" not in capsys.readouterr().out


def test_a_folder_of_bad_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The good row still makes the table, each bad one is named, and the exit code says so."""
    runs = tmp_path / "runs"
    with Composer() as composer:
        store_row(composer, [*ESPCN, "order=baseline"], runs, score=31.0)
        by_hand = store_row(composer, [*ESPCN, "order=prune_first"], runs, score=31.0)
        store_row(composer, [*ESPCN, "order=baseline", "seed=1"], runs)
    [edited] = runs.glob(f"espcn/*{by_hand.signature[:10]}")
    (edited / "metrics.csv").write_text("epoch,psnr_db\n1,29.5\n", encoding="utf-8")
    first, *_ = sorted(runs.glob("espcn/baseline*"))
    good = (first / ROW_FILE).read_text(encoding="utf-8")
    for name, text in (
        ("a", good[: len(good) // 2]),
        ("b", json.dumps(json.loads(good) | {"schema_version": 0})),
        ("zcopy", good),
        ("d", json.dumps(json.loads(good) | {"signature": "0" * 64, "seed": 5})),
    ):
        (runs / name).mkdir()
        (runs / name / ROW_FILE).write_text(text, encoding="utf-8")
    tables = tmp_path / "configs" / "table"
    tables.mkdir(parents=True)
    (tables / "mine.yaml").write_text(
        "title: Mine\nparts:\n  - {name: p, metric: m, unit: u, density_unit: d, overrides: [task=nonsense], "
        "rows: [{label: x, overrides: []}]}\n",
        encoding="utf-8",
    )
    (tables / "broken.yaml").write_text("title: [", encoding="utf-8")
    keys = ["task=espcn", f"results_dir={runs}", "--config-dir", str(tmp_path / "configs")]
    assert cli.main(["tables", "4", "broken", *keys]) == 1
    printed = capsys.readouterr()
    assert "| Baseline | 30.50 ± 0.71 | 2 |" in printed.out
    assert "| P0.5(w,f)->Q8(w,f) | missing | 0 |" in printed.out
    problems = printed.err
    assert f"{runs / 'a' / ROW_FILE}: not readable JSON" in problems
    assert "schema_version is 0" in problems
    assert f"{runs / 'zcopy' / ROW_FILE} has the signature of" in problems
    assert f"{edited / ROW_FILE}: the score is 31, and metrics.csv ends with 29.5" in problems
    assert "table broken is not readable YAML" in problems
    assert cli.main(["tables", "mine", f"results_dir={runs}", "--config-dir", str(tmp_path / "configs")]) == 1
    assert "table mine, p: task='nonsense' is not one of " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["9"], "qprune tables: WHAT='9' is not one of 1, 2, 3, 4, 5, 6, variants, window, order"),
        (["4", "task=espcm"], "task='espcm' is not one of "),
        (["4", "order=baseline"], "order=baseline: a table's rows have their own order; leave it out"),
        (["4", "seed=a"], "seed=a is not a list of whole numbers >= 0; type for example seed=range(5) or seed=0,1"),
        (["4", "prune.sparsty=1"], "unknown key 'prune.sparsty'; did you mean 'prune.sparsity'?"),
    ],
)
def test_bad_input(arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tables", *arguments, f"results_dir={tmp_path}"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {expected}")


def test_run_missing_runs_the_source_of_decimal_bits_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Table 1 on ESPCN: Q_u(x, d*) from the first step, with the decimal bits of the delayed run of the same seed."""
    tables = tmp_path / "configs" / "table"
    tables.mkdir(parents=True)
    (tables / "mine.yaml").write_text(
        "title: Mine\nparts:\n  - name: p\n    metric: psnr_db\n    unit: dB\n    density_unit: d\n"
        "    overrides: [task=espcn]\n    rows:\n      - label: d*\n"
        "        overrides: [order=quantize_only, schedule.t_qw=0, schedule.t_qf=0]\n"
        "        decimal_from: [order=quantize_only]\n",
        encoding="utf-8",
    )
    keys = ["data=synthetic", "budget=smoke", "budget.steps_per_epoch=3", "trainer.threads=1"]
    options = ["--config-dir", str(tmp_path / "configs"), "--run-missing"]
    monkeypatch.chdir(tmp_path)  # where there are no results yet
    runs = tmp_path / "results" / "runs"
    assert cli.main(["tables", "mine", *keys, *options]) == 0
    table = pd.read_csv(runs / "tables" / "tablemine-smoke-synthetic-budget.steps_per_epoch_3.csv")
    assert table["n"].tolist() == [1]
    rows, problems = read_rows(runs)
    assert (len(rows), problems) == (2, [])
    decimals = []
    for path in runs.rglob("operators.json"):
        operators = json.loads(path.read_text(encoding="utf-8"))
        decimals.append({(o["site"], o["kind"]): o["decimals"] for o in operators})
    assert len(decimals) == 2
    assert decimals[0] == decimals[1]
    assert cli.main(["tables", "mine", *keys, *options]) == 0
    assert "missing run" not in capsys.readouterr().out.split("## Table mine")[-1]


def test_tables_are_written_below_results_dir_one_name_per_budget_and_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Composer() as composer:
        store_row(composer, [*ESPCN, "order=baseline", "data=synthetic", "budget=smoke"], tmp_path / "runs")
    for keys in ([], ["budget=smoke", "data=synthetic"], ["budget=smoke", "data=synthetic", "quantize.bits=4"]):
        assert cli.main(["tables", "4", *ESPCN, *keys, f"results_dir={tmp_path / 'runs'}"]) == 0
    written = sorted(path.stem for path in (tmp_path / "runs" / "tables").glob("*.md"))
    assert written == ["table4", "table4-smoke-synthetic", "table4-smoke-synthetic-quantize.bits_4"]
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    printed = capsys.readouterr().out
    assert f"written: {tmp_path / 'runs' / 'tables' / 'table4-smoke-synthetic'}.md, .tex and .csv\n" in printed
    command = f"qprune tables 4 task=espcn results_dir={tmp_path / 'runs'} --run-missing"
    assert f"3 of 3 rows lack runs; to train them: {command}\n" in printed


def test_one_row_lacks_runs_and_several_lack_them() -> None:
    rows = [{"command": "x", "missing_seeds": seeds} for seeds in ([0], [], [1, 2])] + [{"command": ""}]
    assert missing_text([pd.DataFrame(rows)], "train").startswith("2 of 3 rows lack runs; to train them: train")
    assert missing_text([pd.DataFrame(rows[:2])], "train").startswith("1 of 2 rows lacks runs; to train them: train")
    assert missing_text([pd.DataFrame(rows[1:2])], "train") == ""


def test_a_folder_that_is_named_and_not_there_is_an_error_and_stays_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "published").mkdir()
    for verb in ("tables", "report"):
        said = error_of(capsys, verb, f"results_dir={tmp_path / 'runs'}")
        assert said == f"there is no folder {tmp_path / 'runs'}; name the one that holds the runs with results_dir=..."
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


@pytest.mark.parametrize("width", [80, 120])
def test_a_table_fits_a_terminal(width: int, tmp_path: Path) -> None:
    with Composer() as composer:
        for seed in range(2):
            words = [*ESPCN, "order=prune_first", f"seed={seed}"]
            store_row(composer, words, tmp_path / "runs", score=31.0 + seed, marks=["a note"])
    store = Store.read(tmp_path / "runs")
    [joined] = join_all({"4": presets(TABLE)["4"]}, store, ESPCN, None)
    console = Console(width=width, file=io.StringIO())
    print_table(console, joined.table, joined.parts)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    [ours] = [line.split() for line in lines if line.startswith("P0.5(w,f)->Q8(w,f) [a")]
    assert ours[2:8] == ["31.50", "±", "0.71", "2", "31.03", "+0.47"]
    assert "  [a] a note" in lines


@pytest.mark.parametrize(
    ("name", "label", "printed"),
    [
        ("1", "Baseline", ["92.6", ""]),
        ("2", "Baseline", ["92.60", ""]),
        ("4", "Baseline", ["92.60", "0.31"]),
        ("4", "P0.5(w,f)->Q8(w,f)", ["91.44", "2.49"]),
        ("5", "Xiao & Wang 2019, VGG-16", ["91.5", "0.68"]),
        ("6", "Q8(w,f)->P0.5(w,f)", ["135.0", "25.66"]),
    ],
)
def test_the_paper_s_values_have_the_paper_s_digits(name: str, label: str, printed: list[str], tmp_path: Path) -> None:
    keys = ["task=pix2pix"] if name == "6" else ["task=cifar"]
    [joined] = join_all({name: presets(TABLE)[name]}, Store.read(tmp_path), keys, None)
    text = io.StringIO()
    print_table(Console(file=text, width=160), joined.table, joined.parts)
    [terminal] = [line.split() for line in text.getvalue().splitlines() if line.startswith(label)]
    assert {*printed} - {""} <= {*terminal}
    lines = markdown(joined.table, joined.parts).splitlines()
    [line] = [line for line in lines if re.match(rf"\| {re.escape(label)} (\[|\|)", line)]
    cells = line.split(" | ")
    assert [cells[3], cells[-1].removesuffix(" |").strip()] == printed
    escaped = label.replace("->", r"$\to$").replace("&", r"\&")
    [line] = [line for line in latex(joined.table, joined.parts).splitlines() if line.startswith(escaped)]
    assert [line.split(" & ")[place] for place in (3, -1)] == [printed[0], f"{printed[1]} \\\\"]
