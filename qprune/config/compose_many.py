"""Configs of many runs that differ in a few values: groups are composed once per combination, values set on a copy."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import yaml
from hydra import compose, initialize_config_module
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qprune.cli.remembering import Remembering
from qprune.config import signature as identity
from qprune.config.compose import CONFIG_MODULE, CONFIG_NAME, VERSION_BASE
from qprune.errors import UserError, one_of

# Hydra's own groups that say nothing about a config: left out, composing takes a quarter less
_WITHOUT_HYDRA = [
    f"~hydra/{group}" for group in ("launcher", "sweeper", "help", "hydra_help", "output", "hydra_logging")
]
_ANY_RUN = "0" * 64  # stands for the signature of a run


class Composer:
    """Composes configs quickly; a context manager. Further configs are looked for in the folder `config_dir`."""

    def __init__(self, config_dir: str | None = None) -> None:
        self.places = [f"hydra.searchpath=[file://{config_dir}]"] if config_dir else []
        self.known: dict[str, list[str]] = {}  # choices by group
        self.parsed: dict[str, Override] = {}
        self.cache: dict[tuple[str, ...], DictConfig] = {}
        self.configs: dict[tuple[str, ...], DictConfig] = {}  # with all overrides
        self.known_texts: dict[tuple[str, ...], tuple[DictConfig, tuple[str, str] | None]] = {}

    def __enter__(self) -> Composer:
        self.context = initialize_config_module(config_module=CONFIG_MODULE, job_name="qprune", **VERSION_BASE)
        self.context.__enter__()
        if (repository := getattr(self.loader, "repository", None)) is not None:
            setattr(self.loader, "repository", Remembering(repository))  # noqa: B010 (no attribute of its base class)
        return self

    def __exit__(self, *error: Any) -> None:
        self.context.__exit__(*error)

    @property
    def loader(self) -> ConfigLoader:
        """Hydra's loader of this process."""
        return GlobalHydra.instance().config_loader()

    def parse(self, overrides: Iterable[str]) -> list[Override]:
        """The overrides as Hydra reads them. Raises UserError for one that it cannot read."""
        overrides = list(overrides)
        try:
            if new := [text for text in dict.fromkeys(overrides) if text not in self.parsed]:
                parser = OverridesParser.create(config_loader=self.loader)
                self.parsed |= zip(new, parser.parse_overrides(new), strict=True)
        except HydraException as error:
            raise UserError(f"{' '.join(overrides)!r} cannot be read: {str(error).splitlines()[0]}") from error
        return [self.parsed[text] for text in overrides]

    def config(self, overrides: Sequence[str]) -> DictConfig:
        """The config of one run; of several overrides of a key the last counts. Raises UserError."""
        parsed = self.parse(overrides)
        groups = [o for o in parsed if "." not in o.key_or_group and self._choices(o.key_or_group)]
        names = {o.key_or_group: str(o.input_line) for o in groups}
        for override in groups:
            one_of(override.key_or_group, str(override.value()), self._choices(override.key_or_group))
        key = tuple(names.values())
        try:
            if key not in self.cache:
                self.cache[key] = compose(CONFIG_NAME, overrides=[*self.places, *_WITHOUT_HYDRA, *key])
            config = self.cache[key].copy()
            for override in parsed:
                if override not in groups:
                    if override.is_add() or override.is_force_add():
                        OmegaConf.set_struct(config, False)
                    OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(f"{' '.join(overrides)}: {str(error).splitlines()[0]}") from error
        return config

    def order_and_task(self, overrides: Sequence[str]) -> tuple[str, str]:
        """The names of the order and of the task of the run with these overrides."""
        config = self._read_only(tuple(overrides))
        return config.order.name, config.task.name

    def _read_only(self, overrides: tuple[str, ...]) -> DictConfig:
        if overrides not in self.configs:
            self.configs[overrides] = self.config(overrides)
        return self.configs[overrides]

    def signature(self, overrides: Sequence[str], seed: int, source: str | None = None) -> str:
        """The identity of the run with these overrides and this seed. source: the run its decimal bits come from."""
        key = (*overrides, *([decimal_from(_ANY_RUN)] if source else []))
        if key not in self.known_texts:
            config = self._read_only(key)
            follows_seed = "${seed}" in str(OmegaConf.to_container(config))
            around = None if follows_seed else identity.around_seed(identity.identity(config))
            self.known_texts[key] = (config, around)
        config, around = self.known_texts[key]
        if around is None:
            config = config.copy()
            config.seed = seed
            config.quantize.decimal_from = source or config.quantize.decimal_from
            return identity.signature(config)
        text = str(seed).join(around)
        return identity.digest_of_text(text.replace(_ANY_RUN, source) if source else text)

    def _choices(self, group: str) -> list[str]:
        if group in ("seed", "epochs", "results_dir", "force"):
            return []
        if group in self.known:
            return self.known[group]
        inner = self.loader.get_group_options(group, ObjectType.GROUP, CONFIG_NAME, self.places)
        nested = [f"{name}/{choice}" for name in inner for choice in self._choices(f"{group}/{name}")]
        own = self.loader.get_group_options(group, ObjectType.CONFIG, CONFIG_NAME, self.places)
        self.known[group] = [*own, *nested]
        return self.known[group]


def decimal_from(signature: str) -> str:
    """The override that takes the decimal bits of the run with this signature."""
    return f"quantize.decimal_from='{signature}'"


def yaml_value(text: str, where: str) -> Any:
    """The content of a YAML file; UserError naming `where` for what is none."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not readable YAML ({str(error).splitlines()[0]})") from error


def short_hash(texts: Iterable[str]) -> str:
    """Ten hexadecimal digits that stand for a list of texts, whatever its order."""
    return hashlib.sha256("\n".join(sorted(texts)).encode()).hexdigest()[:10]
