"""Exact texts for what was mistyped, before anything is started."""

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module

from qprune.cli import main as cli
from qprune.cli.list import choices
from qprune.config import compose as composing
from qprune.config import signature as identity
from qprune.config.compose import CONFIG_MODULE, CONFIG_NAME, VERSION_BASE, Composer, compose_run
from qprune.config.schema import RETIRED
from tests.cli.errors import error_of

GONE = "a key or group cannot be taken away; give it another value, or null where that is legal"
SMOKE = ("task=espcn", "data=synthetic", "budget=smoke")
TASKS = ", ".join(name for name, _ in choices("task"))
ORDERS = "baseline, joint, joint_late, prune_first, prune_only, prune_only_late, quantize_first, quantize_only, "
ORDERS += "quantize_only_late"
VERBS = f"the verbs are {', '.join(cli.VERBS)}"
TOP = "seed, epochs, results_dir, force, wait, prune, quantize, order, schedule, budget, data, trainer, logger, task, "
TOP += "protocol"
QUANTIZE = "bits, feature_bits, targets, rounding, gradient, saturate, objective, weight_axis, decimal, candidates"
QUANTIZE += ", decimal_from"
PRUNE = "sparsity, targets, window, granularity, rule, border"
SEED = "seed='abc' is not a whole number in [0, 4611686018427387904]"
TEXT = "is not text; quote what YAML reads as something else"
NOT_FOUND = "KeyError raised while resolving interpolation: \"Environment variable 'NO_SUCH_VARIABLE' not found\""
QUOTE = "quote what Hydra reads as special, for example 'data.root=\"/a folder\"'"
LISTS = "tasks, orders, protocols, schedules, budgets, data, loggers, launchers, sweeps, tables, runs"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("lst", f"'lst' is not a verb of qprune; did you mean 'list'?; {VERBS}"),
        ("task=espcn", f"'task=espcn' is not a verb of qprune; type: qprune run task=espcn; {VERBS}"),
        ("run task=epscn", f"task='epscn' is not one of {TASKS}; did you mean 'espcn'?"),
        ("run order=prune_frist", f"order='prune_frist' is not one of {ORDERS}; did you mean 'prune_first'?"),
        ("sweep order=baseline,prun_only", f"order='prun_only' is not one of {ORDERS}; did you mean 'prune_only'?"),
        (
            "run quantize.bit=4",
            f"unknown key 'quantize.bit'; did you mean 'quantize.bits'?; the keys of quantize are {QUANTIZE}",
        ),
        ("run sparsity=0.25", f"unknown key 'sparsity'; did you mean 'prune.sparsity'?; the keys are {TOP}"),
        ("run oder=baseline", f"unknown key 'oder'; did you mean 'order'?; the keys are {TOP}"),
        ("run +sead=1", f"unknown key 'sead'; did you mean 'seed'?; the keys are {TOP.removesuffix(', protocol')}"),
        ("run +seed=1", "+seed=1: seed is a key already; type seed=1"),
        ("run ~seed", f"~seed: {GONE}"),
        ("run ~order", f"~order: {GONE}"),
        ("sweep ~budget", f"~budget: {GONE}"),
        ("plan ~budget", f"~budget: {GONE}"),
        (
            "run logger.name=tensorbord",
            "logger.name='tensorbord' is not one of csv, tensorboard, wandb, mlflow; did you mean 'tensorboard'?",
        ),
        ("run budget=[paper]", "budget='[paper]' is not one of cpu, paper, short, smoke; did you mean 'paper'?"),
        ("run seed=1,2", "seed=1,2 gives several values, which make several runs; type: qprune sweep ..."),
        ("run budget=null", "budget='null' is not one of cpu, paper, short, smoke"),
        ("run results_dir=", f"results_dir='' {TEXT}"),
        ("run force=no", "force='no' is not true or false"),
        ("run seed=abc", SEED),
        ("sweep seed=1,abc", SEED),
        ("run prune=3", f"prune=3: prune is a section, with the keys {PRUNE}; set one of them"),
        ("run quantize.saturate=0.1", "quantize.saturate=0.1 is not a list; type it as quantize.saturate=[...]"),
        ("run seed", "'seed' is not KEY=VALUE; type task=espcn"),
        ("run =5", f"unknown key ''; the keys are {TOP}"),
        ("run cifar", "'cifar' is not KEY=VALUE; type task=cifar"),
        ("run quantize_only", "'quantize_only' is not KEY=VALUE; type order=quantize_only"),
        ("run --cfg job -m", "--cfg prints the config of one run; type: qprune run KEY=VALUE ... --cfg job"),
        ("run schedule=cifar/prune", None),
        (
            "sweep hydra.sweep.dir=x",
            "hydra.sweep.dir is chosen by qprune sweep; set results_dir=... instead, the folder above it",
        ),
        ("run data.root=${oc.env:NO_SUCH_VARIABLE}", f"a value cannot be resolved (data.root): {NOT_FOUND}"),
        ("list order", f"qprune list: WHAT='order' is not one of {LISTS}; did you mean 'orders'?"),
        ("completion tcsh", "qprune completion: SHELL='tcsh' is not one of bash, zsh, fish; did you mean 'zsh'?"),
    ],
)
def test_wrong_input_says_what_is_legal(
    capsys: pytest.CaptureFixture[str], started: list[dict[str, Any]], typed: str, said: str | None
) -> None:
    error = error_of(capsys, *typed.split())
    if said is None:
        assert "did you mean 'cifar/prune_" in error
    else:
        assert error == said
    assert not started


