"""NaN and infinity: where they begin is said by layer, step and phase, and the last good checkpoint stays good."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qprune.errors import RunFailure
from qprune.training import checkpoint
from tests.training.toy import prepared


def fails(folder: Path, harm: Any, **changes: Any) -> str:
    """The error of a toy run (24 steps, 3 an epoch) to which `harm(trainer)` is done; its checkpoints are good."""
    _, _, trainer = prepared(folder, **changes)
    harm(trainer)
    with pytest.raises(RunFailure) as error:
        trainer.fit()
    saved = checkpoint.load_newest(folder / "checkpoints")
    assert saved is None or all(torch.isfinite(value).all() for value in saved["task"].values())
    return str(error.value)


def first_hook(module: Any, hook: Any) -> None:
    """Call `hook` after `module`, before the operators of its feature."""
    handle = module.register_forward_hook(hook)
    module._forward_hooks.move_to_end(handle.id, last=False)


@pytest.mark.parametrize("minutes", [0.0, 5.0], ids=["from a checkpoint", "from the beginning"])
def test_a_layer_is_named_with_its_step_and_phase(minutes: float, tmp_path: Path) -> None:
    def harm(trainer: Any) -> None:
        def overflow(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            return output / 0 if trainer.step == 10 and module.training else output

        trainer.task.network[2].register_forward_hook(overflow)

    message = fails(tmp_path, harm, checkpoint_minutes=minutes)
    assert "by step 1" in message
    assert "traced to step 11 (phase P 3/4), where the output of network.2 is the first that is not finite" in message
    assert "the newest checkpoint is from before" in message


def test_a_weight_that_an_update_spoils_is_named_and_never_saved(tmp_path: Path) -> None:
    """The loss of that step is finite: a checkpoint after it would be a bad one."""

    def harm(trainer: Any) -> None:
        step = trainer.task.optimizer.step

        def spoiling(*args: Any, **kwargs: Any) -> None:
            step(*args, **kwargs)
            if trainer.step == 7:
                with torch.no_grad():
                    trainer.task.network[4].bias.fill_(float("inf"))

        trainer.task.optimizer.step = spoiling

    message = fails(tmp_path, harm, checkpoint_minutes=0.0)
    assert "network.4.bias is not finite by step 8 (phase P 2/4)" in message
    assert "traced to step 8 (phase P 2/4), after whose update network.4.bias is not finite" in message
    saved = checkpoint.load_newest(tmp_path / "checkpoints")
    assert saved is not None
    assert saved["step"] == 7


def test_a_loss_that_is_not_finite_by_itself_is_told_from_a_layer(tmp_path: Path) -> None:
    def harm(trainer: Any) -> None:
        train_step = trainer.task.train_step

        def diverging(batch: Any) -> Any:
            losses = train_step(batch)
            return losses | {"twice": losses["twice"] / 0} if trainer.step == 4 else losses

        trainer.task.train_step = diverging

    message = fails(tmp_path, harm)
    assert "the loss 'twice' is inf by step 6 (phase P 1/4)" in message
    assert "traced to step 5 (phase P 1/4), where all layers' outputs are finite and the loss 'twice' is not" in message


def test_a_feature_is_named_at_the_event_that_would_decide_on_it(tmp_path: Path) -> None:
    def harm(trainer: Any) -> None:
        def overflow(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            observing = trainer.step == 17 and module.training
            return output.clamp(min=float("inf")) if observing else output

        first_hook(trainer.task.network[1], overflow)

    message = fails(tmp_path, harm)
    assert "not finite" in message
    assert "network.1" in message or "'1'" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_feature_that_is_not_finite_makes_no_score(value: float, tmp_path: Path) -> None:
    """The quantizer behind it would hide an infinity, and a class is a class even when it is chosen among NaN."""

    def harm(trainer: Any) -> None:
        def spoil(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            late = trainer.step >= 21 and not module.training
            return output.masked_fill(torch.ones_like(output, dtype=torch.bool), value) if late else output

        def evaluate() -> dict[str, float]:
            trainer.task.network.eval()(torch.ones(1, 2, 5, 5))
            return {"negative_mse": 1.0}

        trainer.task.evaluate = evaluate
        first_hook(trainer.task.network[1], spoil)

    message = fails(tmp_path, harm)
    assert "the output of 1 is not finite in the evaluation after step 21 (phase P 4/4 Q(w,f)); no row" in message
