"""A stranger's results folder is data: verbs that read it execute nothing, and write only where they are told."""

import hashlib
import os
import pickle
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.attacks import hostile
from tests.attacks.conftest import TRIALS, Attacks, SilentDifferenceError, verb

VERBS = {
    "list": lambda folder, run: ("list", "runs", f"results_dir={folder}", "seed=0"),
    "tables": lambda folder, run: ("tables", "order", f"results_dir={folder}"),
    "evaluate": lambda folder, run: ("evaluate", str(run)),
    "export": lambda folder, run: ("export", str(run), "--form", "sparse"),
    "verify": lambda folder, run: ("verify", str(run), "--form", "float", "--no-timing"),
    "explain": lambda folder, run: ("explain", str(run), str(run)),
    "report": lambda folder, run: ("report", f"results_dir={folder}", "--runs", "1"),
}
_WRITES = {f"os.{name}" for name in "mkdir rename remove rmdir symlink link truncate chmod chown".split()}
_WRITES |= {f"shutil.{name}" for name in ("rmtree", "copyfile", "move")}
_STARTS = {f"os.{name}" for name in ("system", "exec", "posix_spawn", "spawn", "fork")}
_STARTS |= {"subprocess.Popen", "pty.spawn", "socket.connect", "socket.getaddrinfo", "urllib.Request"}
_STARTS |= {"ctypes.dlopen", "marshal.loads", "pickle.find_class"}

seen: list[tuple[str, Any]] | None = None  # while a verb is watched


def _audit(event: str, arguments: Any) -> None:
    if seen is None:
        return
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, str | bytes) and ((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)):
            seen.append(("write", os.fsdecode(path)))
    elif event in _WRITES:
        seen.extend(("write", os.fsdecode(path)) for path in arguments if isinstance(path, str | bytes))
    elif event in _STARTS or event == "import":
        seen.append((event, arguments[0]))


sys.addaudithook(_audit)


@contextmanager
def watched() -> Iterator[list[tuple[str, Any]]]:
    """Note what is opened to write, started and imported meanwhile."""
    global seen
    found: list[tuple[str, Any]] = []
    seen = found
    try:
        yield found
    finally:
        seen = None


TARGETS = (
    *"stranger.Task stranger.Task.x os.system subprocess.Popen builtins.eval tests_stranger.Task Toy".split(),
    *"qprune.tasks.espcn.os.system qprune.tasks.data.cifar10.pickle.loads qprune.cli.main.main".split(),
    *"torch.hub.load hydra.utils.call tests.attacks.hostile.os.system qprune_tasks.x.Y".split(),
    *("qprune.tasks", "qprune.tasks..x", "..tests.x.Y", ""),
)


def made_hostile(draw: random.Random, runs: list[Path], place: Path, outside: Path) -> tuple[Path, Path]:
    """Copy a run into a stranger's results folder that would execute or write; return both."""
    shutil.rmtree(place, ignore_errors=True)
    results = place / "runs"
    [run] = hostile.copied(runs[:1], results)
    config = hostile.config_of(run)
    for _ in range(draw.randint(1, 3)):
        draw.choice(
            (
                lambda: config["task"].update(_target_=draw.choice(TARGETS)),
                lambda: config["data"].update(source="real", root=str(outside / "data")),
                lambda: config["logger"].update(name=draw.choice(("tensorboard", "mlflow", "wandb"))),
                lambda: config.update(results_dir=str(outside)),
                lambda: config.update(
                    hydra={"callbacks": {"x": {"_target_": "os.system", "command": f"touch {outside}/x"}}}
                ),
                lambda: config["task"].update(
                    {draw.choice(("name", "sites", "_recursive_", "x")): {"_target_": "os.system"}}
                ),
                lambda: config["order"].update(name="../../../x"),
                lambda: _shipped(config, outside),
            )
        )()
    (run / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    text = f"!!python/object/apply:os.system ['touch {outside}/called']"
    if draw.random() < 0.15:
        (run / "config.yaml").write_text(draw.choice((text, f"x: {text}", f"task: {text}")), encoding="utf-8")
    if draw.random() < 0.3:
        _pickled(run, outside)
    for _ in range(draw.randint(0, 2)):
        target = outside / draw.choice(("folder", "file"))
        names = ".lock export pictures events checkpoints histograms.json metrics.csv".split()
        places = "tables figures explain report.html frontier sweeps warm_starts".split()
        link = draw.choice([*(run / name for name in names), *(results / name for name in places)])
        if link.exists():
            shutil.rmtree(link) if link.is_dir() and not link.is_symlink() else link.unlink()
        if not link.is_symlink():
            link.symlink_to(target)
    (run / "SHA256SUMS").unlink()
    if draw.random() < 0.5:
        hostile.sum_again(run)
    return results, run


def _shipped(config: dict[str, Any], outside: Path) -> None:
    """Have the config name a shipped task that downloads what it lacks."""
    task = {"_target_": "qprune.tasks.cifar.Cifar", "name": "toy", "sites": {}, "paper_size": {}}
    config["task"] = task
    config["data"] = {"source": "real", "root": str(outside / "folder"), "verify": True}


def _pickled(run: Path, outside: Path) -> None:
    """Leave pickles that would call a function, where torch's checkpoints are."""

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (outside / "called",))

    content = pickle.dumps(Evil(), protocol=2)
    for folder in ("checkpoints", "events"):
        (run / folder).mkdir(exist_ok=True)
        (run / folder / f"step-000000003-{hashlib.sha256(content).hexdigest()[:16]}.pt").write_bytes(content)


