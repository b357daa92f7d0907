"""The folder of a run: file names, lock, checksums, and the search by signature.

Checksums are in the format of the tool `sha256sum`, which can check them too: sha256sum -c SHA256SUMS
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import stat
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from qprune.atomic_write import explained, json_bytes, remove_left_temporaries, write_atomically, write_json
from qprune.config.schema import RunConfig
from qprune.errors import UserError, first_line
from qprune.runs import stored
from qprune.runs.row import Row, parse_row

if TYPE_CHECKING:
    import pandas as pd

ROW_FILE, CONFIG_FILE, METRICS_FILE = "result.json", "config.yaml", "metrics.csv"
NETWORK_FILE, OPERATORS_FILE, PLAN_FILE = "network.safetensors", "operators.json", "plan.csv"
ENVIRONMENT_FILE, TIMING_FILE, HISTOGRAMS_FILE = "environment.json", "timing.json", "histograms.json"
SUMS_FILE, STOPPED_FILE, FAILED_FILE, LOCK_FILE = "SHA256SUMS", "stopped.json", "failed.json", ".lock"
CHECKPOINTS, PICTURES, EXPORT, EVENTS = "checkpoints", "pictures", "export", "events"  # folders
PUBLISHED = "published"  # folder beside that of the runs: rows that are committed with a project
SHORTEST_SIGNATURE = 6  # digits

# What has a checksum wherever there are some; of older runs, nothing else has
_SUMMED = (CONFIG_FILE, METRICS_FILE, NETWORK_FILE, OPERATORS_FILE, ROW_FILE)
_SUM = re.compile(r"([0-9a-f]{64})  ([^\x00-\x1f]+)")
_DAMAGED = "delete the run's folder, or run its command again with force=true"
_DEEPEST = 50  # levels of a config
T = TypeVar("T")


def sum_of(content: bytes) -> str:
    """Return the checksum of a file's content."""
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, at `path`, which need not exist yet."""

    path: Path
    written: dict[str, str] = field(default_factory=dict, compare=False)  # checksums of what `write` has written

    @classmethod
    def find(cls, run: str, results_dir: Path) -> RunFolder:
        """Find a finished run by its path or the first digits of its signature."""
        folder = cls(Path(run))
        if not folder.path.is_dir():
            return cls.by_signature(run, results_dir)
        if not folder.finished:
            begun = (folder.path / CONFIG_FILE).exists()
            what = f"is not finished (it has no {ROW_FILE})" if begun else "is no run folder"
            raise UserError(f"{run} {what}; finish the run with the command that began it, or name another")
        return folder

    @classmethod
    def by_signature(cls, signature: str, results_dir: Path) -> RunFolder:
        """Find the one finished run whose signature begins so. Raises UserError."""
        if not re.fullmatch(f"[0-9a-f]{{{SHORTEST_SIGNATURE},64}}", signature):
            raise UserError(
                f"{signature!r} is neither a folder nor the beginning of a signature ({SHORTEST_SIGNATURE} digits or "
                "more); give a run folder, or what its name ends with"
            )
        folders = [cls(path) for path in sorted(results_dir.glob(f"*/*-{signature[:10]}*"))]
        found = [each for each in folders if each.finished and each.row().signature.startswith(signature)]
        if not found:
            begun = next((each.path for each in folders if (each.path / CONFIG_FILE).exists()), None)
            unfinished = f"; the run in {begun} is not finished" if begun else ""
            where = f"below {results_dir}"
            raise UserError(f"no finished run {where} has a signature that begins with {signature}{unfinished}")
        if len(found) > 1:
            raise UserError(f"{len(found)} runs have a signature that begins with {signature}: give more digits")
        return found[0]

    @property
    def finished(self) -> bool:
        """Whether the run is whole: its row is written last."""
        return (self.path / ROW_FILE).exists()

    @property
    def resumable(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return any((self.path / CHECKPOINTS).glob("*.pt"))

    def state(self) -> tuple[str, Row | None]:
        """Return done, broken, running, failed, interrupted or to do, and a finished run's row."""
        if self.finished:
            try:
                return "done", self.row()
            except UserError:
                return "broken", None
        if (self.path / LOCK_FILE).exists():
            try:
                with FileLock(self.path / LOCK_FILE, timeout=0):
                    pass
            except Timeout:
                return "running", None
            except OSError:  # no lock of ours: a link, a folder
                pass
        if (self.path / FAILED_FILE).exists():
            return "failed", None
        return "interrupted" if self.resumable else "to do", None

    @contextmanager
    def locked(self, wait: bool) -> Iterator[None]:
        """Hold the run; UserError if another process has it and `wait` is False.

        What a killed process left half-written is removed.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            held = FileLock(self.path / LOCK_FILE).acquire(timeout=-1 if wait else 0)
        except Timeout:
            raise UserError(
                f"{self.path} is being run by another process; type wait=true to wait for it and take its row, or "
                "change seed or config"
            ) from None
        except OSError as error:
            raise explained(error, self.path) from error
        with held:
            remove_left_temporaries(self.path)
            yield

    def empty(self) -> None:
        """Remove everything but the lock."""
        (self.path / ROW_FILE).unlink(missing_ok=True)  # first: where a row is, its run is whole
        for path in self.path.iterdir():
            if path.name != LOCK_FILE:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def remove_checkpoints(self) -> None:
        """Remove the checkpoints of a finished run."""
        shutil.rmtree(self.path / CHECKPOINTS, ignore_errors=True)

    def row(self) -> Row:
        """Return the row as its run left it. Raises UserError naming file and field."""
        path, content = self.path / ROW_FILE, self.content(ROW_FILE)
        if content is None:
            raise UserError(f"{path} is missing; finish the run with the command that began it")
        self._check(ROW_FILE, content, self._sums())
        try:
            return parse_row(content)
        except ValueError as error:
            raise UserError(f"{path}: {error}; delete the file, or run its command again with force=true") from error

    def store(self, row: Row, sums: Mapping[str, str]) -> None:
        """Write the checksums of the run's files, and the row last: where one is, its run is whole.

        sums: `written` of the process that wrote them.
        """
        content = json_bytes(asdict(row))
        self.write_sums({**sums, ROW_FILE: sum_of(content)})
        write_atomically(self.path / ROW_FILE, content)

    def config(self) -> dict[str, Any] | None:
        """Return the resolved config, checked, or None where the file is missing. Raises UserError."""
        if (content := self.checked_content(CONFIG_FILE)) is None:
            return None
        try:
            config = _plain_yaml(content)
            if not isinstance(config, dict):
                raise UserError(f"it holds {stored.shown(config)}")
            json_bytes(checked := RunConfig.check(config).plain())  # arguments of tasks are of any type
            return checked
        except (ValueError, TypeError, yaml.YAMLError, RecursionError) as error:
            raise UserError(
                f"{self.path / CONFIG_FILE} is not the config of a run ({first_line(error)}); {_DAMAGED}"
            ) from error

    def config_text(self) -> str:
        """Return the text of the config; nothing where it is missing. Raises UserError."""
        return (self.content(CONFIG_FILE) or b"").decode(errors="replace")

    def metrics(self) -> pd.DataFrame | None:
        """Return the curve, one line per epoch, or None where the file is missing. Raises UserError."""
        import pandas as pd  # late: most of the command line does not need it

        if (content := self.checked_content(METRICS_FILE)) is None:
            return None
        try:
            with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):  # lines of other lengths
                curve = pd.read_csv(io.BytesIO(content), index_col=False, low_memory=False)
            lines = [{k: None if v != v else v for k, v in line.items()} for line in curve.to_dict("records")]  # NaN
            stored.CURVE.validate_python(lines)
        except (ValueError, OverflowError, pd.errors.ParserWarning) as error:  # pandas' own errors are ValueErrors
            why = stored.first_problem(error) if isinstance(error, ValidationError) else first_line(error)
            raise UserError(f"{self.path / METRICS_FILE} is not the curve of a run ({why}); {_DAMAGED}") from error
        return curve

    def parsed(self, name: str, schema: TypeAdapter[T], advice: str = _DAMAGED) -> T | None:
        """Return what a JSON file of the run holds, or None where it is missing. Raises UserError.

        schema: one of those in `stored`. advice: what to do with a damaged file.
        """
        if (content := self.checked_content(name)) is None:
            return None
        try:
            return schema.validate_json(content)
        except ValidationError as error:
            raise UserError(f"{self.path / name}: {stored.first_problem(error)}; {advice}") from error

    def environment(self) -> stored.Environment:
        """Return what is known of the environment. Raises UserError."""
        return self.parsed(ENVIRONMENT_FILE, stored.ENVIRONMENT) or stored.Environment()

    def note_failed(self, reason: str | None) -> None:
        """Note why the run failed, or remove the note where it starts again (None)."""
        if reason is None:
            (self.path / FAILED_FILE).unlink(missing_ok=True)
        else:
            write_json(self.path / FAILED_FILE, {"reason": reason})

    def note_stopped(self, reason: str, optimistic: float) -> None:
        """Note that the run was stopped early and might have reached `optimistic`."""
        write_json(self.path / STOPPED_FILE, {"reason": reason, "optimistic_score": optimistic})

    def stopped(self) -> stored.Stopped | None:
        """Return the note of a stopped run, or None where there is none. Raises UserError."""
        return self.parsed(STOPPED_FILE, stored.STOPPED, "delete it")

    def write(self, name: str, content: bytes) -> None:
        """Write a file of the run, and record its checksum in `written`."""
        write_atomically(self.path / name, content)
        self.written[name] = sum_of(content)

    def write_sums(self, sums: Mapping[str, str]) -> None:
        """Write the checksums of the run's files."""
        lines = [f"{sums[name]}  {name}\n" for name in sorted(sums)]
        write_atomically(self.path / SUMS_FILE, os.fsencode("".join(lines)))

    def check(self, *names: str) -> bool:
        """Raise UserError unless these files are as the run wrote them.

        Missing files pass, and all files of a folder from before there were checksums: then the result is False.
        """
        sums = self._sums()
        for name in names if sums is not None else ():
            if (content := self.content(name)) is not None:
                self._check(name, content, sums)
        return sums is not None

    def check_all(self) -> None:
        """Raise UserError unless every file that has a checksum is as the run wrote it, or missing."""
        self.check(*(self._sums() or ()))

    def _check(self, name: str, content: bytes, sums: Mapping[str, str] | None) -> None:
        if sums is None or (sums and name not in (*sums, *_SUMMED)):
            return
        if name not in sums:
            raise UserError(f"{self.path / SUMS_FILE} is damaged, so that {name} cannot be checked; {_DAMAGED}")
        if sums[name] != sum_of(content):
            raise UserError(
                f"{self.path / name} is not as its run wrote it: its checksum differs from that in {SUMS_FILE} "
                f"beside it; {_DAMAGED}"
            )

    def _sums(self) -> dict[str, str] | None:
        """Return the checksums by file: none if damaged, None where there are none."""
        if (content := self.content(SUMS_FILE)) is None:
            return None
        lines = os.fsdecode(content).removesuffix("\n").split("\n")
        sums = {match[2]: match[1] for match in map(_SUM.fullmatch, lines) if match}
        return sums if len(sums) == len(lines) else {}  # damaged: no file is in it, so that each is refused

    def checked_content(self, name: str) -> bytes | None:
        """Return the content of a file as the run wrote it, or None where it is missing. Raises UserError."""
        if (content := self.content(name)) is not None:
            self._check(name, content, self._sums())
        return content

    def content(self, name: str) -> bytes | None:
        """Return the content of a file, or None where it is missing. Raises UserError for what is no file."""
        try:
            # not Path.open: with it, ten thousand rows take twice the time; a pipe or device would be read for ever
            with open(f"{self.path}/{name}", "rb", buffering=0, opener=_open_at_once) as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise UserError(f"{self.path / name} is no file; {_DAMAGED}")
                return file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{self.path / name} cannot be read ({error.strerror}); {_DAMAGED}") from error


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _plain_yaml(content: bytes) -> Any:
    """Read YAML as a run writes it. With aliases, a short text can stand for a value that is endless."""
    depth, loader = 0, getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for event in yaml.parse(content, loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > _DEEPEST:
            raise yaml.YAMLError("it has aliases, or is nested too deep")
    return yaml.load(content, loader)


def read_rows(folder: Path) -> tuple[list[Row], list[str]]:
    """Return all rows below `folder`, sorted by path, and the problems of bad files."""
    runs, problems = read_runs(folder)
    return [row for _, row in runs], problems


def read_runs(folder: Path) -> tuple[list[tuple[RunFolder, Row]], list[str]]:
    """As `read_rows`, with folders; of rows with one signature and arithmetic the first counts."""
    found: dict[tuple[str, int], tuple[RunFolder, Row]] = {}
    problems = []
    # not Path.rglob: it takes longer than reading ten thousand rows
    paths = sorted(Path(place) for place, others, files in os.walk(folder) if ROW_FILE in (*files, *others))
    for run in map(RunFolder, paths):
        try:
            row = run.row()
        except UserError as error:
            problems.append(str(error))
            continue
        first = found.setdefault((row.signature, row.arithmetic), (run, row))[0]
        if first is not run:
            problems.append(
                f"{run.path / ROW_FILE} has the signature of {first.path / ROW_FILE} and is left out; delete one of "
                "them"
            )
    return list(found.values()), problems
