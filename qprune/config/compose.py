"""Compose configs with Hydra, and say what is legal when that fails."""

import functools
import hashlib
import itertools
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_module
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qprune.config import signature as identity
from qprune.config.schema import RETIRED, RunConfig, json_schema, retired_keys
from qprune.config.types import check, dotted_keys, legal, schema_at, unknown_key
from qprune.errors import UserError, one_of

CONFIG_MODULE, CONFIG_NAME = "qprune.configs", "run"
# Hydra 1.3 takes its old defaults when this is left out; from 1.4 on it warns when it is given.
VERSION_BASE: dict[str, Any] = (
    {} if tuple(map(int, hydra.__version__.split(".")[:2])) >= (1, 4) else {"version_base": None}
)
SWEEP, TABLE = "sweep", "table"  # presets: lists of overrides that are no part of a run's config
EXTRAS = {"joblib": "joblib", "ray": "ray", "submitit_local": "submitit", "submitit_slurm": "submitit"}
# Hydra's own groups that say nothing about a config: left out, composing takes a quarter less
_WITHOUT_HYDRA = [
    f"~hydra/{group}" for group in ("launcher", "sweeper", "help", "hydra_help", "output", "hydra_logging")
]
_ANY_RUN, _ANY_SEED = "0" * 64, str(2**62)  # stand for the signature and the seed of a run
# ValueError: the choice of a group is no text; a number has thousands of digits. RecursionError: as many brackets
_REFUSALS = (HydraException, OmegaConfBaseException, ValueError, RecursionError)


def check_folder(config_dir: str | None) -> None:
    """Raise UserError where a further folder of configs is named and not there."""
    if config_dir is not None and not Path(config_dir).is_dir():
        raise UserError(f"there is no folder {config_dir}; name one that holds configs with --config-dir")


def compose_run(overrides: Sequence[str], config_dir: str | None = None) -> RunConfig:
    """Compose and check the config of one run; UserError says what to type instead."""
    with Composer(config_dir) as composer:
        return RunConfig.check(resolved(composer.compose(overrides)))


