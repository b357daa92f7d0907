"""Histograms that are made afterwards are those that the run itself makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from qprune.errors import UserError
from qprune.runs.count_features import count_features
from qprune.runs.execute import execute
from tests.runs.test_execute import config


def test_histograms_made_afterwards_are_those_of_the_run(tmp_path: Path) -> None:
    execute(config(tmp_path))
    [path] = tmp_path.rglob("histograms.json")
    expected = path.read_bytes()
    path.unlink()
    before = {other: other.read_bytes() for other in path.parent.iterdir()}
    count_features(path.parent)
    assert path.read_bytes() == expected
    assert {other: other.read_bytes() for other in path.parent.iterdir() if other != path} == before


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="config.yaml is missing or not readable"):
        count_features(tmp_path)
    execute(config(tmp_path))
    [network] = tmp_path.rglob("network.safetensors")
    network.write_bytes(network.read_bytes()[:100])
    with pytest.raises(UserError, match=r"network.safetensors does not hold the network of this run"):
        count_features(network.parent)
