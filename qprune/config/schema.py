"""The keys of a run's config, each with its type, range, unit and meaning.

Their values are in `configs/`. Only keys that came after runs had been published have a default here: without such a
key, and with its default, a config is one run. Keys marked as `machine` say where and how: no part of a signature.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.config import JsonDict

from qprune.compression.schedule import Schedule
from qprune.config.types import STRICT, Fraction, Samples, explain
from qprune.errors import UserError

# Keys of older configs, all of `trainer`, and what says the same today. They are ignored: no part of a signature.
RETIRED = {
    "trainer.fuse_relu": "trainer.compile=true does the same by standard means",
    "trainer.pack_features": "docs/performance.md shows how to save memory in a loop of your own",
    "trainer.share_stem": "it is called trainer.warm_start now",
}
# Arguments that tasks took on after rows had been published, with their defaults (as in the tasks' constructors)
LATER_ARGUMENTS: dict[str, Any] = {"task.further_test_folders": [], "task.initialization": "default"}

_NAME = "a name of at most 64 letters, digits, '_', '-' and '.'"
# Names become parts of paths
Name = Annotated[str, Field(pattern="^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$", json_schema_extra={"legal": _NAME})]
Text = Annotated[str, Field(pattern=r"^[^\x00]+$")]
Epochs = Annotated[int, Field(ge=1, le=10**6, json_schema_extra={"unit": "epochs"})]
Time = Annotated[float, Field(ge=0, le=1e6, json_schema_extra={"unit": "epochs"})]
Interval = Annotated[float, Field(gt=0, le=1e6, json_schema_extra={"unit": "epochs"})]
Minutes = Annotated[float, Field(ge=0, le=1e6, json_schema_extra={"unit": "minutes"})]
Bits = Annotated[int, Field(ge=2, le=16, json_schema_extra={"unit": "bits"})]
Digits = Annotated[int, Field(ge=-64, le=64, json_schema_extra={"unit": "binary digits"})]
Window = Annotated[int, Field(ge=1, le=10**9, json_schema_extra={"unit": "samples"})]
Steps = Annotated[int, Field(ge=1, le=10**9, json_schema_extra={"unit": "steps"})]
Events = Annotated[int, Field(ge=1, le=10**4, json_schema_extra={"unit": "pruning events"})]
Processes = Annotated[int, Field(ge=1, le=1024, json_schema_extra={"unit": "processes"})]
Threads = Annotated[int, Field(ge=1, le=4096, json_schema_extra={"unit": "threads"})]
Targets = Literal["w", "f", "wf"]


def _key(description: str, *, machine: bool = False, **options: Any) -> Any:
    extra: JsonDict = {"machine": True} if machine else {}
    return Field(description=description, json_schema_extra=extra, **options)


class Section(BaseModel):
    """Keys that belong together; no others are legal."""

    model_config = ConfigDict(**STRICT, extra="forbid", frozen=True)


class PruneSection(Section):
    """What pruning does."""

    sparsity: Annotated[float, Field(ge=0, lt=1)] = _key("fraction of zeros at the end")
    targets: Targets = _key("weights, features, or both")
    window: Window = _key("T: |x| is summed over so many before a pruning event; d* of features is found on so many")
    granularity: Literal["element", "channel", "last"] = _key("of feature masks: neurons, channels, the last dimension")
    rule: Literal["exact", "threshold"] = _key("floor(sparsity * n) zeros, or what is below an order statistic")
    border: Literal["tile", "keep"] = _key("on larger inputs: tile masks to the edge, or keep what exceeds whole tiles")


class QuantizeSection(Section):
    """What quantization does."""

    bits: Bits = _key("of each weight")
    feature_bits: Bits | None = _key("of each feature; null: as many as a weight has")
    targets: Targets = _key("weights, features, or both")
    rounding: Literal["trunc", "floor", "nearest"] = _key("toward zero (authors), down (Eq. 1), or to the nearest")
    gradient: Literal["clip_value", "ste", "in_range"] = _key("of Eq. 2, or straight through, everywhere or in range")
    saturate: list[Fraction] = _key("[low, high]: the quantiles of features between which the grid is fitted (Eq. 6)")
    objective: Literal["saturated", "literal"] = _key(
        "of d* of features: the error of Q(S(x)) (the authors' code) or of Q(x) (Eq. 7)", default="saturated"
    )
    weight_axis: Literal["authors", "tensor", "output"] = _key("what has its own d; authors: as in the authors' code")
    decimal: Digits | None = _key("fraction bits d of every tensor; null: d* of least squared error (Eq. 7)")
    candidates: Literal["any", "authors"] = _key("for d*: any, or 0 to 19 as in the authors' code", default="authors")
    decimal_from: Text | None = _key("signature of a finished run whose fraction bits are used", default=None)


class OrderSection(Section):
    """Which operators there are, and which comes first."""

    name: Name = _key("name of the order in the result row")
    steps: list[Literal["prune", "quantize"]] = _key("operators in the order in which they begin")
    slots: list[Literal[1, 2]] | None = _key(
        "with schedule.slots: the slot (1 or 2) of each step; null: 1, then 2; events in one slot may interleave",
        default=None,
    )


class SlotsSection(Section):
    """Two slots of equal length; an operator has its first event at a slot's start and its last at the end."""

    first: Time = _key("start of the first slot")
    second: Time = _key("start of the second slot")
    length: Interval = _key("of a slot")

    def __str__(self) -> str:
        starts = (self.first, self.second)
        return f"slots {' and '.join(f'{start:g}-{start + self.length:g}' for start in starts)}"


