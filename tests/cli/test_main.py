"""The command line: its verbs, help and version, and a run from the shell."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qprune.cli import main as cli
from tests.cli.errors import error_of
from tests.cli.shell import command

SMOKE = ("task=espcn", "data=synthetic", "budget=smoke")


def test_help_names_every_verb_and_loads_neither_torch_nor_hydra() -> None:
    code = "import sys; from qprune.cli.main import main; main(['--help']); "
    code += "sys.exit(bool({'torch', 'hydra'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(f"\n  {verb} " in done.stdout for verb in cli.VERBS)


def test_nothing_typed_shows_the_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert capsys.readouterr().out.startswith("usage: qprune VERB")


@pytest.mark.parametrize(
    ("given", "spins"), [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, None)]
)
def test_waiting_threads_spin_shortly_unless_the_user_says_otherwise(
    given: dict[str, str], spins: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["--version"]) == 0
    assert os.environ.get("GOMP_SPINCOUNT") == spins


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--version"], ["run", "--version"], ["list", "runs", "--version"]):
        assert cli.main(words) == 0
        assert capsys.readouterr().out == "qprune 0.1.0\n"


@pytest.mark.parametrize("verb", ["run", "sweep", "frontier"])
def test_a_verb_alone_says_what_to_type_and_trains_nothing(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = error_of(capsys, verb)
    assert said.startswith(f"qprune {verb} trains networks, for hours with a task's whole recipe; type what to train")
    assert "task=espcn" in said


@pytest.mark.parametrize("words", ["run", "sweep", "plan", "list", "tables", "report", "frontier"])
def test_a_folder_of_configs_that_is_not_there_is_refused(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [] if words in ("list", "tables", "report") else ["task=espcn"]
    said = error_of(capsys, words, *arguments, "--config-dir", str(tmp_path / "nowhere"))
    assert said == f"there is no folder {tmp_path / 'nowhere'}; name one that holds configs with --config-dir"


@pytest.mark.parametrize(("verb", "missing"), [("export", "RUN"), ("verify", "RUN"), ("explain 123456", "RUN")])
def test_what_may_be_left_out_is_not_called_required(
    verb: str, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(verb.split()) == 2
    assert capsys.readouterr().err.endswith(f"the following arguments are required: {missing}\n")


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("verb", [*cli.VERBS, ""])
def test_in_a_terminal_help_is_folded_between_words(
    verb: str, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert cli.main([*filter(None, [verb]), "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"usage: qprune {verb or 'VERB'}")
    assert [line for line in lines if len(line) > width] == []


def test_cfg_prints_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "task=espcn", "seed=5", "--cfg", "job"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["seed"], config["prune"]["sparsity"], "hydra" in config) == (5, 0.5, False)
    said = error_of(capsys, "sweep", "task=espcn", "--cfg", "job")
    assert said == "--cfg prints the config of one run; type: qprune run KEY=VALUE ... --cfg job"


def test_the_help_of_run_lists_groups_with_their_choices(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--help"]) == 0
    groups = "\n  order: baseline, joint, joint_late, prune_first, prune_only, prune_only_late, quant"
    assert groups in capsys.readouterr().out


def test_list_describes_every_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    printed = capsys.readouterr().out
    assert "\n  prune_first         Pruning, then quantization: P0.5(w,f)->Q8(w,f)\n" in printed
    assert "\n  espcn/quantize_first " in printed
    assert cli.main(["list", "budgets"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == ["budgets", "cpu", "paper", "short", "smoke"]


def test_a_run_from_the_shell_ends_with_its_row_and_is_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("run", *SMOKE, "budget.batch_size=4", "budget.test_samples=1", "order=prune_first", "results_dir=out")
    first = command("qprune", *words, folder=tmp_path)
    assert first.returncode == 0, first.stderr
    row = first.stdout[first.stdout.index("espcn  P0.5(w,f)->Q8(w,f)  seed 0\n  psnr ") :]
    assert "\n  not comparable with the paper: synthetic data; " in row
    assert first.stdout.count("step 64/64") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "a run writes into its own folder only"
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 0
    assert capsys.readouterr().out.endswith(row)
    (tmp_path / "out" / "espcn" / "x").mkdir()
    (tmp_path / "out" / "espcn" / "x" / "result.json").write_text("{", encoding="utf-8")
    assert cli.main(["list", "runs", "results_dir=out"]) == 1
    listed = capsys.readouterr()
    assert listed.out.count("prune_first-P0.5wf-Q8wf-seed0-") == 1
    assert listed.err.startswith("left out: out/espcn/x/result.json: not readable JSON")
