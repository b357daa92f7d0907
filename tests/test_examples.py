"""The examples, as a user runs them."""

import re
import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


def printed_by(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    state = torch.get_rng_state()
    try:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    finally:
        torch.set_rng_state(state)
    return capsys.readouterr().out


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"classifier", "functional", "transformer"}


def test_a_classifier_of_torchvision(capsys: pytest.CaptureFixture[str]) -> None:
    printed = printed_by("classifier", capsys)
    assert printed.startswith(
        "not compressed: 0 of 13 weights, 1 of 13 features\n  feature fc, 96 elements: the network"
    )
    assert "sparsity: {'weight': 0.5, 'feature': 0.5}\nconverted outputs equal: True\n" in printed
    (score,) = re.findall(r"^epoch 9: ([\d.]+) %$", printed, re.MULTILINE)
    assert float(score) > 80
    ((floats, now),) = re.findall(r"size: ([\d.]+) Mb as floats, ([\d.]+) Mb now", printed)
    assert float(now) < float(floats) / 7.5  # 8 of 32 bits, and half of them; biases and norms stay


def test_functional_activations(capsys: pytest.CaptureFixture[str]) -> None:
    printed = printed_by("functional", capsys)
    assert "not compressed: 1 of 14 weights, 2 of 19 features; pruned but float: 3\n" in printed
    assert "not compressed: 1 of 14 weights, 2 of 19 features\n" in printed
    assert printed.count("converted outputs equal: True") == 2
    assert all(float(score) > 90 for score in re.findall(r"accuracy: ([\d.]+) %", printed))
    ((functions, modules),) = re.findall(r"size: ([\d.]+) Mb with functions, ([\d.]+) Mb with", printed)
    # 3 tensors of 16x16x16, half of them kept: 32 bits each, or 8
    assert float(functions) - float(modules) == pytest.approx(3 * 16**3 * 0.5 * 24 / 1e6, abs=0.011)


def test_a_transformer(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(
        UserWarning, match="most elements stay float: features: 7 of 16 compressed, 42.9% of the elements"
    ):
        printed = printed_by("transformer", capsys)
    assert printed.startswith("not compressed: 3 of 11 weights, 9 of 16 features\n")
    assert "sparsity: {'weight': 0.5, 'feature': 0.5}\nconverted outputs equal: True\n" in printed
    (scores,) = re.findall(r"^accuracy at 6, 9 and 12 tokens: (.*)$", printed, re.MULTILINE)
    assert all(float(score.strip(" %")) > 85 for score in scores.split(","))