class ScheduleSection(Section):
    """When operators begin, in epochs of the recipe; a budget scales these times."""

    t_qw: Time | None = _key("when weights become quantized; fractions allowed, null: never")
    t_qf: Time | None = _key("when features become quantized; fractions allowed, null: never")
    t_p: Time | None = _key("epoch from which pruning is counted; null: never")
    dt_p: Interval | None = _key("time between pruning events, which are at t_p + k * dt_p, k = 1..n")
    n: Events = _key("number of pruning events")
    slots: SlotsSection | None = _key(
        "first, second and length of two equal slots that replace the times above (protocol=mirrored)", default=None
    )

    def at_times(self, order: Sequence[str], targets: str) -> Schedule:
        """Build the schedule of operators with times of their own. targets: what is quantized."""
        times = self.model_dump(exclude={"slots"})
        if "prune" not in order:
            times |= {"t_p": None, "dt_p": None}
        for key, target in (("t_qw", "w"), ("t_qf", "f")):
            if "quantize" not in order or target not in targets:
                times[key] = None
            elif times[key] is None:
                raise UserError(
                    f"schedule.{key} is missing, and quantize.targets={targets} needs it; give it in epochs"
                )
        return Schedule(**times)

    def in_slots(self, slots: SlotsSection, numbers: Mapping[str, int], targets: str, epochs: int) -> Schedule:
        """Build the schedule of operators in slots. numbers: 1 or 2, by operator; targets: what is quantized."""
        for key in ("t_qw", "t_qf", "t_p", "dt_p"):
            if getattr(self, key) is not None:
                raise UserError(f"schedule.{key} and schedule.slots are both given; type null for one of them")
        ends = slots.first + slots.length, slots.second + slots.length
        if ends[0] > slots.second:
            raise UserError(
                f"schedule.slots: the first slot ends at epoch {ends[0]:g} and the second begins at {slots.second:g}; "
                f"type schedule.slots.second={ends[0]:g} or later, or a smaller schedule.slots.length"
            )
        if ends[1] >= epochs:
            raise UserError(
                f"schedule.slots: the second slot ends at epoch {ends[1]:g}, but training at epoch {epochs} (in "
                "epochs of the recipe); raise epochs, or choose earlier or shorter slots"
            )
        starts = {step: slots.first if number == 1 else slots.second for step, number in numbers.items()}
        return Schedule.in_slots(starts, slots.length, self.n, targets)


# The library's arguments that are keys here: before "=", and the times of a schedule in any place
_ARGUMENT = re.compile(r"(?<![\w.])(\w+(?==)|t_qw|t_qf|t_p\b|dt_p)")


