"""A finished run reloaded: its network, its fraction bits for another run, and what is refused."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from qprune.errors import UserError
from qprune.runs.execute import execute
from qprune.runs.load import FinishedRun
from tests.runs.test_execute import config


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run folder"):
        FinishedRun.load(str(tmp_path), tmp_path)
    execute(config(tmp_path))
    [network] = tmp_path.rglob("network.safetensors")
    network.write_bytes(network.read_bytes()[:100])
    with pytest.raises(UserError, match=r"network.safetensors is not as its run wrote it"):
        FinishedRun.load(str(network.parent), tmp_path)
    (network.parent / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match=r"network.safetensors cannot be read"):
        FinishedRun.load(str(network.parent), tmp_path)


def test_fraction_bits_of_another_run_are_fixed_from_the_start(tmp_path: Path) -> None:
    source = execute(config(tmp_path, "order.name=quantize_only", "order.steps=[quantize]"))
    row = execute(config(tmp_path, f"quantize.decimal_from={source.signature[:12]}"))
    fraction_bits = []
    for each in (source, row):
        [path] = tmp_path.glob(f"*/*-{each.signature[:10]}/network.safetensors")
        values = {k: v for k, v in load_file(path).items() if k.endswith("decimal")}
        fraction_bits.append([values[name].tolist() for name in sorted(values)])
    assert fraction_bits[0] == fraction_bits[1]
    with pytest.raises(UserError, match="no finished run below .* has a signature that begins with abcdef0123"):
        execute(config(tmp_path, "quantize.decimal_from=abcdef0123"))
