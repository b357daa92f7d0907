"""The runs that a sweep makes: which there are, how far each is, and how long the rest takes."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from qprune.config.compose import SWEEP, Composer, key_of, print_retired
from qprune.config.schema import RETIRED, RunConfig
from qprune.config.signature import run_folder
from qprune.errors import UserError, counted, one_of
from qprune.runs.folder import TIMING_FILE, RunFolder
from qprune.runs.lookup import folder_of
from qprune.runs.row import Row
from qprune.runs.stored import TIMING
from qprune.training.progress import duration


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    overrides: tuple[str, ...]  # as they would be typed
    config: RunConfig
    folder: Path
    state: str  # done, running, interrupted, to do, or broken for a row that cannot be read
    row: Row | None  # if it is done


def expand(arguments: Sequence[str], config_dir: str | None = None) -> list[str]:
    """Replace +sweep=NAME by its overrides of keys not given; drop retired keys."""
    given = {key_of(text) for text in arguments}
    expanded: list[str] = []
    for text in arguments:
        if key_of(text) in RETIRED:
            print_retired(key_of(text))
        elif key_of(text) == SWEEP:
            expanded += [o for o in _named_sweep(text.partition("=")[2], config_dir) if key_of(o) not in given]
        else:
            expanded.append(text)
    return expanded


def _named_sweep(name: str, config_dir: str | None) -> list[str]:
    sources = presets(SWEEP, config_dir)
    one_of(SWEEP, name, sources)
    content = yaml_value(sources[name], f"sweep {name}")
    overrides = content.get("overrides") if isinstance(content, dict) else None
    if not isinstance(overrides, list) or not all(isinstance(o, str) and "=" in o for o in overrides):
        raise UserError(f"sweep {name} has no list `overrides` of KEY=VALUE; see qprune/presets/sweep")
    return overrides


def presets(kind: str, config_dir: str | None = None) -> dict[str, str]:
    """Read the files of SWEEP or TABLE, also those below config_dir: text by name."""
    folders = [files("qprune") / "presets" / kind]
    if config_dir is not None and (Path(config_dir) / kind).is_dir():
        folders.append(Path(config_dir) / kind)
    found = [entry for folder in folders for entry in folder.iterdir() if entry.name.endswith(".yaml")]
    found.sort(key=lambda entry: entry.name)
    return {entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8") for entry in found}


def yaml_value(text: str, where: str) -> Any:
    """Return the content of a YAML file; UserError naming `where` for what is none."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not readable YAML ({str(error).splitlines()[0]})") from error


def jobs_of(overrides: Sequence[str], config_dir: str | None = None) -> list[Job]:
    """List the runs that these overrides make, in the sweep's order, each once."""
    found: dict[Path, Job] = {}
    with Composer(config_dir) as composer:
        for words in composer.jobs(overrides):
            config = composer.checked(words)
            folder = run_folder(config)
            if folder not in found:
                found[folder] = Job(words, config, folder, *folder_of(config).state())
    return list(found.values())


def first_events(jobs: Sequence[Job]) -> list[float]:
    """List the epochs, of those that are trained, at which operators of these runs begin.

    A recipe that contradicts itself is left out: its own run says so.
    """
    found = set()
    for job in jobs:
        with suppress(UserError):
            found.add(job.config.events().first_event)
    return sorted(event for event in found if event is not None)


def seconds_left(jobs: Sequence[Job]) -> dict[Path, float | None]:
    """Estimate the seconds of training that unfinished runs still take, by folder.

    Finished runs of the same task, length and budget are the measure; without one it is None.
    """
    measured: dict[tuple[Any, ...], list[float]] = {}
    for folder in {Path(job.config.results_dir) / job.config.task.name for job in jobs}:
        for path in sorted(folder.glob(f"*/{TIMING_FILE}")):
            with suppress(UserError):  # no measurement; the run itself is judged elsewhere
                if (timing := RunFolder(path.parent).parsed(TIMING_FILE, TIMING)) is not None:
                    kind = _kind(RunConfig.check(RunFolder(path.parent).config() or {}))
                    measured.setdefault(kind, []).append(timing.training_seconds)
    left: dict[Path, float | None] = {}
    for job in jobs:
        if job.state != "done":
            known = measured.get(_kind(job.config))
            left[job.folder] = sum(known) / len(known) * (1 - _progress(job)) if known else None
    return left


def time_left_text(jobs: Sequence[Job]) -> str:
    """Say how much training the unfinished ones of these runs take."""
    left = seconds_left(jobs)
    unknown = sum(seconds is None for seconds in left.values())
    seconds = sum(seconds or 0.0 for seconds in left.values())
    text = f"about {duration(seconds)} of training on one process, from the measured steps of finished runs"
    if unknown:
        text = f"{text}; and " if seconds else ""
        text += f"{counted(unknown, 'run')} of unknown length: no run of this task and budget is finished"
    return f"time left: {text}"


def _kind(config: RunConfig) -> tuple[Any, ...]:
    """Return what makes two runs equally long, roughly."""
    return (config.task.name, config.epochs, config.budget, config.data.source)


def _progress(job: Job) -> float:
    """Return the fraction of an interrupted run that its curve shows as trained."""
    with suppress(UserError):  # as if nothing was trained
        curve = RunFolder(job.folder).metrics()
        if curve is not None and len(curve):
            return min(1.0, float(curve["epoch"].max()) / job.config.trained_epochs)
    return 0.0