@contextmanager
def naming_keys() -> Iterator[None]:
    """Have the library's errors name keys in place of its arguments: `quantize.saturate=` for `saturate=`."""
    sections: dict[str, type[Section]] = {
        "prune": PruneSection,
        "quantize": QuantizeSection,
        "schedule": ScheduleSection,
    }
    keys = {name: f"{section}.{name}" for section, model in sections.items() for name in model.model_fields}
    try:
        yield
    except UserError as error:
        raise UserError(_ARGUMENT.sub(lambda found: keys.get(found[0], found[0]), str(error))) from error


class BudgetSection(Section):
    """How much of the recipe is run; null: all of it."""

    name: Name = _key("name of the budget in the result row")
    epochs: Epochs | None = _key("epochs that are trained at most; fewer than the recipe's scale its schedule too")
    steps_per_epoch: Steps | None = _key("optimizer steps per epoch at most")
    batch_size: Samples | None = _key("samples per step at most; null: the task's")
    test_samples: Window | None = _key("test samples at most; null: all")


class DataSection(Section):
    """Where the data comes from."""

    source: Literal["real", "synthetic"] = _key("published sets from files, or seeded sets made in memory")
    root: Text | None = _key("folder of the data sets: QPRUNE_DATA in the environment, or ./data", machine=True)
    verify: bool = _key("false: accept a copy whose checksums differ from the published ones; its rows carry a note")
    validation: Annotated[float, Field(ge=0, lt=1)] = _key(
        "fraction of the training set that is held out, and whose score decides searches instead of the test set's",
        default=0.0,
    )


class TrainerSection(Section):
    """Device, precision and processes."""

    device: Text = _key("auto (a GPU if there is one), cpu, cuda or cuda:N", machine=True)
    precision: Literal["float32", "bfloat16", "float16"] = _key("mixed unless float32; operators stay in float32")
    ranks: Processes = _key("processes that share each batch; one GPU each where there are GPUs")
    threads: Threads | None = _key("CPU threads per process; null: torch's choice", machine=True)
    evaluate_every: Epochs = _key("between evaluations on the test set; the last epoch has one", machine=True)
    checkpoint_minutes: Minutes = _key("between checkpoints within an epoch; each epoch ends with one", machine=True)
    keep_memory: Annotated[bool, BeforeValidator(lambda given: True if given is None else given)] = _key(
        "on a CPU, keep freed memory for the next step, which is faster; false: return it at once", machine=True
    )
    kernels: bool = _key("on a CPU with a C compiler, operators run in one pass; same bits", machine=True, default=True)
    channels_last: bool | None = _key("memory layout of weights and features; null: the task's", default=None)
    compile: bool = _key("use torch.compile: pays off after some thousand steps; last bits differ", default=False)
    warm_start_at: list[Time] = _key(
        "trained epochs after which other runs differ: a warm start is saved at each; qprune sweep sets them",
        machine=True,
        default=[],
    )
    keep_events: bool = _key(
        "save the network's state before each event, for qprune explain: about ten copies of it",
        machine=True,
        default=False,
    )
    warm_start: bool = _key(
        "runs that differ only in order, prune, quantize or schedule share the float part of training",
        machine=True,
        default=True,
    )


class LoggerSection(Section):
    """Where training curves go, besides metrics.csv in the run folder."""

    name: Text = _key("csv, tensorboard, wandb or mlflow", machine=True)


class SitesSection(Section):
    """Globs over the network's modules; what is absent has no sites."""

    quantize_weights: list[Text] = _key("layers whose weights are quantized", default=[])
    prune_weights: list[Text] = _key("layers whose weights are pruned", default=[])
    quantize_features: list[Text] = _key("modules whose outputs are quantized", default=[])
    prune_features: list[Text] = _key("modules whose outputs are pruned", default=[])


class PaperSizeSection(Section):
    """What the paper's accounting counts."""

    count_input: bool = _key("whether the network's input counts in the paper's accounting", default=False)
    pruned_weights: list[Text] = _key("modules whose weights count as pruned", default=["**"])
    pruned_features: list[Text] = _key("modules whose outputs count as pruned", default=["**"])
    left_float: list[Text] = _key("modules that count as neither pruned nor quantized", default=[])
    feature_bits: Bits | None = _key("bits counted for a quantized feature; null: those it has", default=None)


