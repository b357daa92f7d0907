"""Each guard of stored runs alone: an attack that nothing else would stop, so that a guard that is gone is noticed."""

import hashlib
import json
import os
import pickle
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import pytest
import yaml
from torchvision.datasets import CIFAR10

from qprune.errors import UserError
from qprune.export.grid_forms import QONNX_DOMAIN
from qprune.runs.folder import RunFolder
from qprune.runs.stored import ENVIRONMENT, HISTOGRAMS, OPERATORS, TIMING
from qprune.training import checkpoint
from tests.attacks import hostile
from tests.attacks.conftest import verb
from tests.attacks.test_stored_files import SUMMED
from tests.attacks.test_strangers import tree_of, watched


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = str(place)

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.place,))


@pytest.fixture
def run(runs: list[Path], tmp_path: Path) -> Path:
    """A stranger's run without checksums, in results of its own."""
    [copy] = hostile.copied(runs[:1], tmp_path / "runs")
    (copy / "SHA256SUMS").unlink()
    return copy


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A folder that must be as it is in the end."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "file").write_bytes(b"precious")
    before = tree_of(folder)
    yield folder
    assert tree_of(folder) == before


def rewrite(run: Path, **changes: Any) -> None:
    """Change sections of a run's config."""
    (run / "config.yaml").write_text(yaml.safe_dump(hostile.config_of(run) | changes))


@pytest.mark.parametrize("name", ["export", "verify", "tables", "report", "explain"])
def test_a_link_out_of_the_results_is_not_followed(name: str, run: Path, outside: Path) -> None:
    results = run.parents[1]
    words: dict[str, tuple[Path, tuple[str, ...]]] = {
        "export": (run / "export", (str(run), "--form", "sparse")),
        "verify": (run / "export", (str(run), "--form", "float", "--no-timing")),
        "tables": (results / "tables", ("order", f"results_dir={results}")),
        "report": (results / "figures", (f"results_dir={results}", "--runs", "1")),
        "explain": (results / "explain", (str(run), str(run))),
    }
    link, arguments = words[name]
    link.symlink_to(outside)
    answer = verb(name, *arguments)
    assert answer.code == 2, answer
    assert f" is a link to {outside}" in answer.err
    assert "and nothing is written out of " in answer.err


def test_files_that_are_links_are_replaced(run: Path, outside: Path) -> None:
    (run.parents[1] / "report.html").symlink_to(outside / "file")
    assert verb("report", f"results_dir={run.parents[1]}", "--runs", "0").code == 0
    assert not (run.parents[1] / "report.html").is_symlink()


def test_a_lock_that_is_a_link_is_not_opened(run: Path, outside: Path) -> None:
    (run / "result.json").unlink()
    (run / ".lock").unlink()
    (run / ".lock").symlink_to(outside / "file")
    assert RunFolder(run).state() == ("to do", None)


@pytest.mark.parametrize(
    "place", ["qprune.tasks.espcn.Path", "qprune.tasks.espcn.nn.Linear", "qprune.tasks.data.cifar10.pickle.Unpickler"]
)
def test_a_class_that_is_no_task_is_not_called(place: str, run: Path) -> None:
    rewrite(run, task=hostile.config_of(run)["task"] | {"_target_": place})
    answer = verb("evaluate", str(run))
    assert (answer.code, answer.err) == (
        2,
        f"error: task._target_={place} is not a subclass of qprune.training.task.Task\n",
    )


def test_arguments_that_a_task_does_not_take_are_refused(run: Path) -> None:
    rewrite(run, task=hostile.config_of(run)["task"] | {"callback": {"_target_": "os.system"}})
    assert "task.callback is not an argument of tests.attacks.hostile.Pictured" in verb("evaluate", str(run)).err


def shipped(run: Path, root: Path) -> None:
    """Have the run be one of CIFAR-10 below `root`."""
    task = {"_target_": "qprune.tasks.cifar.Cifar", "name": "toy", "sites": {}, "paper_size": {}}
    rewrite(run, task=task, data={"source": "real", "root": str(root), "verify": False})


