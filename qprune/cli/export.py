"""`qprune export` and `qprune verify`: a finished run's network as a file, and that file beside PyTorch."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console
from rich.table import Table

from qprune.atomic_write import write_atomically, write_json
from qprune.cli.exit_codes import FAILURE
from qprune.errors import UserError, closest

if TYPE_CHECKING:
    from qprune.export.verifying import Difference, Verification
    from qprune.runs.load import FinishedRun

KEYS = ("results_dir", "data.root", "data.verify", "budget.test_samples")
_KEYS_HELP = "results_dir=..., data.root=..., data.verify=..., or budget.test_samples=... (null: the whole test set)"
_FOLD_HELP = (
    "integer: integer kernels, norms folded into their factors, equal to an integer network in PyTorch; "
    "exact: as trained, equal to the trained network in float64, in float kernels"
)
_WEIGHTS_HELP = (
    "auto (default): signed bytes, and unsigned ones on a CPU whose sums would saturate, which the runtime finds out "
    "when it loads the file; safe: unsigned ones in any case; signed: right only on a CPU with VNNI, AMX or ARM's dot "
    "products, as qprune verify shows"
)


def export(arguments: Sequence[str]) -> int:
    """Write one form of a finished run's network."""
    parser = argparse.ArgumentParser(
        "qprune export", description="Write the network of a finished run into the folder `export` of its run folder."
    )
    _run_argument(parser)
    parser.add_argument("--to", default="onnx", help="onnx (default), or sparse: nonzero weights and masks, packed")
    parser.add_argument("--fold", default="integer", help=_FOLD_HELP)
    parser.add_argument("--weights", default="auto", help=_WEIGHTS_HELP)
    parser.add_argument("--output", metavar="FILE", help="a further copy of the file")
    options = parser.parse_intermixed_args(arguments)
    _require("onnx", "onnxruntime")
    from qprune.export.exporting import export as write

    run = _load(options)
    path, program = write(run, options.to, options.fold, options.weights)
    if options.output:
        write_atomically(Path(options.output), path.read_bytes())
    console = _console()
    console.print(f"{path}: {path.stat().st_size / 1e6:.3f} MB")
    if program is not None:
        counts: dict[str, int] = {}
        for note in program.notes:
            if note["path"]:
                words = (
                    f"{note['kernel']} ({note['why']})" if note["kernel"] != "grid" and note["why"] else note["kernel"]
                )
                counts[words] = counts.get(words, 0) + 1
        for words, count in counts.items():
            what = "grids of 8 bits added where training had none" if words == "grid" else f"layers: {words}"
            console.print(f"  {count} {what}")
        for note in program.notes:
            if not note["path"]:
                console.print(f"  {note['why']}")
        console.print("  qprune verify compares it with PyTorch on the test data")
    return 0


def verify(arguments: Sequence[str]) -> int:
    """Compare an exported file with PyTorch. Exit code 1 when a promise is broken."""
    parser = argparse.ArgumentParser(
        "qprune verify",
        description="Run the exported ONNX model of a finished run in onnxruntime beside PyTorch, on the test data.",
        epilog="Exit code 1 when equality was promised and an element differs, or where it was not and the bound is "
        "exceeded. The file is written first where it is missing.",
    )
    _run_argument(parser)
    parser.add_argument("--fold", default="integer", help=_FOLD_HELP)
    parser.add_argument("--no-timing", action="store_true", help="leave out latencies, as on a busy machine")
    options = parser.parse_intermixed_args(arguments)
    _require("onnx", "onnxruntime")
    from qprune.errors import one_of
    from qprune.export.exporting import FOLDS, export, file_of
    from qprune.export.verifying import verify as compare

    one_of("--fold", options.fold, FOLDS)
    run = _load(options)
    path = file_of(run.folder, "onnx", options.fold)
    console = _console()
    if not path.exists():
        export(run, "onnx", options.fold)
        console.print(f"exported: {path}")
    found = compare(run, options.fold, timed=not options.no_timing)
    write_json(path.parent / f"verified-{options.fold}.json", asdict(found))
    _print(console, found)
    return 0 if found.kept else FAILURE


def _run_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder, or the first digits of a signature (6 or more)")
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE", help=_KEYS_HELP)


def _require(*packages: str) -> None:
    for package in packages:
        if find_spec(package) is None:
            raise UserError(f"{package} is not installed; type: pip install 'qprune[export]'")


def _load(options: argparse.Namespace) -> FinishedRun:
    from qprune.runs.load import FinishedRun

    changes: dict[str, Any] = {}
    for word in options.keys:
        key, equals, value = word.partition("=")
        if not equals or key not in KEYS:
            raise UserError(f"{word!r} is not KEY=VALUE with one of {', '.join(KEYS)}{closest(key, KEYS)}")
        changes[key] = yaml.safe_load(value)
    return FinishedRun.load(options.run, Path(changes.pop("results_dir", "results/runs")), changes)


def _console() -> Console:
    return Console(soft_wrap=True, highlight=False)


def _print(console: Console, found: Verification) -> None:
    say: Callable[[str], None] = console.print
    say(f"{found.signature[:10]}  fold {found.fold}  LSB {found.lsb:.3g} (1/128 of the largest output)")
    for name, difference in ((found.reference, found.to_reference), ("the trained network", found.to_trained)):
        say(f"  beside {name}: {_told(difference)}")
    if found.features:
        worst = max(found.features, key=lambda row: row["differing"])
        mean = sum(row["differing"] for row in found.features) / len(found.features)
        say(
            f"  features of the first test batch beside the trained network: {mean:.2%} differ on the mean of "
            f"{len(found.features)} grids, {worst['differing']:.2%} at {worst['site']}, "
            f"by at most {max(row['largest_lsb'] for row in found.features):g} LSB of their grid"
        )
    table = Table("", found.metric, box=None, pad_edge=False)
    for name, score in (
        ("stored with the run", found.score_of_row),
        ("trained network, evaluation mode", found.score_trained),
        ("reference", found.score_reference),
        ("ONNX", found.score_onnx),
    ):
        table.add_row(name, f"{score:.6g}")
    console.print(table)
    say(f"  layers: {found.integer_layers} in integer kernels, {found.float_layers} in float kernels")
    for reason in found.float_reasons:
        say(f"    float: {reason}")
    if found.added_grids:
        say(f"  {found.added_grids} grids of 8 bits were added where training had none")
    for batch, times in found.latency_ms.items():
        ours, floats = times["exported"], times["float"]
        say(f"  {batch}, 1 thread: float {floats:.3f} ms, exported {ours:.3f} ms, ratio {ours / floats:.2f}")
    whole = found.file_bytes["float onnx"]
    for name, size in found.file_bytes.items():
        say(f"  {name}: {size / 1e6:.4g} MB, {size / whole:.3f} of the float file")
    activations = ", ".join(f"{name} {size / 1e6:.4g} MB" for name, size in found.activation_bytes.items())
    say(f"  peak activations of one sample of training size: {activations}")
    if found.promise:
        say(f"equality with the reference: {'kept' if found.kept else 'BROKEN'}")
    else:
        say(f"no equality is promised; mean difference within 1 LSB: {'kept' if found.kept else 'BROKEN'}")


def _told(difference: Difference) -> str:
    return (
        f"{difference.differing} of {difference.elements} output elements differ, "
        f"by at most {difference.largest_lsb:.4g} LSB, {difference.mean_lsb:.2g} LSB on the mean"
    )
