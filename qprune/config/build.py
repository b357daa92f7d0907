"""The recipe of a run: a checked config as the values that training takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qprune.compression.config import PruneConfig, QuantizeConfig
from qprune.compression.footprint import PaperSize
from qprune.compression.schedule import Schedule
from qprune.config.schema import RunConfig, naming_keys
from qprune.config.signature import Config, as_dict


@dataclass(frozen=True)
class DataOptions:
    """Where a task's data comes from."""

    source: str = "real"  # files below `root`, or `synthetic`: made in memory from the seed, offline
    root: str | None = None
    verify: bool = True  # refuse a real set whose checksums differ from the published ones
    validation: float = 0.0  # fraction of the training set that is kept apart, to choose by
    fetch: bool = True  # sets and weights that are missing may be downloaded


@dataclass(frozen=True)
class Limits:
    """How much of the recipe is run, at most; None stands for all of it."""

    epochs: int  # that are trained, scaled by the budget already
    steps_per_epoch: int | None = None
    batch_size: int | None = None
    test_samples: int | None = None


@dataclass(frozen=True)
class Recipe:
    """What one run does, checked. It can be pickled and sent to other processes."""

    config: RunConfig
    pruning: PruneConfig | None
    quantization: QuantizeConfig | None
    schedule: Schedule  # in trained epochs
    limits: Limits
    fetch: bool = True  # as in DataOptions; false for a stored run, whose config is not to choose where to write

    @classmethod
    @naming_keys()
    def from_config(cls, config: Recipe | Config) -> Recipe:
        """Check a config and build its recipe. Raises UserError naming the keys."""
        if isinstance(config, Recipe):
            return config
        if not isinstance(config, RunConfig):
            config = RunConfig.check(as_dict(config))
        order = config.order.steps
        pruning = PruneConfig(**config.prune.model_dump()) if "prune" in order else None
        quantization = None
        if "quantize" in order:
            options = config.quantize.model_dump(exclude={"decimal_from"})
            if config.quantize.decimal_from:
                options["decimal"] = 0  # fixed from the start, hence no search; a run fills in the other run's values
            quantization = QuantizeConfig(**options)
        budget, trained = config.budget, config.trained_epochs
        limits = Limits(trained, budget.steps_per_epoch, budget.batch_size, budget.test_samples)
        return cls(config, pruning, quantization, config.events(), limits)

    @property
    def data(self) -> DataOptions:
        """Where the data comes from."""
        return DataOptions(**self.config.data.model_dump(), fetch=self.fetch)

    @property
    def paper_size(self) -> PaperSize:
        """What the paper's accounting charges for this task."""
        return PaperSize(**self.config.task.paper_size.model_dump())

    def on_synthetic_data(self) -> Recipe:
        """Return the same recipe on data made in memory, which needs no files."""
        data = self.config.data.model_copy(update={"source": "synthetic"})
        return replace(self, config=self.config.model_copy(update={"data": data}))