def test_a_stored_run_downloads_nothing(run: Path, outside: Path) -> None:
    shipped(run, outside)
    with watched() as found:
        answer = verb("evaluate", str(run))
    assert answer.code == 2
    assert not [event for event in found if event[0] in ("urllib.Request", "socket.getaddrinfo", "socket.connect")]


def test_a_stranger_s_pictures_are_unpickled_without_running_code(run: Path, outside: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list):
        (folder / name).write_bytes(pickle.dumps(Evil(outside / "called")))
    shipped(run, folder.parent)
    answer = verb("evaluate", str(run))
    assert answer.code == 2
    assert ".mkdir, which no CIFAR-10 batch needs" in answer.err


@pytest.mark.parametrize("folder", ["checkpoints", "events"])
def test_a_stranger_s_checkpoint_runs_no_code(folder: str, run: Path, outside: Path) -> None:
    content = pickle.dumps(Evil(outside / "called"), protocol=2)
    (run / folder).mkdir()
    path = run / folder / f"step-000000003-{hashlib.sha256(content).hexdigest()[:16]}.pt"
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged .*; the checkpoint before it is used"):
        assert checkpoint.load_newest(run / folder) is None
    path.rename(path.with_name("step-000000003-0123456789abcdef.pt"))
    with pytest.warns(UserWarning, match=r"is damaged \(its checksum differs\)"):
        assert checkpoint.load_newest(run / folder) is None


@pytest.mark.parametrize("text", ["!!python/object/apply:os.mkdir [{}]", "seed: !!python/object/apply:os.mkdir [{}]"])
def test_a_config_calls_nothing(text: str, run: Path, outside: Path) -> None:
    (run / "config.yaml").write_text(text.format(outside / "called"))
    with pytest.raises(UserError, match=r"config\.yaml is not the config of a run"):
        RunFolder(run).config()


_LAUGHS = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 2) if i else 'x'}]\n" for i in range(12))


@pytest.mark.parametrize("text", ["seed: &x [*x]", _LAUGHS, hostile.nested(51)], ids=["cycle", "copies", "deep"])
def test_a_config_is_finite(text: str, run: Path) -> None:
    (run / "config.yaml").write_text(text)
    with pytest.raises(UserError, match="it has aliases, or is nested too deep"):
        RunFolder(run).config()


def test_a_config_has_no_keys_for_hydra(run: Path) -> None:
    rewrite(run, hydra={"callbacks": {"x": {"_target_": "os.system", "command": "true"}}})
    with pytest.raises(UserError, match="hydra"):
        RunFolder(run).config()


def test_names_that_become_paths_hold_no_others(run: Path) -> None:
    row = hostile.row_of(run)
    for key in ("task", "order", "budget", "data_source"):
        (run / "result.json").write_text(json.dumps(row | {key: "../../x"}))
        with pytest.raises(UserError, match=f"result.json: {key} is '../../x'"):
            RunFolder(run).row()


@contextmanager
def in_time() -> Iterator[None]:
    """Raise TimeoutError in what waits."""

    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to(os.devnull)], ids=["pipe", "device"])
def test_what_is_no_file_is_not_read(make: Callable[[Path], None], run: Path) -> None:
    for name in SUMMED:
        (run / name).unlink()
        make(run / name)
        with in_time(), pytest.raises(UserError, match="is no file"):
            RunFolder(run).content(name)


