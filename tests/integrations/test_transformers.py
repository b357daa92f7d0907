"""The callback for the Trainer of transformers, against a loop of one's own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qprune.compression.compressor import Compressor
from tests.integrations.loops import BATCH, EPOCHS, STEPS_PER_EPOCH, compressed, data, differences, own_loop

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from qprune.integrations.transformers import FILE, CompressorCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class InOrder(transformers.Trainer):  # type: ignore[misc,name-defined]
    """Takes batches in order, as the loop that it is compared with."""

    def _get_train_sampler(self, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def collated(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    x, labels = zip(*samples, strict=True)
    return {"x": torch.stack(x), "labels": torch.stack(labels)}


def train(compressor: Compressor, folder: Path, resume: bool = False, **options: Any) -> None:
    options = {"num_train_epochs": EPOCHS, "save_strategy": "no", "eval_strategy": "no"} | options
    arguments = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        weight_decay=0.0,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        remove_unused_columns=False,
        **options,
    )
    trainer = InOrder(
        compressor.network,
        arguments,
        data_collator=collated,
        train_dataset=data(),
        eval_dataset=data(),
        callbacks=[CompressorCallback(compressor)],
    )
    trainer.train(resume_from_checkpoint=resume)


def test_train_gives_the_bits_of_an_own_loop(tmp_path: Path) -> None:
    """Evaluation after each epoch observes nothing."""
    expected = own_loop(compressed())
    compressor = compressed()
    train(compressor, tmp_path, eval_strategy="epoch")
    assert not differences(compressor.network.state_dict(), expected)
    assert all(row["active"] for row in compressor.describe())


@pytest.mark.parametrize("step", [4, 7, 21])
def test_a_training_resumes_inside_a_window(step: int, tmp_path: Path) -> None:
    expected = own_loop(compressed())
    train(compressed(), tmp_path, max_steps=step, save_strategy="steps", save_steps=step)
    assert (tmp_path / f"checkpoint-{step}" / FILE).exists()
    compressor = compressed()
    train(compressor, tmp_path, resume=True)
    assert not differences(compressor.network.state_dict(), expected)


def test_a_checkpoint_without_the_compressors_state_is_refused_inside_a_window(tmp_path: Path) -> None:
    train(compressed(), tmp_path, max_steps=4, save_strategy="steps", save_steps=4)
    (tmp_path / "checkpoint-4" / FILE).unlink()
    with pytest.raises(Exception, match="step 4 lies inside a window of observations.*load the compressor's state too"):
        train(compressed(), tmp_path, resume=True)


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    compressor = compressed(accumulate=5)
    seen: list[int | None] = []
    compressor.network.register_forward_pre_hook(lambda *_: seen.append(compressor.state_dict()["step"]))
    train(compressor, tmp_path, gradient_accumulation_steps=5)
    assert seen == [step for step in range(EPOCHS) for _ in range(STEPS_PER_EPOCH)]
    assert all(row["active"] for row in compressor.describe())
