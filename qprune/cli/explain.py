"""`qprune explain`: why two runs differ, per tensor and event."""

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from qprune.atomic_write import csv_bytes, own_place, write_atomically
from qprune.cli.export import KEYS, keys_last, load_run
from qprune.errors import UserError
from qprune.training.progress import print_text


def explain(arguments: Sequence[str]) -> int:
    """Print the comparison of two runs, and write its tables and figure; return the exit code."""
    parser = argparse.ArgumentParser(
        "qprune explain",
        description="Compare two finished runs of a task: what each event cost and training regained, fraction bits "
        "and noise of pruned and unpruned tensors, gradients that Eq. 2 clips, masks in common and exchanged. "
        "Runs trained with trainer.keep_events=true are compared around each event, others at their ends.",
        epilog=f"KEY=VALUE: {', '.join((*KEYS, 'trainer.device'))}",
    )
    parser.add_argument("first", metavar="RUN", help="a run folder, or the first digits of a signature (6 or more)")
    parser.add_argument("second", metavar="RUN", help="another run of the same task")
    text = "for both runs, such as budget.test_samples=1000"
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE", default=[], help=text)
    parser.add_argument("--output", metavar="DIR", help="where the files go; default: explain/ below results_dir")
    options = parser.parse_intermixed_args(arguments)
    legal = (*KEYS, "trainer.device")
    one, other, *keys = keys_last((options.first, options.second, *options.keys), legal)
    first, second = (load_run((name, *keys), legal) for name in (one, other))
    if first.row.task != second.row.task or first.row.metric != second.row.metric:
        raise UserError(
            f"{one} is a run of {first.row.task} ({first.row.metric}) and {other} of "
            f"{second.row.task} ({second.row.metric}); name two runs of one task, scored alike"
        )
    from qprune.reporting.explain import explain as explanation
    from qprune.reporting.explain import sentences, tables

    found = explanation(first, second)
    console = Console(soft_wrap=True, highlight=False)
    for sentence in sentences(found):
        print_text(sentence)
    for table in tables(found):
        console.print("", table)
    name = f"{first.row.task}-{first.row.signature[:10]}-{second.row.signature[:10]}"
    folder = (
        Path(options.output) if options.output else own_place(first.folder.absolute().parents[1], f"explain/{name}")
    )
    for part in ("terms", "events", "tensors", "masks", "exchanged"):
        write_atomically(folder / f"{part}.csv", csv_bytes(getattr(found, part)))
    print_text(f"tables: {folder}")
    if find_spec("matplotlib") is None:  # installed with the extra `report`
        print_text("no figure: type pip install 'qprune[report]'")
    else:
        from qprune.reporting.explain_figure import draw
        from qprune.reporting.figures import save

        save(draw(found), folder, "explain")
        print_text(f"figure: {folder / 'explain.png'}")
    return 0