class Composer(ExitStack):
    """Composes configs; a context manager whose methods raise UserError.

    `compose` makes one config with Hydra, its own section included. `config` is quick for many: each combination of
    choices of groups is composed once, and values are set on a copy.
    """

    def __init__(self, config_dir: str | None = None) -> None:
        super().__init__()
        check_folder(config_dir)
        self.enter_context(initialize_config_module(config_module=CONFIG_MODULE, job_name="qprune", **VERSION_BASE))
        place = QuotedString(f"file://{Path(config_dir or '').resolve()}", Quote.single).with_quotes()
        self.places = [f"hydra.searchpath=[{place}]"] if config_dir else []
        self._choices: dict[str, list[str]] = {}  # by group
        self._parsed: dict[str, Override] = {}
        self._bases: dict[tuple[str, ...], DictConfig] = {}  # by choices of groups
        self._identities: dict[tuple[str, ...], str] = {}  # by all overrides, with any seed and source

    @property
    def loader(self) -> ConfigLoader:
        """Hydra's loader of this process."""
        return GlobalHydra.instance().config_loader()

    @property
    def groups(self) -> list[str]:
        """The config groups of a run, without Hydra's."""
        found = self.loader.get_group_options("", ObjectType.GROUP, CONFIG_NAME, self.places)
        return sorted(group for group in found if group not in ("hydra", SWEEP, TABLE))

    def choices(self, group: str) -> list[str]:
        """List the choices of a group, nested ones as `folder/choice`."""
        if not group or "." in group:  # the dotted path of a key
            return []
        if group not in self._choices:
            options = self.loader.get_group_options
            inner = options(group, ObjectType.GROUP, CONFIG_NAME, self.places)
            nested = [f"{name}/{choice}" for name in inner for choice in self.choices(f"{group}/{name}")]
            self._choices[group] = [*options(group, ObjectType.CONFIG, CONFIG_NAME, self.places), *nested]
        return self._choices[group]

    def parse(self, overrides: Iterable[str]) -> list[Override]:
        """Parse overrides as Hydra does, without those of retired keys. Raises UserError."""
        kept = [text for text in overrides if key_of(text) not in RETIRED]
        for text in kept:
            if text not in self._parsed:
                self._parsed[text] = self._parse(text)
        return [self._parsed[text] for text in kept]

    def _parse(self, text: str) -> Override:
        try:
            override = _read(text, OverridesParser.create(config_loader=self.loader))
        except _REFUSALS as error:
            if "=" not in text:
                found = [f"{group}={text}" for group in self.groups if text in self.choices(group)]
                raise UserError(f"{text!r} is not KEY=VALUE; type {[*found, 'task=espcn'][0]}") from error
            raise UserError(
                f"{text!r} is not of the form KEY=VALUE ({str(error).splitlines()[0]}); quote what Hydra reads "
                "as special, for example 'data.root=\"/a folder\"'"
            ) from error
        if override.is_delete() and not override.key_or_group.startswith("hydra"):
            raise UserError(
                f"{text}: a key or group cannot be taken away; give it another value, or null where that is legal"
            )
        choices = self.choices(override.key_or_group)
        if choices and not (override.is_sweep_override() or isinstance(override.value(), str)):
            # Hydra takes a list for several choices, and raises TypeError where one of them is not text
            one_of(override.key_or_group, text.partition("=")[2], choices)
        return override

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """Compose the config of one run, with the section `hydra`. Raises UserError."""
        self.refuse_several(overrides)
        parsed = self.parse(overrides)
        texts = [str(override.input_line) for override in parsed]
        try:
            config = compose(CONFIG_NAME, overrides=[*self.places, *texts], return_hydra_config=True)
        except _REFUSALS as error:
            raise self._explained(error, parsed) from error
        self._check_schedule(config, parsed)
        return config

    def values(self, overrides: Sequence[str]) -> dict[str, Any]:
        """Return the values of overrides of keys, by key. Raises UserError for several values of one."""
        self.refuse_several(overrides)
        found = {override.key_or_group: override.value() for override in self.parse(overrides)}
        for key in found.keys() & _texts():
            if found[key] is not None:
                check(key, found[key], str)
        return found

    def refuse_several(self, overrides: Sequence[str]) -> None:
        """Raise UserError for an override that has several values."""
        for override in self.parse(overrides):
            if override.is_sweep_override():
                raise UserError(
                    f"{override.input_line} gives several values, which make several runs; type: qprune sweep ..."
                )

    def checked(self, overrides: Sequence[str]) -> RunConfig:
        """Compose as `config` does, and check."""
        return RunConfig.check(_resolved(self.config(overrides)))

    def config(self, overrides: Sequence[str]) -> DictConfig:
        """Compose the config of one of many runs; of a key given twice, the last counts."""
        parsed = [override for override in self.parse(overrides) if not override.key_or_group.startswith("hydra")]
        groups = {o.key_or_group: str(o.input_line) for o in parsed if self.choices(o.key_or_group)}
        key = tuple(groups.values())
        try:
            if key not in self._bases:
                self._bases[key] = compose(CONFIG_NAME, overrides=[*self.places, *_WITHOUT_HYDRA, *key])
            config = self._bases[key].copy()
            for override in parsed:
                if override.key_or_group not in groups:
                    if override.is_add() or override.is_force_add():
                        OmegaConf.set_struct(config, False)
                    OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
        except UserError:
            raise
        except _REFUSALS as error:
            raise self._explained(error, parsed) from error
        self._check_schedule(config, parsed)
        return config

    def _check_schedule(self, config: DictConfig, parsed: Sequence[Override]) -> None:
        """Raise UserError where an order has operators and neither a schedule nor the task's config has times."""
        for override in parsed:
            if override.key_or_group == "schedule" and not override.is_sweep_override():
                one_of("schedule", str(override.input_line).partition("=")[2].strip("'\""), self.choices("schedule"))
        times = (config.schedule.get(key) for key in ("t_qw", "t_qf", "t_p", "slots"))
        if config.order.steps and all(time is None for time in times):
            name = f"{config.task.name}/{config.order.name}"
            raise UserError(
                f"there is no schedule {name!r} for this task in this order; write one as schedule/{name}.yaml in a "
                "folder given with --config-dir, give schedule.slots for all orders in the task's YAML, or borrow one "
                "with schedule=TASK/ORDER (qprune list schedules)"
            )

    def jobs(self, overrides: Sequence[str]) -> list[tuple[str, ...]]:
        """List the overrides of each run of a sweep, as Hydra's own sweeper does."""
        parsed = [override for override in self.parse(overrides) if not override.key_or_group.startswith("hydra")]
        return list(itertools.product(*(values_of(override) for override in parsed)))

    def signature(self, overrides: Sequence[str], seed: int, source: str | None = None) -> str:
        """Return what names a run. source: the run that its decimal bits come from."""
        words = (*overrides, f"seed={_ANY_SEED}", *([decimal_from(_ANY_RUN)] if source else []))
        if words not in self._identities:
            self._identities[words] = identity.identity_text(self.config(words))
        text = self._identities[words].replace(_ANY_SEED, str(seed)).replace(_ANY_RUN, source or "")
        return hashlib.sha256(text.encode()).hexdigest()

    def _explained(self, error: Exception, parsed: Sequence[Override]) -> UserError:
        """Return the error to show for a refusal of Hydra, from what was given."""
        try:
            self._check_choices(error, parsed)
            groups = [str(o.input_line) for o in parsed if self.choices(o.key_or_group)]
            base = compose(CONFIG_NAME, overrides=[*self.places, *_WITHOUT_HYDRA, *groups])
            known = [*dotted_keys(json_schema()), *_dotted(OmegaConf.to_container(base))]
            for override in parsed:
                _check_key(override, list(dict.fromkeys([*known, *self.groups])))
        except UserError as explained:
            return explained
        except _REFUSALS:
            pass
        return UserError(f"the config does not compose: {error}")

    def _check_choices(self, error: Exception, parsed: Sequence[Override]) -> None:
        for override in parsed:
            group, choices = override.key_or_group, self.choices(override.key_or_group)
            if not choices or override.is_sweep_override():
                continue
            choice = str(override.input_line).partition("=")[2].strip("'\"")
            if group == "hydra/launcher" and choice in EXTRAS and choice not in choices:
                raise UserError(f"{group}={choice} is not installed; type: pip install 'qprune[{EXTRAS[choice]}]'")
            one_of(group, choice, choices)
        if not isinstance(error, MissingConfigException):
            return
        missing = error.missing_cfg_file or ""
        raise UserError(f"there is no config {missing!r}" if missing else str(error).splitlines()[-1])