def tree_of(folder: Path) -> dict[str, str]:
    """What is below a folder."""
    return {str(p): "folder" if p.is_dir() else hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*")}


def _is_own(path: str, results: Path) -> bool:
    """Whether a place is told to be written: the results folder, or the caches and scratch space of libraries."""
    place = Path(path).resolve()
    scratch = place.is_relative_to(tempfile.gettempdir()) and place.relative_to(tempfile.gettempdir()).parts[:1] != ()
    if place.is_relative_to(results.resolve()) or path in ("/dev/null", "/dev/tty"):
        return True
    return (scratch and "pytest-of" not in path) or any(
        part in (".cache", "__pycache__", ".config") for part in place.parts
    )


@pytest.mark.parametrize("name", VERBS)
def test_a_stranger_s_results_folder_is_data(
    name: str, attacks: Attacks, runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = tmp_path / "outside"
    (outside / "folder").mkdir(parents=True)
    (outside / "file").write_bytes(b"precious")
    (tmp_path / "stranger.py").write_text(f"from pathlib import Path\nPath(r'{outside}', 'called').touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = tree_of(outside)
    verb("export", str(runs[0]), "--form", "sparse")  # whatever is imported late is imported now
    if name in ("verify", "report", "explain"):
        hostile.copied(runs[:1], tmp_path / "first" / "runs")
        first = tmp_path / "first" / "runs"
        verb(*VERBS[name](first, first / runs[0].parent.name / runs[0].name))

    def trial(draw: random.Random) -> None:
        results, run = made_hostile(draw, runs, tmp_path / "place", outside)
        with watched() as found:
            verb(*VERBS[name](results, run))
        for event, what in found:
            if event == "import":
                package = str(what).partition(".")[0]
                assert package not in ("stranger", "tests_stranger", "qprune_tasks", "pty", "code"), what
            elif event == "write":
                if not _is_own(what, results):
                    raise SilentDifferenceError(f"{name} writes {what}")
            elif event in ("ctypes.dlopen", "marshal.loads"):
                continue  # libraries that are imported late
            elif (
                event != "subprocess.Popen" or Path(str(what)).name != "git"
            ):  # which looks up a commit in qprune's folder
                raise SilentDifferenceError(f"{name}: {event} {what}")
        if tree_of(outside) != before:
            raise SilentDifferenceError(f"{name} changed {set(tree_of(outside).items()) ^ set(before.items())}")
        assert "stranger" not in sys.modules

    attacks.run(
        f"stranger: {name}", trial, TRIALS if name in ("list", "tables", "evaluate", "export") else -(-TRIALS // 4)
    )


def test_trust_is_asked_of_stored_runs_and_not_of_configs(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QPRUNE_TRUST", "")
    answer = verb("evaluate", str(runs[0]))
    assert answer.code == 2
    assert answer.err == (
        "error: task._target_=tests.attacks.hostile.Pictured is code outside qprune, and this command would import it "
        "for a stored run; if you trust the package tests, add --trust tests to the command, or for good: export "
        "QPRUNE_TRUST=tests\n"
    )
    assert verb("evaluate", str(runs[0]), "--trust", "tests").code == 0
    monkeypatch.setenv("QPRUNE_TRUST", "tests.attack,other")  # a name covers no longer one
    assert verb("evaluate", str(runs[0])).code == 2
    for wrong in (("--trust",), ("--trust", "a b")):
        assert "is not a package; type for example --trust my_tasks" in verb("list", *wrong).err
    words = ("task=espcn", "data=synthetic", "budget=smoke", "task._target_=tests.attacks.test_strangers.Mine")
    assert "tests.attacks.test_strangers.Mine cannot be imported" in verb("plan", *words).err
