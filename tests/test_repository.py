"""The laws of the repository's layout, held over the syntax trees of its files."""

import ast
import json
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
FRAMEWORK = sorted((ROOT / "qprune").rglob("*.py"))
TASKS = sorted((ROOT / "tasks").rglob("*.py"))

# The rooms in the order of their arrows: each may import itself and those before it.
_CHAIN = ("compression", "config", "training", "runs")


def _below(room: str) -> set[str]:
    rooms = _CHAIN[: _CHAIN.index(room) + 1]
    return {"qprune", "qprune.errors", "qprune.atomic_write", *(f"qprune.{name}" for name in rooms)}


# Room -> the rooms that it may import: compression <- config <- training <- runs <- {search, reporting, export} <- cli.
LAW = {
    "qprune": {"qprune.errors", "qprune.compression", "qprune.export"},  # the public names
    "qprune.errors": set(),
    "qprune.atomic_write": {"qprune.errors"},
    "qprune.compression": _below("compression"),
    "qprune.config": _below("config"),
    "qprune.training": _below("training"),
    "qprune.runs": _below("runs"),
    "qprune.integrations": {*_below("compression"), "qprune.integrations"},
    "qprune.search": {*_below("runs"), "qprune.search"},
    "qprune.reporting": {*_below("runs"), "qprune.reporting"},
    "qprune.export": {*_below("runs"), "qprune.export"},
    "qprune.cli": {*_below("runs"), "qprune.search", "qprune.reporting", "qprune.export", "qprune.cli"},
    "qprune.tasks": {"qprune.errors", "qprune.training.task", "qprune.config.types", "qprune.tasks"},
}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("qprune", *parts) if parts[0] == "tasks" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> Iterator[str]:
    """Modules that a file imports, wherever in it; `from package import module` counts as the module."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            assert node.module is not None
            for alias in node.names:
                inner = ROOT.joinpath(*node.module.split("."), alias.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").exists()
                yield f"{node.module}.{alias.name}" if is_module else node.module


def within(module: str, package: str) -> bool:
    return module == package or (package != "qprune" and module.startswith(f"{package}."))


def law_of(module: str) -> set[str]:
    room = max((package for package in LAW if within(module, package)), key=len, default=None)
    assert room is not None, f"{module} is in no room of the house; give it one in LAW"
    return LAW[room]


def test_imports_point_one_way() -> None:
    for path in (*FRAMEWORK, *TASKS):
        legal = law_of(module_name(path))
        for name in imported(path):
            if name.partition(".")[0] == "qprune":
                assert any(within(name, package) for package in legal), f"{module_name(path)} imports {name}"
            top = name.partition(".")[0]
            assert top not in {"tasks", "configs", "tests"}, f"{path}: these are qprune.tasks and qprune.configs"


def test_no_module_imports_itself_by_way_of_others() -> None:
    names = {module_name(path) for path in [*FRAMEWORK, *TASKS]}
    arrows = {module_name(path): {name for name in imported(path) if name in names} for path in [*FRAMEWORK, *TASKS]}
    del arrows["qprune"]  # the lazy public names import nothing when they are loaded
    while True:
        leaves = {name for name, others in arrows.items() if not others & arrows.keys()}
        if not leaves:
            break
        arrows = {name: others for name, others in arrows.items() if name not in leaves}
    assert not arrows, f"import circles among {sorted(arrows)}"


# Private names of other packages that have no public counterpart: where, what, and why.
PRIVATE = {
    ("qprune", "torch.utils._pytree"): "leaves of what networks take and return, containers of others included",
    ("qprune.compression.activation_trace", "torch.utils._python_dispatch"): "no other way to see every operation",
    ("qprune.training.compile", "torch._functorch"): "the one flag that lets graphs with custom gradients be cached",
    ("qprune.compression.convert", "__class__"): "a copied layer without its parametrizations keeps its own class",
}


def private_names(path: Path) -> Iterator[tuple[int, str]]:
    """Imports and attributes with a leading underscore that are not the file's own, and assigned `__class__`."""
    tree = tree_of(path)
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and _is_self(node.value)}
    own |= {node.target.id for node in ast.walk(tree) if isinstance(node, ast.AnnAssign) and _is_name(node.target)}
    own |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if "._" in alias.name)
        elif isinstance(node, ast.ImportFrom):
            parts = f"{node.module}.{node.names[0].name}".split(".")
            if any(part.startswith("_") and not part.endswith("__") for part in parts):
                yield node.lineno, ".".join(parts[:-1]) if "._" in f".{node.module}" else ".".join(parts)
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            if node.attr == "__class__" and isinstance(node.ctx, ast.Store):
                yield node.lineno, "__class__"
            elif not node.attr.startswith("__") and node.attr not in own and node.attr not in ("_replace", "_asdict"):
                yield node.lineno, ast.unparse(node)


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def _is_name(node: ast.expr) -> bool:
    return isinstance(node, ast.Name)