def resolved(full: DictConfig) -> dict[str, Any]:
    """Return the run's part of a composed config, as plain dicts and lists.

    Raises UserError where an interpolation cannot be resolved.
    """
    HydraConfig.instance().set_config(full)  # for interpolations such as ${hydra:job.name}
    values = _resolved(OmegaConf.masked_copy(full, [str(key) for key in full if key != "hydra"]))
    for key in retired_keys(values):
        print_retired(key)
    return values


def _resolved(config: DictConfig) -> dict[str, Any]:
    try:
        return identity.as_dict(config)
    except OmegaConfBaseException as error:
        where = f" ({error.full_key})" if error.full_key else ""
        raise UserError(f"a value cannot be resolved{where}: {str(error.msg or error).splitlines()[0]}") from error


def values_of(override: Override) -> list[str]:
    """List an override once for each of its values."""
    text = str(override.input_line)
    if not override.is_sweep_override():
        return [text]
    if not override.is_discrete_sweep():
        raise UserError(f"{text} is no list of values; type them with commas, or range(...)")
    prefix = text.partition("=")[0]
    return [f"{prefix}={value}" for value in override.sweep_string_iterator()]


def _check_key(override: Override, known: Sequence[str]) -> None:
    """Raise UserError for an override of a key that is not there, or adds one that is."""
    key, line = override.key_or_group, str(override.input_line)
    added = override.is_add() or override.is_force_add()
    if key.startswith("hydra"):
        return
    if override.is_add() and key in known:
        raise UserError(f"{line}: {key} is a key already; type {line.lstrip('+')}")
    if key not in known and not (added and key.startswith("task.")):
        raise UserError(unknown_key(key, known))


def _dotted(config: Any, path: str = "") -> Iterator[str]:
    for key, value in config.items() if isinstance(config, dict) else ():
        inner = f"{path}.{key}" if path else str(key)
        yield inner
        yield from _dotted(value, inner)


def key_of(override: str) -> str:
    """Return the key or group that an override sets."""
    return override.partition("=")[0].lstrip("+~")


def text_override(key: str, text: str) -> str:
    """Return the override that sets a key to this text, quoted where Hydra would read something else."""
    is_plain = re.fullmatch(r"[\w./][\w./-]*", text) and text.lower() != "null"
    return f"{key}={text if is_plain else QuotedString(text, Quote.single).with_quotes()}"


@functools.cache
def _texts() -> frozenset[str]:
    """The keys of a run whose value is text."""
    return frozenset(key for key in dotted_keys(json_schema()) if legal(schema_at(json_schema(), key))[:4] == "text")


def _read(text: str, parser: OverridesParser) -> Override:
    """Parse an override; text of which Hydra makes something else, as a folder called 2026 or [a, is quoted first."""
    key, equals, value = text.partition("=")
    is_text = equals and key_of(text) in _texts() and (value.lower() != "null" or key_of(text) == "results_dir")
    try:
        override = parser.parse_override(text)
        if not is_text or override.is_sweep_override() or isinstance(override.value(), str):
            return override
    except _REFUSALS:
        if not is_text:
            raise
    return parser.parse_override(f"{key}={QuotedString(value, Quote.single).with_quotes()}")


def decimal_from(signature: str) -> str:
    """Return the override that takes the decimal bits of the run with this signature."""
    return f"quantize.decimal_from='{signature}'"


def print_retired(key: str) -> None:
    """Say that a key is ignored, and what is there instead."""
    print(f"{key} is ignored: {RETIRED[key]}", file=sys.stderr)
