"""`qprune verify`: compare an exported network with PyTorch."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from qprune.atomic_write import write_json
from qprune.cli.export import FORM_HELP, add_run_arguments, load_run, require_packages
from qprune.cli.failures import FAILURE
from qprune.errors import one_of
from qprune.training.progress import print_text

if TYPE_CHECKING:
    from qprune.export.verification import Difference, Verification


def verify(arguments: Sequence[str]) -> int:
    """Compare an exported file with PyTorch; return 1 if a promise is broken."""
    parser = argparse.ArgumentParser(
        "qprune verify",
        description="Run the exported ONNX model of a finished run in onnxruntime and in PyTorch, on the test data.",
        epilog="Exit code 1 when equality is promised and an output differs, or when it is not promised and the mean "
        "difference exceeds its bound. A missing file is exported first.",
    )
    add_run_arguments(parser)
    parser.add_argument("--form", default="integer", help=FORM_HELP)
    parser.add_argument("--no-timing", action="store_true", help="measure no latencies, as on a busy machine")
    options = parser.parse_intermixed_args(arguments)
    form = options.form
    require_packages()
    from qprune.export.files import export_run, exported_file
    from qprune.export.onnx_files import FORMS
    from qprune.export.verification import verify_run

    one_of("--form", form, FORMS)
    run = load_run((options.run, *options.keys))
    path = exported_file(run.folder, form)
    missing = not path.exists()
    if missing:
        export_run(run, form)
    found = verify_run(run, form, timed=not options.no_timing)
    write_json(path.parent / f"verified-{form}.json", asdict(found))
    for line in _verdict(found):
        print_text(line)
    if missing:
        print_text(f"exported: {path}")
    for line in _details(found):
        print_text(f"  {line}")
    return 0 if found.kept else FAILURE


def _verdict(found: Verification) -> Iterator[str]:
    """Yield the verdict in a line: equal or not, how fast, how good; then what is promised."""
    from qprune.export.verification import BOUND_LSB

    difference, score = found.to_reference, f"{found.metric} {found.score_onnx:.6g}"
    parts = [f"{'not ' if difference.differing else ''}equal to {found.reference}: {_described(difference)}"]
    parts += [_speed(found.latency_ms["batch 1"])] if found.latency_ms else []
    as_trained = score == f"{found.metric} {found.score_trained:.6g}"
    yield "; ".join([*parts, f"{score}{' as trained' if as_trained else f', {found.score_trained:.6g} as trained'}"])
    if not found.rounds:
        yield "equality is promised" + ("" if found.kept else ", and broken: write the file again with qprune export")
    else:
        bound = f"the bound of {BOUND_LSB:g} LSB on the mean difference {'holds' if found.kept else 'is BROKEN'}"
        yield f"equality is not promised: {found.rounds}; {bound}"


def _speed(times: dict[str, float]) -> str:
    ratio = times["exported"] / times["float"]
    if ratio <= 1:
        return f"{ratio:.2f} of the float model's latency"
    return f"{ratio:.1f} times slower than the float model"


def _described(difference: Difference) -> str:
    text = f"{difference.differing:,} of {difference.elements:,} outputs differ"
    largest = f", by at most {difference.largest_lsb:.2g} LSB, {difference.mean_lsb:.2g} on the mean"
    return text + (largest if difference.differing else "")


def _details(found: Verification) -> Iterator[str]:
    lsb = found.to_reference.lsb
    yield f"{found.signature[:10]}, form {found.form}; an LSB is 1/128 of the largest output, {lsb:.3g}"
    yield (
        f"{found.metric}: {found.score_onnx:.6g} exported, {found.score_reference:.6g} reference, "
        f"{found.score_trained:.6g} trained, {found.score_of_row:.6g} stored with the run"
    )
    yield f"compared with the trained network in float32: {_described(found.to_trained)}"
    if found.features:
        worst = max(found.features, key=lambda row: row["differing"])
        mean = sum(row["differing"] for row in found.features) / len(found.features)
        yield (
            f"features of the first test batch: {mean:.2%} differ from the trained network on the mean of "
            f"{len(found.features)} grids, {worst['differing']:.2%} at {worst['site']}, "
            f"by at most {max(row['largest_lsb'] for row in found.features):g} LSB of their grid"
        )
    yield f"layers: {found.integer_layers} in integer kernels, {found.float_layers} in float kernels"
    yield from (f"  float: {reason}" for reason in found.float_reasons)
    if found.added_grids:
        yield f"{found.added_grids} grids of 8 bits were added where training had none"
    for batch, times in found.latency_ms.items():
        yield f"{batch}, 1 thread: float {times['float']:.3f} ms, exported {times['exported']:.3f} ms: {_speed(times)}"
    for name, size in found.file_bytes.items():
        yield f"{name}: {size / 1e6:.4g} MB, {size / found.file_bytes['float onnx']:.3f} of the float file"