class TaskSection(Section):
    """What is trained; all further keys are arguments of the task's constructor."""

    model_config = ConfigDict(extra="allow")

    class_path: Text = _key("dotted path of the task's class", alias="_target_")
    name: Name = _key("name of the task in the result row")
    sites: SitesSection = _key("which modules get which operator")
    paper_size: PaperSizeSection = _key("what the paper's accounting counts")

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the task's own constructor."""
        return dict(self.model_extra or {})


class RunConfig(Section):
    """The config of one run, checked; attributes are named as the keys."""

    seed: Annotated[int, Field(ge=0, le=2**62)] = _key("of initial weights, data order and augmentation")
    epochs: Epochs = _key("length of the recipe, set by the task; a budget may cut it")
    results_dir: Text = _key("folder that holds the run folders", machine=True)
    force: bool = _key("start afresh in a run folder that holds a finished or interrupted run", machine=True)
    wait: bool = _key("wait for another process with the same run; false: refuse", machine=True, default=False)
    prune: PruneSection
    quantize: QuantizeSection
    order: OrderSection
    schedule: ScheduleSection
    budget: BudgetSection
    data: DataSection
    trainer: TrainerSection
    logger: LoggerSection
    task: TaskSection

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> Self:
        """Check a resolved config but for retired keys. Raises UserError naming a key."""
        try:
            return cls.model_validate(without_retired(config))
        except ValidationError as error:
            raise UserError(explain(error, json_schema())) from None

    @property
    def trained_epochs(self) -> int:
        """Epochs that are trained, within the budget."""
        return min(self.epochs, self.budget.epochs or self.epochs)

    @naming_keys()
    def events(self) -> Schedule:
        """Build the schedule of the operators in the order, in trained epochs.

        Raises:
            UserError: Times or slots are missing, contradict the order, or do not end before training does.
        """
        order, slots, targets = self.order.steps, self.order.slots, self.quantize.targets
        if len(set(order)) != len(order):
            raise UserError(f"order.steps={order} names an operator twice; type each at most once")
        if slots is not None and len(slots) != len(order):
            raise UserError(f"order.slots={slots} is not a slot for each of order.steps={order}; type 1 or 2 for each")
        if self.schedule.slots is not None:
            numbers: dict[str, int] = dict(zip(order, slots or (1, 2), strict=False))
            schedule = self.schedule.in_slots(self.schedule.slots, numbers, targets, self.epochs)
        else:
            schedule = self.schedule.at_times(order, targets)
        schedule.check(order, self.epochs, overlap=slots is not None and len(set(slots)) < len(order))
        return schedule.scaled(self.trained_epochs / self.epochs)

    def plain(self) -> dict[str, Any]:
        """Return the config as plain values, as a run stores it in config.yaml."""
        return self.model_dump(by_alias=True, exclude_unset=True)


@functools.cache
def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a run's config."""
    return RunConfig.model_json_schema()


def keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over the dotted names of all keys but sections, and their FieldInfo."""
    for name, field in model.model_fields.items():
        dotted = f"{prefix}{field.alias or name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{dotted}.")
        else:
            yield dotted, field


# Keys that say where and how a run is carried out, and keys that came after rows had been published, by their defaults
MACHINE_KEYS = ("hydra", "logger", *RETIRED, *(key for key, field in keys() if field.json_schema_extra.get("machine")))
LATER_KEYS = LATER_ARGUMENTS | {
    key: field.default
    for key, field in keys()
    if not field.is_required() and not key.startswith(("task.sites.", "task.paper_size."))
}


def retired_keys(config: Mapping[str, Any]) -> list[str]:
    """List the retired keys that a config holds."""
    trainer = config.get("trainer")
    return [key for key in RETIRED if isinstance(trainer, Mapping) and key.removeprefix("trainer.") in trainer]


def without_retired(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config without retired keys; `config` itself when it holds none."""
    if not (keys := retired_keys(config)):
        return config
    return {**config, "trainer": {k: value for k, value in config["trainer"].items() if f"trainer.{k}" not in keys}}
