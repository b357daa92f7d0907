"""Print docs/exports.md: `python -m tests.networks.exports > docs/exports.md`, with all libraries installed."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import qprune
from tests.networks.report import attached, train
from tests.networks.zoo import ZOO, Network

FORMS = ("float", "qdq")
_HEAD = """# Exports of networks of others

Each network of [](networks.md), compressed and trained as there, written by `qprune.export_onnx` and compared with
PyTorch in onnxruntime on one batch: the share of outputs that are equal in every bit, and the largest difference in
LSB, 1/128 of the largest output. What cannot be written is listed with torch's own reason.

| network | library | float: equal | LSB | qdq: equal | LSB |
| --- | --- | --- | --- | --- | --- |"""


def exported(network: torch.nn.Module, entry: Network, form: str) -> str:
    """Return two cells of the table."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "network.onnx")
        try:
            qprune.export_onnx(network, entry.example(), path, form=form)
        except qprune.UserError as error:
            return f"{error} | "
        found = qprune.verify_onnx(network, path, entry.example())
    return f"{1 - found.differing / found.elements:.0%} | {found.largest_lsb:.2g}"


def main() -> None:
    """Print the page; the names of networks in the arguments print their rows alone."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(_HEAD)
    for entry in ZOO:
        if len(sys.argv) > 1 and entry.name not in sys.argv[1:]:
            continue
        if entry.missing:
            sys.exit(f"{entry.library} is not installed; make the page with all: pip install -e '.[zoo]'")
        compressor = attached(entry)
        train(entry, compressor)
        cells = " | ".join(exported(compressor.network.eval(), entry, form) for form in FORMS)
        print(f"| {entry.name} | {entry.library} | {cells} |", flush=True)
    print("\n`python -m tests.networks.exports > docs/exports.md` prints this page.")


if __name__ == "__main__":
    main()
