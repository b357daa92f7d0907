"""`qprune evaluate`: every score of a finished run's network, on its own test data or on other data."""

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from qprune.cli.export import KEYS, add_run_arguments, load_run
from qprune.errors import UserError
from qprune.training.progress import plain, print_text

FOLDERS = ("test_folder", "further_test_folders", "folder", "train_folder", "test_split", "train_split")


def evaluate(arguments: Sequence[str]) -> int:
    """Print the scores beside those that the run stored; return the exit code."""
    parser = argparse.ArgumentParser(
        "qprune evaluate",
        description="Evaluate the trained network of a finished run and print every score beside the stored one.",
        epilog="On other data: qprune evaluate RUN task.test_folder=set14, or beside the test set "
        'qprune evaluate RUN "task.further_test_folders=[set14,/data/bsd100]". Nothing is written.',
    )
    add_run_arguments(parser)
    options = parser.parse_intermixed_args(arguments)
    legal = (*KEYS, "trainer.device", *(f"task.{name}" for name in FOLDERS))
    words = (options.run, *options.keys)
    run = load_run(words, legal)
    own = [word for word in words if word.startswith("task.") and word.partition("=")[0] in legal]
    if own and run.config.data.source == "synthetic":
        raise UserError(f"{own[0]}: the run was trained on synthetic data, which is made in memory; leave the key out")
    scores = run.evaluate()
    stored = {run.row.metric: run.row.score} | run.row.metrics
    table = Table("score", "now", "stored with the run", box=None, pad_edge=False)
    for name in dict.fromkeys([*scores, *stored]):
        table.add_row(plain(name), *(f"{values[name]:.6g}" if name in values else "-" for values in (scores, stored)))
    print_text(f"{run.row.task}  {run.row.notation}  seed {run.row.seed}  {run.row.signature[:10]}")
    Console(soft_wrap=True, highlight=False).print(table)
    if run.task.marks:
        print_text(f"not comparable with the paper: {'; '.join(run.task.marks)}")
    return 0