def test_of_other_packages_at_most_five_private_names_are_used() -> None:
    assert len(PRIVATE) <= 5
    used: set[tuple[str, str]] = set()
    for path in (*FRAMEWORK, *TASKS):
        for line, name in private_names(path):
            rooms = [room for room, what in PRIVATE if name.startswith(what)]
            found = [room for room in rooms if room == "qprune" or within(module_name(path), room)]
            assert found, f"{path}:{line}: {name} is private"
            used.update((room, what) for room, what in PRIVATE if room in found and name.startswith(what))
    assert used == PRIVATE.keys()


def test_compression_sees_no_config_and_no_runner() -> None:
    for path in FRAMEWORK:
        if module_name(path).startswith("qprune.compression"):
            assert not {name.partition(".")[0] for name in imported(path)} & {"hydra", "omegaconf", "yaml", "pandas"}


def test_only_the_command_line_starts_hydra() -> None:
    starters = {"main", "initialize", "initialize_config_module", "initialize_config_dir", "compose"}
    for path in [*FRAMEWORK, *TASKS]:
        if module_name(path).startswith(("qprune.cli", "qprune.config.compose")):
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hydra"):
                assert not {alias.name for alias in node.names} & starters, path


def test_the_framework_stays_small() -> None:
    sources = [*FRAMEWORK, *(ROOT / "qprune").rglob("*.c")]
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources}
    assert max(lines.values()) <= 500
    assert len(sources) <= 110
    # 11,930 lines in 85 files before any network, export by torch, costs, protocols and `qprune explain` came in.
    assert sum(lines.values()) <= 16_750


def test_everything_is_listed_for_the_wheel() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {path.parent for top in ("qprune", "tasks", "configs") for path in (ROOT / top).rglob("*.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    on_disk = {name if name.split(".")[0] == "qprune" else f"qprune.{name}" for name in names}
    assert sorted(on_disk) == config["packages"]
    assert all((folder / "__init__.py").exists() for folder in folders)
    data = config["package-data"]
    given = {path for glob in data["qprune"] for path in (ROOT / "qprune").glob(glob)}
    given |= {path for glob in data["qprune.configs"] for path in (ROOT / "configs").glob(glob)}
    assert given == {path for top in ("qprune", "configs") for path in (ROOT / top).rglob("*.[yt][ax][mt]*")}


def test_every_file_that_contributors_are_sent_to_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    places = {place for place in re.findall(r"`([\w/]+/[\w.]*)`", text) if not re.search("NAME|ORDER|build/", place)}
    assert len(places) > 40
    assert [place for place in sorted(places) if not (ROOT / place).exists()] == []
    assert len(text.splitlines()) <= 120


def test_the_version_stands_in_one_place() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert config["project"]["dynamic"] == ["version"]
    assert config["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "qprune.__version__"}


def test_constraints_name_no_torch_and_no_host() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all("==" in pin and "/" not in pin for pin in pins)
    assert not any(pin.startswith(("torch==", "torchvision==", "nvidia")) for pin in pins)


def test_published_commands_name_no_place_of_one_machine() -> None:
    notes = list((ROOT / "results" / "published").glob("*/*/environment.json"))
    assert notes
    for path in notes:
        words = json.loads(path.read_text(encoding="utf-8"))["command"]
        values = [word.partition("=")[2].strip("'") for word in words[1:]]
        assert not [value for value in values if Path(value).is_absolute()], path
