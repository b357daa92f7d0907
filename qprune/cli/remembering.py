"""A memory for Hydra's loader: each file of configs is read once, however many configs are composed of it."""

from __future__ import annotations

import copy
from typing import Any


class Remembering:
    """Stands before the `repository` of configs of one loader of Hydra, which keeps none between two compositions.

    Hydra merges what it loads into the config and changes that, so it is given a copy each time.
    """

    def __init__(self, repository: Any) -> None:
        self.repository, self.folders = copy.deepcopy(repository), ""
        self.known: dict[str, Any] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Remembering:
        return self  # Hydra copies it for every composition

    def __getattr__(self, name: str) -> Any:
        return getattr(self.repository, name)

    def initialize_sources(self, config_search_path: Any) -> None:
        """Look in other folders from now on."""
        if (folders := str(config_search_path)) != self.folders:
            self.repository.initialize_sources(config_search_path)
            self.folders = folders
            self.known.clear()

    def load_config(self, config_path: str) -> Any:
        """The content of a file with its header and defaults list, or None."""
        if config_path not in self.known:
            self.known[config_path] = self.repository.load_config(config_path=config_path)
        found = copy.copy(self.known[config_path])
        if found is not None:
            found.config = copy.deepcopy(found.config)
        return found
