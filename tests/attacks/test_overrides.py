"""Values on the command line that YAML or Hydra reads as something else than text: a path is text for every verb."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qprune.config.compose import Composer, text_override
from qprune.errors import UserError
from tests.attacks import hostile
from tests.attacks.conftest import TRIALS, Answer, Attacks, LostRowError, SilentDifferenceError, verb

TEXTS = (
    *"2026 007 1e5 0x1F -1 1.50 yes no on true False null Null ~ nan inf .5 [a a] {a a(b #x !x %x @x `x` a=b =".split(),
    *r"""a: :a 2026-01-01 12:30:00 é 漢字 a'b a"b *x ? |x > &x --- ...x a\b x\ $x 1_000 range choice""".split(),
    *("a: b", "a b", "- x"),
)
# What Hydra itself reads in them, as it does for `qprune run`; a path that holds it is typed in quotes
_SYNTAX = ("'", '"', "\\", "${", ",", "(", ")")


def in_place(runs: list[Path], text: str, place: Path) -> Path:
    """Copy the runs into a results folder called `text` in an empty `place`."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    hostile.copied(runs, place / text)
    return place


Commands = dict[str, Callable[[str, str], Answer]]


@pytest.fixture
def commands(runs: list[Path]) -> Commands:
    """Each verb that reads stored runs, as a function of the override and a signature."""
    return {
        "list": lambda given, _: verb("list", "runs", given),
        "tables": lambda given, _: verb("tables", "order", given, "--output", "out"),
        "evaluate": lambda given, name: verb("evaluate", name, given),
        "export": lambda given, name: verb("export", name, given, "--form", "sparse"),
        "explain": lambda given, name: verb("explain", name, name, given, "--output", "out"),
        "verify": lambda given, name: verb("verify", name, given, "--form", "float", "--no-timing"),
        "report": lambda given, _: verb("report", given, "--runs", "0", "--output", "out/report.html"),
    }


def test_a_path_is_text_for_every_verb(
    attacks: Attacks, runs: list[Path], commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signature = hostile.row_of(runs[0])["signature"][:12]

    def trial(draw: random.Random) -> None:
        text = draw.choice(TEXTS)
        monkeypatch.chdir(in_place(runs, text, tmp_path / "place"))
        name = draw.choices(list(commands), weights=(8, 4, 6, 4, 1, 1, 1))[0]
        is_plain = not any(mark in text for mark in _SYNTAX)
        given = f"results_dir={text}" if is_plain and draw.random() < 0.7 else text_override("results_dir", text)
        answer = commands[name](given, signature)
        if answer.code:
            raise LostRowError(f"{name} {given}: {answer.err}")
        if name == "list" and "2 runs: 2 finished" not in answer.out:
            raise LostRowError(f"{given}: {answer.out}")

    attacks.run("override: results_dir", trial, 2 * TRIALS)


def test_run_and_other_verbs_read_a_path_alike(attacks: Attacks) -> None:
    def trial(draw: random.Random) -> None:
        text = draw.choice((*TEXTS, *(hostile.name(draw) for _ in range(30))))
        given = f"results_dir={text}" if draw.random() < 0.7 else text_override("results_dir", text)
        try:
            with Composer() as composer:
                alone = composer.values([given])["results_dir"]
        except UserError:
            alone = None
        try:
            with Composer() as composer:
                composed = composer.checked(["task=espcn", given]).results_dir
        except UserError:
            composed = None
        if alone != composed and "${" not in text and text != "???":
            raise SilentDifferenceError(f"{given}: {alone!r} and {composed!r}")
        if given == f"results_dir={text}" and alone is not None and not any(mark in text for mark in _SYNTAX):
            assert alone == text.strip(" "), (alone, text)
        if given != f"results_dir={text}" and text.isprintable() and "${" not in text:
            assert alone == text, (alone, text)

    attacks.run("override: run and other verbs", trial, 2 * TRIALS)


@pytest.mark.filterwarnings("ignore:provider=hydra.searchpath")  # a warning of Hydra, which a command prints
def test_any_value_of_any_key_is_answered_in_words(
    attacks: Attacks, runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signature = hostile.row_of(runs[0])["signature"][:12]
    hostile.copied(runs, tmp_path / "results" / "runs")
    monkeypatch.chdir(tmp_path)
    keys = ["", *"results_dir data.root data.verify budget.test_samples task.test_folder trainer.device seed".split()]
    keys += "task arithmetic margin protocol budget state x".split()

    def trial(draw: random.Random) -> None:
        key, text = draw.choice(keys), draw.choice((*TEXTS, *(hostile.name(draw, path=False) for _ in range(20))))
        text = draw.choice((text, text, "9" * 5000, "[" * 500, "'" * 3, ""))
        word = f"{key}={text}"
        answer = {
            "evaluate": lambda: verb("evaluate", signature, word),
            "list": lambda: verb("list", "runs", word),
            "tables": lambda: verb("tables", "order", word, "--output", "out"),
            "plan": lambda: verb("plan", "task=espcn", "data=synthetic", "budget=smoke", "--config-dir", "none", word),
            "export": lambda: verb("export", signature, word, "--form", "sparse"),
        }[draw.choice(("evaluate", "list", "tables", "plan", "export"))]()
        assert answer.code in (0, 1, 2)

    attacks.run("override: any value of any key", trial, 2 * TRIALS)


def test_frontier_reads_paths_as_text(
    attacks: Attacks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: list[Path]
) -> None:
    def trial(draw: random.Random) -> None:
        text = draw.choice([text for text in TEXTS if not any(mark in text for mark in _SYNTAX)])
        monkeypatch.chdir(in_place(runs, text, tmp_path / "place"))
        words = ("task=espcn", "data=synthetic", "budget=smoke", "bits=8", "sparsity=0.5", f"results_dir={text}")
        answer = verb("frontier", *words, "--finished")
        assert (answer.code, "no run is finished" in answer.out) == (0, True), answer

    attacks.run("override: frontier", trial, -(-TRIALS // 3))
