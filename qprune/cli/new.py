"""`qprune new task`: write a task of one's own to begin with, its config and its test."""

from __future__ import annotations

import argparse
import keyword
import re
from collections.abc import Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from qprune.atomic_write import write_atomically
from qprune.errors import UserError, one_of

# By template in qprune/presets/new_task: where it is written, and what it holds
FILES = {
    "task.py.txt": ("{name}.py", "network, data, training step, score"),
    "task.yaml.txt": ("configs/task/{name}.yaml", "its keys, sites and schedule"),
    "test_task.py.txt": ("test_{name}.py", "trains it in every order"),
}


def make(arguments: Sequence[str]) -> int:
    """Write the files of a new task, and print how to run it."""
    parser = argparse.ArgumentParser(
        "qprune new",
        description="Write a task of your own to begin with: a Python file, its config and a test. They train a small "
        "network on two spirals; put your network and your data in their place.",
    )
    parser.add_argument("kind", metavar="task", help="the word task")
    parser.add_argument("name", metavar="NAME", help="of the task and its Python module, such as my_task")
    parser.add_argument("--folder", type=Path, default=Path(), metavar="DIR", help="where the files go (default: here)")
    options = parser.parse_args(arguments)
    one_of("qprune new: WHAT", options.kind, ["task"])
    name, folder = options.name, options.folder
    _check(name)
    paths = {template: folder / path.format(name=name) for template, (path, _) in FILES.items()}
    if there := [str(path) for path in paths.values() if path.exists()]:
        raise UserError(
            f"{' and '.join(there)} would be replaced; choose another name, or another folder with --folder"
        )
    class_name = "".join(word.capitalize() for word in name.split("_"))
    for template, path in paths.items():
        text = (files("qprune") / "presets" / "new_task" / template).read_text(encoding="utf-8")
        write_atomically(path, text.replace("my_task", name).replace("MyTask", class_name).encode())
        print(f"{path}: {FILES[template][1]}")
    place = "" if folder == Path() else f"cd {folder}\n  "
    print(f"to run it:\n  {place}export PYTHONPATH=$PWD QPRUNE_TRUST={name}")
    print(f"  qprune run --config-dir configs task={name}")
    return 0


def _check(name: str) -> None:
    """Raise UserError unless a module and a task can have this name."""
    if not re.fullmatch("[a-z][a-z0-9_]{0,63}", name) or keyword.iskeyword(name):
        raise UserError(f"{name!r} is no name of a module; type lower-case letters, digits and '_', such as my_task")
    tasks = [entry.name.removesuffix(".yaml") for entry in (files("qprune.configs") / "task").iterdir()]
    if name in tasks or find_spec(name) is not None:
        what = "a task of qprune" if name in tasks else "a module that can be imported"
        raise UserError(f"{name} is {what}; choose another name")
