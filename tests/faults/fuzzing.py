"""Configs and files that are wrong in random ways, in a process of limited memory that is forked for the purpose."""

import json
import os
import resource
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import hydra.utils
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from pydantic import TypeAdapter

from qprune.atomic_write import write_json
from qprune.cli import failures
from qprune.config.build import Recipe
from qprune.config.schema import json_schema
from qprune.config.types import STRICT, dotted_keys, schema_at
from qprune.errors import RunFailure, UserError
from qprune.runs import execute as run
from qprune.runs.folder import ROW_FILE, SUMS_FILE, RunFolder
from qprune.runs.load import copy_fraction_bits
from qprune.runs.store import Store
from qprune.training import checkpoint
from tests.training import toy

MEMORY = 8 << 30  # bytes of address space: a config that asks for more must be refused, not kill the machine


def in_limits(work: Callable[..., Counter[str]], notes: str, *arguments: Any) -> None:
    """Do `work` with bounded memory and leave what it counted in `notes`; exit code 1 and output for a failure."""
    folder = Path(notes)
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout = sys.stderr = (folder / "output.txt").open("a", buffering=1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.chdir(folder)  # hypothesis keeps its examples where it is, and a relative results_dir belongs here too
    write_json(folder / "counts.json", dict(work(*arguments)))


def counted(examples: int, strategy: Any, judge: Callable[[Any], str]) -> Counter[str]:
    """Count what `judge` says of so many examples, the same ones each time."""
    found, health = Counter[str](), list(HealthCheck)

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=health)
    @given(strategy)
    def each(example: Any) -> None:
        found[judge(example)] += 1

    each()
    return found


def verdict(action: Callable[[], Any]) -> str:
    """`runs`, or `refused` for an error that is explained; anything else is raised, with what was printed."""
    try:
        action()
    except Exception as error:
        code, message = failures.explain(error)
        if "This is a bug of qprune" in message or not message or code not in (failures.USER, failures.FAILURE):
            raise AssertionError(f"unexplained: {message}") from error
        return "refused"
    return "runs"


# --- configs -------------------------------------------------------------------------------------------------------

_WORDS = st.sampled_from(
    (
        *("", "w", "f", "wf", "fw", "**", "*", "!*", "[", "[z-a]", "conv2", "input", "prune", "null", "auto", "cpu"),
        *("cuda:9", "synthetic", "real", "espcn", "../x", "a/b", "/", "a\0b", "${seed}", "${nowhere}", "é" * 80, "x.y"),
        *("os.system", "qprune.tasks.espcn.Espcn", "qprune.tasks.espcn.math", "tests.nowhere.X", "1e9", "-1"),
    )
)
_NUMBERS = (
    st.integers(-2, 9)
    | st.sampled_from([0.0, -0.0, 0.25, 0.5, 1.0, 1.5, 2.5, -1.0, 1e-9, 1e9, 1e300, 2**31, 2**63, 10**30, -(10**30)])
    | st.sampled_from([float("nan"), float("inf"), float("-inf")])
)
_SCALARS = st.none() | st.booleans() | _NUMBERS | _WORDS | st.text(max_size=5)
VALUES = _SCALARS | st.lists(_SCALARS, max_size=3) | st.dictionaries(st.text(max_size=3), _SCALARS, max_size=2)


KEYS = {key: schema_at(json_schema(), key) for key in dotted_keys(json_schema())}


def legal(node: Any) -> Any:
    """A strategy for values that a part of a JSON schema allows, most of which are within its range."""
    if "anyOf" in node:
        return st.one_of(*map(legal, node["anyOf"]))
    kind = node.get("type")
    if "enum" in node:
        return st.sampled_from(node["enum"])
    if kind in ("integer", "number"):
        low, high = (node.get(name, node.get(f"exclusive{name.title()}")) for name in ("minimum", "maximum"))
        low, high = (-10 if low is None else low), (10 if high is None else high)
        most = min(high, max(low, 0) + 300)
        return st.integers(int(low), int(most)) if kind == "integer" else st.floats(low, most)
    others = {"boolean": st.booleans(), "null": st.none(), "string": _WORDS}
    return others.get(kind, st.lists(_WORDS, max_size=2))


