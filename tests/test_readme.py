"""The README's code is run as it stands there, and its numbers are those of the stored tables."""

import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import qprune

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_library_snippet_runs_and_keeps_its_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(snippet, names)
    network, compressor, small = names["network"].eval(), names["compressor"], names["small"]
    images = names["images"]
    assert torch.equal(small(images), network(images))
    assert compressor.sparsity == {"weight": pytest.approx(0.5, abs=1e-4), "feature": pytest.approx(0.5, abs=1e-4)}
    float_bits = sum(p.numel() for p in network.parameters()) * 32
    # 4 of 32 bits for most weights; features are small at 32x32
    assert qprune.actual_footprint(network, images[:1]).size_bits() < float_bits / 6

    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    (line,) = re.findall(r"`(qprune\.export_onnx\(.*?\))`", README)
    monkeypatch.chdir(tmp_path)
    exec(line, names)
    assert qprune.verify_onnx(network, "network.onnx", images).largest_lsb < 0.01


def test_the_table_is_that_of_the_stored_results() -> None:
    rows = pd.concat([pd.read_csv(ROOT / f"results/tables/table{number}.csv") for number in (2, 3, 4)])
    rows = rows[rows["part"] == "(c) ESPCN"].drop_duplicates("label").set_index("label")
    shown = re.findall(
        r"^\| (float|[QP][^ :]+).* \| ([\d.]+) ± ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", README, re.MULTILINE
    )
    assert [label.replace("float", "Baseline") for label, *_ in shown] == list(rows.index)
    for label, *cells in shown:
        row = rows.loc[label.replace("float", "Baseline")]
        size = row["weight_mb_actual"] + row["feature_mb_actual"]
        assert cells == [f"{row[name]:.2f}" for name in ("score", "score_sd", "paper_score")] + [f"{size:.1f}"]
        assert row["n"] == 10
