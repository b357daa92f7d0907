"""The callback for Lightning, against a loop of one's own."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from qprune.compression.compressor import Compressor
from tests.integrations.loops import BATCH, EPOCHS, STEPS_PER_EPOCH, compressed, data, differences, own_loop

pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging  # noqa: E402
from torch.optim.swa_utils import get_ema_avg_fn  # noqa: E402

from qprune.integrations.lightning import CompressorCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # about workers and validation
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Module(pl.LightningModule):  # type: ignore[misc,name-defined]
    def __init__(self, compressor: Compressor) -> None:
        super().__init__()
        self.network = compressor.network

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.network(*batch)["loss"]
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("score", self.network(*batch)["loss"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.network.parameters(), lr=0.1)


def fit(compressor: Compressor, folder: Path, path: Path | None = None, **options: Any) -> Module:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    callbacks = [CompressorCallback(compressor), *options.pop("callbacks", ())]
    options = {"max_epochs": EPOCHS, "logger": False, "enable_checkpointing": False} | options
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    module, loader = Module(compressor), DataLoader(data(), BATCH)
    trainer.fit(module, loader, loader, ckpt_path=path)
    return module


def test_fit_gives_the_bits_of_an_own_loop(tmp_path: Path) -> None:
    """Validation, after each epoch and before the first, observes nothing."""
    expected = own_loop(compressed())
    compressor = compressed()
    fit(compressor, tmp_path)
    assert not differences(compressor.network.state_dict(), expected)
    assert all(row["active"] for row in compressor.describe())


@pytest.mark.parametrize("step", [5, 20])
def test_a_fit_resumes_inside_a_window(step: int, tmp_path: Path) -> None:
    """At the end of an epoch: inside one, Lightning begins again with its first batch."""
    expected = own_loop(compressed())
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=step, save_top_k=-1)
    fit(compressed(), tmp_path, max_steps=step, enable_checkpointing=True, callbacks=[saving])
    compressor = compressed()
    fit(compressor, tmp_path, tmp_path / f"step={step}.ckpt")
    assert not differences(compressor.network.state_dict(), expected)


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    compressor = compressed(accumulate=5)
    seen: list[int | None] = []
    compressor.network.register_forward_pre_hook(lambda *_: seen.append(compressor.state_dict()["step"]))
    fit(compressor, tmp_path, accumulate_grad_batches=5, num_sanity_val_steps=0, limit_val_batches=0)
    assert seen == [step for step in range(EPOCHS) for _ in range(STEPS_PER_EPOCH)]
    assert all(row["active"] for row in compressor.describe())


def test_lightnings_average_is_compressed(tmp_path: Path) -> None:
    """It averages buffers too, and puts them into the network that was trained."""
    compressor, trained = compressed(), compressed()
    fit(trained, tmp_path)
    fit(compressor, tmp_path, callbacks=[WeightAveraging(avg_fn=get_ema_avg_fn(0.9))])
    network, x = compressor.network.eval(), data().tensors[0]
    assert differences(network.state_dict(), trained.network.state_dict())
    converted = compressor.convert()
    assert torch.equal(converted(x)["logits"], network(x)["logits"])
    reference = trained.convert()
    for name, value in converted.named_buffers():
        assert torch.equal(value, reference.get_buffer(name)), name
    assert float((converted.body[2].weight == 0).float().mean()) >= 0.5
    again = copy.deepcopy(network)
    assert torch.equal(again(x)["logits"], network(x)["logits"])
