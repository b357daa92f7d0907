"""Overrides checked and composed before a run starts, with errors that say what is legal and what to type instead."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_module
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qprune.config.trusted import refuse_code_of_hydra
from qprune.errors import UserError, one_of

CONFIG_MODULE, CONFIG_NAME = "qprune.configs", "run"
# Hydra 1.3 takes its old defaults when this is left out; from 1.4 on it warns when it is given.
VERSION_BASE: dict[str, Any] = (
    {} if tuple(map(int, hydra.__version__.split(".")[:2])) >= (1, 4) else {"version_base": None}
)
_NOT_OF_A_RUN = ("hydra", "sweep", "table")  # folders of configs that are no choices of a run
OPEN_SECTIONS = ("hydra", "task")  # a task's constructor may take more than its YAML gives
EXTRAS = {"joblib": "joblib", "ray": "ray", "submitit_local": "submitit", "submitit_slurm": "submitit"}


@dataclass(frozen=True)
class Composed:
    """A config as a run receives it (interpolations unresolved), and whether it belongs to a sweep."""

    config: DictConfig
    multirun: bool


def compose_checked(
    overrides: Sequence[str],
    *,
    multirun: bool = False,
    config_name: str | None = None,
    config_dir: str | None = None,
) -> list[Composed]:
    """The config for every combination of choices of groups; of other values that are swept, the first stands for all.

    One config unless it is a sweep. Raises UserError for an override that cannot be read, an unknown group, choice or
    key, a value of the wrong kind, several values outside a sweep, and for configs that do not compose or resolve.
    """
    with initialize_config_module(config_module=CONFIG_MODULE, job_name="qprune", **VERSION_BASE):
        loader = GlobalHydra.instance().config_loader()
        parsed = [_parse(text, loader) for text in overrides]
        places = [text for text in overrides if text.startswith("hydra.searchpath=")]
        if config_dir is not None:
            places.append(f"hydra.searchpath=[file://{Path(config_dir).resolve()}]")
        catalogue = Catalogue(loader, config_name or CONFIG_NAME, places)
        groups = [override for override in parsed if catalogue.choices(override.key_or_group)]
        values = [override for override in parsed if override not in groups]
        for override in groups:
            _check_choices(override, catalogue)
        composed = []
        for choice in itertools.product(*map(_texts, groups)):
            full = _compose([*places, *choice], catalogue)
            if values:
                for override in values:
                    _check_value(override, full, catalogue)
                full = _compose([*places, *choice, *(next(_texts(value)) for value in values)], catalogue)
            is_sweep = multirun or full.hydra.mode == RunMode.MULTIRUN
            several = [override.input_line for override in parsed if override.is_sweep_override()]
            if several and not is_sweep:
                raise UserError(f"{several[0]} gives several values, which make several runs; type: qprune sweep ...")
            composed.append(Composed(_resolvable(full), is_sweep))
        return composed


@dataclass(frozen=True)
class Catalogue:
    """The config groups that are there to choose from, those of the user's own folders (`places`) included."""

    loader: ConfigLoader
    config_name: str
    places: list[str]

    @property
    def groups(self) -> list[str]:
        """The names of the groups, without Hydra's."""
        return sorted(group for group in self._inside("", ObjectType.GROUP) if group not in _NOT_OF_A_RUN)

    def choices(self, group: str) -> list[str]:
        """The choices of a group, those in folders below it as `folder/choice`; none for what is no group."""
        if "." in group:  # the dotted path of a key
            return []
        inner = self._inside(group, ObjectType.GROUP)
        nested = [f"{folder}/{choice}" for folder in inner for choice in self.choices(f"{group}/{folder}")]
        return [*self._inside(group, ObjectType.CONFIG), *nested]

    def _inside(self, group: str, kind: ObjectType) -> list[str]:
        return self.loader.get_group_options(group, kind, self.config_name, self.places)


def _parse(text: str, loader: ConfigLoader) -> Override:
    try:
        override = OverridesParser.create(config_loader=loader).parse_override(text)
    except HydraException as error:
        raise UserError(
            f"{text!r} is not of the form KEY=VALUE ({str(error).splitlines()[0]}); quote what Hydra reads as special, "
            "for example 'data.root=\"/a folder\"'"
        ) from error
    override.input_line = text
    return override


def _check_choices(override: Override, catalogue: Catalogue) -> None:
    group = override.key_or_group
    if override.is_delete() and not group.startswith("hydra/"):
        raise UserError(f"{override.input_line}: a run needs a choice of {group}; type {group}=... instead")
    for text in _texts(override):
        choice = text.partition("=")[2].strip("'\"")
        if group.startswith("hydra/") and choice == "null":  # some of Hydra's groups may be empty
            continue
        if group == "hydra/launcher" and choice in EXTRAS and choice not in catalogue.choices(group):
            raise UserError(f"{group}={choice} is not installed; type: pip install 'qprune[{EXTRAS[choice]}]'")
        one_of(group, choice, catalogue.choices(group))