def set_key(config: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a key of nested dictionaries, where there is a place for it."""
    *sections, name = dotted.split(".")
    for section in sections:
        config = config.get(section) if isinstance(config, dict) else None  # type: ignore[assignment]
    if isinstance(config, dict):
        config[name] = value


def changes(kinds: dict[str, Any]) -> Any:
    """A few keys with new values: legal ones and others, sometimes of keys that do not exist or are taken away."""
    keys = sorted(kinds)
    right = st.sampled_from(keys).flatmap(lambda key: st.tuples(st.just(key), legal(kinds[key])))
    wrong = st.tuples(st.sampled_from(keys), VALUES)
    unknown = st.tuples(
        st.sampled_from(["colour", "prune.colour", "task.colour", "trainer.thread", "task.sites.x"]), VALUES
    )
    gone = st.tuples(st.sampled_from([*keys, "prune", "task", "task.sites", "schedule"]), st.just(KeyError))
    some_right = st.lists(right, min_size=1, max_size=3)
    return some_right | some_right | st.lists(st.one_of(right, wrong, wrong, unknown, gone), min_size=1, max_size=3)


def fuzz_configs(bases: dict[str, dict[str, Any]], task: str, examples: int) -> Counter[str]:
    """Plan changed configs of `task`: each makes a plan, or an error that is explained."""
    values = bases[task]["task"]
    hints = get_type_hints(vars(hydra.utils.get_class(values["_target_"]))["__init__"], include_extras=True)
    own = {f"task.{key}": TypeAdapter(hints[key], config=STRICT).json_schema() for key in hints if key in values}
    # what makes networks and pictures large is left as it is in most configs
    kinds = KEYS | own
    large = ("width", "blocks", "image_size", "short_side", "scale", "patch", "stride", "depth", "on_synthetic")
    often = {key: kind for key, kind in kinds.items() if key.rpartition(".")[2] not in large}

    def plan_or_explain(changed: list[tuple[str, Any]]) -> str:
        config = json.loads(json.dumps(bases[task]))
        for key, value in changed:
            if value is KeyError:
                section, _, name = key.rpartition(".")
                parent = config.get(section, {}) if section and "." not in section else config
                parent.pop(name, None) if isinstance(parent, dict) else None
            else:
                set_key(config, key, value)
        return verdict(lambda: run.plan(OmegaConf.create(config)))

    return counted(examples, st.one_of(changes(often), changes(often), changes(often), changes(kinds)), plan_or_explain)


def fuzz_commands(examples: int) -> Counter[str]:
    """Give the command line changed overrides: each makes a plan, or one paragraph and an exit code."""
    from qprune.cli import main as cli

    keys = st.sampled_from([*KEYS, "task", "order", "data", "budget", "hydra.run.dir", "+task.x", "~seed", "++a.b"])
    text = st.text(st.sampled_from("=,.[]{}()'\"$:+-~!*\\ \tabq01ä"), max_size=6)
    override = st.builds(lambda key, value: f"{key}={value}", keys, VALUES.map(str) | text) | text

    def command(overrides: list[str]) -> str:
        path = Path("error.txt")
        with path.open("w") as stream:
            before, sys.stderr = sys.stderr, stream
            try:
                code = cli.main(["plan", "task=espcn", "data=synthetic", "budget=smoke", *overrides])
            finally:
                sys.stderr = before
        said = path.read_text()
        assert code in (0, 1, 2), (overrides, code, said)
        assert "This is a bug" not in said, (overrides, said)
        assert "Traceback" not in said, (overrides, said)
        return "runs" if code == 0 else "refused"

    return counted(examples, st.lists(override, min_size=1, max_size=3), command)


# --- files ---------------------------------------------------------------------------------------------------------


def mutated(content: bytes) -> Any:
    """A strategy for contents that differ from `content`: cut, overwritten, inserted into, taken from, doubled."""
    place = st.integers(0, max(0, len(content) - 1))
    junk = st.binary(min_size=1, max_size=8)
    digit = st.sampled_from([i for i, byte in enumerate(content) if chr(byte).isdigit()] or [0])
    return st.one_of(
        st.builds(lambda at: content[:at], place),
        st.builds(lambda at, new: content[:at] + new + content[at + len(new) :], place, junk),
        st.builds(lambda at, new: content[:at] + new + content[at:], place, junk),
        st.builds(lambda at, length: content[:at] + content[at + length :], place, st.integers(1, 64)),
        st.builds(lambda at, new: content[:at] + str(new).encode() + content[at + 1 :], digit, st.integers(0, 9)),
        st.builds(lambda new: new, st.binary(max_size=64)),
        st.just(content + content),
    ).filter(lambda new: new != content)


def fuzz_row(folder: Path, name: str, examples: int) -> Counter[str]:
    """Change one file of a finished run: no row of it may be used, or none may differ from the run's own."""
    path = folder / name
    content, row = path.read_bytes(), RunFolder(folder).row()
    [stored] = Store.read(folder.parent).rows.values()  # marked where the tests run in a tree with changes

    def unused_or_the_same(new: bytes) -> str:
        path.write_bytes(new)
        try:
            store = Store.read(folder.parent)
            store.check(list(store.rows))
            rows = list(store.rows.values())
            assert all(read == stored for read in rows), "a wrong number was accepted"
            if name in (ROW_FILE, "config.yaml", "metrics.csv"):
                assert not rows, "a changed file went unnoticed"
                assert store.problems
            if name == "network.safetensors":
                network = toy.Toy().network
                assert verdict(lambda: copy_fraction_bits(network, RunFolder(folder))) == "refused"
            return "noticed"
        finally:
            path.write_bytes(content)

    found = counted(examples, mutated(content), unused_or_the_same)
    assert RunFolder(folder).row() == row
    return found


def fuzz_old_row(folder: Path, examples: int) -> Counter[str]:
    """Change the row of a run without checksums: it is refused, or a row by all rules, and nothing fails."""
    path = folder / ROW_FILE
    content = path.read_bytes()

    def refused_or_legal(new: bytes) -> str:
        path.write_bytes(new)
        return verdict(lambda: RunFolder(folder).row())

    found = counted(examples, mutated(content), refused_or_legal)
    path.write_bytes(content)
    return found


def fuzz_checkpoint(folder: Path, examples: int) -> Counter[str]:
    """Change the newest checkpoint, its checksum too or not: the one before is used, or the run says what is wrong."""
    older, newest = sorted((folder / "checkpoints").iterdir())
    content, older_content = newest.read_bytes(), older.read_bytes()
    before = checkpoint.load_newest(older.parent, latest=int(older.name.split("-")[1]))
    assert before is not None

    def passed_over(example: tuple[bytes, bool]) -> str:
        new, forged = example
        newest.unlink()
        name = newest.name
        if forged:
            name = f"{name[:15]}{checkpoint.hashlib.sha256(new).hexdigest()[:16]}.pt"  # type: ignore[attr-defined]
        path = newest.with_name(name)
        path.write_bytes(new)
        try:
            with warnings.catch_warnings(record=True):
                warnings.simplefilter("always")
                if not forged:
                    state = checkpoint.load_newest(folder / "checkpoints")
                    assert state is not None
                    assert (state["step"], state["metrics"]) == (before["step"], before["metrics"])
                    return "passed over"
                # whoever can write checksums may write any weights; the run must still not break
                _, _, trainer = toy.prepared(folder)
                try:
                    trainer.fit()
                except (UserError, RunFailure):
                    return "forged: refused"
                return "forged: trained on"
        finally:
            for file in (folder / "checkpoints").iterdir():
                file.unlink()
            older.write_bytes(older_content)
            newest.write_bytes(content)

    return counted(examples, st.tuples(mutated(content), st.booleans()), passed_over)


def fuzz_recipe_file(config: dict[str, Any], examples: int) -> Counter[str]:
    """Change the text of a stored config: it is read or not, and never breaks the reader."""

    def read(new: bytes) -> None:
        try:
            loaded = yaml.safe_load(new)
        except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
            raise UserError(f"not YAML ({error})") from error
        if not isinstance(loaded, dict):
            raise UserError("no config")
        Recipe.from_config(loaded)

    return counted(examples, mutated(yaml.safe_dump(config).encode()), lambda new: verdict(lambda: read(new)))


def check_all(folder: Path) -> list[str]:
    """Names of files of a finished run whose checksum differs."""
    names = [line.split()[1] for line in (folder / SUMS_FILE).read_text().splitlines()]
    bad = []
    for name in names:
        try:
            RunFolder(folder).check(name)
        except UserError:
            bad.append(name)
    return bad
