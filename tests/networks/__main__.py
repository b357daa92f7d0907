"""Print results/networks.md: `python -m tests.networks > results/networks.md`, with all libraries installed."""

import sys
import warnings

import torch

import qprune
from tests.networks.report import Row, attached, seconds_of_step, train
from tests.networks.zoo import ZOO

_HEAD = """# Networks of others

This page lists how much `qprune.compress` quantizes of networks that were not written for it, by its automatic plan and
with its defaults. The networks are small configurations with random weights. `tests/networks` trains each through all
phases, converts, saves, loads and copies it, and compares the outputs bit by bit. It also checks that every weight and
feature that a convolution or matrix product reads lies on its grid, unless coverage lists it as float.

*Weights* and *features* are quantized tensors, of all parameters of two or more dimensions and of all features that are
read, with the share of their elements. Not quantized are embeddings, other free parameters, the results, and features
that functions make where no module returns them; `qprune.coverage` names each and says what to do. *Step* is the time
of a forward and a backward pass with all operators active, relative to the float network, on one core of a CPU.
Networks this small show the cost of the calls; `results/bench.md` measures that of the arithmetic.

| network | library | weights | features | step |
| --- | --- | --- | --- | --- |"""

_FOOT = """
`python -m tests.networks > results/networks.md` prints this page."""


def main() -> None:
    """Print the page."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # compress says of some that most elements stay float; so does the table
    print(_HEAD)
    for entry in ZOO:
        if entry.missing:
            sys.exit(f"{entry.library} is not installed; make the page with all: pip install -e '.[zoo]'")
        compressor = attached(entry)
        train(entry, compressor)
        row = Row.of(entry, compressor.network, qprune.coverage(compressor.network, entry.example()))
        ratio = seconds_of_step(compressor.network, entry) / seconds_of_step(entry.make(), entry)
        print(f"{row} {ratio:.1f} |", flush=True)
    print(_FOOT)


if __name__ == "__main__":
    main()
