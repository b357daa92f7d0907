"""Very small runs that pass through every phase: an epoch of float training, masks at four events, quantization."""

from typing import Any

from qprune.config.compose import compose_run

_SMALL = (
    *("data=synthetic", "budget=smoke", "budget.epochs=null", "epochs=4", "budget.test_samples=4", "prune.window=6"),
    *("trainer.device=cpu", "trainer.threads=1", "schedule.n=4"),
)
_ORDERS = {
    "prune_first": ("order=prune_first", "schedule.t_p=1", "schedule.dt_p=0.5", "schedule.t_qw=3", "schedule.t_qf=3.5"),
    "quantize_first": (
        *("order=quantize_first", "schedule.t_p=2.25", "schedule.dt_p=0.25", "schedule.t_qw=1.5", "schedule.t_qf=2"),
    ),
}
# 16 steps, 8 for CIFAR's larger network
RECIPES = {
    "espcn": ("task=espcn", *_ORDERS["quantize_first"], "budget.batch_size=4", "budget.steps_per_epoch=4"),
    "cifar": ("task=cifar", *_ORDERS["prune_first"], "budget.batch_size=3", "budget.steps_per_epoch=2"),
    "cyclegan": (
        *("task=cyclegan", *_ORDERS["prune_first"], "budget.batch_size=2", "budget.steps_per_epoch=4"),
        *("task.image_size=32", "task.width=4", "task.blocks=1", "task.pool_size=2", "prune.window=4"),
    ),
}


def config_of(*overrides: str) -> dict[str, Any]:
    """A composed and resolved config."""
    return compose_run(overrides).plain()


def small(task: str, *overrides: str) -> tuple[str, ...]:
    """The overrides of a small run of `task`."""
    return (*_SMALL, *RECIPES[task], *overrides)
