"""The README's code is run as it stands there."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

README = Path(__file__).parent.parent / "README.md"


def test_the_library_snippet_runs_and_keeps_its_promises(capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(snippet, names)
    network, compressor, small = names["network"].eval(), names["compressor"], names["small"]
    images = names["images"]
    assert torch.equal(small(images), network(images))
    assert compressor.sparsity == {"weight": pytest.approx(0.5, abs=1e-4), "feature": pytest.approx(0.5, abs=1e-4)}
    float_mb = sum(p.numel() for p in network.parameters()) * 32 / 1e6
    printed = float(capsys.readouterr().out.split()[0])
    assert printed < float_mb / 6  # 4 of 32 bits for most weights; features are small at 32x32


def test_every_command_of_the_readme_names_a_verb() -> None:
    from qprune.cli.main import VERBS

    verbs = re.findall(r"^\.venv/bin/qprune (\w+)", README.read_text(), re.MULTILINE)
    assert len(verbs) >= 5
    assert set(verbs) <= set(VERBS)