@pytest.mark.parametrize("name", SUMMED)
def test_a_changed_file_is_noticed_by_its_checksum(name: str, run: Path) -> None:
    hostile.sum_again(run)
    content = bytearray((run / name).read_bytes())
    content[-1] ^= 1
    (run / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is not as its run wrote it"):
        RunFolder(run).check_all()
    assert (verb("evaluate", str(run)).code == 2) == (name in ("result.json", "config.yaml", "network.safetensors"))


def test_without_readable_checksums_nothing_is_believed(run: Path) -> None:
    hostile.sum_again(run)
    lines = (run / "SHA256SUMS").read_text().splitlines()
    (run / "SHA256SUMS").write_text("\n".join([*lines[1:], "x"]))
    for read in (RunFolder.row, RunFolder.config, RunFolder.metrics):
        with pytest.raises(UserError, match="SHA256SUMS is damaged, so that"):
            read(RunFolder(run))


@pytest.mark.parametrize(
    ("name", "schema", "value"),
    [
        ("operators.json", OPERATORS, [{"site": "x", "kind": "weight", "operator": "call"}]),
        ("histograms.json", HISTOGRAMS, [{"site": "x"}]),
        ("timing.json", TIMING, {"training_seconds": -1}),
        ("environment.json", ENVIRONMENT, {"git": {"commit": "`x`"}}),
    ],
)
def test_json_that_is_valid_and_wrong_is_named(name: str, schema: Any, value: Any, run: Path) -> None:
    (run / name).write_text(json.dumps(value))
    with pytest.raises(UserError, match=f"{name}: "):
        RunFolder(run).parsed(name, schema)


def test_a_curve_that_is_valid_and_wrong_is_named(run: Path) -> None:
    (run / "metrics.csv").write_text("epoch,step\n-1,3\n")
    with pytest.raises(UserError, match=r"metrics\.csv is not the curve of a run"):
        RunFolder(run).metrics()


@pytest.mark.parametrize(
    ("content", "text"), [(b"x", "cannot be read"), (b"\x02" + bytes(7) + b"{}", "is not the network")]
)
def test_a_network_that_is_none_is_named(content: bytes, text: str, run: Path) -> None:
    (run / "network.safetensors").write_bytes(content)
    answer = verb("evaluate", str(run))
    assert answer.code == 2
    assert f"network.safetensors {text}" in answer.err


def quant_model(*others: onnx.NodeProto) -> onnx.ModelProto:
    """A Quant node, and other nodes behind it."""
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 2]) for name in "xy")
    quant = onnx.helper.make_node("Quant", ["x", "s", "z", "b"], ["h"], domain=QONNX_DOMAIN)
    return onnx.helper.make_model(onnx.helper.make_graph([quant, *others], "graph", [x], [y]))


INNER = onnx.helper.make_graph([onnx.helper.make_node("Call", ["h"], ["y"], domain="stranger")], "inner", [], [])


@pytest.mark.parametrize(
    "node",
    [
        onnx.helper.make_node("Call", ["h"], ["y"], domain="stranger"),  # qonnx would import the module `stranger`
        onnx.helper.make_node("GenericPartition", ["h"], ["y"], domain=QONNX_DOMAIN, model="/other.onnx"),
        onnx.helper.make_node("If", ["h"], ["y"], then_branch=INNER, else_branch=INNER),
    ],
    ids=lambda node: node.op_type,
)
def test_a_stranger_s_onnx_file_imports_no_module(
    node: onnx.NodeProto, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qprune.export.verification.find_spec", lambda _: True)  # as if qonnx were installed
    (run / "export").mkdir()
    (run / "export" / "float.onnx").write_bytes(quant_model(node).SerializeToString())
    answer = verb("verify", str(run), "--form", "float", "--no-timing")
    assert answer.code == 2
    assert "cannot be loaded (beside Quant and MultiThreshold nodes it has other nodes than ONNX's own)" in answer.err


def identity(size: list[int]) -> onnx.ModelProto:
    """A model that is not the network's."""
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, size) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "graph", [x], [y])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)


@pytest.mark.parametrize("content", [b"", b"x", *(identity(size).SerializeToString() for size in ([1, 2], [4]))])
def test_an_onnx_file_of_something_else_is_named(content: bytes, run: Path) -> None:
    (run / "export").mkdir()
    (run / "export" / "float.onnx").write_bytes(content)
    answer = verb("verify", str(run), "--form", "float", "--no-timing")
    assert answer.code == 2
    assert re.search(
        r"float\.onnx (cannot be loaded|does not compute the network's outputs) \(.*write it again", answer.err
    )


def test_an_onnx_file_that_is_none_is_not_read(run: Path) -> None:
    (run / "export").mkdir()
    os.mkfifo(run / "export" / "float.onnx")
    with in_time():
        answer = verb("verify", str(run), "--form", "float", "--no-timing")
    assert (answer.code, "float.onnx cannot be loaded (it is no file)" in answer.err) == (2, True)
