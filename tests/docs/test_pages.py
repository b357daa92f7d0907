"""Hold the pages to the code: snippets, outputs, commands, error texts, names."""

import ast
import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import qprune
from qprune.cli import main as cli
from qprune.config.compose import Composer
from qprune.runs.jobs import expand
from tests.docs.pages import DOCS, blocks

ROOT = DOCS.parent
PAGES = sorted(path.stem for path in DOCS.glob("*.md"))


@pytest.mark.parametrize("page", ["own-network", "density"])
def test_code_prints_what_is_said(
    page: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    for block in blocks(page, "python", "text"):  # which go on with the names of those before
        if block.language == "text":
            assert capsys.readouterr().out == block.text
        elif "only-shown" not in block.options:
            exec(block.text, names)
    assert not capsys.readouterr().out


def commands() -> list[str]:
    """Return every `qprune ...` of the pages, without the shell's part."""
    found = []
    for page in PAGES:
        for language in ("", "sh"):
            for block in blocks(page, language):
                for line in block.text.replace("\\\n", " ").splitlines():
                    line = re.sub(r"\s#.*|\s&$|^[A-Z_]+=\S+ ", "", line).strip().removeprefix(".venv/bin/")
                    if line.startswith("qprune ") and "only-shown" not in block.options:
                        found.append(line)
    return list(dict.fromkeys(found))


def test_commands_are_such_as_qprune_takes() -> None:
    with Composer() as composer:
        for command in commands():
            _, verb, *words = shlex.split(command)
            assert verb in cli.VERBS, command
            if verb not in ("run", "sweep", "plan") or "task=my_task" in words:  # the tutorial's have their own test
                continue
            if "hydra/launcher=ray_here" in words and find_spec("hydra_plugins.hydra_ray_launcher") is None:
                continue
            words = [word for word in words if not word.startswith("-") and word != "job"]
            if verb == "run":
                composer.refuse_several(words)
            for job in composer.jobs(expand(words))[:40]:
                assert composer.checked(job), command


def texts_of_errors() -> list[str]:
    """Return all strings of the code, with `…` for values."""
    texts = []
    for path in [*(ROOT / "qprune").rglob("*.py"), *(ROOT / "tasks").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))  # type: ignore[misc]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return [re.sub("…+", "…", text) for text in texts]


def test_errors_are_quoted_as_they_stand_in_the_code() -> None:
    texts, page = texts_of_errors(), (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    quotes = re.findall(r"^`(.+)`\n: ", page, re.MULTILINE)
    assert len(quotes) > 20
    assert [quoted for quoted in quotes if not any(text.startswith(quoted) for text in texts)] == []


def test_every_public_name_is_in_the_reference() -> None:
    documented = re.findall(r"auto\w+:: qprune\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(documented) == sorted(qprune.__all__)


def test_packing_features_changes_no_gradient() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3))
    images, labels = torch.randn(4, 2, 9, 9), torch.randn(4, 2, 5, 5)
    compressor = qprune.compress(network, images, qprune.Schedule(t_qw=1, t_qf=2), 1, 4, prune=None)
    criterion = torch.nn.functional.mse_loss
    for step in range(4):
        compressor.at(step)
        loss = criterion(network(images), labels)
    wanted = torch.autograd.grad(loss, [*network.parameters()])
    names: dict[str, Any] = {"torch": torch, "compressor": compressor, "network": network, "images": images}
    names |= {"labels": labels, "criterion": criterion}
    exec(blocks("performance", "python")[0].text, names)
    packed = names["pack"](network[1](network[0](images)).detach())
    assert packed[0].dtype == torch.int8
    found = torch.autograd.grad(names["loss"], [*network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_the_examples_are_shown() -> None:
    pages = "".join(path.read_text("utf-8") for path in DOCS.glob("*.md"))
    shown = re.findall(r"literalinclude\} \.\./examples/(\w+)\.py", pages)
    assert {*shown} == {path.stem for path in (ROOT / "examples").glob("*.py")}


def test_the_readme_leads_to_pages_that_exist() -> None:
    links = re.findall(r"\]\((docs/[\w.-]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert links
    assert all((ROOT / link).exists() for link in links)