NOT_TEXT = ["budget=[False]", "budget=[1]", "budget=[null]", "budget={a:1}", "budget=1", "budget=true", "budget=[[]]"]
NOT_TEXT += ["+budget=[x]", "++budget=[[False]]", "task=null", "task=[{a:1}]", "data=[1.5]", "schedule=[False]"]


OTHER_VERBS = [(verb, "budget=[False]") for verb in ("sweep", "plan", "frontier", "tables")]


@pytest.mark.parametrize(("verb", "override"), [*(("run", override) for override in NOT_TEXT), *OTHER_VERBS])
def test_a_choice_of_a_group_is_text(
    capsys: pytest.CaptureFixture[str], started: list[dict[str, Any]], tmp_path: Path, verb: str, override: str
) -> None:
    group, _, given = override.lstrip("+").partition("=")
    task = [] if group == "task" else ["task=espcn"]
    error = error_of(capsys, verb, *task, override, f"results_dir={tmp_path}")
    with Composer() as composer:
        assert error.startswith(f"{group}={given!r} is not one of {', '.join(composer.choices(group))}")
    assert not started


def test_a_schedule_that_is_missing_says_where_to_write_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "mine.yaml").write_text("# @package _global_\ntask: {name: mine}\n", encoding="utf-8")
    assert error_of(capsys, "run", "--config-dir", str(tmp_path), "task=mine", "order=prune_first") == (
        "there is no schedule 'mine/prune_first' for this task in this order; write one as schedule/mine/prune_first."
        "yaml in a folder given with --config-dir, give schedule.slots for all orders in the task's YAML, or borrow "
        "one with schedule=TASK/ORDER (qprune list schedules)"
    )


def test_an_argument_of_an_own_task_may_be_added(started: list[dict[str, Any]]) -> None:
    assert cli.main(["run", *SMOKE, "+task.width=3"]) == 0
    assert len(started) == 1


def test_a_run_composes_once(started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    composed: list[Any] = []

    def counting(*args: Any, **options: Any) -> Any:
        composed.append(args)
        return compose(*args, **options)

    monkeypatch.setattr(composing, "compose", counting)
    assert cli.main(["run", *SMOKE, "prune.sparsity=0.25"]) == 0
    assert (len(composed), len(started)) == (1, 1)


@pytest.mark.parametrize("key", RETIRED)
def test_a_retired_key_is_ignored_with_a_line_that_says_so(
    key: str, started: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", *SMOKE, f"{key}=true"]) == 0
    assert capsys.readouterr().err == f"{key} is ignored: {RETIRED[key]}\n"
    (tmp_path / "trainer").mkdir()
    text = f"defaults: [default]\n{key.removeprefix('trainer.')}: true\n"
    (tmp_path / "trainer" / "old.yaml").write_text(text, encoding="utf-8")
    assert cli.main(["run", "--config-dir", str(tmp_path), *SMOKE, "trainer=old"]) == 0
    assert capsys.readouterr().err == f"{key} is ignored: {RETIRED[key]}\n"
    assert len(started) == 2


CHOICES = [[f"task={task}", f"order={order}"] for task in ("espcn", "cifar") for order in ("baseline", "prune_first")]
SEED_ELSEWHERE = ["task=espcn", "order=prune_first", "+task.further_seed=${seed}"]


def test_configs_composed_quickly_are_those_that_hydra_composes() -> None:
    words = [[*choice, "prune.window=5", "quantize.saturate=[0.1,1.0]"] for choice in [*CHOICES, *CHOICES[::-1]]]
    with Composer() as composer:
        ours = [composer.config(overrides) for overrides in words]
    with initialize_config_module(config_module=CONFIG_MODULE, **VERSION_BASE):
        theirs = [compose(CONFIG_NAME, overrides=overrides) for overrides in words]
    assert ours == theirs
    assert compose_run(words[0]).prune.window == 5


def test_files_of_a_folder_given_later_count(tmp_path: Path) -> None:
    (tmp_path / "budget").mkdir()
    (tmp_path / "budget" / "own.yaml").write_text(
        "name: own\nepochs: 3\nsteps_per_epoch: 2\nbatch_size: null\ntest_samples: null\n", encoding="utf-8"
    )
    with Composer(str(tmp_path)) as composer:
        assert composer.config(["task=espcn", "budget=own"]).budget.epochs == 3
        assert composer.config(["task=espcn", "budget=paper"]).budget.epochs is None


@pytest.mark.parametrize("overrides", [CHOICES[1], SEED_ELSEWHERE], ids=["own", "seed_elsewhere"])
@pytest.mark.parametrize("source", [None, "ab" * 32])
def test_a_signature_is_that_of_the_whole_config(overrides: list[str], source: str | None) -> None:
    with Composer() as composer:
        for seed in (3, 11, 3):
            config = composer.config([*overrides, f"seed={seed}"])
            config.quantize.decimal_from = source
            assert composer.signature(overrides, seed, source) == identity.signature(config)
        assert composer.config(overrides).seed == 0


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("report", ["task=espcn", "--runs", "4", "results_dir={}"]),
        ("tables", ["3", "--output", "{}", "task=espcn", "results_dir={}"]),
        ("frontier", ["task=espcn", "--plan", "data=synthetic", "budget=smoke", "results_dir={}"]),
        ("plan", ["task=espcn", "--config-dir", "{}", "data=synthetic", "results_dir={}"]),
        ("run", ["task=espcn", "--cfg", "job", "data=synthetic", "results_dir={}"]),
    ],
)
def test_keys_may_surround_options(
    verb: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([verb, *(word.format(tmp_path) for word in words)]) == 0, capsys.readouterr().err
