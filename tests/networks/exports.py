"""Print results/exports.md: `python -m tests.networks.exports > results/exports.md`, with all libraries installed."""

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
LSB, 1/128 of the largest output. Neither form promises equality: a runtime adds in an order of its own, so that a value
close to where the next number of its grid begins may fall to the other side, and the layers behind amplify the step.

| network | library | float: equal | LSB | qdq: equal | LSB |
| --- | --- | --- | --- | --- | --- |"""


def exported(network: torch.nn.Module, entry: Network, form: str) -> tuple[str, str]:
    """Return two cells of the table, and why there is no file, or an empty text."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "network.onnx")
        try:
            qprune.export_onnx(network, entry.example(), path, form=form)
        except qprune.UserError as error:
            return "refused | ", str(error)
        found = qprune.verify_onnx(network, path, entry.example())
    # Rounded down: 100 % is everything.
    return f"{100 * (found.elements - found.differing) // found.elements}% | {found.largest_lsb:.2g}", ""


def main() -> None:
    """Print the page; the names of networks in the arguments print their rows alone."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(_HEAD)
    refused, chosen = [], [entry for entry in ZOO if len(sys.argv) == 1 or entry.name in sys.argv[1:]]
    for entry in chosen:
        if entry.missing:
            sys.exit(f"{entry.library} is not installed; make the page with all: pip install -e '.[zoo]'")
        compressor = attached(entry)
        train(entry, compressor)
        network, cells = compressor.network.eval(), []
        for form in FORMS:
            text, reason = exported(network, entry, form)
            cells.append(text)
            refused += [(form, f"- {entry.name} of {entry.library} in `{form}`: {reason}")] if reason else []
        print(f"| {entry.name} | {entry.library} | {' | '.join(cells)} |", flush=True)
    for form in FORMS:
        written = len(chosen) - sum(kind == form for kind, _ in refused)
        print(f"{chr(10) if form == FORMS[0] else ''}`{form}` is written of {written} of {len(chosen)} networks.")
    print("".join(f"\n{text}" for _, text in refused))
    print("\n`python -m tests.networks.exports > results/exports.md` prints this page.")


if __name__ == "__main__":
    main()
