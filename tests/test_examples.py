"""The examples, as a user runs them."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

EXAMPLES = Path(__file__).parent.parent / "examples"


def printed_by(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    state = torch.get_rng_state()
    try:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    finally:
        torch.set_rng_state(state)
    return capsys.readouterr().out


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"classifier", "functional", "pretrained", "transformer"}


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


def test_a_pretrained_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a small network and noise in place of the package's network and CIFAR-10."""
    for package in ("onnxruntime", "onnxscript", "qonnx"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    names = runpy.run_path(str(EXAMPLES / "pretrained.py"))
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8)]
    network = nn.Sequential(*layers, nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    pictures = names["Pictures"](torch.randint(256, (96, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (96,)))
    names["steps"](network, pictures, pictures, tmp_path)
    printed = capsys.readouterr().out
    assert "converted outputs equal: True\n" in printed
    assert re.search(r"^qonnx: \d\.\d MB; 0 of 80 outputs differ", printed, re.MULTILINE)
    assert re.search(r"^integer: .*; equal to the same integers in PyTorch: True$", printed, re.MULTILINE)
    assert re.search(r"^integers: \d\.\d MB; 3 of 3 weights equal$", printed, re.MULTILINE)
    page = names["PAGE"].read_text(encoding="utf-8")
    for section, lines in names["PRINTED"].items():  # the page has what the script prints today, but for the numbers
        (shown,) = re.findall(rf"% printed: {section}\n```text\n(.*?)\n```", page, re.DOTALL)
        found = [line.split(":")[0] for line in shown.splitlines() if not line.startswith(("note:", "  "))]
        assert found == [line.split(":")[0] for line in lines]