def _check_value(override: Override, base: DictConfig, catalogue: Catalogue) -> None:
    """Check an override of a key against the config that the choices of groups make."""
    key, section = override.key_or_group, override.key_or_group.partition(".")[0]
    if section == "hydra" or key.startswith("hydra/"):
        return
    known = dict(_nodes(OmegaConf.to_container(_own_part(base))))
    if override.is_delete():
        raise UserError(
            f"{override.input_line}: a key cannot be taken away; give it a value, or null where that is legal"
        )
    if override.is_add() and key in known:
        raise UserError(f"{override.input_line}: {key} is a key already; type {str(override.input_line).lstrip('+')}")
    if key not in known:
        if (override.is_add() or override.is_force_add()) and section in OPEN_SECTIONS and "." in key:
            return
        raise UserError(_unknown(key, known, catalogue.groups))
    # the first number of a range stands for all; choices may be of several kinds
    texts = _texts(override) if override.is_choice_sweep() else itertools.islice(_texts(override), 1)
    for text in texts:
        _check_kind(key, known[key], _parse(text, catalogue.loader).value())


def _unknown(key: str, known: Mapping[str, Any], groups: Sequence[str]) -> str:
    section, _, name = key.rpartition(".")
    siblings = known.get(section)
    similar = [path for path in known if path.rpartition(".")[2] == name]
    if isinstance(siblings, dict):  # names alone are compared: with a long section before them all would look alike
        similar += [f"{section}.{match}" for match in difflib.get_close_matches(name, siblings, n=1, cutoff=0.5)]
    else:
        similar += difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    advice = f"; did you mean {similar[0]!r}?" if similar else ""
    if isinstance(siblings, dict):
        advice += f"; the keys of {section} are {', '.join(siblings)}"
    else:
        keys = [path for path in known if "." not in path and path not in groups]
        advice += f"; the groups are {', '.join(groups)}, and the keys {', '.join(keys)}"
    if section == "task":
        advice += f"; for an argument of a task of your own that its YAML does not give, type +{key}=..."
    return f"unknown key {key!r}{advice}"


def _check_kind(key: str, node: Any, value: Any) -> None:
    """Refuse a value of another kind than the config's, where no later check could tell: 'no' is true to Python."""
    is_section, is_list = isinstance(node, Mapping), isinstance(node, Sequence) and not isinstance(node, str)
    if isinstance(value, str) and "${" in value:
        return  # an interpolation: known when it is resolved
    if is_section and not isinstance(value, Mapping):
        raise UserError(
            f"{key}={value!r}: {key} is a section, with the keys {', '.join(map(str, node))}; set one of them"
        )
    if is_list and not isinstance(value, list):
        raise UserError(f"{key}={value!r} is not a list; type it as {key}=[...], for example {key}={_list_text(node)}")
    if isinstance(node, bool) and not isinstance(value, bool):
        raise UserError(f"{key}={value!r} is not true or false; type {key}=true or {key}=false")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(node, int | float) and not isinstance(node, bool) and not number and value is not None:
        raise UserError(f"{key}={value!r} is not a number; the default is {key}={node}")
    if isinstance(node, str) and value in (None, "") and "${" not in node:
        raise UserError(f"{key}= is empty, and a run needs a value; the default is {key}={node}")
    if isinstance(node, str) and isinstance(value, Mapping | list):
        raise UserError(f"{key}={value!r} is not a single value; the default is {key}={node}")


def _list_text(node: Sequence[Any]) -> str:
    return "[" + ",".join(map(str, node)) + "]"


def _texts(override: Override) -> Iterator[str]:
    """The override once for each of its values, as texts that Hydra reads; of an interval, its start."""
    text = str(override.input_line)
    prefix = text.partition("=")[0]
    if isinstance(interval := override.value(), IntervalSweep):
        yield f"{prefix}={interval.start}"
    elif override.is_discrete_sweep():
        for element in override.sweep_string_iterator():
            yield f"{prefix}={element}"
    else:
        yield text


def _compose(overrides: list[str], catalogue: Catalogue) -> DictConfig:
    try:
        return compose(catalogue.config_name, overrides=overrides, return_hydra_config=True)
    except MissingConfigException as error:
        missing = error.missing_cfg_file or ""
        if missing.startswith("schedule/"):
            raise UserError(
                f"there is no schedule {missing.removeprefix('schedule/')!r} for this task in this order; write one as "
                f"{missing}.yaml in a folder given with --config-dir, or borrow one with schedule=TASK/ORDER "
                "(qprune list schedules)"
            ) from error
        raise UserError(
            f"{str(error).splitlines()[-1] if not missing else f'there is no config {missing!r}'}"
        ) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"the config does not compose: {error}") from error


def _resolvable(full: DictConfig) -> DictConfig:
    """The run's part of a composed config, once it is seen that its interpolations resolve."""
    config = _own_part(full)
    refuse_code_of_hydra(OmegaConf.to_container(full.hydra))
    try:
        OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        where = f" ({error.full_key})" if error.full_key else ""
        raise UserError(f"a value cannot be resolved{where}: {str(error.msg or error).splitlines()[0]}") from error
    return config


def _own_part(full: DictConfig) -> DictConfig:
    """The config without Hydra's section."""
    return OmegaConf.masked_copy(full, [str(key) for key in full if key != "hydra"])


def _nodes(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of every node below `config`, of plain dicts and lists."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(config, dict):
        items = config.items()
    elif isinstance(config, list):
        items = enumerate(config)
    for key, value in items:
        inner = f"{path}.{key}" if path else str(key)
        yield inner, value
        yield from _nodes(value, inner)
