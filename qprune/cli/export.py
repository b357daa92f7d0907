"""`qprune export`: write a finished run's network as ONNX or in sparse form."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qprune.atomic_write import write_atomically
from qprune.cli.output import DEFAULT_RESULTS, RESULTS_DIR
from qprune.config.compose import Composer
from qprune.errors import UserError, closest, counted
from qprune.training.progress import print_text

if TYPE_CHECKING:
    from qprune.runs.load import FinishedRun

KEYS = (RESULTS_DIR, "data.root", "data.verify", "budget.test_samples")
_KEYS_HELP = "results_dir=..., data.root=..., data.verify=..., or budget.test_samples=... (null: the whole test set)"
FORM_HELP = (
    "integer (default): 8-bit integer kernels with batch norms folded in; float: the trained network, its grids "
    "simulated by plain nodes; qdq: grids as QuantizeLinear and DequantizeLinear; qonnx: grids as Quant"
)
_ARCHIVES_HELP = (
    "integers: whole numbers, for C and RTL; sparse: nonzero weights and masks, packed; hls4ml: a project for FPGAs"
)
_WEIGHTS_HELP = (
    "type of integer weights: auto (default), int8, and uint8 on a CPU whose int8 sums would saturate, chosen when the "
    "file is loaded; safe, uint8; signed, int8, right only on a CPU with VNNI, AMX or ARM's dot products"
)


def export(arguments: Sequence[str]) -> int:
    """Write one form of a finished run's network; return the exit code."""
    parser = argparse.ArgumentParser(
        "qprune export", description="Write the network of a finished run into the folder `export` of its run folder."
    )
    add_run_arguments(parser)
    parser.add_argument("--form", default="integer", help=f"{FORM_HELP}; {_ARCHIVES_HELP}")
    parser.add_argument("--weights", default="auto", help=_WEIGHTS_HELP)
    parser.add_argument("--output", metavar="FILE", help="a further copy of the file")
    options = parser.parse_intermixed_args(arguments)
    form = options.form
    if options.output and form == "hls4ml":
        raise UserError("--output copies a file, and --form hls4ml writes a folder; leave --output out")
    require_packages()
    from qprune.export.files import export_run

    exported = export_run(load_run((options.run, *options.keys)), form, options.weights)
    path = exported.path
    if options.output and path.is_file():
        write_atomically(Path(options.output), path.read_bytes())
    size = f"{path.stat().st_size / 1e6:.3f} MB" if path.is_file() else ""
    print_text(f"{path}: {'; '.join(text for text in (size, exported.verdict) if text)}")
    for line in _summary(exported.notes):
        print_text(f"  {line}")
    if form not in ("hls4ml", "integers", "sparse"):
        print_text(f"  qprune verify RUN --form {form} compares it with PyTorch on the test data")
    return 0


def _summary(notes: Sequence[dict[str, Any]]) -> list[str]:
    """Return how many layers are computed how, and why."""
    counts = Counter((note["kernel"], "" if note["kernel"] == "grid" else note["why"]) for note in notes)
    return [
        f"{counted(number, 'grid')} of 8 bits added where training had none"
        if kernel == "grid"
        else f"{kernel}: {counted(number, 'layer')}{why and f' ({why})'}"
        for (kernel, why), number in counts.items()
    ]


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a finished run."""
    parser.add_argument("run", metavar="RUN", help="a run folder, or the first digits of a signature (6 or more)")
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE", default=[], help=_KEYS_HELP)
    parser.add_argument("--config-dir", metavar="DIR", help="not needed: a run's folder holds its whole config")


def require_packages() -> None:
    """Raise UserError unless the extra `export` is installed."""
    for package in ("onnx", "onnxruntime", "onnxscript"):
        if find_spec(package) is None:
            raise UserError(f"{package} is not installed; type: pip install 'qprune[export]'")


def keys_last(words: Sequence[str], legal: Sequence[str]) -> list[str]:
    """Put the words that set a `legal` key after the others: users may type runs and keys in any order."""
    return sorted(words, key=lambda word: word.partition("=")[0] in legal)


def load_run(words: Sequence[str], legal: Sequence[str] = KEYS) -> FinishedRun:
    """Load the run that one word names, by folder or signature; the others, KEY=VALUE, change its config."""
    run, *keys = keys_last(words, legal)
    for word in keys:
        key, equals, _ = word.partition("=")
        if not equals or key not in legal:
            raise UserError(f"{word!r} is not KEY=VALUE with one of {', '.join(legal)}{closest(key, legal)}")
    with Composer() as composer:
        changes = composer.values(keys)
    from qprune.runs.load import FinishedRun  # late: it imports torch, which bad input need not wait for

    return FinishedRun.load(run, Path(changes.pop(RESULTS_DIR, DEFAULT_RESULTS)), changes)
