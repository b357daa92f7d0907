"""Decimal bits taken from a finished run and fixed from the start: Q_u(x, d*) of Table 1."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from qprune.compression.prepare import find_operators
from qprune.compression.quantizer import Quantizer
from qprune.errors import UserError
from qprune.runs.checksums import check_sum
from qprune.runs.row import ROW_FILE

NETWORK_FILE = "network.safetensors"


def finished_run(results_dir: Path, signature: str) -> Path:
    """The folder of the finished run with this signature (or its first 10 digits or more). Raises UserError."""
    key = "quantize.decimal_from"
    if not isinstance(signature, str) or len(signature) < 10 or not set(signature) <= set("0123456789abcdef"):
        raise UserError(
            f"{key}={signature!r} is not the signature of a run; give it from the run's {ROW_FILE}, or its first 10 "
            "digits, with which the name of the run folder ends"
        )
    for row in sorted(results_dir.glob(f"*/*-{signature[:10]}/{ROW_FILE}")):
        if f'"signature": "{signature}' in row.read_text(encoding="utf-8"):
            return row.parent
    raise UserError(
        f"{key}={signature} is not the signature of a finished run below {results_dir}; finish that run first"
    )


def fix_decimals(network: nn.Module, folder: Path) -> None:
    """Give every quantizer of `network` the decimal bits that it has in the run in `folder`, for good.

    Raises UserError for a quantizer that the run lacks, or has with another number of decimal bits.
    """
    path = folder / NETWORK_FILE
    check_sum(path)
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"quantize.decimal_from: {path} cannot be read ({error})") from error
    theirs = {_site(name): value for name, value in saved.items() if name.endswith(".decimal")}
    names = {id(buffer): name for name, buffer in network.named_buffers() if name.endswith("decimal")}
    for placed in find_operators(network):
        if not isinstance(quantizer := placed.operator, Quantizer):
            continue
        site = _site(names[id(quantizer.decimal)])
        if site not in theirs or theirs[site].shape != quantizer.decimal.shape:
            raise UserError(
                f"quantize.decimal_from: the run in {folder} has no decimal bits that fit {placed.kind} {placed.path}; "
                "give a run of the same task with the same quantize.targets and quantize.weight_axis"
            )
        with torch.no_grad():
            quantizer.decimal.copy_(theirs[site])
        quantizer.searches = False


def _site(buffer: str) -> str:
    """The name of a `decimal` without its place in a chain of operators: a pruner may stand before it, or none."""
    return re.sub(r"(\.parametrizations\.weight)\.\d+", r"\1", buffer)
